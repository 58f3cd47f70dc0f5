"""Tile sizes of the FP8 Hopper prefill kernel: which pieces, and why. Host only; the kernel is ``kernels/prefill_sm90_fp8.py``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .spec import AttentionSpec
from .tiles_prefill_sm90 import BARRIER_BYTES, MAX_SHARED_BYTES, MAX_SPLITS, PACK_BELOW, REGISTER_FILE

if TYPE_CHECKING:
    from ..jit import Target
    from .tiles import Hints

PATH = "cute_infer.attention.kernels.prefill_sm90_fp8:PrefillSm90Fp8"


@dataclasses.dataclass(frozen=True)
class PrefillSm90Fp8Tile:
    """The pieces of one work item.

    tile_kv              keys per step of the main loop, a multiple of 32
    stages               depth of the rings of K and of V that TMA fills
    num_q_buffers        2: the next item's Q arrives while this one computes
    promote_every        after so many key tiles wgmma's short accumulator is added to a sum in fp32; 0: never
    tile_q               query rows of a work item: 64 per consumer warp group
    num_consumer_groups  warp groups that run wgmma
    producer_regs, consumer_regs   registers per thread after setmaxnreg
    pack_heads           rows are (query, head of a GQA group) pairs: short queries fill the tile. The group size must divide 64
    split_kv             the keys of a query block are shared by several CTAs, fp32 partials are merged
    """

    tile_kv: int
    stages: int
    num_q_buffers: int
    promote_every: int
    tile_q: int = 128
    num_consumer_groups: int = 2
    producer_regs: int = 56
    consumer_regs: int = 224
    pack_heads: bool = False
    split_kv: bool = False

    def __post_init__(self) -> None:
        assert self.tile_q == 64 * self.num_consumer_groups, self
        assert self.tile_kv % 32 == 0 and self.num_q_buffers in (1, 2), self
        # The pool is what the launch gave the CTA, threads * registers at entry, not the whole register file: ask for more and
        # setmaxnreg.inc waits for ever. 384 threads * 168 = 64,512.
        pool = self.num_threads * (REGISTER_FILE // self.num_threads // 8 * 8)
        assert 128 * (self.producer_regs + self.num_consumer_groups * self.consumer_regs) <= pool, self

    @property
    def num_threads(self) -> int:
        return 128 * (self.num_consumer_groups + 1)

    def num_splits(self, spec: AttentionSpec, hints: Hints) -> int:
        """KV splits that give every SM a work item; 1 unless ``split_kv``."""
        return max(1, min(MAX_SPLITS, hints.num_sms // _items(self, spec, hints))) if self.split_kv else 1

    def shared_bytes(self, head_dim_qk: int, head_dim_vo: int) -> int:
        """Upper bound of the shared memory of one CTA: 8-bit Q, K, V, V^T, and 16-bit O or the 32-bit sum."""
        q, o = self.num_q_buffers * self.tile_q * head_dim_qk, (4 if self.promote_every else 2) * self.tile_q * head_dim_vo
        kv = self.tile_kv * (self.stages * (head_dim_qk + head_dim_vo) + VT_STAGES * head_dim_vo)
        return q + o + kv + BARRIER_BYTES


VT_STAGES = 2  # depth of the ring of transposed V
LONG = 1536  # queries of a request, on average, from which on the rows of the long tables are taken
# wgmma loses 4.4e-4 of a sum of one sign per 32 keys (one H200, 2026-11-22): 12 steps of it, 0.5 %, are left between two promotions
PROMOTE_TOKENS = 384

# (head_dim_qk, head_dim_vo): tile_kv, stages, Q buffers, reason. Fast: O is wgmma's accumulator; precise: O and a sum of 32 bits.
# One H200, 2026-11-22, head_dim 128, TFLOP/s with 128 and 192 keys, fast: 1k full 841, 798, causal 677, 654; 2k full 878, 909, causal
# 779, 790; 8k full 941, 998, causal 899, 949. 160 keys lie between. 224 keys leave no room for a second stage of V.
_FAST = {
    (64, 64): (128, 2, 2, "Q 16 + O 16 + K/V/V^T 48 = 80 KiB"),
    (128, 128): (128, 2, 2, "Q 32 + O 32 + K/V/V^T 96 = 160 KiB"),
    (192, 128): (128, 2, 1, "Q 24 + O 32 + K/V/V^T 112 = 168 KiB"),
    (256, 256): (64, 2, 1, "Q 32 + O 64 + K/V/V^T 96 = 192 KiB"),
}
_PRECISE = {
    (64, 64): (128, 2, 2, "Q 16 + sum 32 + K/V/V^T 48 = 96 KiB"),
    (128, 128): (128, 2, 2, "Q 32 + sum 64 + K/V/V^T 96 = 192 KiB"),
    (192, 128): (128, 2, 1, "Q 24 + sum 64 + K/V/V^T 112 = 200 KiB"),
    (256, 256): (64, 1, 1, "Q 32 + sum 128 + K/V/V^T 64 = 224 KiB: no room for a second stage of K and V"),
}
_FAST_LONG = {(128, 128): (192, 2, 2, "Q 32 + O 32 + K/V/V^T 144 = 208 KiB")}
_PRECISE_LONG = {(128, 128): (192, 2, 1, "Q 16 + sum 64 + K/V/V^T 144 = 224 KiB")}


def _items(tile: PrefillSm90Fp8Tile, spec: AttentionSpec, hints: Hints) -> int:
    """Work items of a batch at least: its query blocks times its heads, without splits."""
    rows_per_query = spec.group_size if tile.pack_heads else 1
    blocks = max(hints.batch_size, -(-hints.total_q * rows_per_query // tile.tile_q))
    return blocks * hints.num_kv_heads * (spec.group_size // rows_per_query)


def _pages_fit(spec: AttentionSpec, tile_kv: int) -> bool:
    """Whether a key tile is whole pages, or a page whole key tiles."""
    return spec.kv_layout != "paged" or tile_kv % spec.page_size == 0 or spec.page_size % tile_kv == 0


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The first reason the FP8 Hopper prefill kernel cannot run ``spec``, or None."""
    if not target.is_hopper:
        return f"needs wgmma and TMA (sm_90a), target is {target.arch}"
    if spec.kind != "prefill":
        return "made for prefill"
    if spec.q_dtype == "float8_e4m3fn" and spec.kv_dtype != "float8_e4m3fn":
        return f"q is float8_e4m3fn but k and v are {spec.kv_dtype}: wgmma multiplies 8-bit operands with 8-bit operands only"
    if spec.q_dtype == "float8_e5m2":
        return "q is float8_e5m2, whose two bits of mantissa are too few for queries: quantise q (and k, v) to float8_e4m3fn"
    if spec.q_dtype != "float8_e4m3fn":
        return f"made for float8_e4m3fn queries, q_dtype is {spec.q_dtype}"
    if spec.o_dtype not in ("float16", "bfloat16"):
        return f"o_dtype={spec.o_dtype} is not float16 or bfloat16"
    if (spec.head_dim_qk, spec.head_dim_vo) not in _FAST:
        return f"head_dim_qk={spec.head_dim_qk} head_dim_vo={spec.head_dim_vo} is not one of {sorted(_FAST)}"
    if spec.custom_mask:
        return "custom masks are not implemented here"
    if spec.pos_encoding != "NONE":
        return f"pos_encoding={spec.pos_encoding} is not implemented here"
    if spec.kv_layout == "paged":
        if spec.page_size < 16:
            return f"page_size={spec.page_size} is below 16 tokens, the smallest TMA box used here"
        tile_kv = _FAST[spec.head_dim_qk, spec.head_dim_vo][0]
        if not _pages_fit(spec, tile_kv):
            return f"page_size={spec.page_size} neither divides the KV tile of {tile_kv} tokens nor is a multiple of it"
    return None


