"""Geometry of the Hopper decode kernel: how work is dealt to warps, and where everything lies in shared memory.

    warp 0's ring | warp 1's ring | ...     a ring: slot 0 (K, V), slot 1 (K, V), ...; later the warp's fp32 partial O [heads, d + 4]
    s_sum     (maximum, sum) of every head and warp
    s_row     (factor of the output, base-2 logit of the sink) of every output row
    full      an mbarrier for every slot        arrived    one for all that the cluster sends
    s_lengths (early metadata) kv_indptr of the request and the next, and kv_last_page_len, as three threads found them
    s_slice   this CTA's share of the outputs from every CTA of the cluster        s_peer    (maximum, sum) of every row and CTA

A slot holds T tokens. A row (one token of one head) is cut into panels of 128, 64 or 32 bytes, the widest that divides it, and stored with
the TMA swizzle of that width: box after box, panel after panel, token after token. The 8 pieces of 16 bytes that one phase of ldmatrix
reads lie in 8 different bank groups, whatever the width.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from ..device.args import CUTE_DTYPES
from ..tiles_decode_sm90 import (
    COLUMNS,
    Rows,
    gathers,
    head_blocks,
    heads_per_block,
    id_steps,
    rows_of,
    slice_elements,
    slot_bytes,
    tokens_per_id,
    warp_region_bytes,
)

SWIZZLES = {
    128: warpgroup.SmemLayoutAtomKind.K_SW128,
    64: warpgroup.SmemLayoutAtomKind.K_SW64,
    32: warpgroup.SmemLayoutAtomKind.K_SW32,
}


class Shared(NamedTuple):
    """One CTA's shared memory: see the module docstring. What a tile has no use for is None."""

    ring: cute.Pointer
    s_k: cute.Tensor
    s_v: cute.Tensor
    s_o: cute.Tensor
    s_sum: cute.Tensor
    s_row: cute.Tensor
    s_lengths: object
    full: cute.Pointer
    arrived: cute.Pointer
    s_slice: object
    s_peer: object


