"""Layouts of the FP8 Hopper prefill kernel: how Q, K, V, V^T and O lie in shared memory, the TMA boxes, and V's way through the transpose.

A shared tile is stored as blocks of columns, 128 bytes wide where 128 divides the row, else 64 or 32: what TMA can swizzle. A block holds
all rows of the tile one after the other, what wgmma reads with one stride between groups of 8 rows. Inside a block the 16-byte chunk
index is XORed with bits of the row (``swizzled``), so that 8 rows of one chunk touch all banks.

Transpose. 8-bit wgmma reads both operands K-major, so P V wants V as (column, token). One step of a warp takes 32 tokens x 16 columns:

    ldmatrix.x4.trans   matrix m = tokens 8m.. of one 16-byte chunk; lane 4g + t gets columns 2g, 2g + 1 of tokens 8m + 2t, 8m + 2t + 1
    prmt                of matrices 0, 1 (and 2, 3): the four bytes of one column, tokens 2t, 2t + 1, 8 + 2t, 9 + 2t
    stmatrix.x4         each 8 x 16-byte matrix: 16 tokens of 8 columns

so every 16 tokens end up in the order 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15. That is the order in which a thread holds its columns of the
S accumulator (8 j + 2 t, 8 j + 2 t + 1): P, rounded to 8 bits, is the A operand of P V without a shuffle.

The two stored matrices of 16 tokens are not "even columns" and "odd columns": lanes from 16 on swap them, so that the 8 rows of a matrix
are columns 0 2 4 6 9 11 13 15 (or 1 3 5 7 8 10 12 14) and land on 8 different chunk positions under every swizzle: no bank conflict.
"""

import cutlass.cute as cute
from cutlass.cute.nvgpu import cpasync, warpgroup

# bytes of a block's row: how its rows are swizzled
SWIZZLES = {
    128: warpgroup.SmemLayoutAtomKind.K_SW128,
    64: warpgroup.SmemLayoutAtomKind.K_SW64,
    32: warpgroup.SmemLayoutAtomKind.K_SW32,
}
GROUP_ROWS = 64  # query rows of one consumer warp group: wgmma has M = 64
CHUNK = 16  # bytes that stay together: a row of ldmatrix and stmatrix, the unit of the swizzles
STEP_TOKENS = 32  # tokens of one transpose step, and K of one 8-bit wgmma
EVEN, ODD = 0x6420, 0x7531  # prmt: the even or the odd bytes of two registers


def block_bytes(row_bytes: int) -> int:
    """Bytes of a row inside one block of a shared tile."""
    return next(width for width in SWIZZLES if row_bytes % width == 0)


