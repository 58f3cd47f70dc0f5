"""Tile sizes of the Hopper prefill kernel: which pieces, and why. Host only; the kernel is ``kernels/prefill_sm90.py``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .spec import AttentionSpec

if TYPE_CHECKING:
    from ..jit import Target
    from .tiles import Hints

PATH = "cute_infer.attention.kernels.prefill_sm90:PrefillSm90"

REGISTER_FILE = 65536  # 32-bit registers of one SM
MAX_SHARED_BYTES = 232_448  # 227 KiB, what one CTA may have on sm_90
BARRIER_BYTES = 2048  # generous room for mbarriers, the work slot, the table of requests and alignment


@dataclasses.dataclass(frozen=True)
class PrefillSm90Tile:
    """The pieces of one work item.

    tile_q               query rows of a work item: 64 per consumer warp group
    tile_kv              keys per step of the main loop
    num_stages           depth of the K ring and of the V ring
    num_q_buffers        2: the next item's Q arrives while this one computes, O leaves through its own buffer.
                         1: Q is single and O is staged in its place, for head dims that leave no room
    num_consumer_groups  warp groups that run wgmma
    producer_regs, consumer_regs   registers per thread after setmaxnreg
    pack_heads           rows are (query, head of a GQA group) pairs: short queries fill the tile. The group size must divide 64
    split_kv             the keys of a query block are shared by several CTAs, fp32 partials are merged
    v_warp               V has a load warp of its own where K and V are contiguous too
    cluster              2: two heads of a GQA group on two SMs; each loads half of every K and V tile for both
    """

    tile_q: int
    tile_kv: int
    num_stages: int
    num_q_buffers: int
    num_consumer_groups: int
    producer_regs: int
    consumer_regs: int
    pack_heads: bool = False
    split_kv: bool = False
    v_warp: bool = False
    cluster: int = 1

    def __post_init__(self) -> None:
        assert self.tile_q == 64 * self.num_consumer_groups, self
        assert self.tile_kv % 16 == 0 and self.num_q_buffers in (1, 2) and self.cluster in (1, 2), self
        # The pool is what the launch gave the CTA, threads * registers at entry, not the whole register file: ask for more and
        # setmaxnreg.inc waits for ever. 384 threads * 168 = 64,512; 512 threads * 128 = 65,536.
        pool = self.num_threads * (REGISTER_FILE // self.num_threads // 8 * 8)
        assert 128 * (self.producer_regs + self.num_consumer_groups * self.consumer_regs) <= pool, self

    @property
    def num_threads(self) -> int:
        return 128 * (self.num_consumer_groups + 1)

    def num_splits(self, spec: AttentionSpec, hints: Hints) -> int:
        """KV splits that give every SM a work item; 1 unless ``split_kv``."""
        return max(1, min(MAX_SPLITS, hints.num_sms // _items(self, spec, hints))) if self.split_kv else 1

    def shared_bytes(self, head_dim_qk: int, head_dim_vo: int) -> int:
        """Upper bound of the shared memory of one CTA, 16-bit elements."""
        q = self.num_q_buffers * self.tile_q * head_dim_qk
        o = self.tile_q * head_dim_vo if self.num_q_buffers == 2 else 0
        kv = self.num_stages * self.tile_kv * (head_dim_qk + head_dim_vo)
        return 2 * (q + o + kv) + BARRIER_BYTES


# 24*128 + 2*240*128 = 64,512 of 64,512. Where the producer also walks indptr and page tables it gets more, 40*128 + 2*232*128 = 64,512:
# with 24 the paged variants spill (24 to 48 bytes of stack), with 40 none does [compiled, 2026-11-22].
# Three consumer groups: 32*128 + 3*160*128 = 65,536 of 65,536.
# Gathering pages computes addresses, 56*128 + 2*224*128 = 64,512: with 40 it spills 24 to 68 bytes [compiled, 2026-11-22].
_LEAN, _SCAN, _GATHER, _THREE_GROUPS = (24, 240), (40, 232), (56, 224), (32, 160)

# (head_dim_qk, head_dim_vo): tile_kv, stages, Q buffers, consumer groups, reason
_TABLE = {
    (64, 64): (128, 3, 2, 3, "three groups: 508 -> 587 TFLOP/s, full 8k; two stages 582, four 585, 96 keys 532 [H200, 2026-11-22]"),
    (80, 80): (128, 2, 2, 2, "as head_dim 128; blocks of 16 columns"),
    (96, 96): (128, 2, 2, 2, "as head_dim 128; blocks of 32 columns; a third group would spill"),
    (112, 112): (128, 2, 2, 2, "as head_dim 128; blocks of 16 columns"),
    (128, 128): (128, 2, 2, 2, "Q 64 + O 32 + K/V 128 = 224 KiB; 128x160 was not faster [H200, 2026-11-22, prototype]"),
    (192, 128): (128, 2, 1, 2, "Q+O 48 + K/V 160 = 208 KiB; an O buffer of its own would leave 112 keys, which no page of 32 divides"),
    (256, 256): (64, 2, 1, 2, "Q+O 64 + K/V 128 = 192 KiB; causal 2k 668, 80 keys 660; 8k 797, 795; full within 1 % [H200, 2026-11-22]"),
}


# Splits cost a merge launch and fp32 partials (4 * splits * rows * (head_dim + 1) bytes), so they stop where a split has little to read.
MAX_SPLITS = 32
# Packing the heads of a GQA group pays below this many queries per request (average): of a tile's 128 rows more than half would be empty.
# Packed / not, us: 32 x 16 over 4k 128 / 281, 1 x 128 over 32k 108 / 107, 8 x 128 over 8k 210 / 196; 1k and longer lose up to 5 % [H200,
# 2026-11-22, groups of 4, causal].
PACK_BELOW = 64


def gathers(page_size: int, tile_kv: int) -> bool:
    """Whether pages are gathered row by row: TMA wants whole groups of 8 tokens, and pages that tile the tile or that the tile tiles."""
    return page_size % 8 != 0 or (tile_kv % page_size != 0 and page_size % tile_kv != 0)


def _items(tile: PrefillSm90Tile, spec: AttentionSpec, hints: Hints) -> int:
    """Work items of a batch at least: its query blocks times its heads, without splits."""
    rows_per_query = spec.group_size if tile.pack_heads else 1
    blocks = max(hints.batch_size, -(-hints.total_q * rows_per_query // tile.tile_q))
    return blocks * hints.num_kv_heads * (spec.group_size // rows_per_query)


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The first reason the Hopper prefill kernel cannot run ``spec``, or None."""
    if not target.is_hopper:
        return f"needs wgmma and TMA (sm_90a), target is {target.arch}"
    if spec.kind != "prefill":
        return "made for prefill"
    if spec.q_dtype not in ("float16", "bfloat16"):
        return f"q_dtype={spec.q_dtype} is not float16 or bfloat16"
    if spec.kv_dtype != spec.q_dtype:
        return f"kv_dtype={spec.kv_dtype} differs from q_dtype={spec.q_dtype}"
    if spec.o_dtype != spec.q_dtype:
        return f"o_dtype={spec.o_dtype} differs from q_dtype={spec.q_dtype}"
    if (spec.head_dim_qk, spec.head_dim_vo) not in _TABLE:
        return f"head_dim_qk={spec.head_dim_qk} head_dim_vo={spec.head_dim_vo} is not one of {sorted(_TABLE)}"
    if spec.pos_encoding not in ("NONE", "ALIBI"):
        return f"pos_encoding={spec.pos_encoding} is not implemented here"
    return None


