"""What a batch needs besides its inputs: the kernel that was picked, how often KV is split, and the scratch memory.

Nothing here reads a length. The kernels compute their share of the work from the live metadata, so the scratch is bounded by the number
of SMs, never by the batch: KV is split only while (requests x KV heads) is too small to fill the device. Where the host happens to know the
lengths, their class (``KvLens``) may select a faster tile, and every tile is right for all lengths.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..errors import MissingKernelError
from ..jit import Target, get_kernel
from .lengths import UNKNOWN, KvLens
from .merge import load_partials_kernel
from .spec import AttentionSpec
from .tiles import Choice, Hints, pick

log = logging.getLogger(__name__)

STATUS_WORDS = 4  # [0] a page id was outside the cache, [1:3] words of a persistent kernel's work queue, [3] unused


class BoundKernel(NamedTuple):
    """A loaded kernel with the launch facts that depend on the batch only."""

    run: Callable[..., Any]
    choice: Choice
    num_splits: int
    num_ctas: int


class Workspace:
    """Scratch of one wrapper: the status words, the split-KV partials and the kernel of the last batch.

    ``buffer`` is the caller's workspace; it is used when it is large enough, otherwise memory comes from torch. Launches that share a
    workspace must be ordered on one stream, as in FlashInfer.
    """

    def __init__(self, device: torch.device, buffer: torch.Tensor | None = None, status: torch.Tensor | None = None) -> None:
        self.device = device
        self.buffer = buffer
        self.status = torch.zeros(STATUS_WORDS, dtype=torch.int32, device=device) if status is None else status
        self._grown: list[torch.Tensor] = []
        self._partials: tuple[torch.Tensor, torch.Tensor] | None = None
        self._bound: BoundKernel | None = None
        self._bound_spec: AttentionSpec | None = None
        self._bound_for: tuple[int, int, int, bool, KvLens] | None = None

    def bind(
        self,
        spec: AttentionSpec,
        batch_size: int,
        num_kv_heads: int,
        total_q: int,
        batch_invariant: bool = False,
        kv_lens: KvLens = UNKNOWN,
    ) -> BoundKernel:
        """:func:`bind`, remembered: hashing a spec costs more than the rest of a launch, so an unchanged batch compares by identity."""
        shape = (batch_size, num_kv_heads, total_q, batch_invariant, kv_lens)
        if self._bound is None or self._bound_spec is not spec or self._bound_for != shape:
            self._bound = bind(spec, self.device, *shape)
            self._bound_spec, self._bound_for = spec, shape
        return self._bound

    def partials(self, num_splits: int, total_q: int, num_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``out_partial [num_splits, total_q, num_heads, head_dim]`` and ``lse_partial`` (without head_dim), fp32, uninitialised."""
        shape = (num_splits, total_q, num_heads, head_dim)
        if self._partials is None or self._partials[0].shape != shape:
            self._partials = self._allocate(shape)
        return self._partials

    def _allocate(self, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        numel = math.prod(shape)
        rows = numel // shape[-1]
        words = self._scratch(4 * (numel + rows)).view(torch.float32)
        return words[:numel].view(shape), words[numel : numel + rows].view(shape[:-1])

    def _scratch(self, needed: int) -> torch.Tensor:
        """At least ``needed`` bytes, 16-byte aligned."""
        buffer = self.buffer
        if buffer is not None and buffer.data_ptr() % 16 == 0 and buffer.numel() * buffer.element_size() >= needed:
            return buffer.view(torch.uint8)[:needed]
        if not self._grown or self._grown[-1].numel() < needed:
            # Powers of two, and older ones stay (together no larger than the newest): a captured graph may still write to them.
            self._grown.append(torch.empty(1 << (needed - 1).bit_length(), dtype=torch.uint8, device=self.device))
        return self._grown[-1]


@functools.lru_cache(maxsize=64)
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """The compile target of a CUDA device."""
    return Target.detect(device)


def bind(
    spec: AttentionSpec,
    device: torch.device,
    batch_size: int,
    num_kv_heads: int,
    total_q: int,
    batch_invariant: bool = False,
    kv_lens: KvLens = UNKNOWN,
) -> BoundKernel:
    """Pick, load and size the kernel for a batch; compiles it the first time."""
    if batch_invariant:
        return _bind(spec, device, 1, num_kv_heads, 1, UNKNOWN, True)  # the batch is not looked at: one entry serves them all
    # Only the magnitude of total_q matters for a tile; rounding it up keeps the number of bound kernels small.
    rounded = 1 << (total_q - 1).bit_length() if total_q > 1 else total_q
    return _bind(spec, device, batch_size, num_kv_heads, rounded, kv_lens, False)


@functools.lru_cache(maxsize=8192)
def _bind(
    spec: AttentionSpec,
    device: torch.device,
    batch_size: int,
    num_kv_heads: int,
    total_q: int,
    kv_lens: KvLens,
    batch_invariant: bool,
) -> BoundKernel:
    sms = num_sms(device)
    target = target_of(device)
    choice = pick(spec, target, Hints(batch_size, num_kv_heads, sms, total_q, batch_invariant, kv_lens))
    try:
        kernel = get_kernel(choice.path, spec, choice.tile, target)
    except MissingKernelError as error:  # frozen, or the compiler is absent: a tile for any lengths may be there
        if not kv_lens.mean:
            raise
        log.warning("no kernel for lengths that are %s, using the one for any: %s", kv_lens, error)
        return _bind(spec, device, batch_size, num_kv_heads, total_q, UNKNOWN, batch_invariant)
    if choice.tile.split_kv:
        load_partials_kernel(device, getattr(torch, spec.o_dtype), spec.head_dim_vo, spec.lse, choice.num_splits)
    return BoundKernel(kernel.fn, choice, choice.num_splits, sms)


def workspace_bytes(
    spec: AttentionSpec,
    device: torch.device,
    batch_size: int,
    num_kv_heads: int,
    total_q: int,
    batch_invariant: bool = False,
    kv_lens: KvLens = UNKNOWN,
) -> int:
    """Bytes of scratch a batch of this size uses for split-KV partials (at least one alignment unit)."""
    if device.type != "cuda":
        return 16
    choice = bind(spec, device, batch_size, num_kv_heads, total_q, batch_invariant, kv_lens).choice
    return max(16, partial_bytes(spec, choice, num_kv_heads, total_q))


def partial_bytes(spec: AttentionSpec, choice: Choice, num_kv_heads: int, total_q: int) -> int:
    """Bytes of the fp32 partials that ``choice`` leaves for the merge kernel; 0 when it does not split KV."""
    if not choice.tile.split_kv:
        return 0
    return 4 * choice.num_splits * total_q * num_kv_heads * spec.group_size * (spec.head_dim_vo + 1)
