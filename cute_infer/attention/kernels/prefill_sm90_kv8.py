"""Prefill attention for Hopper, 8-bit K and V under 16-bit queries: single, ragged and paged. Deep dive: docs/kernels/prefill_sm90_kv8.md.

    out[i, h] = out_scale * v_scale * sum_j softmax_j(logit[i, j]) v[j]     logit = (q . k) * sm_scale * k_scale, soft-capped, masked

q is fp16 or bf16, k and v are e4m3 or e5m2, out is fp16 or bf16. Both products are 16-bit wgmma in fp16, whatever q is. Work items, queue,
masks and the order of the steps are those of prefill_sm90.py; what 8 bits change:

Warp roles (128 * (2 + num_consumer_groups) threads)
    warp group 0, warp 0   lead     draws tickets, turns them into work items, TMA of Q; the other three exit
    warp group 1           convert  K and V, by address and 16 bytes a thread, to fp16 in shared memory; bf16 Q to fp16
                                    (prefill_sm90_kv8_widen.py)
    warp groups 2..        mma      64 query rows each; S = Q K^T and O += P V by wgmma, softmax in registers, O leaves by TMA
    Registers after setmaxnreg: (32, 64, 208, 208), or (24, 72, 208, 208); together 512 = 65,536 / 128.

Pipelines (mbarriers)
    name         filled by   waited by        arrivals to release       why
    q_full       lead (TMA)  convert or mma   -                         bf16 (convert) or fp16 (mma) has arrived
    q_ready      convert     one group        -                         bf16 only: Q is fp16, factors of its rows are there
    q_empty      that group  lead             4 (its warps)             after the last Q K^T (after the O store where O takes Q's place)
    k_full       convert     all groups       -                         4 warps' rows
    k_empty      all groups  convert          8                         S is complete in registers
    v_full, v_empty          the same for V; v_empty after O += P V
    work_full    lead        the others       -                         the next work item, negative rows = end of the queue
    work_empty   the others  lead             8 + 4                     the words have been read
    draw         convert     lead             -                         the last tile of an item is on its way: look for the next

Named barriers: 1 + g, 128 threads: group g agrees on its O buffer.

Shared memory (d = 128): Q 2*32 KiB, O 32 KiB, K and V 2 stages * 32 KiB each = 224 of 227 KiB.
Compute bound: 4 * head_dim FLOP per (query, visible key); exp2 runs at 16 per clock and SM, half the time of the wgmmas at d = 128.
Source: Shah et al., FlashAttention-3 (arXiv:2407.08608).
"""

import dataclasses
import typing
from enum import IntEnum
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float16, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from ..device.args import CUTE_DTYPES, fake_args
from .prefill_sm90_finish import LOG2_E, WARP_GROUP, Output, Place, PrefillFinish
from .prefill_sm90_fp8_softmax import cap_scores
from .prefill_sm90_kv8_softmax import online_softmax
from .prefill_sm90_kv8_widen import NOTES_BYTES, WARPS, Cache, PrefillWiden, Queries
from .prefill_sm90_layout import GROUP_ROWS, PrefillLayout
from .prefill_sm90_queue import COLUMNS, WARP, Lengths, PrefillQueue
from .prefill_sm90_softmax import as_a_operand, convert_pairs, mask_scores, scale_rows

WIDE = Float16  # Q, K, P and V of the products
PV_COLUMNS = 128  # of one wgmma: with 256 its 128 accumulators alone exceed what 512 threads are compiled for
STEPS_AT_ONCE = 8  # wgmma of Q K^T whose descriptors come from one place: see ``issue_qk``
TINY = 2.0**-126  # the smallest normal number
FAR = 1 << 30  # a window that reaches this far is no window; keeps position arithmetic inside 32 bits


class Role(IntEnum):
    """Warp group roles; consumer group g is warp group 2 + g."""

    LEAD = 0
    CONVERT = 1
    MMA = 2


class Scales(NamedTuple):
    """Run-time scalars of one call."""

    sm_scale: object
    out_scale: object
    soft_cap: object
    lse_scale: object
    window_left: object
    num_splits: object


