"""The converting warps of the Hopper prefill kernel for 8-bit K and V: global memory -> registers -> fp16 in shared memory.

K and V do not pass through shared memory as bytes. At head_dim 128 a tile of 128 keys costs the shared memory 160 KiB of wgmma operands and
64 KiB of widened K and V; TMA in and a read back would add 64 KiB to these 1792 clocks of 128 bytes, and the tensor cores are done after
2048. So every thread loads 16 codes at a time, ``tile.depth`` loads ahead of their use, and stores them as 32 bytes. A row is found by
address, so pages of any size cost the same, and rows past the end of the keys or without a page are zeros.

Codes are exact in fp16, e4m3 as well as e5m2, subnormals, infinities and NaN included: one instruction widens two of them.

One load of a warp is 8 rows times 64 columns: every 8 lanes store two rows of a swizzled block, and their 16-byte chunks fall on 8
different places of the swizzle, without a bank conflict (``lane_place``). The four lanes of a row hold the addresses of four rows 8 apart.

bf16 queries have to become fp16 too, which has fewer exponents. Every row is multiplied by the power of two that brings its largest
magnitude into [2^14, 2^15); what a row's elements lose is at most 2^-39 of that magnitude. The softmax scale of the row takes the inverse.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Float8E4M3FN, Float32, Int32, Int64, Uint32, const_expr

from ..device.mma import load_shared_4, store_shared_4
from .prefill_sm90_layout import GROUP_ROWS
from .prefill_sm90_queue import WARP

WARPS = 4  # that convert
CODES = 16  # of one load of a lane
SETS = 2  # of registers for loads: one is widened while the other's data are on their way
LANES_PER_ROW = 4
ROWS_AT_ONCE = WARP // LANES_PER_ROW  # of one load of a warp
SEGMENTS_OF_4 = 0x1C1F  # shfl: clamp 31, segments of 4 lanes
BLOCK_COLUMNS = 64  # of a swizzled block: 128 bytes of fp16
BLOCK_ROW = 2 * BLOCK_COLUMNS  # bytes
NO_PAGE = -1
NOTES_BYTES = 16  # of a warp: kv_len, kv_head, kv_begin, num_pages of its work item. In registers they would make it spill
LEAST_EXPONENT = 15  # from here on both powers of ``row_scales`` exist; a row of smaller queries is scaled as if it had it


class Cache(NamedTuple):
    """K or V: in global memory, and the ring of its widened tiles."""

    tensor: object
    address: object  # of the ring in shared memory
    full: object
    empty: object


class Queries(NamedTuple):
    """Q in shared memory; None for fp16 queries, which stay as they are."""

    address: object
    full: object  # bf16 has arrived
    ready: object  # fp16 is there
    factors: object  # [buffer * 64 + row] fp32: what the row was divided by


def lane_place(lane):
    """Byte offset of a lane's first 8 codes, widened, from the first row of a load; the other 8 lie at the offset XOR 16.

    Lane 4 r + c: row r, codes [16 c, 16 c + 16) of a block. Python integers or run-time values.
    """
    row = lane // LANES_PER_ROW
    return row * BLOCK_ROW + ((lane % LANES_PER_ROW * 2) ^ row) * 16


def lane_row(lane, share):
    """Of a warp's ``share`` of rows the one whose address a lane holds: that of its own row in the load numbered by its place among the
    four lanes of a row. Python integers or run-time values."""
    return lane % LANES_PER_ROW % (share // ROWS_AT_ONCE) * ROWS_AT_ONCE + lane // LANES_PER_ROW


def row_scales(exponent):
    """(bits of 2^(141 - exponent) in bf16, bits of its inverse in fp32) for a row of bf16 whose largest magnitude is 1.m * 2^(exponent -
    127). Python integers or run-time values."""
    return (268 - exponent) << 7, (exponent - 14) << 23


class Slots:
    """The loads of one warp for a tile of K or of V: ``count`` of them, those of a row's blocks one after the other."""

    def __init__(self, tile_kv, head_dim):
        self.tile_kv = tile_kv
        self.share = tile_kv // WARPS  # rows of a warp
        self.blocks = head_dim // BLOCK_COLUMNS
        self.count = self.share // ROWS_AT_ONCE * self.blocks
        self.tile_bytes = 2 * tile_kv * head_dim

    def place(self, i):
        """(rows before it, in units of 8; block) of the i-th load."""
        return i // self.blocks, i % self.blocks

    def offset(self, i):
        """Bytes from the share's first row to that of the i-th load, in its block."""
        rows, block = self.place(i)
        return block * (self.tile_kv * BLOCK_ROW) + rows * (ROWS_AT_ONCE * BLOCK_ROW)


