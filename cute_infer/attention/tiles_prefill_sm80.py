"""Tiles of the SM80-class prefill kernel: what it refuses, the shapes it is built for, and which one a batch gets.

It uses nothing newer than sm_80 and is compiled for every later architecture too, where it takes what the newer kernels refuse.
Host-only: importing this never imports the compiler.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from .spec import AttentionSpec
from .tiles_decode_sm80 import BUDGET, padded, pitch, slot_bytes, why_not_sm80

if TYPE_CHECKING:
    from ..jit import Target
    from .tiles import Hints

PATH = "cute_infer.attention.kernels.prefill_sm80:PrefillSm80"

ROWS_PER_WARP = 16  # the rows of mma.m16n8k16
REGISTER_Q_DIM = 192  # up to here a warp keeps its query rows in registers (head_dim / 4 of them) and their shared memory is reused
MAX_SPLITS = 32  # the merge reads all partials of a row one after the other


@dataclasses.dataclass(frozen=True)
class PrefillSm80Tile:
    """The pieces of one launch.

    tile_q     packed query rows (query, head of the group) of a CTA; every 16 of them are one warp.
    tile_kv    tokens of a KV tile, a multiple of 16.
    stages     KV tiles in the ring; stages - 1 are in flight while one is read.
    split_kv   several CTAs share the KV range of a query tile and leave fp32 partials for the merge kernel.
    """

    tile_q: int
    tile_kv: int
    stages: int
    split_kv: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.tile_q // ROWS_PER_WARP

    def num_splits(self, spec: AttentionSpec, hints: Hints) -> int:
        """CTAs that share a query tile: as many as give every SM two CTAs, at most MAX_SPLITS so that the merge stays short."""
        if not self.split_kv:
            return 1
        return max(1, min(MAX_SPLITS, 2 * hints.num_sms // max(1, _ctas(spec, self.tile_q, hints))))


class SharedMemory(NamedTuple):
    """Byte offsets of the regions of a CTA's shared memory, every one 16-byte aligned.

    ring    stages slots of K, then of V; 16-bit rows with padding, or packed fp8 rows
    wide    fp8 only: K and V of one tile as 16-bit rows with padding
    q       [tile_q, pitch_k] query rows: over ``wide`` or the last slot of the ring, both written for the first time after every warp has
            taken its rows into registers; a region of its own when the rows stay in shared memory or are larger than that
    table   RoPE frequencies
    """

    ring: int
    wide: int
    q: int
    table: int
    total: int


def shared_memory(spec: AttentionSpec, tile: PrefillSm80Tile) -> SharedMemory:
    """Where everything lies in shared memory."""
    slot = sum(slot_bytes(spec, tile.tile_kv))
    wide = tile.stages * slot
    wide_bytes = tile.tile_kv * (pitch(spec.head_dim_qk) + pitch(spec.head_dim_vo)) if spec.kv_bits == 8 else 0
    q_bytes = tile.tile_q * pitch(spec.head_dim_qk)
    end = wide + wide_bytes
    shared_q = wide if spec.kv_bits == 8 else wide - slot
    q = shared_q if spec.head_dim_qk <= REGISTER_Q_DIM and shared_q + q_bytes <= end else end
    table = max(end, q + q_bytes)
    return SharedMemory(0, wide, q, table, table + (padded(spec.head_dim_qk) // 2 * 8 if spec.pos_encoding == "ROPE_LLAMA" else 0))


# Tried in this order, 128 query rows (where they pay) before 64.
_TABLE = (
    # tile_q, tile_kv, stages
    (128, 64, 2),  # 68 KiB at head_dim 128, 100 at 192, 134 at 192,128: one tile in flight during one
    (128, 32, 2),  # head_dim 256: 132 KiB
    (64, 64, 2),  # 68 KiB at head_dim 128, 84 at 192,128: two or three CTAs on a Hopper SM
    (64, 32, 3),  # head_dim 192: smaller tiles, but two of them in flight
    (64, 32, 2),  # head_dim 256: 99 KiB to the byte
    (64, 16, 2),  # head_dim 256 with RoPE
)


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The first reason this kernel cannot do ``spec`` on ``target``, or None."""
    if spec.kind != "prefill":
        return f"kind={spec.kind} is not prefill"
    return why_not_sm80(spec, min(shared_memory(spec, PrefillSm80Tile(*row)).total for row in _TABLE), target)


def choose(spec: AttentionSpec, target: Target, hints: Hints) -> PrefillSm80Tile:
    """The tile for a batch whose lengths are unknown.

    128 query rows read K and V half as often as 64, but only pay when requests fill them and the tiles fill the device. KV is split while
    the tiles leave SMs idle.
    """
    rows = hints.total_q * spec.group_size // max(1, hints.batch_size)
    large = rows >= 128 and _ctas(spec, 128, hints) >= hints.num_sms
    for tile in (PrefillSm80Tile(*row) for row in _TABLE):
        # 8 warps keep an SM busy alone; 4 want company, so they stay within what the smallest SM of the family offers
        budget = target.smem_limit if tile.tile_q == 128 else min(BUDGET, target.smem_limit)
        # the addresses of a custom mask's bits leave no registers for 64 keys
        fits = shared_memory(spec, tile).total <= budget and not (spec.custom_mask and tile.tile_kv == 64)
        if fits and (large or tile.tile_q == 64):
            break
    return dataclasses.replace(tile, split_kv=2 * _ctas(spec, tile.tile_q, hints) <= hints.num_sms)


def _ctas(spec: AttentionSpec, tile_q: int, hints: Hints) -> int:
    """CTAs that have work when all requests are equally long."""
    batch = max(1, hints.batch_size)
    return batch * -(-hints.total_q * spec.group_size // (batch * tile_q)) * hints.num_kv_heads