class Memory(NamedTuple):
    """Global tensors a role touches besides TMA."""

    k: object
    v: object
    out: object
    lse: object
    kv_indices: object
    sinks: object
    k_scale: object
    v_scale: object
    out_partial: object
    lse_partial: object
    status: object


class Events(NamedTuple):
    """mbarriers of a CTA, and the words they guard."""

    k_full: object
    k_empty: object
    v_full: object
    v_empty: object
    q_full: object
    q_ready: object  # q_full where nobody converts Q
    q_empty: object
    work_full: object
    work_empty: object
    draw: object
    work: object  # the words of the next work item
    table: object  # the queue's notes on the requests it is handing out
    factors: object  # what the rows of Q were divided by; None for fp16


class Rows(NamedTuple):
    """What all key tiles of one work item share, for one thread of a consumer group."""

    q_at: object  # buffer of Q
    pos: object  # position among the keys of the query of the thread's first row
    column: object  # the thread's first column of a key tile
    kv_len: object
    window_left: object
    scale_log2: object  # scores to base-2 logits, per row
    pre_scale: object  # factor inside the tanh of a soft cap, per row


class Math(NamedTuple):
    """What one consumer group computes with: MMAs, operand descriptors and register tensors."""

    qk_first: object  # overwrites S
    qk: object
    pv: object
    frag_q: object
    frag_k: object
    frag_v: object
    acc_s: object
    acc_o: object
    p: object
    frag_p: object
    row_max: object
    row_sum: object
    correction: object


