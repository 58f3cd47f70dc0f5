"""Tiles of the Hopper decode kernel: what it refuses, the shapes it is built for, and which one a batch gets.

Host-only: importing this never imports the compiler.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

from .spec import AttentionSpec

if TYPE_CHECKING:
    from ..jit import Target
    from .tiles import Hints

PATH = "cute_infer.attention.kernels.decode_sm90:DecodeSm90"

COLUMNS = 8  # query heads are the N side of mma.m16n8k16
MAX_GROUP_SIZE = 64
SLOT_BYTES = 4096  # of K in a slot, and of V: 16 rows of 128 bf16
SHARED_MEMORY_PER_SM = 228 * 1024  # 1 KiB of it per CTA is the system's
SHARED_MEMORY_PER_CTA = 227 * 1024


class Shape(NamedTuple):
    """Warps of a CTA, slots of each warp's ring, and CTAs that share an SM."""

    warps: int
    stages: int
    ctas_per_sm: int


DEEP = Shape(4, 3, 2)  # three slots per warp, two CTAs of 4 warps per SM
CROWDED = Shape(4, 2, 3)  # two slots, three CTAs: as many bytes in flight, and the last wave is finer
ALONE = Shape(8, 2, 1)  # leaves registers and shared memory for the CTAs of the next launch, which start early


class Rows(NamedTuple):
    """How the tokens of K or V lie in shared memory.

    A row of ``bytes`` is cut into ``panels`` of ``panel_bytes``, the widest swizzle span (128, 64 or 32 bytes) that divides it; a box of
    tokens is stored panel after panel, each panel 8 tokens x panel_bytes to a swizzle atom.
    """

    head_dim: int
    bytes: int
    panel_bytes: int
    panels: int


