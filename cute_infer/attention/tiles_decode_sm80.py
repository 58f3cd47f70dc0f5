"""Tiles of the SM80-class decode kernel: what it refuses, the shapes it is built for, and which one a batch gets.

It uses nothing newer than sm_80 and is compiled for every later architecture too, where it takes what the newer kernels refuse.
Host-only: importing this never imports the compiler.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from .spec import AttentionSpec

if TYPE_CHECKING:
    from ..jit import Target
    from .tiles import Hints

PATH = "cute_infer.attention.kernels.decode_sm80:DecodeSm80"

ROWS = 16  # query heads of one CTA: the rows of mma.m16n8k16
ROW_PADDING = 16  # bytes after every 16-bit row: consecutive rows fall on different banks
MAX_HEAD_DIM = 256
MAX_SPLITS = 32  # the merge reads all partials of a row one after the other


@dataclasses.dataclass(frozen=True)
class DecodeSm80Tile:
    """The pieces of one launch.

    warps      warps of a CTA; each owns a ring of its own and loads for itself.
    tokens     tokens of a slot, a multiple of 16: what a warp takes in one step.
    stages     slots of a warp's ring; stages - 1 are in flight while one is read.
    split_kv   several CTAs share a request and KV head and leave fp32 partials for the merge kernel.
    """

    warps: int
    tokens: int
    stages: int
    split_kv: bool = False

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def tile_kv(self) -> int:
        """Tokens that the warps of a CTA take in one step; splits are cut at multiples of it."""
        return self.warps * self.tokens

    def num_splits(self, spec: AttentionSpec, hints: Hints) -> int:
        """CTAs that share a request and KV head: as many as give every SM two CTAs, at most MAX_SPLITS so that the merge stays short."""
        if not self.split_kv:
            return 1
        items = hints.batch_size * hints.num_kv_heads * head_blocks(spec)
        return max(1, min(MAX_SPLITS, 2 * hints.num_sms // max(1, items)))


class SharedMemory(NamedTuple):
    """Byte offsets of the regions of a CTA's shared memory, every one 16-byte aligned.

    q       [16, pitch_k]                  query rows
    ring    per warp: stages slots of K, then of V; 16-bit rows with padding, or packed fp8 rows
    wide    per warp, fp8 only: K and V of one step as 16-bit rows with padding
    table   RoPE frequencies
    stats   [warps, 16, 2] fp32            maximum and sum of every warp's rows
    After the last step ring and wide hold ``[warps, 16, head_dim_vo + 8]`` fp32: the warps' partial outputs.
    """

    q: int
    ring: int
    wide: int
    table: int
    stats: int
    total: int


def padded(head_dim: int) -> int:
    """Head dim rounded up to the 16 columns of an MMA; the columns added are zeros."""
    return -(-head_dim // 16) * 16


def pitch(head_dim: int) -> int:
    """Bytes from one 16-bit row to the next in shared memory."""
    return 2 * padded(head_dim) + ROW_PADDING


def merge_pitch(head_dim_vo: int) -> int:
    """Elements from one fp32 partial row to the next: 8 more than the row, so that the 8-byte stores of 4 rows use all 32 banks."""
    return padded(head_dim_vo) + 8


def slot_bytes(spec: AttentionSpec, tokens: int) -> tuple[int, int]:
    """Bytes of a K slot and of a V slot of the ring."""
    if spec.kv_bits == 8:
        return tokens * padded(spec.head_dim_qk), tokens * padded(spec.head_dim_vo)
    return tokens * pitch(spec.head_dim_qk), tokens * pitch(spec.head_dim_vo)


def shared_memory(spec: AttentionSpec, tile: DecodeSm80Tile) -> SharedMemory:
    """Where everything lies in shared memory."""
    q = 0
    ring = q + ROWS * pitch(spec.head_dim_qk)
    wide = ring + tile.warps * tile.stages * sum(slot_bytes(spec, tile.tokens))
    wide_bytes = tile.tokens * (pitch(spec.head_dim_qk) + pitch(spec.head_dim_vo)) if spec.kv_bits == 8 else 0
    merge = tile.warps * ROWS * merge_pitch(spec.head_dim_vo) * 4
    table = max(wide + tile.warps * wide_bytes, ring + merge)
    stats = table + (padded(spec.head_dim_qk) // 2 * 8 if spec.pos_encoding == "ROPE_LLAMA" else 0)
    return SharedMemory(q, ring, wide, table, stats, stats + tile.warps * ROWS * 2 * 4)


def head_blocks(spec: AttentionSpec) -> int:
    """CTAs among which the query heads of a group are dealt, 16 at a time."""
    return -(-spec.group_size // ROWS)


# Tried in this order; the first that stays within BUDGET is taken. KiB per CTA for 16-bit KV unless said otherwise.
_TABLE = (
    # warps, tokens, stages
    (4, 32, 3),  # up to head_dim 56: 32 tokens a step halve the fixed cost of the softmax, two slots in flight
    (4, 32, 2),  # head_dim 64: 76 KiB
    (4, 16, 3),  # up to head_dim 104; fp8: 88 KiB at head_dim 128
    (4, 16, 2),  # head_dim 128: 72 KiB, three CTAs on a Hopper SM; 192,128: 90 KiB
    (2, 16, 3),  # fewer warps rather than fewer tokens in flight
    (2, 16, 2),  # head_dim 256: 74 KiB
)
BUDGET = 99 * 1024  # the smallest limit of the family (sm_86, sm_89): one tile serves all of them


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The first reason this kernel cannot do ``spec`` on ``target``, or None."""
    if spec.kind != "decode":
        return f"kind={spec.kind} is not decode"
    if spec.custom_mask:
        return "custom masks belong to prefill"
    return why_not_sm80(spec, min(shared_memory(spec, DecodeSm80Tile(*row)).total for row in _TABLE), target)


def why_not_sm80(spec: AttentionSpec, least_smem: int, target: Target) -> str | None:
    """What both SM80-class kernels refuse; ``least_smem`` is the shared memory of their smallest tile."""
    if spec.q_dtype not in ("float16", "bfloat16"):
        return f"q={spec.q_dtype} is neither float16 nor bfloat16"
    if spec.kv_dtype not in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        return f"kv={spec.kv_dtype} has no tensor-core path"
    if spec.kv_bits == 16 and spec.kv_dtype != spec.q_dtype:
        return f"kv={spec.kv_dtype} differs from q={spec.q_dtype}"
    if spec.o_dtype not in ("float16", "bfloat16", "float32"):
        return f"o={spec.o_dtype} is not float16, bfloat16 or float32"
    for dim in (spec.head_dim_qk, spec.head_dim_vo):
        if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            return f"head_dim={dim} is not a multiple of 8 from 8 to {MAX_HEAD_DIM}"
    if least_smem > target.smem_limit:
        return f"needs {least_smem} bytes of shared memory, {target} offers {target.smem_limit}"
    return None


def choose(spec: AttentionSpec, target: Target, hints: Hints) -> DecodeSm80Tile:
    """The tile for a batch whose lengths are unknown: KV is split while requests x KV heads leave SMs idle."""
    split = 2 * hints.batch_size * hints.num_kv_heads * head_blocks(spec) <= hints.num_sms
    tiles = [DecodeSm80Tile(*row, split_kv=split) for row in _TABLE]
    return next((tile for tile in tiles if shared_memory(spec, tile).total <= min(BUDGET, target.smem_limit)), tiles[-1])