def choose(spec: AttentionSpec, target: Target, hints: Hints) -> PrefillSm90Tile:
    """The tile for ``spec``; call only where :func:`why_not` returned None."""
    tile_kv, num_stages, num_q_buffers, num_groups, _ = _TABLE[spec.head_dim_qk, spec.head_dim_vo]
    if spec.window or spec.custom_mask or spec.pos_encoding == "ALIBI":
        num_groups = 2  # with three the window's loop spills 96 bytes; the words of a mask and slopes take registers too
    producer_regs, consumer_regs = _THREE_GROUPS if num_groups == 3 else _LEAN if spec.kv_layout == "single" else _SCAN
    if spec.kv_layout == "paged" and gathers(spec.page_size, tile_kv) and num_groups == 2:
        producer_regs, consumer_regs = _GATHER
    pack = 64 % spec.group_size == 0 and spec.group_size > 1 and hints.total_q < PACK_BELOW * hints.batch_size
    tile = PrefillSm90Tile(64 * num_groups, tile_kv, num_stages, num_q_buffers, num_groups, producer_regs, consumer_regs, pack)
    if 2 * _items(tile, spec, hints) <= hints.num_sms:
        tile = dataclasses.replace(tile, split_kv=True)
    elif _in_pairs(tile, spec):
        tile = dataclasses.replace(tile, cluster=2)
    tile = dataclasses.replace(tile, v_warp=_v_by_its_own_warp(spec))
    assert tile.shared_bytes(spec.head_dim_qk, spec.head_dim_vo) <= MAX_SHARED_BYTES, tile
    return tile


def _in_pairs(tile: PrefillSm90Tile, spec: AttentionSpec) -> bool:
    """Whether two heads share K and V through a cluster. Rested / back to back, pages of 16, TFLOP/s, 32/8 heads: 2k causal 618/546 ->
    642/562, 8k causal 723/632 -> 733/635, 2k full 694/601 -> 709/604, 8k full 741/654 -> 745/649; contiguous K/V the same within 1 %
    rested, up to 4 % slower back to back [H200, 2026-11-22]."""
    plain = not (spec.window or spec.custom_mask or spec.soft_cap) and spec.pos_encoding == "NONE"
    by_boxes = spec.kv_layout == "paged" and not gathers(spec.page_size, tile.tile_kv)
    return plain and by_boxes and spec.head_dim_qk == spec.head_dim_vo == 128 and spec.group_size % 2 == 0 and not tile.pack_heads


def _v_by_its_own_warp(spec: AttentionSpec) -> bool:
    """Contiguous K/V, rested / back to back: 2k full 692/616 -> 712/626, 8k full 748/665 -> 758/673, 16k full 767/692 -> 768/684; head_dim
    256 8k full 807/721 -> 818/724, 2k causal 670/673 -> 680/683. Causal at 128: 2k 649/592 -> 634/569, 8k 748/665 -> 740/653; head_dim 64
    572/531 -> 560/517 [H200, 2026-11-22]. Paged K/V always has it."""
    if spec.kv_layout == "paged":
        return False
    return spec.head_dim_qk == 256 or (spec.head_dim_qk == 128 and not (spec.causal or spec.window))