def swizzled(row, chunk, width):
    """Byte offset of a chunk inside a block: row ``row``, 16-byte chunk ``chunk`` of it. Python integers or run-time values."""
    return row * width + (chunk ^ (row * width // 128 % (width // CHUNK))) * CHUNK


def source_lane(lane, width):
    """Transpose, read side: this lane's offset in a V block of ``width`` bytes, for chunk 0 and tokens 0..31; XOR 16 * chunk."""
    return swizzled(lane, 0, width)


def target_lane(lane, width):
    """Transpose, write side: this lane's offset in a V^T block of ``width`` tokens, for columns 0..15 and tokens 0..31; XOR the tokens."""
    matrix, row = lane // 8, lane % 8
    column = 2 * row + (matrix % 2 ^ row // 4)
    return swizzled(column, matrix // 2, width)


class PrefillFp8Layout:
    """Static geometry of one (spec, tile)."""

    def __init__(self, spec, tile, dtype, out_dtype):
        self.dtype, self.out_dtype = dtype, out_dtype
        self.groups = tile.num_consumer_groups
        self.pack = spec.group_size if tile.pack_heads else 1  # query heads that share a tile
        self.q_tiles = tile.num_consumer_groups * tile.num_q_buffers
        self.tile_kv = tile.tile_kv
        self.box_tokens = min(spec.page_size, tile.tile_kv) if spec.kv_layout == "paged" else tile.tile_kv
        self.boxes = tile.tile_kv // self.box_tokens  # boxes along the tokens of a tile
        self.tiles_per_page = spec.page_size // self.box_tokens if spec.kv_layout == "paged" else 1
        assert self.boxes * self.box_tokens == tile.tile_kv and self.boxes <= 32
        assert spec.kv_layout != "paged" or self.tiles_per_page * self.box_tokens == spec.page_size
        # of the transpose
        self.v_width, self.vt_width = block_bytes(spec.head_dim_vo), block_bytes(tile.tile_kv)
        self.v_block, self.vt_block = self.v_width * tile.tile_kv, self.vt_width * spec.head_dim_vo
        self.v_bytes = tile.tile_kv * spec.head_dim_vo  # of one tile, V and V^T

    # ------------------------------------------------------------------------------------------------ shared memory

    def tiles(self, rows, columns, buffers, dtype):
        """(row, column, buffer): the MMA's view."""
        return cute.tile_to_shape(self._atom(columns, dtype), (rows, columns, buffers), (0, 1, 2))

    def row_boxes(self, columns, buffers, dtype):
        """(row, column, block, buffer): TMA's view of Q or O, a group's 64 rows per buffer."""
        width = _block_columns(columns, dtype)
        return cute.tile_to_shape(self._atom(columns, dtype), (GROUP_ROWS, width, columns // width, buffers), (0, 1, 2, 3))

    def kv_boxes(self, columns, buffers):
        """TMA's view of K or V: (token, column, block, stage), or (token, column, box, block, stage) where a tile spans pages."""
        width = _block_columns(columns, self.dtype)
        blocks = columns // width
        if self.boxes == 1:
            return cute.tile_to_shape(self._atom(columns, self.dtype), (self.box_tokens, width, blocks, buffers), (0, 1, 2, 3))
        shape = (self.box_tokens, width, self.boxes, blocks, buffers)
        return cute.tile_to_shape(self._atom(columns, self.dtype), shape, (0, 1, 2, 3, 4))

    def _atom(self, columns, dtype):
        return warpgroup.make_smem_layout_atom(SWIZZLES[block_bytes(columns * dtype.width // 8)], dtype)

    # ------------------------------------------------------------------------------------------------ TMA

    def row_box(self, columns, dtype):
        """Box of Q and O: 64 rows, all columns."""
        rows = GROUP_ROWS if self.pack == 1 else (self.pack, GROUP_ROWS // self.pack)
        width = _block_columns(columns, dtype)
        return (rows, width, columns // width)

    def rows_from(self, coords, query):
        """``coords`` of Q or out, moved so that the box at 0 begins with row ``query`` of the tensor."""
        return cute.domain_offset(((0, query) if self.pack > 1 else query, 0, 0, 0), coords)

    def kv_box(self, columns):
        """Box of K and V."""
        width = _block_columns(columns, self.dtype)
        box = (self.box_tokens, width, columns // width)
        return box if self.boxes == 1 else box[:2]

    def row_tma(self, op, t, dtype):
        """(atom, coordinates) of Q or O, [rows, heads, d] seen as (row, column, block, head)."""
        s, columns = t.layout.stride, t.shape[2]
        width = _block_columns(columns, dtype)
        rows, row_stride, heads, head_stride = t.shape[0], s[0], t.shape[1], s[1]
        if self.pack > 1:
            rows, row_stride, heads, head_stride = (self.pack, rows), (s[1], s[0]), heads // self.pack, self.pack * s[1]
        shape = (rows, width, columns // width, heads)
        view = cute.make_tensor(t.iterator, cute.make_layout(shape, stride=(row_stride, 1, width, head_stride)))
        return self._tma(op, view, self.row_boxes(columns, 1, dtype), self.row_box(columns, dtype))

    def kv_tma(self, op, t):
        """(atom, coordinates) of K or V, [pages, tokens, heads, d] seen as (token, column, block, head, page).

        The page is a coordinate, so its stride may need 64 bits, and a page past the end reads zeros instead of memory.
        """
        s, columns = t.layout.stride, t.shape[3]
        width = _block_columns(columns, self.dtype)
        shape = (t.shape[1], width, columns // width, t.shape[2], t.shape[0])
        view = cute.make_tensor(t.iterator, cute.make_layout(shape, stride=(s[1], 1, width, s[2], s[0])))
        return self._tma(op, view, self.kv_boxes(columns, 1), self.kv_box(columns))

    def partition(self, tma, shared, coords, box):
        """TMA's views (smem box, buffer...) and (gmem box, coordinate) of a tensor cut in boxes."""
        tiled = cute.zipped_divide(coords, box)
        return cpasync.tma_partition(tma, 0, cute.make_layout(1), cute.group_modes(shared, 0, len(box)), tiled)

    def _tma(self, op, view, boxes, box):
        one = cute.slice_(boxes, (None,) * len(box) + (0,) * (cute.rank(boxes) - len(box)))
        return cpasync.make_tiled_tma_atom(op, view, one, box)


def _block_columns(columns, dtype):
    """Columns of one block."""
    return block_bytes(columns * dtype.width // 8) * 8 // dtype.width
