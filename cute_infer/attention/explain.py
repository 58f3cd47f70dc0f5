"""What a planned batch will run and what it should cost: the answer of ``wrapper.explain()``.

Nothing is compiled or launched. The kernel and its tile come from the same ``tiles.pick`` that run() uses; the time is a roofline, bytes
that must move over what the memory can move (and, for prefill, operations over what the tensor cores can do), plus a launch. A measured
time far above it says that something else than the data limits the call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, fail
from ..jit import Target
from . import tiles_decode_sm80, tiles_decode_sm90
from .lengths import UNKNOWN, KvLens
from .plan import num_sms, partial_bytes, target_of
from .spec import DTYPE_BITS, AttentionSpec
from .tiles import Choice, Hints, pick

BANDWIDTH = {"sm_80": 2.0e12}  # bytes/s of memory where there is no device to ask: A100 80 GB, from its data sheet
BANDWIDTH_OTHERS = 4.4e12  # about what can be read of an H200's 4.8 TB/s
LAUNCH_SECONDS = 3e-6  # an assumption: a launch in a graph, the first loads and the last stores of a kernel that does nothing else
TENSOR_PEAK = {"sm_80": 312e12, "sm_90a": 989e12}  # dense fp16 and bf16 FLOP/s of A100 and H100 SXM, from their data sheets


class Chip(NamedTuple):
    """What a prediction needs to know of a GPU."""

    target: Target
    num_sms: int
    bandwidth: float


class Request(NamedTuple):
    """Lengths of one request."""

    qo_len: int
    kv_len: int


class Batch(NamedTuple):
    """The batch of a plan. ``requests`` is None where the lengths are not known on the host, ``kv_lens`` what plan() knew of them."""

    batch_size: int
    num_kv_heads: int
    total_q: int
    window_left: int
    batch_invariant: bool
    requests: Sequence[Request] | None
    kv_lens: KvLens = UNKNOWN


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How one run() is computed. ``str()`` of it is meant to be read.

    kernel           name of the kernel, or "reference".
    spec             the compile key. Presence of sinks, tensor scales and lse is that of the last run(), absent before the first.
    kv_lens          the class of lengths that plan() could know without asking the device, where it made a difference to the tile.
    arch, num_sms    the GPU it is for; None and 0 for the reference.
    tile             the kernel's tile (a dataclass), None for the reference.
    num_splits       launches' worth of partial results per request that the merge kernel combines; 1: no merge.
    cluster          CTAs that share a request and merge in shared memory.
    num_ctas         CTAs of the grid.
    kv_tokens, longest    tokens that are read, and of the longest request; None: lengths unknown.
    kv_bytes         bytes of K and V to be read, each counted once.
    io_bytes         bytes of q, out and lse.
    workspace_bytes  bytes of split-KV partials, written once and read once.
    flops            floating-point operations of both matrix products.
    bandwidth        bytes/s the prediction reckons with.
    predicted_us     microseconds; None for the reference and for unknown lengths.
    """

    kernel: str
    spec: AttentionSpec
    batch_size: int
    total_q: int
    batch_invariant: bool
    kv_lens: KvLens = UNKNOWN
    arch: str | None = None
    num_sms: int = 0
    tile: Any = None
    num_splits: int = 1
    cluster: int = 1
    num_ctas: int = 0
    kv_tokens: int | None = None
    longest: int | None = None
    kv_bytes: int | None = None
    io_bytes: int = 0
    workspace_bytes: int = 0
    flops: int | None = None
    bandwidth: float = 0.0
    predicted_us: float | None = None

    @property
    def tile_text(self) -> str:
        """The fields of the tile that differ from their defaults: ``"cluster=4, warps=4, stages=3"``."""
        fields = dataclasses.fields(self.tile) if self.tile is not None else ()
        return ", ".join(f"{f.name}={getattr(self.tile, f.name)}" for f in fields if getattr(self.tile, f.name) != f.default)

    @property
    def _chosen_for(self) -> str:
        if self.batch_invariant:
            return " (batch-invariant)"
        return f" (for lengths: {self.kv_lens})" if self.kv_lens.mean else ""

    @property
    def grid_text(self) -> str:
        """``"256 CTAs on 132 SMs"``, with the splits if there are several."""
        return f"{self.num_ctas} CTAs on {self.num_sms} SMs" + (f", {self.num_splits} KV splits" if self.num_splits > 1 else "")

    def __str__(self) -> str:
        batch = f"{self.batch_size} requests, {self.total_q} query rows"
        known = self.kv_tokens is not None
        lines = [
            f"{self.kernel}" + (f" on {self.arch}" if self.arch else ": torch in fp32, one request at a time"),
            f"  spec       {self.spec}",
            f"  batch      {batch}, " + (f"{self.kv_tokens} KV tokens, longest {self.longest}" if known else "lengths on the device"),
        ]
        if self.tile is not None:
            merge = "through shared memory" if self.cluster > 1 else "none"
            merge = "a second kernel" if self.num_splits > 1 else merge
            lines += [
                f"  tile       {self.tile_text}" + self._chosen_for,
                f"  grid       {self.grid_text}, clusters of {self.cluster}; merge: {merge}",
            ]
        kv = f"{_bytes(self.kv_bytes)} of KV, " if self.kv_bytes is not None else ""
        lines.append(f"  memory     {kv}{_bytes(self.io_bytes)} of q and results, {_bytes(self.workspace_bytes)} of workspace")
        if self.predicted_us is not None:
            lines.append(f"  predicted  {self.predicted_us:.1f} us at {self.bandwidth / 1e12:.2f} TB/s, launch included")
        return "\n".join(lines)