class PrefillWiden:
    """Device functions of the converting warps."""

    def __init__(self, spec, tile, queue, dtype_kv):
        self.spec, self.tile, self.queue, self.dtype_kv = spec, tile, queue, dtype_kv
        self.k, self.v = Slots(tile.tile_kv, spec.head_dim_qk), Slots(tile.tile_kv, spec.head_dim_vo)
        self.slots, self.stages = self.k.count + self.v.count, tile.num_stages
        self.at_once = tile.depth // SETS  # loads of a group
        assert self.slots % (SETS * self.at_once) == 0
        self.paged = spec.kv_layout == "paged"
        self.narrow = spec.q_dtype == "bfloat16"
        self.heads_per_kv = queue.heads_per_kv

    # ------------------------------------------------------------------------------------------------ role

    @cute.jit
    def run(self, events, memory, scales, k, v, queries, notes: Uint32, warp: Int32):
        """One of the converting warps: every work item's Q, then its tiles, right to left. ``notes``: shared room of all WARPS."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        words = cute.make_rmem_tensor(4 * self.tile.depth, Uint32)  # on their way
        held = cute.make_rmem_tensor(1, Int64)  # address of this lane's row of the tile of K or V that is being loaded
        notes = notes + Uint32(warp * NOTES_BYTES)
        items = Int32(0)
        num_rows = Int32(0)
        while num_rows >= 0:
            cute.arch.mbarrier_wait(events.work_full, items & 1)
            uniform = cute.arch.make_warp_uniform
            num_rows, first_pos, kv_len, split = (uniform(events.work[i]) for i in (1, 2, 4, 5))
            kv_head, kv_begin, num_pages = events.work[3] // self.heads_per_kv, events.work[6], events.work[7]
            first, end = self.queue.kv_tiles(first_pos, num_rows, kv_len, split, scales.num_splits, scales.window_left)
            cute.arch.sync_warp()  # nobody reads the last item's notes any more
            if cute.arch.lane_idx() == 0:
                store_shared_4(notes, *(Uint32(x) for x in (kv_len, kv_head, kv_begin, num_pages)))
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(events.work_empty)
            if num_rows >= 0:
                page = self.fetch_page(memory, notes, end - 1, first, warp)
                next_page = self.fetch_page(memory, notes, end - 2, first, warp)
                if const_expr(self.narrow):
                    self.narrow_q(queries, items, warp)
                for group in cutlass.range_constexpr(SETS):
                    self.load_group(words, held, group, memory, k, v, notes, end - 1, first, warp, page, next_page)
                if end <= first and warp == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive(events.draw)
                for i in cutlass.range(end - first, unroll=1):
                    kv_tile = end - 1 - i
                    if kv_tile == first and warp == 0:
                        # the last tile: time to look for the next item, while what the rings hold hides the latency
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive(events.draw)
                    for group in cutlass.range_constexpr(self.slots // self.at_once):
                        self.widen_group(words, group, k, v, state, warp)
                        self.load_group(words, held, group + SETS, memory, k, v, notes, kv_tile, first, warp, page, next_page)
                    page = next_page
                    next_page = self.fetch_page(memory, notes, kv_tile - 2, first, warp)
                    state.advance()
            items = items + 1

    # ------------------------------------------------------------------------------------------------ addresses

    @cute.jit
    def token_of(self, kv_tile: Int32, warp: Int32):
        """The token of this lane's row of a tile, counted from the request's first."""
        return kv_tile * self.tile.tile_kv + warp * self.k.share + lane_row(cute.arch.lane_idx(), self.k.share)

    @cute.jit
    def fetch_page(self, memory, notes: Uint32, kv_tile: Int32, first: Int32, warp: Int32):
        """Request the page of this lane's row of a tile, if it is one of the item's; nothing waits for it until its rows are loaded."""
        page = Int32(0)
        if const_expr(self.paged):
            kv_len, _, kv_begin, num_pages = _load_notes(notes)
            token = self.token_of(kv_tile, warp)
            entry = token // self.spec.page_size
            position = kv_begin + entry
            inside = (position >= 0) & (position < memory.kv_indices.shape[0]) & (entry < num_pages)
            wanted = (kv_tile >= first) & (token < kv_len) & inside
            page = _load_if(memory.kv_indices.iterator.toint() + Int64(position) * 4, wanted)
        return page

    @cute.jit
    def row_of(self, memory, cache, notes: Uint32, kv_tile: Int32, warp: Int32, page: Int32):
        """Address of this lane's row of a tile of K or V; 0 where there is nothing to read. A page that does not exist is reported."""
        kv_len, kv_head, kv_begin, _ = _load_notes(notes)
        token = self.token_of(kv_tile, warp)
        known = token < kv_len
        row = kv_begin + token
        if const_expr(self.paged):
            lost = known & ((page < 0) | (page >= cache.tensor.shape[0]))
            if lost:
                memory.status[0] = 1
            known = known & (lost == 0)
            row = token % self.spec.page_size
        page_stride, token_stride, head_stride, _ = cache.tensor.layout.stride
        offset = Int64(kv_head) * head_stride + Int64(row) * token_stride
        if const_expr(self.paged):
            offset = offset + Int64(page) * page_stride
        return cache.tensor.iterator.toint() + offset if known else Int64(0)

    # ------------------------------------------------------------------------------------------------ tiles

    @cute.jit
    def load_group(
        self,
        words,
        held,
        group: cutlass.Constexpr,
        memory,
        k,
        v,
        notes: Uint32,
        kv_tile: Int32,
        first: Int32,
        warp: Int32,
        page: Int32,
        next_page: Int32,
    ):
        """Start the ``group``-th loads of a tile, K's come first; past the last group they are the next tile's."""
        begin, words_at = group * self.at_once, group % SETS * self.at_once * 4
        if const_expr(begin >= self.slots):
            begin, kv_tile, page = begin - self.slots, kv_tile - 1, next_page
        # The second condition always holds where the first does. It makes a branch of loads of this tile too, past which ptxas does not
        # push them; it would otherwise issue them after the next stores, just before their use.
        if (kv_tile >= first) & (_load_notes(notes)[0] > 0):
            row = Int64(0)
            for slot in cutlass.range_constexpr(begin, begin + self.at_once):
                of_v = slot >= self.k.count
                i = slot - self.k.count if of_v else slot
                turn, block = (self.v if of_v else self.k).place(i)
                if const_expr(i == 0):
                    held[0] = self.row_of(memory, v if of_v else k, notes, kv_tile, warp, page)
                if const_expr(slot == begin or block == 0):
                    row = _shuffle_address(held[0], turn)
                found = _load_16(row, cute.arch.lane_idx() % LANES_PER_ROW * CODES, block * BLOCK_COLUMNS)
                for j in cutlass.range_constexpr(4):
                    words[words_at + (slot - begin) * 4 + j] = found[j]

    @cute.jit
    def widen_group(self, words, group: cutlass.Constexpr, k, v, state, warp: Int32):
        """Widen what the ``group``-th loads brought, into a stage of K and of V."""
        begin, words_at = group * self.at_once, group % SETS * self.at_once * 4
        for slot in cutlass.range_constexpr(begin, begin + self.at_once):
            of_v = slot >= self.k.count
            cache, slots, i = (v, self.v, slot - self.k.count) if of_v else (k, self.k, slot)
            if const_expr(i == 0):
                cute.arch.mbarrier_wait(cache.empty + state.index, state.phase)
            lane_offset = lane_place(cute.arch.lane_idx()) + warp * (slots.share * BLOCK_ROW)
            target = cache.address + Uint32(state.index * slots.tile_bytes + lane_offset)
            wide = []
            for j in cutlass.range_constexpr(4):
                wide += [*_widen_4(words[words_at + (slot - begin) * 4 + j], self.dtype_kv)]
            store_shared_4(target + Uint32(slots.offset(i)), *wide[:4])
            store_shared_4((target ^ Uint32(16)) + Uint32(slots.offset(i)), *wide[4:])
            if const_expr(i == slots.count - 1):
                self.arrive(cache.full + state.index)

    @cute.jit
    def arrive(self, barrier):
        """This warp's stores are done; wgmma may read them."""
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(barrier)

    # ------------------------------------------------------------------------------------------------ queries

    @cute.jit
    def narrow_q(self, queries, items: Int32, warp: Int32):
        """bf16 Q of the ``items``-th work item -> fp16 in place; a warp does half of one consumer group's rows, a lane one row."""
        lane, columns = cute.arch.lane_idx(), self.spec.head_dim_qk
        buffers = self.tile.num_q_buffers
        buffer, phase = (items & 1, (items >> 1) & 1) if const_expr(buffers == 2) else (Int32(0), items & 1)
        at = warp // 2 * buffers + buffer
        row = warp % 2 * WARP + lane
        cute.arch.mbarrier_wait(queries.full + at, phase)
        start = queries.address + Uint32(at * (GROUP_ROWS * columns * 2) + row * BLOCK_ROW + lane % 8 * 16)
        top = Uint32(0)
        for block in cutlass.range(0, columns // BLOCK_COLUMNS, unroll=1):
            for c in cutlass.range_constexpr(8):
                chunk = load_shared_4((start ^ Uint32(c * 16)) + Uint32(block * (GROUP_ROWS * BLOCK_ROW)))
                for j in cutlass.range_constexpr(4):
                    top = _larger_magnitudes(top, chunk[j])
        exponent = cutlass.max(cutlass.max(Int32(top & Uint32(0xFFFF)), Int32(top >> Uint32(16))) >> 7, LEAST_EXPONENT)
        scale, inverse = row_scales(exponent)
        scale = Uint32(scale) * Uint32(0x10001)  # for two elements
        for block in cutlass.range(0, columns // BLOCK_COLUMNS, unroll=1):
            for c in cutlass.range_constexpr(8):
                place = (start ^ Uint32(c * 16)) + Uint32(block * (GROUP_ROWS * BLOCK_ROW))
                chunk = load_shared_4(place)
                store_shared_4(place, *[_narrow_2(word, scale) for word in chunk])
        queries.factors[at * GROUP_ROWS + row] = _bits_float(Uint32(inverse))
        self.arrive(queries.ready + at)


# ---------------------------------------------------------------------------------------------------------------------- PTX one-liners
@cute.jit
def _load_if(address: Int64, condition: Boolean):
    """A page id from global memory, or NO_PAGE: predicated, because a branch would wait for the load."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.s32 {$w0}, -1; @p ld.global.nc.s32 {$w0}, [{$r0}]; }",
        write_only_types=[Int32],
        read_only_args=[address, Int32(condition)],
    )


@cute.jit
def _load_notes(notes: Uint32):
    """Four words that the warp keeps in shared memory; volatile, or they would move to registers for good."""
    return cute.arch.inline_ptx(
        "ld.volatile.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Int32] * 4, read_only_args=[notes]
    )


@cute.jit
def _load_16(row: Int64, lane_offset: Int32, offset: cutlass.Constexpr):
    """16 bytes of a row, or zeros where ``row`` is 0."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; .reg .b64 a; setp.ne.s64 p, {$r0}, 0; cvt.s64.s32 a, {$r1}; add.s64 a, a, {$r0}; "
        "mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; mov.b32 {$w2}, 0; mov.b32 {$w3}, 0; "
        "@p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [a+" + str(offset) + "]; }",
        write_only_types=[Uint32] * 4,
        read_only_args=[row, lane_offset],
    )


@cute.jit
def _shuffle_address(address: Int64, neighbour: cutlass.Constexpr) -> Int64:
    """The address that lane ``neighbour`` of the four of this lane's row holds."""
    shuffle = f"shfl.sync.idx.b32 {{part}}, {{part}}, {neighbour}, {SEGMENTS_OF_4}, -1; "
    return cute.arch.inline_ptx(
        "{ .reg .b32 low, high; mov.b64 {low, high}, {$r0}; "
        + shuffle.format(part="low")
        + shuffle.format(part="high")
        + "mov.b64 {$w0}, {low, high}; }",
        write_only_types=[Int64],
        read_only_args=[address],
    )


@cute.jit
def _widen_4(word: Uint32, dtype: cutlass.Constexpr):
    """Four 8-bit floats as two registers of two fp16."""
    name = "e4m3x2" if const_expr(dtype is Float8E4M3FN) else "e5m2x2"
    return cute.arch.inline_ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, {$r0}; cvt.rn.f16x2." + name + " {$w0}, low; cvt.rn.f16x2." + name + " {$w1}, high; }",
        write_only_types=[Uint32] * 2,
        read_only_args=[word],
    )


@cute.jit
def _larger_magnitudes(top: Uint32, word: Uint32) -> Uint32:
    """Of the pair of magnitudes ``top`` and a pair of bf16: magnitudes are in the order of their bits."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 x, y; mov.b32 y, {$r0}; and.b32 x, {$r1}, 0x7fff7fff; max.u16x2 {$w0}, y, x; }",
        write_only_types=[Uint32],
        read_only_args=[top, word],
    )


@cute.jit
def _narrow_2(word: Uint32, scale: Uint32) -> Uint32:
    """Two bf16 times two powers of two, as fp16."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 x, low, high; mul.rn.bf16x2 x, {$r0}, {$r1}; shl.b32 low, x, 16; and.b32 high, x, 0xffff0000; "
        "cvt.rn.f16x2.f32 {$w0}, high, low; }",
        write_only_types=[Uint32],
        read_only_args=[word, scale],
    )


@cute.jit
def _bits_float(x: Uint32) -> Float32:
    """The float of 32 bits."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