def rows_of(head_dim: int, bits: int) -> Rows:
    """The :class:`Rows` of a head dimension. Rows must be a multiple of 32 bytes, what one ldmatrix.x4 takes from 16 tokens."""
    row_bytes = head_dim * bits // 8
    panel_bytes = next(span for span in (128, 64, 32) if row_bytes % span == 0)
    return Rows(head_dim, row_bytes, panel_bytes, row_bytes // panel_bytes)


@dataclasses.dataclass(frozen=True)
class DecodeSm90Tile:
    """The pieces of one launch.

    cluster         CTAs that share one item (a request and ``heads_per_item`` KV heads), 1..16; their partial results meet in distributed
                    shared memory.
    warps           warps of a CTA; each owns a ring of its own and loads for itself.
    stages          slots of a warp's ring.
    tokens          tokens of a slot: a multiple of 16 that divides the page or is divided by it.
    head_tiles      tiles of 8 query heads that one CTA works on; larger groups take several CTAs, which meet the same KV in L2.
    heads_per_item  neighbouring KV heads one CTA fetches together, so that the short rows of a token that lie side by side in an NHD cache
                    are read from DRAM at about the same time.
    ctas_per_sm     what the registers are budgeted for.
    early_metadata  look up lengths and page ids before the previous kernel has finished, fetch with them right after it has, and read them
                    once more while the copies fly: had it changed them, what came is dropped and fetched anew. Paged KV by TMA only, and
                    not with longest_first, whose order must not be built on lengths that still change.
    evict_first     KV copied by TMA leaves L2 first; wrong when another CTA will read the same KV.
    longest_first   CTAs that start early take the longest requests, so that no long one starts last. Every warp ranks its neighbourhood of
                    256 requests by live lengths; worth it when the grid runs in several waves.
    split_kv        several clusters share one item and leave fp32 partials for the merge kernel.
    """

    cluster: int
    warps: int
    stages: int
    tokens: int
    head_tiles: int = 1
    heads_per_item: int = 1
    ctas_per_sm: int = 1
    early_metadata: bool = False
    evict_first: bool = False
    longest_first: bool = False
    split_kv: bool = False

    def num_splits(self, spec: AttentionSpec, hints: Hints) -> int:
        """Clusters that share an item: as many as it takes to give every SM one CTA, at most 16 so that the merge stays short."""
        if not self.split_kv:
            return 1
        ctas = hints.batch_size * -(-hints.num_kv_heads // self.heads_per_item) * head_blocks(spec, self) * self.cluster
        return max(1, min(16, hints.num_sms // max(1, ctas)))


def head_blocks(spec: AttentionSpec, tile: DecodeSm90Tile) -> int:
    """CTAs among which the query heads of a group are dealt."""
    return -(-spec.group_size // (COLUMNS * tile.head_tiles))


def heads_per_block(spec: AttentionSpec, tile: DecodeSm90Tile) -> int:
    """Query heads of a group that one CTA works on: the group cut into equal shares (12 heads in tiles of 8 are 6 + 6)."""
    return -(-spec.group_size // head_blocks(spec, tile))


def slot_bytes(spec: AttentionSpec, tile: DecodeSm90Tile) -> tuple[int, int]:
    """Bytes of a K slot and of a V slot, rounded up to the 1024 bytes after which every swizzle repeats."""
    k, v = (_round_up(tile.tokens * dim * spec.kv_bits // 8, 1024) for dim in (spec.head_dim_qk, spec.head_dim_vo))
    return k, v


def warp_region_bytes(spec: AttentionSpec, tile: DecodeSm90Tile) -> int:
    """Shared memory of one warp: its ring, later reused for its fp32 partial output [heads, head_dim + 4]."""
    partial = heads_per_block(spec, tile) * (spec.head_dim_vo + 4) * 4
    return max(tile.stages * sum(slot_bytes(spec, tile)), _round_up(partial, 1024))


def slice_elements(spec: AttentionSpec, tile: DecodeSm90Tile) -> int:
    """Output elements of an item that one CTA of the cluster finishes; even, because they travel in pairs."""
    return 2 * -(-heads_per_block(spec, tile) * tile.heads_per_item * spec.head_dim_vo // (2 * tile.cluster))


def smem_bytes(spec: AttentionSpec, tile: DecodeSm90Tile) -> int:
    """Shared memory of one CTA, as the kernel allocates it."""
    heads = heads_per_block(spec, tile)
    rows = heads * tile.heads_per_item
    total = tile.warps * warp_region_bytes(spec, tile)
    total = _round_up(total + 8 * heads * tile.warps, 16)  # running maximum and sum of every warp
    total += 8 * rows  # sink and output factor of every row
    total += 8 * (tile.warps * tile.stages + 1)  # mbarriers
    if tile.cluster > 1:
        total = _round_up(total, 16) + 4 * slice_elements(spec, tile) * tile.cluster  # slices pushed by the peers
        total += 8 * rows * tile.cluster  # their maxima and sums
    return total


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The first reason this kernel cannot do ``spec`` on ``target``, or None."""
    if not target.is_hopper:
        return f"needs TMA and clusters (sm_90a), not {target.arch}"
    if spec.kind != "decode":
        return f"kind={spec.kind} is not decode"
    if spec.q_dtype not in ("float16", "bfloat16"):
        return f"q={spec.q_dtype} is neither float16 nor bfloat16"
    if spec.kv_bits == 16 and spec.kv_dtype != spec.q_dtype:
        return f"kv={spec.kv_dtype} differs from q={spec.q_dtype}"
    if spec.kv_bits == 32:
        return "kv=float32 has no tensor-core path"
    for dim in (spec.head_dim_qk, spec.head_dim_vo):
        if dim > 256 or dim * spec.kv_bits // 8 % 32 or dim * spec.kv_bits // 8 < 64:
            return f"head_dim={dim} with {spec.kv_dtype} is not 64 to 256 elements in rows of a multiple of 32 bytes"
    if spec.group_size > MAX_GROUP_SIZE:
        return f"group_size={spec.group_size} exceeds {MAX_GROUP_SIZE}: KV would be read once per 16 query heads"
    if spec.pos_encoding == "ROPE_LLAMA":
        return "ROPE_LLAMA rotates K in registers, which the swizzled ring does not allow"
    if spec.custom_mask:
        return "custom masks belong to prefill"
    return None


def choose(spec: AttentionSpec, target: Target, hints: Hints) -> DecodeSm90Tile:
    """The tile for a batch whose lengths are unknown.

    The grid has cluster x items CTAs. While the items do not fill the device, the cluster makes up for it; from several waves on, long
    requests go first. A row serves every length, so the cells measured for one number of requests (512, 2048, 8192 tokens each, mixed
    lengths) count together: that tile wins whose largest loss against the best tile of each cell is smallest, and of two that are within
    3 points of each other the one with the smaller mean loss. docs/kernels/decode_sm90.md has the losses.

    Times: one H200, 2026-11-22, 32/8 heads, head_dim 128, page 16, bf16 unless said. L x n is n tokens for each of L requests. The times of
    2 x n and those of unsorted clusters had a barrier of the cluster in the merge, which costs clusters of 4 and 8 up to 9 %.
    """
    if hints.batch_invariant:  # how KV is dealt to warps decides the order of sums: the same for every batch size, model and device
        return _tile(spec, 4, DEEP, evict_first=True)
    sms, bf16 = hints.num_sms, spec.kv_bits == 16
    items = max(1, hints.batch_size * hints.num_kv_heads * head_blocks(spec, _tile(spec, 1, DEEP)))
    if items <= 2:  # a tensor-parallel shard of one request. 1 x 131072, 8/1 heads, 16 splits: 22.5 us, early 23.2; C2, 64 splits: 22.8
        return _tile(spec, 8, DEEP, split_kv=True)
    if items <= sms // 12:  # 1 x 512, 2048, 8192: 2.85, 5.15, 11.45 us, late 3.31, 5.33, 11.59; 1 x 32768: 36.5, with 8 warps 34.3
        return _tile(spec, 8, DEEP, early=True)
    if items <= sms // 6:  # 2 x 2048, 8192: 7.34, 19.4 us, early 7.48, 19.4; DEEP, early: 8.90, 27.1
        return _tile(spec, 8, CROWDED)
    if items <= sms // 4:  # 4 x 512, 2048, 8192: 5.07, 10.86, 34.5 us, early 5.09, 11.02, 34.9. 3 x 2048: 9.46, C4 DEEP 9.17, 4 x 2048 14.6
        return _tile(spec, 2, ALONE)
    if items <= sms // 2:  # 8 x 2048, 8192: 18.3, 63.8 us; C2 DEEP 18.7, 63.6. Early costs fp8 1 % at 4 x 2048, 3 % at 16 x 2048
        return _tile(spec, 2, ALONE, early=bf16)
    if items <= sms:  # 16 x 512, 2048, 8192: 10.1, 33.7, 124.8 us, C1 of 8 warps 9.8, 33.3, 124.2; but 24 mixed: 3279 GB/s, C1 2394
        return _tile(spec, 2, DEEP, early=bf16, evict_first=True)
    if items <= 2 * sms:  # 24 mixed: 4004 GB/s, unsorted 3827; C8 4110, but 64 x 512: 76.6 us, C4 47.2. fp8 24 mixed: 3480
        return _tile(spec, 4, DEEP, evict_first=True, longest_first=True)
    together = _heads_together(spec, hints)
    if items < 8 * sms:
        # 64 x 512, 2048, 8192, 64 mixed: C2 DEEP 3466, 4243, 4418, 4245 GB/s, C4 CROWDED 3433, 4251, 4332, 4432. The rule says the latter
        # by two points; C2 is ahead of the best peer (3246, 4101, 4364, 4091, another run) in all four, which counts for more.
        # fp8: 64 mixed: C4 CROWDED 3771 GB/s, C4 DEEP 4082, unsorted 3772; 64 x 512: 24.3 us, 28.4, 26.5; 64 x 8192: 4244 GB/s, 4173, 4157.
        cluster, shape = (2, DEEP) if bf16 else (4, CROWDED)
        return _tile(spec, cluster, shape, heads_per_item=together, evict_first=True, longest_first=True)
    # As many CTAs as KV heads. 256 mixed: 4523 GB/s, unsorted 4342; 256 x 512: 125.0 us, unsorted 123.3, C4 CROWDED 137.6.
    # fp8, C2 with two heads: 256 mixed 4374 GB/s, C1 unsorted 3746; 256 x 512: 73.3 us, 66.5.
    return _tile(spec, together, DEEP, heads_per_item=together, evict_first=True, longest_first=True)


def _heads_together(spec: AttentionSpec, hints: Hints) -> int:
    """Heads whose rows of a token make up about 256 bytes: DRAM reads shorter pieces slower.

    One H200, 2026-11-22, 64 x 8192, 1, 2, 4 heads: bf16 head_dim 64, C1: 4140, 4291 GB/s; fp8 head_dim 64, C1: 3272, 4003, 4135. fp8
    head_dim 128, C4: 4100, 4173.
    """
    return next(heads for heads in (4, 2, 1) if heads == 1 or (heads * _row_bytes(spec) <= 256 and hints.num_kv_heads % heads == 0))


def _tile(
    spec: AttentionSpec,
    cluster: int,
    shape: Shape,
    *,
    heads_per_item: int = 1,
    early: bool = False,
    evict_first: bool = False,
    longest_first: bool = False,
    split_kv: bool = False,
) -> DecodeSm90Tile:
    """The tile of that shape, or of the next smaller one that fits the SM's registers and shared memory; no flag where it cannot apply."""
    # Two tiles of 8 heads (a group of up to 16) share each K and V fragment; wider heads have no registers for that.
    head_tiles = 2 if spec.group_size > COLUMNS and max(spec.head_dim_qk, spec.head_dim_vo) <= 128 else 1
    tile = DecodeSm90Tile(
        cluster=cluster,
        warps=4,
        stages=1,
        tokens=_tokens(spec),
        head_tiles=head_tiles,
        heads_per_item=heads_per_item,
        early_metadata=early and spec.kv_layout == "paged" and not gathers(spec),
        longest_first=longest_first and spec.kv_layout != "single",
        split_kv=split_kv,
    )
    tile = dataclasses.replace(tile, evict_first=evict_first and head_blocks(spec, tile) == 1)
    # Rows beyond 256 bytes take 16 KiB per slot, so that less fits.
    for warps, stages, ctas_per_sm in (shape, DEEP, Shape(4, 2, 2), Shape(4, 3, 1)):
        candidate = dataclasses.replace(tile, warps=warps, stages=stages, ctas_per_sm=ctas_per_sm)
        if _fits(spec, candidate):
            return candidate
    raise AssertionError(f"no shape fits {spec}")


def _fits(spec: AttentionSpec, tile: DecodeSm90Tile) -> bool:
    """Whether ``ctas_per_sm`` CTAs have the shared memory, and their threads the registers (168 in three CTAs of 4 warps)."""
    if tile.ctas_per_sm == 3 and (tile.head_tiles > 1 or max(spec.head_dim_qk, spec.head_dim_vo) > 128):
        return False  # up to 194 and 207 registers
    return smem_bytes(spec, tile) <= min(SHARED_MEMORY_PER_CTA, SHARED_MEMORY_PER_SM // tile.ctas_per_sm - 1024)


def gathers(spec: AttentionSpec) -> bool:
    """Whether rows are copied one by one (16-byte cp.async) because no TMA box fits the page: sizes below 8 and odd ones."""
    return _box_tokens(spec) == 0


def tokens_per_id(spec: AttentionSpec, tile: DecodeSm90Tile) -> int:
    """Tokens that one looked-up page id covers: a TMA box, or a single token when rows are gathered."""
    return 1 if gathers(spec) else min(spec.page_size or tile.tokens, tile.tokens)


def id_steps(spec: AttentionSpec, tile: DecodeSm90Tile) -> int:
    """Slots whose page ids one coalesced load of a warp covers."""
    return 32 // (tile.tokens // tokens_per_id(spec, tile))


def _tokens(spec: AttentionSpec) -> int:
    """Tokens of a slot: what :func:`_box_tokens` wants, or at most 32 (one per lane) when rows are gathered."""
    return _box_tokens(spec) or next(t for t in (32, 16) if t == 16 or t * _row_bytes(spec) <= SLOT_BYTES)


def _box_tokens(spec: AttentionSpec) -> int:
    """The most tokens a slot of boxes may have: about 4 KiB of K, and a whole number of pages or of slots per page; 0 when no size fits."""
    for tokens in (64, 32, 16):
        page = spec.page_size or tokens
        if (tokens == 16 or tokens * _row_bytes(spec) <= SLOT_BYTES) and page % 8 == 0 and (page % tokens == 0 or tokens % page == 0):
            return tokens
    return 0


def _row_bytes(spec: AttentionSpec) -> int:
    return max(spec.head_dim_qk, spec.head_dim_vo) * spec.kv_bits // 8


def _round_up(n: int, to: int) -> int:
    return math.ceil(n / to) * to