def explain(spec: AttentionSpec, batch: Batch, chip: Chip | None) -> Explanation:
    """The :class:`Explanation` of ``spec`` for a batch on a GPU; ``chip`` None: on the reference.

    Raises:
        UnsupportedConfigError: no kernel covers ``spec`` on that GPU.
    """
    heads = batch.num_kv_heads * spec.group_size
    row_bits = spec.head_dim_qk * spec.q_bits + spec.head_dim_vo * DTYPE_BITS[spec.o_dtype] + (32 if spec.lse else 0)
    facts: dict[str, Any] = {"io_bytes": batch.total_q * heads * row_bits // 8}
    if batch.requests is not None:
        facts |= _data(spec, batch, heads)
    base = Explanation("reference", spec, batch.batch_size, batch.total_q, batch.batch_invariant, **facts)
    if chip is None:
        return base
    hints = Hints(batch.batch_size, batch.num_kv_heads, chip.num_sms, batch.total_q, batch.batch_invariant, batch.kv_lens)
    choice = pick(spec, chip.target, hints)
    told = choice != pick(spec, chip.target, hints._replace(kv_lens=UNKNOWN))
    workspace = partial_bytes(spec, choice, batch.num_kv_heads, batch.total_q)
    return dataclasses.replace(
        base,
        kv_lens=batch.kv_lens if told else UNKNOWN,
        kernel=choice.name,
        arch=chip.target.arch,
        num_sms=chip.num_sms,
        tile=choice.tile,
        num_splits=choice.num_splits,
        cluster=getattr(choice.tile, "cluster", 1),
        num_ctas=_num_ctas(spec, choice, hints),
        workspace_bytes=workspace,
        bandwidth=chip.bandwidth,
        predicted_us=_microseconds(base, chip, workspace),
    )


def chip_of(device: torch.device) -> Chip:
    """The GPU ``device``, with the peak bandwidth of its memory where the driver tells."""
    properties = torch.cuda.get_device_properties(device)
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)  # kHz, bits
    return Chip(target_of(device), num_sms(device), 2e3 * clock * width / 8 or BANDWIDTH_OTHERS)  # two transfers per clock


def chip_named(arch: str) -> Chip:
    """A GPU that need not be there: ``"sm_90a"`` with the SM count of an H200, ``"sm_80"`` of an A100."""
    from ..zoo import NUM_SMS, NUM_SMS_OTHERS  # the zoo is built from the whole package

    if not isinstance(arch, str):
        fail(ConfigError, "explain(): target must be the name of an architecture", got=repr(arch), expected='"sm_90a", "sm_80", ...')
    target = Target.parse(arch)
    return Chip(target, NUM_SMS.get(target.arch, NUM_SMS_OTHERS), BANDWIDTH.get(target.arch, BANDWIDTH_OTHERS))


def _data(spec: AttentionSpec, batch: Batch, heads: int) -> dict[str, int]:
    tokens = longest = pairs = 0
    for qo_len, kv_len in batch.requests or ():
        visible = min(kv_len, batch.window_left + qo_len) if spec.window else kv_len
        tokens, longest = tokens + visible, max(longest, kv_len)
        # row i of a causal request misses the last qo_len - 1 - i keys (as far as there are keys)
        hidden = sum(min(kv_len, i) for i in range(qo_len)) if kv_len < qo_len else qo_len * (qo_len - 1) // 2
        seen = qo_len * visible - (hidden if spec.causal else 0)
        pairs += min(seen, qo_len * (batch.window_left + 1)) if spec.window else seen
    dims = spec.head_dim_qk + spec.head_dim_vo
    return {
        "kv_tokens": tokens,
        "longest": longest,
        "kv_bytes": tokens * batch.num_kv_heads * dims * spec.kv_bits // 8,
        "flops": 2 * pairs * heads * dims,
    }


def _microseconds(base: Explanation, chip: Chip, workspace: int) -> float | None:
    if base.kv_bytes is None or base.flops is None:
        return None
    seconds = (base.kv_bytes + base.io_bytes + 2 * workspace) / chip.bandwidth
    peak = TENSOR_PEAK.get(chip.target.arch)
    if base.spec.kind == "prefill" and peak is not None:
        seconds = max(seconds, base.flops * base.spec.q_bits / (16 * peak))  # 8-bit operands: twice the rate
    return 1e6 * (seconds + (2 if workspace else 1) * LAUNCH_SECONDS)


def _num_ctas(spec: AttentionSpec, choice: Choice, hints: Hints) -> int:
    """CTAs of the grid, as each kernel's ``__call__`` computes it from live shapes."""
    tile, splits, batch, heads = choice.tile, choice.num_splits, hints.batch_size, hints.num_kv_heads
    if choice.name == "decode_sm90":
        groups = -(-heads // tile.heads_per_item)
        return tile.cluster * tiles_decode_sm90.head_blocks(spec, tile) * groups * splits * batch
    if choice.name == "decode_sm80":
        return batch * heads * tiles_decode_sm80.head_blocks(spec) * splits
    if choice.name == "prefill_sm80":
        return (hints.total_q * spec.group_size + batch * (tile.tile_q - 1)) // tile.tile_q * heads * splits
    rows_per_query = spec.group_size if tile.pack_heads else 1  # prefill_sm90: persistent CTAs
    items = (hints.total_q * rows_per_query // tile.tile_q + batch) * heads * spec.group_size // rows_per_query * splits
    return max(1, min(items, hints.num_sms))


def _bytes(n: int | None) -> str:
    """``"1.5 MB"``, decimal units."""
    size = float(n or 0)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


__all__ = ["Batch", "Chip", "Explanation", "Request", "chip_named", "chip_of", "explain"]
