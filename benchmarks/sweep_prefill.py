"""Tiles of the Hopper prefill kernel, and peers: ``python -m benchmarks.sweep_prefill [section ...] --out F.json [--check] [--budget S]``

What is timed: one launch of the kernel (and the merge of its splits, where it has any) on one input set, twice over. "rested" puts 30 ms of
idle before every sample, so that a power-limited card runs at its full clock; "back to back" does not, and shows what it sustains. The rate
is FLOP/s by FlashAttention's convention. The tile that ``choose()`` picks comes first, and the other outputs are compared with its own.
cuDNN (batches of one length) and FA4 stand beside it where they are installed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import peers, sweep
from benchmarks.problems import PrefillProblem, randn
from benchmarks.protocol import Call
from benchmarks.sweep import Candidate, Job
from cute_infer.attention import tiles_prefill_sm90 as t90
from cute_infer.attention.merge import merge_partials
from cute_infer.attention.spec import AttentionSpec
from cute_infer.attention.tiles import Hints

UNIT = "TFLOP/s"
RESTED, BACK_TO_BACK = "rested", "back to back"
TIMINGS: dict[str, dict[str, Any]] = {RESTED: {"rounds": 7, "rest_s": 0.03}, BACK_TO_BACK: {"rounds": 31}}
CUDNN, FA4 = "cuDNN (torch SDPA)", "FA4"

Variants = tuple[tuple[str, dict[str, Any]], ...]
"""Names of tiles, and the fields in which they differ from the chosen one."""

NARROW: Variants = (
    ("2 stages", {"num_stages": 2}),
    ("4 stages", {"num_stages": 4}),
    ("2 groups", {"tile_q": 128, "num_consumer_groups": 2, "producer_regs": 40, "consumer_regs": 232}),
)
PACKED: Variants = (("packed", {"pack_heads": True}),)
NOT_SHORT: Variants = (
    ("not packed", {"pack_heads": False}),
    ("not split", {"split_kv": False}),
    ("neither", {"pack_heads": False, "split_kv": False}),
)


@dataclasses.dataclass(frozen=True)
class SweepCase:
    """One batch of queries over keys.

    page_sizes  of the paged caches to try, 0 for contiguous K and V; the variants are of the first.
    peers       names in ``benchmarks.peers.PREFILL``; FA4 also takes batches of several lengths.
    """

    section: str
    name: str
    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    qo_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    causal: bool = True
    page_sizes: tuple[int, ...] = (0,)
    variants: Variants = ()
    peers: tuple[str, ...] = (CUDNN, FA4)

    @property
    def work(self) -> float:
        """TFLOP: 4 heads head_dim for every visible (query, key), where a causal square counts half."""

        def pairs(q: int, k: int) -> float:
            if not self.causal:
                return q * k
            return q * k - q * q / 2 if q <= k else q * k / 2

        visible = sum(pairs(q, k) for q, k in zip(self.qo_lens, self.kv_lens, strict=True))
        return 4 * self.qo_heads * self.head_dim * visible / 1e12

    @property
    def equal(self) -> bool:
        return len(set(self.qo_lens)) == 1 and self.qo_lens == self.kv_lens

    def spec(self, page_size: int) -> AttentionSpec:
        layout = "paged" if page_size else "single" if len(self.qo_lens) == 1 else "ragged"
        dims, group_size = (self.head_dim, self.head_dim), self.qo_heads // self.kv_heads
        return AttentionSpec("prefill", "bfloat16", "bfloat16", "bfloat16", *dims, group_size, layout, page_size, causal=self.causal)

    def candidates(self) -> list[Candidate]:
        """The chosen tile of every layout, then those variants of the first that fit and differ."""
        hints = Hints(len(self.qo_lens), self.kv_heads, sweep.num_sms(), sum(self.qo_lens))
        found: list[Candidate] = []

        def add(name: str, spec: AttentionSpec, tile: t90.PrefillSm90Tile, chosen: bool) -> None:
            fits = tile.shared_bytes(spec.head_dim_qk, spec.head_dim_vo) <= t90.MAX_SHARED_BYTES
            if fits and (t90.PATH, spec, tile) not in (c.job for c in found):
                splits = tile.num_splits(spec, hints) if tile.split_kv else 0
                found.append(Candidate(name, t90.PATH, spec, tile, splits, chosen))

        for page_size in self.page_sizes:
            spec = self.spec(page_size)
            reason = t90.why_not(spec, sweep.HOPPER)
            assert reason is None, reason
            add(f"pages of {page_size}" if page_size else "chosen", spec, t90.choose(spec, sweep.HOPPER, hints), chosen=True)
        first = found[0]
        for name, changes in self.variants:
            add(name, first.spec, dataclasses.replace(first.tile, **changes), chosen=False)
        return found

    def run(self, compiled: dict[Job, dict[str, Any]], check: bool) -> list[dict[str, Any]]:
        batch = Batch(self)
        candidates = self.candidates()
        makers: dict[str, Callable[[Batch], Call]] = {
            c.name: functools.partial(Batch.launch, candidate=c) for c in candidates if "error" not in compiled[c.job]
        }
        makers |= {name: PEERS[name] for name in self.peers}
        timed = sweep.compare(peers.prepare(makers, batch), 1, check, TIMINGS)
        rows = [{**c.as_dict(), **compiled[c.job], **timed.get(c.name, {})} for c in candidates]
        return rows + [{"candidate": name, "peer": True, **timed[name]} for name in self.peers]


class Batch:
    """The tensors of a case: one input set, K and V contiguous (ragged)."""

    def __init__(self, case: SweepCase) -> None:
        self.case = case
        self.qo_indptr, self.kv_indptr = indptr(case.qo_lens), indptr(case.kv_lens)
        if case.equal:
            batch, seq_len = len(case.qo_lens), case.qo_lens[0]
            self.problem = PrefillProblem(
                batch, seq_len, case.qo_heads, case.kv_heads, case.causal, "bf16", 1, head_dim=case.head_dim
            )  # fmt: skip
            self.q, self.k, self.v = self.problem.qkv[0]
        else:
            shapes = ((sum(case.qo_lens), case.qo_heads), *[(sum(case.kv_lens), case.kv_heads)] * 2)
            self.q, self.k, self.v = (randn(*shape, case.head_dim, dtype="bf16", device="cuda") for shape in shapes)

    def launch(self, candidate: Candidate) -> Call:
        """The launch of one candidate; its output is the candidate's own."""
        kernel, spec, splits = candidate.kernel(), candidate.spec, candidate.splits
        out = torch.full_like(self.q, float("nan"))
        status = torch.zeros(4, dtype=torch.int32, device="cuda")
        k, v = self.k[None], self.v[None]
        layout: tuple[torch.Tensor | None, ...] = (self.qo_indptr, self.kv_indptr, None, None)
        if spec.kv_layout == "single":
            layout = (None,) * 4
        elif spec.kv_layout == "paged":
            k, v, *table = self.paged(spec.page_size)
            layout = (self.qo_indptr, *table)
        partials: tuple[Any, Any] = (None, None)
        if splits:
            shape = (splits, *self.q.shape)
            partials = torch.empty(shape, device="cuda"), torch.empty(shape[:-1], device="cuda")
        absent = (None,) * 5  # mask, its indptr, sinks, K and V scales
        scalars = (spec.head_dim_qk**-0.5, 1.0, 0.0, 1.0, 1.0, math.log2(1e4), -1, max(1, splits), sweep.num_sms())

        def call(i: int) -> torch.Tensor:
            kernel(self.q, k, v, out, None, *layout, *absent, *partials, status, *scalars)
            if splits:
                merge_partials(*partials, out, None)
            return out

        return call

    def paged(self, page_size: int) -> list[torch.Tensor]:
        """[K cache, V cache, kv_indptr, kv_indices, kv_last_page_len], pages scattered at random."""
        lens = self.case.kv_lens
        pages = [-(-n // page_size) for n in lens]
        order = torch.randperm(sum(pages), device="cuda")
        caches = []
        for tokens in (self.k, self.v):
            padded = [pad(x, count * page_size) for x, count in zip(tokens.split(list(lens)), pages, strict=True)]
            in_order = torch.cat(padded).view(sum(pages), page_size, *tokens.shape[1:])
            caches.append(torch.empty_like(in_order).index_copy_(0, order, in_order))
        last = torch.tensor([(n - 1) % page_size + 1 for n in lens], dtype=torch.int32, device="cuda")
        return [*caches, indptr(pages), order.int(), last]


def indptr(lens: tuple[int, ...] | list[int]) -> torch.Tensor:
    return torch.tensor([0, *lens], device="cuda").cumsum(0).int()


def pad(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros after the last token, up to ``length``."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, length - len(tokens)))


def cudnn(batch: Batch) -> Call:
    return peers.PREFILL[CUDNN](batch.problem)


def fa4(batch: Batch) -> Call:
    if batch.case.equal:
        return peers.PREFILL[FA4](batch.problem)
    from flash_attn.cute import flash_attn_varlen_func

    case = batch.case
    lengths = {"cu_seqlens_q": batch.qo_indptr, "cu_seqlens_k": batch.kv_indptr}
    longest = {"max_seqlen_q": max(case.qo_lens), "max_seqlen_k": max(case.kv_lens)}

    def call(i: int) -> torch.Tensor:
        out = flash_attn_varlen_func(batch.q, batch.k, batch.v, **lengths, **longest, causal=case.causal)
        return out[0] if isinstance(out, tuple) else out

    return call


PEERS = {CUDNN: cudnn, FA4: fa4}


def cases() -> Iterator[SweepCase]:
    def prompts(section: str, length: int, causal: bool, heads: tuple[int, int] = (32, 8), head_dim: int = 128, **more: Any) -> SweepCase:
        """16384 tokens, or one prompt of more."""
        lens = (length,) * max(1, 16384 // length)
        name = f"{heads[0]}/{heads[1]} d{head_dim} {length} {word(causal)}{', paged' if section == 'paged' else ''}"
        return SweepCase(section, name, lens, lens, *heads, head_dim, causal, **more)

    for heads in ((32, 8), (16, 16)):
        for length in (1024, 2048, 4096, 8192, 16384, 32768):
            for causal in (True, False):
                yield prompts("main", length, causal, heads, variants=PACKED if heads == (32, 8) and length < 16384 else ())
    for length in (2048, 8192):
        for causal in (True, False):
            yield prompts("dims", length, causal, head_dim=64, variants=NARROW)
            yield prompts("dims", length, causal, head_dim=256)
            yield prompts("paged", length, causal, page_sizes=(0, 1, 4, 8, 16, 64), peers=())
    draw = random.Random(5)
    mixed = tuple(draw.randint(128, 8192) for _ in range(32))
    same = (math.isqrt(sum(n * n for n in mixed) // 32),) * 32  # as much work, without the imbalance
    for causal in (True, False):
        for what, lens in (("of 128 to 8192", mixed), (f"of {same[0]}", same)):
            yield SweepCase("mixed", f"32 {what} {word(causal)}", lens, lens, causal=causal, page_sizes=(0, 16), peers=(FA4,))
    for batch, queries, keys in ((1, 128, 32768), (8, 128, 8192), (32, 16, 4096), (1, 2048, 32768)):
        lens, kv_lens = (queries,) * batch, (keys,) * batch
        yield SweepCase("short", f"{batch} x {queries} over {keys}", lens, kv_lens, variants=NOT_SHORT, peers=(FA4,))
    for head_dim in (80, 96, 112):
        yield prompts("odd dims", 2048, True, head_dim=head_dim)


def word(causal: bool) -> str:
    return "causal" if causal else "full"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(sweep.main(__doc__, cases, UNIT, RESTED))
