"""Tiles of the Hopper decode kernel: what it refuses, the shapes it is built for, and which one a batch gets.

Host-only: importing this never imports the compiler.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

from .lengths import EVEN, LONG, MIXED, SHORT
from .spec import AttentionSpec

if TYPE_CHECKING:
    from ..jit import Target
    from .tiles import Hints

PATH = "cute_infer.attention.kernels.decode_sm90:DecodeSm90"

COLUMNS = 8  # query heads are the N side of mma.m16n8k16
MAX_GROUP_SIZE = 64
MAX_TOKENS = 64  # of a slot: scores of more would take too many registers
SLOT_BYTES = 4096  # of K in a slot, and of V: 16 rows of 128 bf16
SHARED_MEMORY_PER_SM = 228 * 1024  # 1 KiB of it per CTA is the system's
SHARED_MEMORY_PER_CTA = 227 * 1024


class Shape(NamedTuple):
    """Warps of a CTA, slots of each warp's ring, CTAs that share an SM, and the size of a slot in multiples of about 4 KiB of K."""

    warps: int
    stages: int
    ctas_per_sm: int
    slot_size: int = 1


DEEP = Shape(4, 3, 2)  # three slots per warp, two CTAs of 4 warps per SM
CROWDED = Shape(4, 2, 3)  # two slots, three CTAs: as many bytes in flight, and the last wave is finer
WIDE = Shape(8, 3, 1)  # as many bytes in flight as an SM can hold in one CTA
THICK = Shape(4, 2, 1, 2)  # two slots of twice the size: fewer, longer steps
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
    lets_go         when the next launch may start: a CTA's first copies are under way ("filled"), its last ones are ("refilled"), it has
                    read all KV ("merging"), or not before this launch has ended ("never", which does not start early itself either).
    prefetch        slots of each warp that L2 is asked for before the previous kernel has finished, with what early_metadata found.
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
    lets_go: str = "filled"
    prefetch: int = 0

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
    if tile.early_metadata:
        total = _round_up(total, 16) + 12  # lengths as three threads found them
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
    """The tile for a batch.

    The grid has cluster x items CTAs. While the items do not fill the device, the cluster makes up for it; from several waves on, long
    requests go first. Where the host knows something of the lengths (``hints.kv_lens``), the fastest tile timed for that class serves.
    Where it does not, one row serves every length: the cells measured for one number of requests (512, 2048, 8192 tokens each, mixed
    lengths) count together, that tile wins whose largest loss against the best tile of each cell is smallest, and of two that are within
    3 points of each other the one with the smaller mean loss. docs/kernels/decode_sm90.md has the losses.

    Times in us: one H200, 2026-11-22, 32/8 heads, head_dim 128, page 16, bf16 unless said, launches back to back. L x n is n tokens for
    each of L requests. "After an ordinary kernel": with one before every launch, whose time is included.
    """
    if hints.batch_invariant:  # how KV is dealt to warps decides the order of sums: the same for every batch size, model and device
        return _tile(spec, 4, DEEP, evict_first=True)
    sms, bf16 = hints.num_sms, spec.kv_bits == 16
    mean, spread = hints.kv_lens
    items = max(1, hints.batch_size * hints.num_kv_heads * head_blocks(spec, _tile(spec, 1, DEEP)))
    if items <= 2:  # a tensor-parallel shard of one request. 1 x 131072, 8/1 heads, 16 splits: 22.5, early 23.2; C2, 64 splits: 22.8
        return _tile(spec, 8, DEEP, split_kv=True)
    if items <= sms // 12:
        if mean == LONG:  # 1 x 32768: 34.4, the other 34.8, this one early 51.3
            return _tile(spec, 8, WIDE, lets_go="never")
        # 1 x 512, 2048, 8192: 2.50, 4.89, 10.75, without prefetch 2.68, 4.84, 11.15. After an ordinary kernel 2048, 8192: 8.2, 14.3,
        # without 7.9, 14.0. fp8 1 x 2048, 8192: 3.60, 7.62, without 3.90, 8.09.
        return _tile(spec, 8, DEEP, early=True, prefetch=3)
    # For 2 to 4 requests early costs nothing after an ordinary kernel; prefetch does: 2 x 2048 8.7, without 8.2; 4 x 512 7.3, without 6.6.
    # fp8 4 x 2048: 7.18, early 7.19, after an ordinary kernel 8.9, early 9.3.
    if items <= sms // 6:  # 2 x 2048, 8192: 6.55, 18.08, not early 7.17, 18.82; after an ordinary kernel 8.21, 20.12, 8.33, 20.16
        return _tile(spec, 8, CROWDED, early=bf16)
    if bf16 and items <= sms * 3 // 16:  # 3 x 2048: 8.26, C2 ALONE early 8.53; after an ordinary kernel 10.4, 10.8
        return _tile(spec, 4, CROWDED, early=True)
    if items <= sms // 4:
        # 4 x 512, 2048, 8192: 4.20, 9.92, 32.8, not early 4.80, 10.47, 33.7; after an ordinary kernel 6.61, 12.20, 35.7, 6.60, 12.14, 35.7
        return _tile(spec, 2, ALONE, early=bf16)
    if items <= sms // 2:  # 8 x 2048, 8192: 18.3, 63.9, C2 DEEP 18.7, 63.4. Early costs fp8 1 % at 4 x 2048
        return _tile(spec, 2, DEEP if bf16 and spread == EVEN and mean > 4096 else ALONE, early=bf16)
    together = _heads_together(spec, hints)
    if items <= sms:
        if spread == EVEN and items > sms * 7 // 8:  # a CTA for each SM
            if not bf16:  # 16 x 2048: 17.6, without prefetch 19.4, C1 WIDE 18.8. 16 x 8192: 65.0, with prefetch 73.0, C1 WIDE 66.6
                prefetch = 3 if mean <= 4096 else 0
                return _tile(spec, together, DEEP, heads_per_item=together, early=True, evict_first=True, prefetch=prefetch)
            if mean > 4096:  # 16 x 8192: 122.0, filled 123.4, C2 DEEP early 124.0
                return _tile(spec, 1, WIDE, evict_first=True, lets_go="never")
            # 16 x 512, 2048: 9.5, 32.0, never 10.4, 32.6, with prefetch 10.3, 31.5; after an ordinary kernel 512: 11.5, 11.3, 13.5
            return _tile(spec, 1, WIDE, early=True, evict_first=True, prefetch=3 if mean > SHORT else 0)
        # C1 at 24 mixed: 2394 GB/s, C2 3279; at 8 x 8192 71.8 us, C2 63.4
        return _tile(spec, 2, DEEP, early=bf16, evict_first=True)
    if items <= 2 * sms:
        if spread == MIXED:  # 24 mixed: 138.0, C4 140.5. fp8 24 mixed: 77.2, filled 78.2, C4 99.8
            return _tile(spec, 8, DEEP, heads_per_item=together, evict_first=True, longest_first=True, lets_go="merging")
        if spread == EVEN and bf16:
            if mean <= 4096 and items > sms * 7 // 4:  # 32 x 2048: 61.3, C2 early 64.7; 24 x 2048: 58.7, C2 early 51.7
                return _tile(spec, 1, DEEP, early=True, evict_first=True, prefetch=3)
            # 24 x 2048: 51.7, C4 51.2; 32 x 2048, 8192: 64.7, 242.4, C4 66.5, 247.6, C4 longest first 68.8, 250.1
            return _tile(spec, 2, DEEP, early=True, evict_first=True)
        return _tile(spec, 4, DEEP, evict_first=True, longest_first=True)  # C8 takes 76.6 at 64 x 512, C4 47.2
    last_wave = items % (2 * sms)
    if spread == EVEN and (last_wave == 0 or last_wave > sms // 2 or items >= 8 * sms):
        return _tile_of_even_waves(spec, hints, items)
    if items < 8 * sms:
        if spread == MIXED and bf16:  # 64 mixed: 347.8, C2 DEEP 363.5, C8 DEEP 371.9
            return _tile(spec, 4, CROWDED, heads_per_item=together, evict_first=True, longest_first=True)
        if spread == MIXED:  # fp8 64 mixed: 186.8, filled 188.0, C8 191.4, C2 237.8
            return _tile(spec, 4, DEEP, heads_per_item=together, evict_first=True, longest_first=True, lets_go="merging")
        # 64 x 512, 2048, 8192, 64 mixed: C2 DEEP 3466, 4243, 4418, 4245 GB/s, C4 CROWDED 3433, 4251, 4332, 4432. The rule says the latter
        # by two points; C2 is ahead of the best peer (3246, 4101, 4364, 4091, another run) in all four, which counts for more.
        # fp8: 64 mixed: C4 CROWDED 3771 GB/s, C4 DEEP 4082, unsorted 3772; 64 x 512: 24.3 us, 28.4, 26.5; 64 x 8192: 4244 GB/s, 4173, 4157.
        cluster, shape = (2, DEEP) if bf16 else (4, CROWDED)
        return _tile(spec, cluster, shape, heads_per_item=together, evict_first=True, longest_first=True)
    # As many CTAs as KV heads. 256 mixed: 1364, C2 1367, C4 1389; 256 x 512: 125.0, unsorted 123.3, C4 CROWDED 137.6.
    # fp8, C2 with two heads: 256 mixed 4374 GB/s, C1 unsorted 3746; 256 x 512: 73.3 us, 66.5.
    return _tile(spec, together, DEEP, heads_per_item=together, evict_first=True, longest_first=True)


def _tile_of_even_waves(spec: AttentionSpec, hints: Hints, items: int) -> DecodeSm90Tile:
    """:func:`choose` for several waves of requests about equally long, the last of which is not nearly empty."""
    mean, sms, together = hints.kv_lens.mean, hints.num_sms, _heads_together(spec, hints)
    many = items >= 8 * sms
    if spec.kv_bits == 16:
        if sms * 7 // 2 < items <= 4 * sms and together == 1 and hints.num_kv_heads % 2 == 0:
            # Pairs of heads are just one wave. 64 x 512, 2048, 8192: 33.9, 123.5, 479.6, one head, early 34.1, 123.9, 481.5
            return _tile(spec, 1, DEEP, heads_per_item=2, evict_first=True, lets_go="never")
        if many and mean > 4096:  # 256 x 8192: 1892.7, DEEP early 1900.0
            return _tile(spec, 1, CROWDED, heads_per_item=together, evict_first=True)
        return _tile(spec, 1, DEEP, heads_per_item=together, early=True, evict_first=True)  # 256 x 512: 123.2, longest first 125.0
    if mean > 4096:  # 64 x 8192: DEEP never 246.9, THICK 247.3; 256 x 8192: THICK 961.8, C4 DEEP longest first 971.2, DEEP never 984.0
        return _tile(spec, 1, THICK if many else DEEP, heads_per_item=together, evict_first=True, lets_go="never")
    # 64 x 512, 2048: 19.0, 63.7, never 19.7, 65.3. 256 x 512: 66.5 without prefetch, never 66.7
    return _tile(spec, 1, DEEP, heads_per_item=together, early=not many, evict_first=True, prefetch=0 if many else 3)


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
    prefetch: int = 0,
    lets_go: str = "filled",
) -> DecodeSm90Tile:
    """The tile of that shape, or of the next smaller one that fits the SM's registers and shared memory; no flag where it cannot apply.

    With ``prefetch`` (of an early tile) the next launch starts when the last copies are under way, lest its requests delay them.
    """
    # Two tiles of 8 heads (a group of up to 16) share each K and V fragment; wider heads have no registers for that.
    head_tiles = 2 if spec.group_size > COLUMNS and max(spec.head_dim_qk, spec.head_dim_vo) <= 128 else 1
    early = early and spec.kv_layout == "paged" and not gathers(spec)
    prefetch = prefetch if early else 0
    tile = DecodeSm90Tile(
        cluster=cluster,
        warps=4,
        stages=1,
        tokens=_tokens(spec),
        head_tiles=head_tiles,
        heads_per_item=heads_per_item,
        early_metadata=early,
        longest_first=longest_first and spec.kv_layout != "single",
        split_kv=split_kv,
        prefetch=prefetch,
        lets_go="refilled" if prefetch else lets_go,
    )
    tile = dataclasses.replace(tile, evict_first=evict_first and head_blocks(spec, tile) == 1)
    # Rows beyond 256 bytes take 16 KiB per slot, so that less fits.
    for warps, stages, ctas_per_sm, slot_size in (shape, DEEP, Shape(4, 2, 2), Shape(4, 3, 1)):
        tokens = slot_size * tile.tokens
        candidate = dataclasses.replace(tile, warps=warps, stages=stages, ctas_per_sm=ctas_per_sm, tokens=tokens)
        if _fits(spec, candidate):
            return candidate
    raise AssertionError(f"no shape fits {spec}")


def _fits(spec: AttentionSpec, tile: DecodeSm90Tile) -> bool:
    """Whether slots and pages match, and ``ctas_per_sm`` CTAs have the shared memory and the registers (168 in three CTAs of 4 warps)."""
    if tile.tokens > _tokens(spec) and (gathers(spec) or tile.tokens > MAX_TOKENS or not _divides(spec.page_size, tile.tokens)):
        return False
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
    for tokens in (MAX_TOKENS, 32, 16):
        page = spec.page_size or tokens
        if (tokens == 16 or tokens * _row_bytes(spec) <= SLOT_BYTES) and page % 8 == 0 and _divides(page, tokens):
            return tokens
    return 0


def _divides(page_size: int, tokens: int) -> bool:
    """Whether a slot is a whole number of pages (or of nothing, where there are none), or a page a whole number of slots."""
    return not page_size or page_size % tokens == 0 or tokens % page_size == 0


def _row_bytes(spec: AttentionSpec) -> int:
    return max(spec.head_dim_qk, spec.head_dim_vo) * spec.kv_bits // 8


def _round_up(n: int, to: int) -> int:
    return math.ceil(n / to) * to
