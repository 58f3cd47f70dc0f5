"""Layouts of the Hopper prefill kernel: how Q, K, V and O lie in shared memory, and the TMA boxes that bring them there.

A shared tile is stored as d/64 blocks of 64 columns; a block holds all rows of the tile, 128 swizzled bytes each: what wgmma reads with
one stride between groups of 8 rows. The same bytes have two layouts: (row, column, buffer) for the MMA, and split into boxes for TMA.

Boxes: a contiguous K/V tile, a tile inside one page, and 64 rows of Q or O are one box each (all column blocks at once). Where a tile
spans several pages a box is one page by 64 columns: with all its columns in one box, the rows of two pages would not be one stride apart.
"""

import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync, warpgroup

SWIZZLE_COLUMNS = 64  # 16-bit elements of one 128-byte swizzled row, the widest box TMA swizzles
GROUP_ROWS = 64  # query rows of one consumer warp group: wgmma has M = 64


class PrefillLayout:
    """Static geometry of one (spec, tile)."""

    def __init__(self, spec, tile, dtype):
        self.dtype = dtype
        self.stages = tile.num_stages
        self.groups = tile.num_consumer_groups
        self.head_dim_qk, self.head_dim_vo = spec.head_dim_qk, spec.head_dim_vo
        self.o_in_q = tile.num_q_buffers == 1
        self.q_tiles = tile.num_consumer_groups * tile.num_q_buffers
        self.tile_kv = tile.tile_kv
        self.box_tokens = min(spec.page_size, tile.tile_kv) if spec.kv_layout == "paged" else tile.tile_kv
        self.boxes = tile.tile_kv // self.box_tokens  # boxes along the tokens of a tile
        self.tiles_per_page = spec.page_size // self.box_tokens if spec.kv_layout == "paged" else 1
        assert self.boxes * self.box_tokens == tile.tile_kv and self.boxes <= 32
        assert spec.kv_layout != "paged" or self.tiles_per_page * self.box_tokens == spec.page_size

    # ------------------------------------------------------------------------------------------------ shared memory

    def tiles(self, rows, columns, buffers):
        """(row, column, buffer): the MMA's view."""
        return cute.tile_to_shape(self._atom(), (rows, columns, buffers), (0, 1, 2))

    def row_boxes(self, columns, buffers):
        """(row, 64, column block, buffer): TMA's view of Q or O, a group's 64 rows per buffer."""
        return cute.tile_to_shape(self._atom(), (GROUP_ROWS, SWIZZLE_COLUMNS, columns // SWIZZLE_COLUMNS, buffers), (0, 1, 2, 3))

    def kv_boxes(self, columns):
        """TMA's view of K or V: (token, 64, column block, stage), or (token, 64, box, column block, stage) where a tile spans pages."""
        blocks = columns // SWIZZLE_COLUMNS
        if self.boxes == 1:
            return cute.tile_to_shape(self._atom(), (self.box_tokens, SWIZZLE_COLUMNS, blocks, self.stages), (0, 1, 2, 3))
        shape = (self.box_tokens, SWIZZLE_COLUMNS, self.boxes, blocks, self.stages)
        return cute.tile_to_shape(self._atom(), shape, (0, 1, 2, 3, 4))

    def o_view(self, s_o, layout):
        """The O buffers under ``layout``, whose last mode counts groups; the swizzle stays on the pointer."""
        shape, stride = layout.outer.shape, layout.outer.stride
        pitch = GROUP_ROWS * (self.head_dim_qk if self.o_in_q else self.head_dim_vo)  # a Q buffer each where O is staged in Q's place
        return cute.make_tensor(s_o.iterator, cute.make_layout((*shape[:-1], self.groups), stride=(*stride[:-1], pitch)))

    def _atom(self):
        return warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.dtype)

    # ------------------------------------------------------------------------------------------------ TMA

    def row_box(self, columns):
        """Box of Q and O: 64 rows, all columns."""
        return (GROUP_ROWS, SWIZZLE_COLUMNS, columns // SWIZZLE_COLUMNS)

    def kv_box(self, columns):
        """Box of K and V."""
        box = (self.box_tokens, SWIZZLE_COLUMNS, columns // SWIZZLE_COLUMNS)
        return box if self.boxes == 1 else box[:2]

    def row_tma(self, op, t):
        """(atom, coordinates) of Q or O, [rows, heads, d] seen as (row, 64, column block, head)."""
        s, columns = t.layout.stride, t.shape[2]
        shape = (t.shape[0], SWIZZLE_COLUMNS, columns // SWIZZLE_COLUMNS, t.shape[1])
        view = cute.make_tensor(t.iterator, cute.make_layout(shape, stride=(s[0], 1, SWIZZLE_COLUMNS, s[1])))
        return self._tma(op, view, self.row_boxes(columns, 1), self.row_box(columns))

    def kv_tma(self, op, t):
        """(atom, coordinates) of K or V, [pages, tokens, heads, d] seen as (token, 64, column block, head, page).

        The page is a coordinate, so its stride may need 64 bits, and a page past the end reads zeros instead of memory.
        """
        s, columns = t.layout.stride, t.shape[3]
        shape = (t.shape[1], SWIZZLE_COLUMNS, columns // SWIZZLE_COLUMNS, t.shape[2], t.shape[0])
        view = cute.make_tensor(t.iterator, cute.make_layout(shape, stride=(s[1], 1, SWIZZLE_COLUMNS, s[2], s[0])))
        return self._tma(op, view, self.kv_boxes(columns), self.kv_box(columns))

    def partition(self, tma, shared, coords, box):
        """TMA's views (smem box, buffer...) and (gmem box, coordinate) of a tensor cut in boxes."""
        tiled = cute.zipped_divide(coords, box)
        return cpasync.tma_partition(tma, 0, cute.make_layout(1), cute.group_modes(shared, 0, len(box)), tiled)

    def _tma(self, op, view, boxes, box):
        one = cute.slice_(boxes, (None,) * len(box) + (0,) * (cute.rank(boxes) - len(box)))
        return cpasync.make_tiled_tma_atom(op, view, one, box)