class PrefillSm90Kv8:
    """See the module docstring. ``tile`` is a ``tiles_prefill_sm90_kv8.PrefillSm90Kv8Tile``."""

    def __init__(self, spec, tile):
        self.spec, self.tile = spec, tile
        self.q_dtype, self.out_dtype = CUTE_DTYPES[spec.q_dtype], CUTE_DTYPES[spec.o_dtype]
        self.groups, self.stages, self.q_buffers = tile.num_consumer_groups, tile.num_stages, tile.num_q_buffers
        self.o_in_q = tile.num_q_buffers == 1  # O staged in Q's place
        self.pack = spec.group_size if tile.pack_heads else 1  # rows per query
        self.heads_per_kv = spec.group_size // self.pack  # heads, as work items count them, per KV head
        self.group_queries = GROUP_ROWS // self.pack  # queries of one consumer group
        self.single = spec.kv_layout == "single"
        # Whether a group may pass tiles by. In a full single request only the last block could, and the extra loop keeps ptxas from
        # proving the main loop warp-uniform.
        self.passes = spec.causal or spec.window or not self.single or tile.split_kv
        # K and V lie in shared memory like contiguous ones, wherever they come from
        contiguous = dataclasses.replace(spec, kv_layout="single", page_size=0)
        self.layout = PrefillLayout(contiguous, tile, self.q_dtype)
        self.queue = PrefillQueue(spec, tile)
        self.queue.budget_tokens *= 2  # the queue counts 16-bit elements
        self.widen = PrefillWiden(spec, tile, self.queue, CUTE_DTYPES[spec.kv_dtype])
        self.finish = PrefillFinish(spec, tile, self.layout, self.out_dtype)

    def abi(self) -> tuple:
        """Fake arguments of ``__call__``."""
        return fake_args(self.spec, split_kv=self.tile.split_kv)

    # ================================================================================================ host

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        out: cute.Tensor,
        lse: typing.Optional[cute.Tensor],
        qo_indptr: typing.Optional[cute.Tensor],
        kv_indptr: typing.Optional[cute.Tensor],
        kv_indices: typing.Optional[cute.Tensor],
        kv_last_page_len: typing.Optional[cute.Tensor],
        mask: typing.Optional[cute.Tensor],
        mask_indptr: typing.Optional[cute.Tensor],
        sinks: typing.Optional[cute.Tensor],
        k_scale: typing.Optional[cute.Tensor],
        v_scale: typing.Optional[cute.Tensor],
        out_partial: typing.Optional[cute.Tensor],
        lse_partial: typing.Optional[cute.Tensor],
        status: cute.Tensor,
        sm_scale: Float32,
        out_scale: Float32,
        soft_cap: Float32,
        lse_scale: Float32,
        rope_rcp_scale: Float32,
        rope_log2_theta: Float32,
        window_left: Int32,
        num_splits: Int32,
        num_ctas: Int32,
        stream: cuda.CUstream,
    ):
        """Layouts, descriptors, launch. Argument meanings: device/args.py."""
        tile, layout = self.tile, self.layout
        qk = lambda: sm90.make_trivial_tiled_mma(  # noqa: E731
            WIDE, WIDE, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (GROUP_ROWS, tile.tile_kv)
        )
        pv = sm90.make_trivial_tiled_mma(
            WIDE,
            WIDE,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            (1, 1, 1),
            (GROUP_ROWS, min(self.spec.head_dim_vo, PV_COLUMNS)),
            a_source=warpgroup.OperandSource.RMEM,
        )
        q_tma, q_coords = layout.row_tma(cpasync.CopyBulkTensorTileG2SOp(), q)
        o_tma, o_coords = layout.row_tma(cpasync.CopyBulkTensorTileS2GOp(), out)
        batch = 1 if const_expr(self.single) else qo_indptr.shape[0] - 1
        heads = q.shape[1] // self.pack
        # rows of a request fill all its query blocks but one
        most_items = (q.shape[0] * self.pack // tile.tile_q + batch) * heads * num_splits
        grid = cutlass.max(1, cutlass.min(most_items, num_ctas))
        total_kv = k.shape[1] if const_expr(self.single) else 0
        self.kernel(
            qk(),
            qk(),
            pv,
            q_tma,
            q_coords,
            o_tma,
            o_coords,
            Memory(k, v, out, lse, kv_indices, sinks, k_scale, v_scale, out_partial, lse_partial, status),
            Lengths(qo_indptr, kv_indptr, kv_last_page_len, q.shape[0], total_kv, heads, num_splits),
            Scales(sm_scale, out_scale, soft_cap, lse_scale, cutlass.min(window_left, FAR), num_splits),
        ).launch(
            grid=[grid, 1, 1],
            block=[tile.num_threads, 1, 1],
            # .maxntid in place of .reqntid: told the exact block, ptxas drops the shuffle that makes a warp's group uniform, and with it
            # the uniform registers of all wgmma descriptors in causal kernels.
            max_number_threads=[tile.num_threads, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    # ================================================================================================ kernel

    @cute.kernel
    def kernel(
        self,
        qk_first: cute.TiledMma,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        q_tma: cute.CopyAtom,
        q_coords: cute.Tensor,
        o_tma: cute.CopyAtom,
        o_coords: cute.Tensor,
        memory: Memory,
        lengths: Lengths,
        scales: Scales,
    ):
        """Shared memory, barriers, dispatch to the roles."""
        tile, spec, layout = self.tile, self.spec, self.layout
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARP_GROUP)
        qk_first.set(warpgroup.Field.ACCUMULATE, False)
        for mma in (qk, pv):
            mma.set(warpgroup.Field.ACCUMULATE, True)

        shared = SmemAllocator()
        allocate = lambda layout, dtype: shared.allocate_tensor(  # noqa: E731
            dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner
        )
        num_q = layout.q_tiles
        q_tiles = layout.tiles(GROUP_ROWS, spec.head_dim_qk, num_q)
        s_q = allocate(q_tiles, self.q_dtype)
        s_k = allocate(layout.kv_tiles(spec.head_dim_qk), WIDE)
        s_v = allocate(layout.kv_tiles(spec.head_dim_vo), WIDE)
        s_o = _as(s_q, q_tiles, self.out_dtype)
        if const_expr(not self.o_in_q):
            s_o = allocate(layout.tiles(GROUP_ROWS, spec.head_dim_vo, self.groups), self.out_dtype)
        barriers = lambda n: shared.allocate_array(Int64, n)  # noqa: E731
        k_full, k_empty, v_full, v_empty = (barriers(self.stages) for _ in range(4))
        q_full, q_empty = barriers(num_q), barriers(num_q)
        q_ready, factors = q_full, None
        if const_expr(self.widen.narrow):
            q_ready = barriers(num_q)
            factors = shared.allocate_tensor(Float32, cute.make_layout(num_q * GROUP_ROWS), byte_alignment=16)
        work_bars = barriers(3)
        work = shared.allocate_tensor(Int32, cute.make_layout(8), byte_alignment=16)
        table = shared.allocate_tensor(Int32, cute.make_layout(COLUMNS * WARP), byte_alignment=16)
        notes = shared.allocate_tensor(Int32, cute.make_layout(WARPS * NOTES_BYTES // 4), byte_alignment=16)
        if warp == 0:
            for descriptor in (q_tma, o_tma):
                cpasync.prefetch_descriptor(descriptor)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(num_q):
                    cute.arch.mbarrier_init(q_full + i, 1)
                    cute.arch.mbarrier_init(q_empty + i, 4)  # one arrival per warp of the group
                    if const_expr(self.widen.narrow):
                        cute.arch.mbarrier_init(q_ready + i, 2)  # two warps share a group's Q
                for i in cutlass.range_constexpr(self.stages):
                    for full, empty in ((k_full, k_empty), (v_full, v_empty)):
                        cute.arch.mbarrier_init(full + i, WARPS)
                        cute.arch.mbarrier_init(empty + i, 4 * self.groups)
                cute.arch.mbarrier_init(work_bars, 1)
                cute.arch.mbarrier_init(work_bars + 1, 4 * self.groups + WARPS)
                cute.arch.mbarrier_init(work_bars + 2, 1)
        events = Events(
            k_full, k_empty, v_full, v_empty, q_full, q_ready, q_empty, work_bars, work_bars + 1, work_bars + 2, work, table, factors
        )
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if group == Role.LEAD:
            cute.arch.setmaxregister_decrease(tile.lead_regs)
            if warp == 0:
                self.lead(events, memory, lengths, scales, q_tma, q_coords, s_q)
        elif group == Role.CONVERT:
            cute.arch.setmaxregister_decrease(tile.convert_regs)
            k = Cache(memory.k, Uint32(s_k.iterator.toint()), k_full, k_empty)
            v = Cache(memory.v, Uint32(s_v.iterator.toint()), v_full, v_empty)
            queries = Queries(Uint32(s_q.iterator.toint()), q_full, q_ready, factors)
            self.widen.run(events, memory, scales, k, v, queries, Uint32(notes.iterator.toint()), warp - Role.CONVERT * WARPS)
        else:
            cute.arch.setmaxregister_increase(tile.consumer_regs)
            self.mma(events, memory, scales, qk_first, qk, pv, o_tma, o_coords, _as(s_q, q_tiles, WIDE), s_k, s_v, s_o)

    # ================================================================================================ lead

    @cute.jit
    def lead(self, events, memory, lengths, scales, q_tma, q_coords, s_q):
        """Work items in ticket order, and their Q."""
        spec = self.spec
        lane = cute.arch.lane_idx()
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        t_q = cute.make_tensor(s_q.iterator, self.layout.row_boxes(spec.head_dim_qk, self.layout.q_tiles).outer)
        requests_per_section, heads_per_section = self.queue.section_sizes(lengths)
        cursor = self.queue.start(lengths, events.table, requests_per_section)
        cursor, item = self.queue.find(lengths, events.table, cursor, Int32(cta), requests_per_section, heads_per_section)
        self.publish(events, item, Int32(0))
        items = Int32(1)  # published so far
        while item.num_rows >= 0:
            buffer, phase = self.q_place(items - 1)
            for g in cutlass.range_constexpr(self.groups):
                at = g * self.q_buffers + buffer
                cute.arch.mbarrier_wait(events.q_empty + at, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(events.q_full + at, GROUP_ROWS * spec.head_dim_qk * 2)
                rows = self.layout.rows_from(q_coords, item.q_row + self.group_queries * g)
                to_s, from_g = self.layout.partition(q_tma, t_q, rows, self.layout.row_box(spec.head_dim_qk))
                cute.copy(q_tma, from_g[None, (0, 0, 0, item.head)], to_s[None, at], tma_bar_ptr=events.q_full + at)
            # Drawn when the last tile is on its way: the rings hide the latency, and a later draw balances better.
            cute.arch.mbarrier_wait(events.draw, (items - 1) & 1)
            ticket = Int32(0)
            if lane == 0:
                ticket = cute.arch.atomic_add(memory.status.iterator + 1, Int32(1), sem="relaxed", scope="gpu")
            ticket = cute.arch.shuffle_sync(ticket, 0) + num_ctas
            cursor, item = self.queue.find(lengths, events.table, cursor, ticket, requests_per_section, heads_per_section)
            self.publish(events, item, items)
            items = items + 1
        if lane == 0:
            # Every CTA drew its last ticket before this count: the last one resets both words for the next launch.
            if cute.arch.atomic_add(memory.status.iterator + 2, Int32(1), sem="acq_rel", scope="gpu") == num_ctas - 1:
                memory.status[1] = 0
                memory.status[2] = 0

    @cute.jit
    def publish(self, events, item, items: Int32):
        """Hand a work item to the other roles; ``items`` were handed over before."""
        cute.arch.mbarrier_wait(events.work_empty, (items & 1) ^ 1)
        if cute.arch.lane_idx() == 0:
            events.work[0] = item.q_row
            events.work[1] = item.num_rows
            events.work[2] = item.first_pos
            events.work[3] = item.head
            events.work[4] = item.kv_len
            events.work[5] = item.split
            events.work[6] = item.kv_begin
            events.work[7] = item.num_pages
            cute.arch.mbarrier_arrive(events.work_full)

    @cute.jit
    def q_place(self, turn: Int32):
        """(buffer, phase) of the Q of the ``turn``-th work item of this CTA."""
        buffer, phase = Int32(0), turn & 1
        if const_expr(self.q_buffers == 2):
            buffer, phase = turn & 1, (turn >> 1) & 1
        return buffer, phase

    # ================================================================================================ mma

    @cute.jit
    def mma(self, events, memory, scales, qk_first, qk, pv, o_tma, o_coords, s_q, s_k, s_v, s_o):
        """A consumer group: 64 rows of each work item."""
        tile, spec = self.tile, self.spec
        thread = cute.arch.thread_idx()[0] % WARP_GROUP
        group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP_GROUP) - Role.MMA
        row = thread // 32 * 16 + thread % 32 // 4  # this thread's rows of the group: row and row + 8
        column = thread % 4 * 2  # and columns: column + {0, 1} + 8j

        qk_slice, pv_slice = qk.get_slice(0), pv.get_slice(0)
        s_v_t = cute.make_tensor(s_v.iterator, cute.select(s_v.layout, mode=[1, 0, 2]))  # (column, token, stage): B operand of P V
        acc_s = cute.make_rmem_tensor(qk.partition_shape_C((GROUP_ROWS, tile.tile_kv)), Float32)
        acc_o = cute.make_rmem_tensor(pv.partition_shape_C((GROUP_ROWS, spec.head_dim_vo)), Float32)
        p = cute.make_rmem_tensor_like(acc_s, WIDE)
        pair = lambda: cute.make_rmem_tensor(2, Float32)  # noqa: E731
        m = Math(
            qk_first,
            qk,
            pv,
            qk.make_fragment_A(qk_slice.partition_A(s_q)),
            qk.make_fragment_B(qk_slice.partition_B(s_k)),
            pv.make_fragment_B(pv_slice.partition_B(s_v_t)),
            acc_s,
            acc_o,
            p,
            as_a_operand(p),
            pair(),
            pair(),
            pair(),
        )
        head_dim = spec.head_dim_vo
        o_tiles = self.layout.o_view(s_o, self.layout.tiles(GROUP_ROWS, head_dim, self.groups))
        o_boxes = self.layout.o_view(s_o, self.layout.row_boxes(head_dim, self.groups))
        output = Output(o_tma, o_coords, o_tiles, o_boxes, self.layout.row_box(head_dim), group)
        scale_log2, pre_scale = pair(), pair()
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        q_row, num_rows, first_pos, head, kv_len, split = self.next_item(events, Int32(0))
        items = Int32(1)  # taken so far
        while num_rows >= 0:
            item_first, item_end = self.queue.kv_tiles(first_pos, num_rows, kv_len, split, scales.num_splits, scales.window_left)
            group_pos = first_pos + group * self.group_queries  # position of the group's first query
            pos = group_pos + row // self.pack
            place = Place(q_row + group * self.group_queries, num_rows - group * GROUP_ROWS, head, split)
            first, end = item_first, item_end
            if const_expr(self.passes):
                first, end = self.group_tiles(item_first, item_end, group_pos, place.num_rows, kv_len, scales.window_left)
            buffer, phase = self.q_place(items - 1)
            q_at = group * self.q_buffers + buffer
            m.acc_o.fill(0.0)
            m.row_sum.fill(0.0)
            for r in cutlass.range_constexpr(2):
                # Rows past the request's end hold the next request's queries; a maximum of +inf keeps their P at 0 and them out of the vote
                # that rescales O, so that a request's result does not depend on its neighbours.
                m.row_max[r] = -Float32.inf
                if const_expr(not self.single):
                    m.row_max[r] = -Float32.inf if row + 8 * r < place.num_rows else Float32.inf
            if const_expr(self.passes):
                for _ in cutlass.range(item_end - end, unroll=1):
                    self.pass_by(events, k_state, v_state)
                    k_state.advance()
                    v_state.advance()
            cute.arch.mbarrier_wait(events.q_ready + q_at, phase)
            for r in cutlass.range_constexpr(2):
                scale_log2[r], pre_scale[r] = self.softmax_scale(events, memory, scales, head, q_at * GROUP_ROWS + row + 8 * r)
            rows = Rows(q_at, pos, column, kv_len, scales.window_left, scale_log2, pre_scale)
            if end > first:
                # ---- first tile: always masked, its P V follows later
                self.first_tile(m, events, rows, k_state, (end - 1) * tile.tile_kv)
                k_state.advance()
                # ---- tiles [whole_first, whole_end) are seen whole by all 64 rows of this group
                whole_end = end - 1
                if const_expr(spec.causal):
                    # of the tiles that follow only those left of every row's diagonal are whole
                    seen_by_all = cutlass.max(0, group_pos + 1) // tile.tile_kv
                    whole_end = cutlass.max(first, cutlass.min(whole_end, seen_by_all))
                    for i in cutlass.range(end - 1 - whole_end, unroll=1):
                        self.step(m, events, rows, k_state, v_state, (end - 2 - i) * tile.tile_kv, True)
                        k_state.advance()
                        v_state.advance()
                whole_first = first
                if const_expr(spec.window):
                    oldest_of_last_row = cutlass.max(0, group_pos + (self.group_queries - 1) - scales.window_left)
                    whole_first = cutlass.min(whole_end, cutlass.max(first, cute.ceil_div(oldest_of_last_row, tile.tile_kv)))
                for _ in cutlass.range(whole_end - whole_first, unroll=1):
                    self.step(m, events, rows, k_state, v_state, Int32(0), False)
                    k_state.advance()
                    v_state.advance()
                if const_expr(spec.window):
                    for i in cutlass.range(whole_first - first, unroll=1):
                        self.step(m, events, rows, k_state, v_state, (whole_first - 1 - i) * tile.tile_kv, True)
                        k_state.advance()
                        v_state.advance()
                self.issue_pv(m, events, v_state)
                self.release_q(events, q_at)
                if const_expr(not spec.window):
                    q_row, num_rows, first_pos, head, kv_len, split = self.next_item(events, items)  # under the last P V
                warpgroup.wait_group(0)
                self.release(events.v_empty, v_state)
                v_state.advance()
            else:
                self.release_q(events, q_at)
                if const_expr(not spec.window):
                    q_row, num_rows, first_pos, head, kv_len, split = self.next_item(events, items)
            if const_expr(spec.window):
                # the next item is announced only after the converting warps have begun the last of these tiles
                for _ in cutlass.range(first - item_first, unroll=1):
                    self.pass_by(events, k_state, v_state)
                    k_state.advance()
                    v_state.advance()
                q_row, num_rows, first_pos, head, kv_len, split = self.next_item(events, items)
            items = items + 1
            self.finish.normalise(m, memory, scales, scale_log2, place, row, column, 1)
            if const_expr(tile.split_kv):
                self.finish.store_partial(m, memory, place, row, column)
            else:
                self.finish.store(m, memory, output, place, group, thread)
            if const_expr(self.o_in_q):
                if thread // 32 == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)  # O has left Q's place
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(events.q_empty + q_at)
        if thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # shared memory must outlive the last store

    @cute.jit
    def group_tiles(self, first: Int32, end: Int32, group_pos: Int32, group_rows: Int32, kv_len: Int32, window_left: Int32):
        """[first, end): those of the work item's key tiles that some row of one consumer group sees; empty for a group without rows."""
        group_first, group_end = first, end
        if const_expr(self.spec.causal):
            seen = cute.ceil_div(cutlass.max(0, cutlass.min(kv_len, group_pos + self.group_queries)), self.tile.tile_kv)
            group_end = cutlass.max(first, cutlass.min(end, seen))
        if group_rows <= 0:
            group_end = first
        if const_expr(self.spec.window):
            group_first = cutlass.min(group_end, cutlass.max(first, cutlass.max(0, group_pos - window_left) // self.tile.tile_kv))
        return group_first, group_end

    @cute.jit
    def next_item(self, events, items: Int32):
        """(q_row, num_rows, first_pos, head, kv_len, split) of the ``items``-th work item."""
        cute.arch.mbarrier_wait(events.work_full, items & 1)
        uniform = cute.arch.make_warp_uniform
        q_row, num_rows, first_pos = uniform(events.work[0]), uniform(events.work[1]), uniform(events.work[2])
        head, kv_len, split = uniform(events.work[3]), uniform(events.work[4]), uniform(events.work[5])
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(events.work_empty)
        return q_row, num_rows, first_pos, head, kv_len, split

    @cute.jit
    def release_q(self, events, q_at: Int32):
        """The last Q K^T of a work item is done. Where O takes Q's place it is released after the store instead."""
        if const_expr(not self.o_in_q):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(events.q_empty + q_at)

    @cute.jit
    def arrived(self, full, state):
        """Wait for a stage of K or V."""
        cute.arch.mbarrier_wait(full + state.index, state.phase)

    @cute.jit
    def release(self, empty, state):
        """This warp's group has read a stage of K or V."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(empty + state.index)

    @cute.jit
    def pass_by(self, events, k_state, v_state):
        """Release a key tile that none of this group's rows sees."""
        self.arrived(events.k_full, k_state)
        self.release(events.k_empty, k_state)
        self.arrived(events.v_full, v_state)
        self.release(events.v_empty, v_state)

    @cute.jit
    def softmax_scale(self, events, memory, scales, head: Int32, q_row: Int32):
        """(factor from scores to base-2 logits, factor inside the tanh of a soft cap) of one row of Q in shared memory."""
        logit_scale = scales.sm_scale
        if const_expr(self.spec.k_scale):
            logit_scale = logit_scale * memory.k_scale[head // self.heads_per_kv]
        if const_expr(self.widen.narrow):
            logit_scale = logit_scale * events.factors[q_row]
            logit_scale = Float32(TINY) if logit_scale == Float32(0.0) else logit_scale  # 0 times a masked score, -inf, is NaN
        scale_log2, pre_scale = logit_scale * Float32(LOG2_E), Float32(1.0)
        if const_expr(self.spec.soft_cap):
            scale_log2, pre_scale = scales.soft_cap * Float32(LOG2_E), logit_scale / scales.soft_cap
        return scale_log2, pre_scale

    @cute.jit
    def mask(self, m, rows, start: Int32):
        """Apply every mask to the scores of the key tile that begins at ``start``."""
        origin = start + rows.column
        key_end, diagonal, oldest = rows.kv_len - origin, rows.pos + 1 - origin, rows.pos - rows.window_left - origin
        mask_scores(m.acc_s, key_end, diagonal, oldest, 8 // self.pack, self.spec.causal, self.spec.window)

    @cute.jit
    def first_tile(self, m, events, rows, k_state, start: Int32):
        """The first key tile of a work item: Q K^T and softmax. Its P V belongs to the next step."""
        self.issue_qk(m, events, k_state, rows.q_at)
        warpgroup.wait_group(0)
        self.release(events.k_empty, k_state)
        if const_expr(self.spec.soft_cap):
            cap_scores(m.acc_s, rows.pre_scale)
        self.mask(m, rows, start)
        online_softmax(m.acc_s, m.row_max, m.row_sum, m.correction, rows.scale_log2, True)
        convert_pairs(m.acc_s, m.p)

    @cute.jit
    def step(self, m, events, rows, k_state, v_state, start: Int32, masked: cutlass.Constexpr):
        """One key tile: its Q K^T, then P V of the tile before, and its softmax while that P V runs."""
        self.issue_qk(m, events, k_state, rows.q_at)
        self.issue_pv(m, events, v_state)
        warpgroup.wait_group(1)  # S is complete, P V may still run
        self.release(events.k_empty, k_state)
        if const_expr(self.spec.soft_cap):
            cap_scores(m.acc_s, rows.pre_scale)
        if const_expr(masked):
            self.mask(m, rows, start)
        grew = online_softmax(m.acc_s, m.row_max, m.row_sum, m.correction, rows.scale_log2, False)
        warpgroup.wait_group(0)
        self.release(events.v_empty, v_state)
        convert_pairs(m.acc_s, m.p)
        if grew:
            scale_rows(m.acc_o, m.correction)

    @cute.jit
    def issue_qk(self, m, events, k_state, q_at: Int32):
        """Start S = Q K^T when k_full says so.

        The buffers' numbers are made uniform anew after some steps. ptxas holds the descriptors of all steps at once otherwise, and where
        the uniform registers do not suffice (16 steps) it uses none at all, which costs 80 R2UR per key tile and spills.
        """
        self.arrived(events.k_full, k_state)
        warpgroup.fence()
        stage = k_state.index
        for kk in cutlass.range_constexpr(cute.size(m.frag_q, mode=[2])):
            if const_expr(kk == STEPS_AT_ONCE):
                q_at, stage = cute.arch.make_warp_uniform(q_at), cute.arch.make_warp_uniform(stage)
            mma = m.qk_first if const_expr(kk == 0) else m.qk
            cute.gemm(mma, m.acc_s, m.frag_q[None, None, kk, q_at], m.frag_k[None, None, kk, stage], m.acc_s)
        warpgroup.commit_group()

    @cute.jit
    def issue_pv(self, m, events, v_state):
        """Start O += P V when v_full says so."""
        self.arrived(events.v_full, v_state)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(cute.size(m.frag_p, mode=[2])):
            cute.gemm(m.pv, m.acc_o, m.frag_p[None, None, kk], m.frag_v[None, None, kk, v_state.index], m.acc_o)
        warpgroup.commit_group()


def _as(tensor, layout, dtype):
    """The same 16-bit elements of shared memory under another type; ``layout`` is what they were allocated with."""
    return cute.make_tensor(cute.recast_ptr(tensor.iterator, layout.inner, dtype=dtype), tensor.layout)