class DecodeLayout:
    """Static geometry of one (spec, tile)."""

    def __init__(self, spec, tile):
        self.spec, self.tile, self.kv_dtype = spec, tile, CUTE_DTYPES[spec.kv_dtype]
        self.k_rows, self.v_rows = rows_of(spec.head_dim_qk, spec.kv_bits), rows_of(spec.head_dim_vo, spec.kv_bits)
        self.k_slot, self.v_slot = slot_bytes(spec, tile)
        self.warp_region = warp_region_bytes(spec, tile)
        self.gathers = gathers(spec)
        self.tokens_per_id, self.id_steps = tokens_per_id(spec, tile), id_steps(spec, tile)
        self.ids_per_step = tile.tokens // self.tokens_per_id
        self.box_tokens = tile.tokens if self.gathers else self.tokens_per_id  # tokens stored together in shared memory
        self.boxes = tile.tokens // self.box_tokens

        self.heads = heads_per_block(spec, tile)
        self.head_blocks = head_blocks(spec, tile)
        self.head_tiles = -(-self.heads // COLUMNS)
        self.token_tiles = tile.tokens // 16
        self.rows = self.heads * tile.heads_per_item  # output rows of an item
        self.warps_per_head = tile.warps // tile.heads_per_item
        self.slice = slice_elements(spec, tile)
        assert tile.tokens % 16 == 0 and tile.warps % tile.heads_per_item == 0 and self.id_steps > 0, tile
        assert self.gathers or not spec.page_size or tile.tokens % self.box_tokens == 0 == spec.page_size % self.box_tokens, tile

    # ------------------------------------------------------------------------------------------------------------------- shared memory

    def allocate(self, memory, k_ring, v_ring, warp):
        """Everything in :class:`Shared`; ``full`` are the barriers of this warp's ring."""
        tile, dim = self.tile, self.spec.head_dim_vo
        ring = memory.allocate(tile.warps * self.warp_region, byte_alignment=1024)
        partial = cute.make_layout((self.heads, dim, tile.warps), stride=(dim + 4, 1, self.warp_region // 4))
        s_sum = memory.allocate_tensor(Float32, cute.make_layout((2, self.heads, tile.warps)), byte_alignment=16)
        s_row = memory.allocate_tensor(Float32, cute.make_layout((2, self.rows)), byte_alignment=16)
        barriers = memory.allocate_array(Int64, tile.warps * tile.stages + 1)
        s_lengths, s_slice, s_peer = None, None, None
        if const_expr(tile.early_metadata):
            s_lengths = memory.allocate_tensor(Int32, cute.make_layout(3), byte_alignment=16)
        if const_expr(tile.cluster > 1):
            s_slice = memory.allocate_tensor(Float32, cute.make_layout((self.slice, tile.cluster)), byte_alignment=16)
            s_peer = memory.allocate_tensor(Float32, cute.make_layout((2, self.rows, tile.cluster)), byte_alignment=16)
        return Shared(
            ring=ring,
            s_k=cute.make_tensor(cute.recast_ptr(ring, k_ring.inner, dtype=self.kv_dtype), k_ring.outer),
            s_v=cute.make_tensor(cute.recast_ptr(ring + self.k_slot, v_ring.inner, dtype=self.kv_dtype), v_ring.outer),
            s_o=cute.make_tensor(cute.recast_ptr(ring, dtype=Float32), partial),  # over the rings, once they are read
            s_sum=s_sum,
            s_row=s_row,
            s_lengths=s_lengths,
            full=barriers + warp * tile.stages,
            arrived=barriers + tile.warps * tile.stages,
            s_slice=s_slice,
            s_peer=s_peer,
        )

    def ring_layout(self, rows: Rows):
        """Shared-memory layout (token, element, panel, box, (slot, warp)) of all rings of K or V; K and V slots alternate."""
        width = self.kv_dtype.width // 8
        atom = warpgroup.make_smem_layout_atom(SWIZZLES[rows.panel_bytes], self.kv_dtype)
        slot = cute.tile_to_shape(atom, (self.box_tokens, rows.panel_bytes // width, rows.panels, self.boxes), (0, 1, 2, 3))
        rings = cute.make_layout(
            (self.tile.stages, self.tile.warps), stride=((self.k_slot + self.v_slot) // width, self.warp_region // width)
        )
        return cute.make_composed_layout(slot.inner, 0, cute.append(slot.outer, rings))

    # ---------------------------------------------------------------------------------------------------------------------------- addresses
    def row_offset(self, rows: Rows, row):
        """Bytes from the slot to a token's first panel (``row`` static or not); box after box, panel after panel, token after token."""
        return row // self.box_tokens * (self.box_tokens * rows.bytes) + row % self.box_tokens * rows.panel_bytes

    def fragment_offset(self, rows: Rows, token_tile: int, column: int) -> int:
        """Static part of the address of 16 tokens x 32 bytes: ``column`` counts 32-byte columns of the row."""
        per_panel = rows.panel_bytes // 32
        return self.row_offset(rows, 16 * token_tile) + column // per_panel * self.box_tokens * rows.panel_bytes

    @cute.jit
    def lane_offsets(self, lane: Int32):
        """Byte offsets, inside 16 tokens of a panel, of the 16-byte row piece this lane names to ldmatrix.x4; entry j is 32-byte column j.

        K:            matrices (tokens 0-7, piece 2j), (8-15, 2j), (0-7, 2j + 1), (8-15, 2j + 1) are registers a0..a3 of K as mma operand A.
        V, 16 bit:    transposed, (tokens 0-7, 2j), (0-7, 2j + 1), (8-15, 2j), (8-15, 2j + 1) are a0..a3 of V^T.
        V, 8 bit:     addressed like K; transposition moves pairs of d, which ``accumulate`` separates.
        """
        row, piece = lane % 16, lane // 16
        k_lane = self.swizzled(self.k_rows, row, piece)
        if const_expr(self.spec.kv_bits == 16):
            row, piece = lane % 8 + 8 * (lane // 16), lane // 8 % 2
        return k_lane, self.swizzled(self.v_rows, row, piece)

    @cute.jit
    def swizzled(self, rows: cutlass.Constexpr, row: Int32, piece: Int32):
        """Offsets of pieces ``2j + piece`` of a row: the TMA swizzle XORs the piece with bits 7 and up of the row's address."""
        pieces = rows.panel_bytes // 16
        flip = row // (128 // rows.panel_bytes) % pieces
        offsets = cute.make_rmem_tensor(pieces // 2, Uint32)
        start = self.row_offset(rows, row)
        for j in cutlass.range_constexpr(pieces // 2):
            offsets[j] = Uint32(start + ((2 * j + piece) ^ flip) * 16)
        return offsets

    # ---------------------------------------------------------------------------------------------------------------------------------- TMA
    @cute.jit
    def tma_load(self, cache: cute.Tensor, ring: cute.ComposedLayout, rows: cutlass.Constexpr):
        """TMA of one box: (box_tokens tokens, one row) of one head and page. The page id is the last coordinate."""
        panel = rows.panel_bytes * 8 // self.kv_dtype.width
        page, token, head, _ = cache.layout.stride
        view = cute.make_tensor(
            cache.iterator,
            cute.make_layout((cache.shape[1], panel, rows.panels, cache.shape[2], cache.shape[0]), stride=(token, 1, panel, head, page)),
        )
        box = cute.slice_(ring, (None, None, None, 0, (0, 0)))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), view, box, (self.box_tokens, panel, rows.panels))