def choose(spec: AttentionSpec, target: Target, hints: Hints) -> PrefillSm90Fp8Tile:
    """The tile for ``spec``; call only where :func:`why_not` returned None."""
    dims = spec.head_dim_qk, spec.head_dim_vo
    row, long_row = (table.get(dims) for table in ((_FAST, _FAST_LONG) if spec.fp8_fast_accumulation else (_PRECISE, _PRECISE_LONG)))
    spills = spec.soft_cap or spec.window  # with 192 keys
    if long_row is not None and hints.total_q >= LONG * hints.batch_size and _pages_fit(spec, long_row[0]) and not spills:
        row = long_row
    assert row is not None, spec
    tile_kv, stages, q_buffers, _ = row
    tile = PrefillSm90Fp8Tile(
        tile_kv=tile_kv,
        stages=stages,
        num_q_buffers=q_buffers,
        promote_every=0 if spec.fp8_fast_accumulation else PROMOTE_TOKENS // tile_kv,
        pack_heads=64 % spec.group_size == 0 and spec.group_size > 1 and hints.total_q < PACK_BELOW * hints.batch_size,
    )
    if 2 * _items(tile, spec, hints) <= hints.num_sms:
        tile = dataclasses.replace(tile, split_kv=True)
    assert tile.shared_bytes(*dims) <= MAX_SHARED_BYTES, tile
    return tile
