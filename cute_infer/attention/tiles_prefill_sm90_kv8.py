"""Tile sizes of the Hopper prefill kernel for 16-bit queries over 8-bit K and V. Host only; the kernel: ``kernels/prefill_sm90_kv8.py``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .spec import AttentionSpec
from .tiles_prefill_sm90 import BARRIER_BYTES, MAX_SHARED_BYTES, MAX_SPLITS, PACK_BELOW, REGISTER_FILE

if TYPE_CHECKING:
    from ..jit import Target
    from .tiles import Hints

PATH = "cute_infer.attention.kernels.prefill_sm90_kv8:PrefillSm90Kv8"


@dataclasses.dataclass(frozen=True)
class PrefillSm90Kv8Tile:
    """The pieces of one work item.

    tile_kv              keys per step of the main loop, a multiple of 32
    depth                16-byte loads that a converting thread has in flight, four registers each; divides those of a tile of K and V
    num_q_buffers        2: the next item's Q arrives while this one computes, O leaves through its own buffer.
                         1: Q is single and O is staged in its place
    num_stages           depth of the rings of widened K and V
    tile_q               query rows of a work item: 64 per consumer warp group
    num_consumer_groups  warp groups that run wgmma
    lead_regs, convert_regs, consumer_regs   registers per thread after setmaxnreg
    pack_heads           rows are (query, head of a GQA group) pairs: short queries fill the tile. The group size must divide 64
    split_kv             the keys of a query block are shared by several CTAs, fp32 partials are merged
    """

    tile_kv: int
    depth: int
    num_q_buffers: int
    num_stages: int = 2
    tile_q: int = 128
    num_consumer_groups: int = 2
    lead_regs: int = 32
    convert_regs: int = 64
    consumer_regs: int = 208
    pack_heads: bool = False
    split_kv: bool = False

    def __post_init__(self) -> None:
        assert self.tile_q == 64 * self.num_consumer_groups, self
        assert self.tile_kv % 32 == 0 and self.num_q_buffers in (1, 2), self
        # The pool is what the launch gave the CTA, threads * registers at entry: ask for more and setmaxnreg.inc waits for ever.
        pool = self.num_threads * (REGISTER_FILE // self.num_threads // 8 * 8)
        assert 128 * (self.lead_regs + self.convert_regs + self.num_consumer_groups * self.consumer_regs) <= pool, self

    @property
    def num_threads(self) -> int:
        return 128 * (self.num_consumer_groups + 2)

    def num_splits(self, spec: AttentionSpec, hints: Hints) -> int:
        """KV splits that give every SM a work item; 1 unless ``split_kv``."""
        return max(1, min(MAX_SPLITS, hints.num_sms // _items(self, spec, hints))) if self.split_kv else 1

    def shared_bytes(self, head_dim_qk: int, head_dim_vo: int) -> int:
        """Upper bound of the shared memory of one CTA: everything lies there with 16 bits."""
        q = self.num_q_buffers * self.tile_q * head_dim_qk
        o = self.tile_q * head_dim_vo if self.num_q_buffers == 2 else 0
        kv = self.num_stages * self.tile_kv * (head_dim_qk + head_dim_vo)
        return 2 * (q + o + kv) + BARRIER_BYTES


# Registers of (lead, convert): with the groups' 2 * 208 they are 512 = 65,536 / 128. Ten loads in flight want more than eight.
_EIGHT_LOADS, _TEN_LOADS = (32, 64), (24, 72)

# (head_dim_qk, head_dim_vo): tile_kv, loads in flight, Q buffers, registers, reason
_TABLE = {
    (64, 64): (128, 8, 2, _EIGHT_LOADS, "Q 32 + O 16 + K/V 64 = 112 KiB; a whole tile of K and V in flight"),
    (128, 128): (128, 8, 2, _EIGHT_LOADS, "Q 64 + O 32 + K/V 128 = 224 KiB; K or V of a tile in flight"),
    (192, 128): (128, 10, 1, _TEN_LOADS, "Q+O 48 + K/V 160 = 208 KiB; half of 12 loads of K and 8 of V"),
    (256, 256): (64, 8, 1, _EIGHT_LOADS, "Q+O 64 + K/V 128 = 192 KiB; K or V of a tile in flight"),
}


def _items(tile: PrefillSm90Kv8Tile, spec: AttentionSpec, hints: Hints) -> int:
    """Work items of a batch at least: its query blocks times its heads, without splits."""
    rows_per_query = spec.group_size if tile.pack_heads else 1
    blocks = max(hints.batch_size, -(-hints.total_q * rows_per_query // tile.tile_q))
    return blocks * hints.num_kv_heads * (spec.group_size // rows_per_query)


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The first reason this kernel cannot run ``spec``, or None."""
    if not target.is_hopper:
        return f"needs wgmma and TMA (sm_90a), target is {target.arch}"
    if spec.kind != "prefill":
        return "made for prefill"
    if spec.q_dtype not in ("float16", "bfloat16"):
        return f"q_dtype={spec.q_dtype} is not float16 or bfloat16"
    if spec.kv_dtype not in ("float8_e4m3fn", "float8_e5m2"):
        return f"made for 8-bit k and v, kv_dtype is {spec.kv_dtype}"
    if spec.o_dtype not in ("float16", "bfloat16"):
        return f"o_dtype={spec.o_dtype} is not float16 or bfloat16"
    if (spec.head_dim_qk, spec.head_dim_vo) not in _TABLE:
        return f"head_dim_qk={spec.head_dim_qk} head_dim_vo={spec.head_dim_vo} is not one of {sorted(_TABLE)}"
    if spec.custom_mask:
        return "custom masks are not implemented here"
    if spec.pos_encoding != "NONE":
        return f"pos_encoding={spec.pos_encoding} is not implemented here"
    return None


def choose(spec: AttentionSpec, target: Target, hints: Hints) -> PrefillSm90Kv8Tile:
    """The tile for ``spec``; call only where :func:`why_not` returned None."""
    tile_kv, depth, num_q_buffers, (lead_regs, convert_regs), _ = _TABLE[spec.head_dim_qk, spec.head_dim_vo]
    pack = 64 % spec.group_size == 0 and spec.group_size > 1 and hints.total_q < PACK_BELOW * hints.batch_size
    tile = PrefillSm90Kv8Tile(tile_kv, depth, num_q_buffers, lead_regs=lead_regs, convert_regs=convert_regs, pack_heads=pack)
    if 2 * _items(tile, spec, hints) <= hints.num_sms:
        tile = dataclasses.replace(tile, split_kv=True)
    assert tile.shared_bytes(spec.head_dim_qk, spec.head_dim_vo) <= MAX_SHARED_BYTES, tile
    return tile
