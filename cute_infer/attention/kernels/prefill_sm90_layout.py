"""Layouts of the Hopper prefill kernel: how Q, K, V and O lie in shared memory, and the TMA boxes that bring them there.

A shared tile consists of blocks of 64 columns (32 or 16 where 64 does not divide the head dim, so that no box reaches into the next head).
8 rows of a block, 128 (64, 32) swizzled bytes each, are contiguous; wgmma wants one stride between such groups of rows. The same bytes have
two layouts: (row, column, buffer) for the MMA, and split into boxes for TMA.

    block after block   [block][row group][8 rows]   Q, O, contiguous K and V, pages of a tile and more, gathered pages
    group after group   [row group][block][8 rows]   a tile of several pages

Boxes: a contiguous K/V tile, a tile inside one page, and 64 rows of Q or O are one box each (all column blocks at once). Where a tile spans
pages, group after group makes a page one box too, and the stride between row groups stays one across pages. Such a box has four dimensions:
column, token of a group, block, group. The fifth and last counts pages, so no dimension is left for heads: a head begins at some block and,
where heads are not a whole number of blocks apart, at some column of it (``head_start``). The dimension of the columns is two blocks long.

Pages that are no multiple of 8 tokens, or that the tile cuts, are gathered row by row without TMA (``gather``).

Packed heads: the 64 rows of a group are 64 / group_size queries times the group's heads, query major; row r is query r / group_size.
Q and out are then seen as ((head in group, query), column, block, KV head), still one box.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup

from ..tiles_prefill_sm90 import gathers

# columns of a block: how its rows are swizzled. 64 16-bit elements are 128 bytes, the widest box TMA swizzles
SWIZZLES = {
    64: warpgroup.SmemLayoutAtomKind.K_SW128,
    32: warpgroup.SmemLayoutAtomKind.K_SW64,
    16: warpgroup.SmemLayoutAtomKind.K_SW32,
}
ROW_GROUP = 8  # rows of a swizzle atom: contiguous in shared memory
GROUP_ROWS = 64  # query rows of one consumer warp group: wgmma has M = 64


def block_columns(head_dim: int) -> int:
    """Columns of one block of a shared tile."""
    return next(width for width in SWIZZLES if head_dim % width == 0)


class PrefillLayout:
    """Static geometry of one (spec, tile)."""

    def __init__(self, spec, tile, dtype, cluster=1):
        self.dtype = dtype
        self.cluster = cluster
        self.stages = tile.num_stages
        self.groups = tile.num_consumer_groups
        self.head_dim_qk, self.head_dim_vo = spec.head_dim_qk, spec.head_dim_vo
        self.pack = spec.group_size if tile.pack_heads else 1  # query heads that share a tile
        self.o_in_q = tile.num_q_buffers == 1
        self.q_tiles = tile.num_consumer_groups * tile.num_q_buffers
        self.tile_kv = tile.tile_kv
        page = spec.page_size if spec.kv_layout == "paged" else tile.tile_kv
        self.gather = spec.kv_layout == "paged" and gathers(page, tile.tile_kv)
        self.box_tokens = min(page, tile.tile_kv)
        self.boxes = 1 if self.gather else tile.tile_kv // self.box_tokens  # along the tokens of a tile; several: one page each
        self.tiles_per_page = page // self.box_tokens
        assert self.boxes <= 32  # a lane holds the page of a box
        if cluster > 1:  # a CTA loads every other page of a tile, or half its column blocks
            assert not self.gather
            assert self.boxes % cluster == 0 or all(d // block_columns(d) % cluster == 0 for d in (spec.head_dim_qk, spec.head_dim_vo))

    # ------------------------------------------------------------------------------------------------ shared memory

    def tiles(self, rows, columns, buffers):
        """(row, column, buffer): the MMA's view."""
        return cute.tile_to_shape(self._atom(columns), (rows, columns, buffers), (0, 1, 2))

    def kv_tiles(self, columns):
        """(token, column, stage): the MMA's view of the K or V ring."""
        order = (1, 0, 2) if self.boxes > 1 else (0, 1, 2)  # block or row group fastest
        return cute.tile_to_shape(self._atom(columns), (self.tile_kv, columns, self.stages), order)

    def row_boxes(self, columns, buffers):
        """(row, column, block, buffer): TMA's view of Q or O, a group's 64 rows per buffer."""
        width = block_columns(columns)
        return cute.tile_to_shape(self._atom(columns), (GROUP_ROWS, width, columns // width, buffers), (0, 1, 2, 3))

    def kv_boxes(self, columns):
        """TMA's view of K or V: (token, column, block, share, stage), or (token of group, column, block, group, box, stage) where a tile
        spans pages. A share is what one CTA of the cluster loads."""
        width = block_columns(columns)
        blocks = columns // width
        if self.boxes == 1:
            shape = (self.box_tokens, width, blocks // self.cluster, self.cluster, self.stages)
            return cute.tile_to_shape(self._atom(columns), shape, (0, 1, 2, 3, 4))
        shape = (ROW_GROUP, width, blocks, self.box_tokens // ROW_GROUP, self.boxes, self.stages)
        return cute.tile_to_shape(self._atom(columns), shape, (0, 1, 2, 3, 4, 5))

    def o_view(self, s_o, layout):
        """The O buffers under ``layout``, whose last mode counts groups; the swizzle stays on the pointer."""
        shape, stride = layout.outer.shape, layout.outer.stride
        pitch = GROUP_ROWS * (self.head_dim_qk if self.o_in_q else self.head_dim_vo)  # a Q buffer each where O is staged in Q's place
        return cute.make_tensor(s_o.iterator, cute.make_layout((*shape[:-1], self.groups), stride=(*stride[:-1], pitch)))

    def _atom(self, columns):
        return warpgroup.make_smem_layout_atom(SWIZZLES[block_columns(columns)], self.dtype)

    # ------------------------------------------------------------------------------------------------ TMA

    def row_box(self, columns):
        """Box of Q and O: 64 rows, all columns."""
        rows = GROUP_ROWS if self.pack == 1 else (self.pack, GROUP_ROWS // self.pack)
        width = block_columns(columns)
        return (rows, width, columns // width)

    def rows_from(self, coords, query):
        """``coords`` of Q or out, moved so that the box at 0 begins with row ``query`` of the tensor."""
        return cute.domain_offset(((0, query) if self.pack > 1 else query, 0, 0, 0), coords)

    def kv_box(self, columns):
        """Box of K and V."""
        width = block_columns(columns)
        blocks = columns // width
        if self.boxes == 1:
            return (self.box_tokens, width, blocks // self.cluster)
        return (ROW_GROUP, width, blocks, self.box_tokens // ROW_GROUP)

    def row_tma(self, op, t):
        """(atom, coordinates) of Q or O, [rows, heads, d] seen as (row, column, block, head)."""
        s, columns = t.layout.stride, t.shape[2]
        width = block_columns(columns)
        rows, row_stride, heads, head_stride = t.shape[0], s[0], t.shape[1], s[1]
        if self.pack > 1:
            rows, row_stride, heads, head_stride = (self.pack, rows), (s[1], s[0]), heads // self.pack, self.pack * s[1]
        shape = (rows, width, columns // width, heads)
        view = cute.make_tensor(t.iterator, cute.make_layout(shape, stride=(row_stride, 1, width, head_stride)))
        return self._tma(op, view, columns, self.row_box(columns))

    def kv_tma(self, op, t):
        """(atom, coordinates) of K or V, [pages, tokens, heads, d] seen as (token, column, block, head, page).

        Where a tile spans pages they are seen as (token of group, column, block, group, page); heads begin at ``head_start``.

        The page is a coordinate, so its stride may need 64 bits, and a page past the end reads zeros instead of memory.
        """
        s, columns = t.layout.stride, t.shape[3]
        width = block_columns(columns)
        blocks = columns // width
        shape, stride = (t.shape[1], width, blocks, t.shape[2], t.shape[0]), (s[1], 1, width, s[2], s[0])
        if self.boxes > 1:
            all_blocks = Int32((t.shape[2] - 1) * s[2] // width) + blocks
            shape = (ROW_GROUP, 2 * width, all_blocks, self.box_tokens // ROW_GROUP, t.shape[0])
            stride = (s[1], 1, width, ROW_GROUP * s[1], s[0])
        view = cute.make_tensor(t.iterator, cute.make_layout(shape, stride=stride))
        return self._tma(op, view, columns, self.kv_box(columns))

    def head_start(self, head, stride, columns):
        """(column, block) of a head's first element where a tile spans pages, heads being ``stride`` (64 bits) elements apart."""
        width = block_columns(columns)
        offset = Int64(head) * stride
        return Int32(offset & (width - 1)), Int32(offset >> (width.bit_length() - 1))

    def partition(self, tma, shared, coords, box):
        """TMA's views (smem box, buffer...) and (gmem box, coordinate) of a tensor cut in boxes."""
        tiled = cute.zipped_divide(coords, box)
        return cpasync.tma_partition(tma, 0, cute.make_layout(1), cute.group_modes(shared, 0, len(box)), tiled)

    def _tma(self, op, view, columns, box):
        # laid out anew: a slice of all boxes aborts the compiler where their stride is no power of two (head_dim 96, 192)
        one = cute.tile_to_shape(self._atom(columns), box, tuple(range(len(box))))
        return cpasync.make_tiled_tma_atom(op, view, one, box)
