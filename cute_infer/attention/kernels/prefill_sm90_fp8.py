"""FP8 prefill attention for Hopper: e4m3 Q, K and V, both products on 8-bit wgmma. Deep dive: docs/kernels/prefill_sm90_fp8.md.

    out[i, h] = out_scale * v_scale * sum_j softmax_j(logit[i, j]) v[j]     logit = (q . k) * sm_scale * k_scale, soft-capped, masked

k_scale has one value per query head (it carries the scales of q and k), v_scale one per KV head; out is fp16 or bf16. Work items, queue,
masks and the order of the steps are those of prefill_sm90.py; what 8 bits change:

Warp roles (128 * (1 + num_consumer_groups) threads)
    warp group 0, warp 0           load       draws tickets, turns them into work items, issues every TMA load
    warp group 0, warps 1..        transpose  V tile -> V^T tile in shared memory; zeros tokens past the end of the keys; the rest exit
    warp groups 1..                mma        64 query rows each; S = Q K^T and O += P V by wgmma, softmax in registers, O leaves by TMA
    Registers after setmaxnreg: (56, 224) for two consumer groups, 56*128 + 2*224*128 = 64,512 = 384 threads * 168 at entry.

Pipelines (mbarriers)
    name         filled by   waited by     bytes per stage          why
    q_full       load        one group     64 * head_dim_qk         each group waits for its own 64 rows only
    q_empty      that group  load          -                        after the last Q K^T
    k_full       load        all groups    tile_kv * head_dim_qk    K and V arrive separately: S starts one copy earlier
    k_empty      all groups  load          -                        S is complete in registers
    v_full       load        transpose     tile_kv * head_dim_vo    V as it lies in memory
    v_empty      transpose   load          -                        it has been read
    vt_full      transpose   all groups    - (same size)            V^T, tokens in the order of P's registers
    vt_empty     all groups  transpose     -                        after O += P V
    work_full    load        the others    - (6 words)              the next work item, zero rows = end of the queue
    work_empty   the others  load          -                        the words have been read

P is rounded to e4m3 under a shift of 2^7 (prefill_sm90_fp8_softmax.py). 8-bit wgmma adds with about 14 bits of mantissa and cuts the rest
off, so a long sum of one sign shrinks. Every ``tile.promote_every`` key tiles the accumulator is therefore added to a sum in fp32 that
lies in shared memory, where O waits for its store later, and starts again from zero: while the next Q K^T runs, and without a register.

Shared memory (d = 128, 192 keys): Q 16 KiB, sum and O 64 KiB, two stages each of K, V and V^T, 24 KiB a stage.
Compute bound: 4 * head_dim FLOP per (query, visible key); exp2 runs at 16 per clock and SM, as long as both products at d = 128.
Source: Shah et al., FlashAttention-3 (arXiv:2407.08608).
"""

import math
import typing
from enum import IntEnum
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.utils import LayoutEnum

from ..device.args import CUTE_DTYPES, fake_args
from ..device.mma import ldmatrix_x4, load_shared_4, store_shared_4
from ..device.output import store_columns, store_lse
from ..tiles_prefill_sm90_fp8 import VT_STAGES
from .prefill_sm90_fp8_layout import (
    CHUNK,
    EVEN,
    GROUP_ROWS,
    ODD,
    STEP_TOKENS,
    PrefillFp8Layout,
    source_lane,
    target_lane,
)
from .prefill_sm90_fp8_softmax import UNSHIFT, advance_maximum, cap_scores, exponentiate_row, round_p
from .prefill_sm90_queue import COLUMNS, WARP, Lengths, PrefillQueue
from .prefill_sm90_softmax import convert_pairs, mask_scores, rows_cols, scale_rows

LOG2_E = math.log2(math.e)
WARP_GROUP = 128
VANISHED = -200.0  # exp2 of it is 0
FAR = 1 << 30  # a window that reaches this far is no window; keeps position arithmetic inside 32 bits
TRANSPOSERS = 2  # warps that transpose
STEPS_AT_ONCE = 4  # transpose steps whose reads are in flight together: four registers each


class Role(IntEnum):
    """Warp group roles; consumer group g is warp group 1 + g."""

    FEED = 0
    MMA = 1


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
    """Pipelines and mbarriers of a CTA."""

    k: object
    v: object
    vt_full: object
    vt_empty: object
    q_full: object
    q_empty: object
    work_full: object
    work_empty: object
    work: object  # the words of the next work item
    table: object  # the queue's notes on the requests it is handing out


class Place(NamedTuple):
    """Where one consumer group's 64 rows of a work item belong."""

    q_row: object  # row of q and out of the first
    num_rows: object  # rows that belong to the request; may be negative or exceed 64
    head: object
    split: object


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
    row_max: object
    row_sum: object
    correction: object
    sum_max: object  # row maxima that the sum in shared memory refers to
    sum_at: object  # shared address of this thread's part of it


class PrefillSm90Fp8:
    """See the module docstring. ``tile`` is a ``tiles_prefill_sm90_fp8.PrefillSm90Fp8Tile``."""

    def __init__(self, spec, tile):
        self.spec, self.tile = spec, tile
        self.dtype, self.out_dtype = CUTE_DTYPES[spec.q_dtype], CUTE_DTYPES[spec.o_dtype]
        self.groups = tile.num_consumer_groups
        self.q_buffers = tile.num_q_buffers
        self.pack = spec.group_size if tile.pack_heads else 1  # rows per query
        self.heads_per_kv = spec.group_size // self.pack  # heads, as work items count them, per KV head
        self.group_queries = GROUP_ROWS // self.pack  # queries of one consumer group
        self.o_buffers = 2 if tile.promote_every else 1  # 16-bit tiles in a group's part of s_o: the sum has 32 bits
        self.single = spec.kv_layout == "single"
        # Whether a group may pass tiles by. In a long full single request only the last block could, and the extra loop keeps ptxas from
        # proving the main loop warp-uniform.
        self.passes = spec.causal or spec.window or not self.single or tile.split_kv
        self.paged = spec.kv_layout == "paged"
        self.layout = PrefillFp8Layout(spec, tile, self.dtype, self.out_dtype)
        self.queue = PrefillQueue(spec, tile)
        self.queue.budget_tokens *= 2  # the queue counts 16-bit elements

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
        mma = lambda columns, source: sm90.make_trivial_tiled_mma(  # noqa: E731
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (GROUP_ROWS, columns),
            a_source=source,
        )
        qk = lambda: mma(tile.tile_kv, warpgroup.OperandSource.SMEM)  # noqa: E731
        load = cpasync.CopyBulkTensorTileG2SOp()
        store = cpasync.CopyBulkTensorTileS2GOp()
        q_tma, q_coords = layout.row_tma(load, q, self.dtype)
        k_tma, k_coords = layout.kv_tma(load, k)
        v_tma, v_coords = layout.kv_tma(load, v)
        o_tma, o_coords = layout.row_tma(store, out, self.out_dtype)
        batch = 1 if const_expr(self.single) else qo_indptr.shape[0] - 1
        heads = q.shape[1] // self.pack
        # rows of a request fill all its query blocks but one
        most_items = (q.shape[0] * self.pack // tile.tile_q + batch) * heads * num_splits
        grid = cutlass.max(1, cutlass.min(most_items, num_ctas))
        total_kv = k.shape[1] if const_expr(self.single) else 0
        self.kernel(
            qk(),
            qk(),
            mma(self.spec.head_dim_vo, warpgroup.OperandSource.RMEM),
            q_tma,
            q_coords,
            k_tma,
            k_coords,
            v_tma,
            v_coords,
            o_tma,
            o_coords,
            Memory(out, lse, kv_indices, sinks, k_scale, v_scale, out_partial, lse_partial, status),
            Lengths(qo_indptr, kv_indptr, kv_last_page_len, q.shape[0], total_kv, heads, num_splits),
            Scales(sm_scale, out_scale, soft_cap, lse_scale, cutlass.min(window_left, FAR), num_splits),
        ).launch(grid=[grid, 1, 1], block=[tile.num_threads, 1, 1], stream=stream, min_blocks_per_mp=1)

    # ================================================================================================ kernel

    @cute.kernel
    def kernel(
        self,
        qk_first: cute.TiledMma,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        q_tma: cute.CopyAtom,
        q_coords: cute.Tensor,
        k_tma: cute.CopyAtom,
        k_coords: cute.Tensor,
        v_tma: cute.CopyAtom,
        v_coords: cute.Tensor,
        o_tma: cute.CopyAtom,
        o_coords: cute.Tensor,
        memory: Memory,
        lengths: Lengths,
        scales: Scales,
    ):
        """Shared memory, pipelines, dispatch to the roles."""
        tile, spec, dtype, layout = self.tile, self.spec, self.dtype, self.layout
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARP_GROUP)
        qk_first.set(warpgroup.Field.ACCUMULATE, False)
        for mma in (qk, pv):
            mma.set(warpgroup.Field.ACCUMULATE, True)

        shared = SmemAllocator()
        allocate = lambda rows, columns, buffers, dtype: _allocate(shared, layout.tiles(rows, columns, buffers, dtype), dtype)  # noqa: E731
        num_q = layout.q_tiles
        s_q = allocate(GROUP_ROWS, spec.head_dim_qk, num_q, dtype)
        s_k = allocate(tile.tile_kv, spec.head_dim_qk, tile.stages, dtype)
        s_v = allocate(tile.tile_kv, spec.head_dim_vo, tile.stages, dtype)
        s_vt = allocate(spec.head_dim_vo, tile.tile_kv, VT_STAGES, dtype)  # (column, token, stage): B operand of P V
        s_o = allocate(GROUP_ROWS, spec.head_dim_vo, self.groups * self.o_buffers, self.out_dtype)
        k_bars = shared.allocate_array(Int64, 2 * tile.stages)
        v_bars = shared.allocate_array(Int64, 2 * tile.stages)
        vt_full = shared.allocate_array(Int64, VT_STAGES)
        vt_empty = shared.allocate_array(Int64, VT_STAGES)
        q_full = shared.allocate_array(Int64, num_q)
        q_empty = shared.allocate_array(Int64, num_q)
        work_bars = shared.allocate_array(Int64, 2)
        work = shared.allocate_tensor(Int32, cute.make_layout(6), byte_alignment=16)
        table = shared.allocate_tensor(Int32, cute.make_layout(COLUMNS * WARP), byte_alignment=16)
        if warp == 0:
            for descriptor in (q_tma, k_tma, v_tma, o_tma):
                cpasync.prefetch_descriptor(descriptor)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(num_q):
                    cute.arch.mbarrier_init(q_full + i, 1)
                    cute.arch.mbarrier_init(q_empty + i, 4)  # one arrival per warp of the group
                for i in cutlass.range_constexpr(VT_STAGES):
                    cute.arch.mbarrier_init(vt_full + i, TRANSPOSERS)  # one arrival per warp
                    cute.arch.mbarrier_init(vt_empty + i, 4 * self.groups)
                cute.arch.mbarrier_init(work_bars, 1)
                cute.arch.mbarrier_init(work_bars + 1, 4 * self.groups + TRANSPOSERS)
        ring = lambda bars, stages, columns, warps: pipeline.PipelineTmaAsync.create(  # noqa: E731
            barrier_storage=bars,
            num_stages=stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, warps),
            tx_count=tile.tile_kv * columns,
            defer_sync=True,
        )
        k_ring = ring(k_bars, tile.stages, spec.head_dim_qk, 4 * self.groups)
        v_ring = ring(v_bars, tile.stages, spec.head_dim_vo, TRANSPOSERS)
        events = Events(k_ring, v_ring, vt_full, vt_empty, q_full, q_empty, work_bars, work_bars + 1, work, table)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        if group == Role.FEED:
            cute.arch.setmaxregister_decrease(tile.producer_regs)
            if warp == 0:
                self.load(events, memory, lengths, scales, q_tma, q_coords, s_q, k_tma, k_coords, s_k, v_tma, v_coords, s_v)
            elif warp <= TRANSPOSERS:
                self.transpose(events, scales, warp - 1, s_v, s_vt)
        else:
            cute.arch.setmaxregister_increase(tile.consumer_regs)
            self.mma(events, memory, scales, qk_first, qk, pv, o_tma, o_coords, s_q, s_k, s_vt, s_o)

    # ================================================================================================ load

    @cute.jit
    def load(self, events, memory, lengths, scales, q_tma, q_coords, s_q, k_tma, k_coords, s_k, v_tma, v_coords, s_v):
        """Warp 0: work items in ticket order, their Q, K and V. One warp does both, the rings hide the queue's latency."""
        spec, tile = self.spec, self.tile
        lane = cute.arch.lane_idx()
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        t_q = cute.make_tensor(s_q.iterator, self.layout.row_boxes(spec.head_dim_qk, self.layout.q_tiles, self.dtype).outer)
        t_k = cute.make_tensor(s_k.iterator, self.layout.kv_boxes(spec.head_dim_qk, tile.stages).outer)
        t_v = cute.make_tensor(s_v.iterator, self.layout.kv_boxes(spec.head_dim_vo, tile.stages).outer)

        requests_per_section, heads_per_section = self.queue.section_sizes(lengths)
        cursor = self.queue.start(lengths, events.table, requests_per_section)
        cursor, item = self.queue.find(lengths, events.table, cursor, Int32(cta), requests_per_section, heads_per_section)
        self.publish(events, item, Int32(0))
        items = Int32(1)  # published so far
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, tile.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, tile.stages)
        while item.num_rows > 0:
            first, end = self.kv_tiles(item.first_pos, item.num_rows, item.kv_len, item.split, scales)
            kv_head = item.head // self.heads_per_kv
            buffer, phase = self.q_place(items - 1)
            for g in cutlass.range_constexpr(self.groups):
                at = g * self.q_buffers + buffer
                cute.arch.mbarrier_wait(events.q_empty + at, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(events.q_full + at, GROUP_ROWS * spec.head_dim_qk)
                rows = self.layout.rows_from(q_coords, item.q_row + self.group_queries * g)
                to_s, from_g = self.layout.partition(q_tma, t_q, rows, self.layout.row_box(spec.head_dim_qk, self.dtype))
                cute.copy(q_tma, from_g[None, (0, 0, 0, item.head)], to_s[None, at], tma_bar_ptr=events.q_full + at)
            from_k, from_v = self.kv_source(k_coords, item), self.kv_source(v_coords, item)
            page_ids = self.page_ids(memory, item, k_coords.shape[4], end - 1, first)
            for i in cutlass.range(end - first, unroll=1):
                kv_tile = end - 1 - i  # right to left: masked tiles first
                next_ids = self.page_ids(memory, item, k_coords.shape[4], kv_tile - 1, first)  # one tile ahead of its use
                events.k.producer_acquire(k_state)
                self.load_tile(k_tma, from_k, t_k, k_state.index, kv_tile, kv_head, page_ids, events.k.producer_get_barrier(k_state))
                events.v.producer_acquire(v_state)
                self.load_tile(v_tma, from_v, t_v, v_state.index, kv_tile, kv_head, page_ids, events.v.producer_get_barrier(v_state))
                k_state.advance()
                v_state.advance()
                page_ids = next_ids
            # Drawn after the last load: the rings still hold unread tiles, which hides the latency, and a later draw balances better.
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
            cute.arch.mbarrier_arrive(events.work_full)

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
    def q_place(self, turn: Int32):
        """(buffer, phase) of the Q of the ``turn``-th work item of this CTA."""
        buffer, phase = Int32(0), turn & 1
        if const_expr(self.q_buffers == 2):
            buffer, phase = turn & 1, (turn >> 1) & 1
        return buffer, phase

    @cute.jit
    def kv_tiles(self, first_pos: Int32, num_rows: Int32, kv_len: Int32, split: Int32, scales):
        """[first, end): the key tiles of the work item, those that some row of it sees; empty when none is visible."""
        end, first = kv_len, Int32(0)
        if const_expr(self.spec.causal):
            queries = cute.ceil_div(cutlass.min(num_rows, self.tile.tile_q), self.pack)
            end = cutlass.max(0, cutlass.min(kv_len, first_pos + queries))
        if const_expr(self.spec.window):
            first = cutlass.max(0, first_pos - scales.window_left) // self.tile.tile_kv
        end = cute.ceil_div(end, self.tile.tile_kv)
        if const_expr(self.tile.split_kv):
            visible, begin = cutlass.max(0, end - first), first
            first = begin + visible * split // scales.num_splits
            end = begin + visible * (split + 1) // scales.num_splits
        return first, end

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

    def kv_source(self, coords, item):
        """The request's own view of K or V; pages are found by coordinate instead."""
        return cute.domain_offset((item.kv_begin, 0, 0, 0, 0), coords) if self.spec.kv_layout == "ragged" else coords

    @cute.jit
    def page_ids(self, memory, item, num_pages: Int32, kv_tile: Int32, first: Int32):
        """Lane j: the page of the tile's j-th box (tiles from ``first`` on). A missing page becomes ``num_pages``: TMA fills zeros."""
        page = Int32(0)
        if const_expr(self.paged):
            lane = cute.arch.lane_idx()
            entry = kv_tile * self.tile.tile_kv // self.spec.page_size + lane
            page = num_pages
            if lane < self.layout.boxes and kv_tile >= first and entry < item.num_pages:
                position = item.kv_begin + entry
                page = Int32(-1)
                if position >= 0 and position < memory.kv_indices.shape[0]:
                    page = memory.kv_indices[position]
                if page < 0 or page >= num_pages:
                    memory.status[0] = 1
                    page = num_pages
        return page

    @cute.jit
    def load_tile(self, tma, coords, shared, stage: Int32, kv_tile: Int32, kv_head: Int32, page_ids: Int32, barrier):
        """K or V of one key tile: one box, or a box per page and column block."""
        layout, blocks = self.layout, coords.shape[2]
        to_s, from_g = layout.partition(tma, shared, coords, layout.kv_box(coords.shape[1] * blocks))
        if const_expr(layout.boxes == 1):
            box, page = kv_tile, Int32(0)
            if const_expr(self.paged):
                box, page = kv_tile % layout.tiles_per_page, cute.arch.shuffle_sync(page_ids, 0)
            cute.copy(tma, from_g[None, (box, 0, 0, kv_head, page)], to_s[None, stage], tma_bar_ptr=barrier)
        else:
            for j in cutlass.range(layout.boxes, unroll_full=True):
                page = cute.arch.shuffle_sync(page_ids, j)
                for block in cutlass.range_constexpr(blocks):
                    cute.copy(tma, from_g[None, (0, 0, block, kv_head, page)], to_s[None, j, block, stage], tma_bar_ptr=barrier)

    # ================================================================================================ transpose

    @cute.jit
    def transpose(self, events, scales, worker: Int32, s_v, s_vt):
        """V -> V^T, tile by tile in the order of the loads. ``worker`` counts the transposing warps; they share a tile's columns."""
        tile = self.tile
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, tile.stages)
        target = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, VT_STAGES)
        _, num_rows, first_pos, _, kv_len, split = self.next_item(events, Int32(0))
        items = Int32(1)
        while num_rows > 0:
            first, end = self.kv_tiles(first_pos, num_rows, kv_len, split, scales)
            for i in cutlass.range(end - first, unroll=1):
                tokens = kv_len - (end - 1 - i) * tile.tile_kv  # of this tile and right of it
                events.v.consumer_wait(state, events.v.consumer_try_wait(state))
                cute.arch.mbarrier_wait(events.vt_empty + target.index, target.phase)
                self.transpose_tile(s_v, state.index, s_vt, target.index, worker, tokens)
                cute.arch.fence_proxy("async.shared", space="cta")  # before wgmma reads what these stores wrote
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(events.vt_full + target.index)
                events.v.consumer_release(state)
                state.advance()
                target.advance()
            _, num_rows, first_pos, _, kv_len, split = self.next_item(events, items)
            items = items + 1

    @cute.jit
    def transpose_tile(self, s_v, stage: Int32, s_vt, target: Int32, worker: Int32, tokens: Int32):
        """One warp's share of a tile of ``tokens`` tokens or more: every ``TRANSPOSERS``-th chunk of 16 columns.

        What follows belongs to the next request or to nobody, and 0 * NaN is NaN: each warp zeros it in the columns it is about to read.
        A contiguous single V ends where TMA clips and fills zeros.
        """
        layout, lane = self.layout, cute.arch.lane_idx()
        read = Uint32(s_v.iterator.toint()) + Uint32(stage * layout.v_bytes)
        write = Uint32(s_vt.iterator.toint()) + Uint32(target * layout.v_bytes)
        read_lane, write_lane = source_lane(lane, layout.v_width), target_lane(lane, layout.vt_width)
        straight = Int32(EVEN) if lane < 16 else Int32(ODD)
        crossed = Int32(ODD) if lane < 16 else Int32(EVEN)
        for i in cutlass.range(self.spec.head_dim_vo // CHUNK // TRANSPOSERS, unroll=1):
            at = (i * TRANSPOSERS + worker) * CHUNK  # first of 16 columns
            block, inside = 0, at
            if const_expr(layout.v_width < self.spec.head_dim_vo):
                block, inside = at // layout.v_width, at % layout.v_width
            from_columns = read + Uint32(block * layout.v_block + (read_lane ^ inside))
            to_columns = write + Uint32(at * layout.vt_width)
            if const_expr(not self.single):
                if tokens < self.tile.tile_kv:
                    for t in cutlass.range(lane, self.tile.tile_kv, WARP, unroll=1):
                        if t >= tokens:
                            address = from_columns + Uint32((t - lane) * layout.v_width)
                            store_shared_4(address, Uint32(0), Uint32(0), Uint32(0), Uint32(0))
                    cute.arch.sync_warp()
            for begin in cutlass.range_constexpr(0, self.tile.tile_kv, STEPS_AT_ONCE * STEP_TOKENS):
                steps = range(begin, min(begin + STEPS_AT_ONCE * STEP_TOKENS, self.tile.tile_kv), STEP_TOKENS)
                loaded = [ldmatrix_x4(from_columns, t * layout.v_width, True) for t in steps]
                for t, a in zip(steps, loaded):
                    stored = [prmt(a[m], a[m + 1], selector) for m in (0, 2) for selector in (straight, crossed)]
                    address = to_columns + Uint32(write_lane ^ (t % layout.vt_width))
                    stmatrix_x4(address, t // layout.vt_width * layout.vt_block, *stored)

    # ================================================================================================ mma

    @cute.jit
    def mma(self, events, memory, scales, qk_first, qk, pv, o_tma, o_coords, s_q, s_k, s_vt, s_o):
        """A consumer group: 64 rows of each work item."""
        tile, spec = self.tile, self.spec
        thread = cute.arch.thread_idx()[0] % WARP_GROUP
        group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // WARP_GROUP) - Role.MMA
        row = thread // 32 * 16 + thread % 32 // 4  # this thread's rows of the group: row and row + 8
        column = thread % 4 * 2  # and columns: column + {0, 1} + 8j

        qk_slice, pv_slice = qk.get_slice(0), pv.get_slice(0)
        operand = lambda k: cute.make_rmem_tensor(cute.make_layout(((4, 2, 2), 1, k // 32)), self.dtype)  # noqa: E731
        acc_s = cute.make_rmem_tensor(qk.partition_shape_C((GROUP_ROWS, tile.tile_kv)), Float32)
        acc_o = cute.make_rmem_tensor(pv.partition_shape_C((GROUP_ROWS, spec.head_dim_vo)), Float32)
        sum_bytes = GROUP_ROWS * spec.head_dim_vo * 4
        pair = lambda: cute.make_rmem_tensor(2, Float32)  # noqa: E731
        m = Math(
            qk_first,
            qk,
            pv,
            qk.make_fragment_A(qk_slice.partition_A(s_q)),
            qk.make_fragment_B(qk_slice.partition_B(s_k)),
            pv.make_fragment_B(pv_slice.partition_B(s_vt)),
            acc_s,
            acc_o,
            operand(tile.tile_kv),
            pair(),
            pair(),
            pair(),
            pair(),
            Uint32(s_o.iterator.toint()) + Uint32(group * sum_bytes + thread * 16),
        )
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, tile.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, VT_STAGES)
        scale_log2, pre_scale = pair(), pair()
        q_row, num_rows, first_pos, head, kv_len, split = self.next_item(events, Int32(0))
        items = Int32(1)  # taken so far
        while num_rows > 0:
            item_first, item_end = self.kv_tiles(first_pos, num_rows, kv_len, split, scales)
            group_pos = first_pos + group * self.group_queries  # position of the group's first query
            pos = group_pos + row // self.pack
            place = Place(q_row + group * self.group_queries, num_rows - group * GROUP_ROWS, head, split)
            first, end = item_first, item_end
            if const_expr(self.passes):
                first, end = self.group_tiles(item_first, item_end, group_pos, place.num_rows, kv_len, scales.window_left)
            for r in cutlass.range_constexpr(2):
                scale_log2[r], pre_scale[r] = self.softmax_scale(memory, scales, place, row + 8 * r)
            buffer, phase = self.q_place(items - 1)
            q_at = group * self.q_buffers + buffer
            rows = Rows(q_at, pos, column, kv_len, scales.window_left, scale_log2, pre_scale)
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
            cute.arch.mbarrier_wait(events.q_full + q_at, phase)
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
                        self.step(m, events, rows, k_state, v_state, group, thread, end - 2 - i, i, True)
                        k_state.advance()
                        v_state.advance()
                whole_first = first
                if const_expr(spec.window):
                    oldest_of_last_row = cutlass.max(0, group_pos + (self.group_queries - 1) - scales.window_left)
                    whole_first = cutlass.min(whole_end, cutlass.max(first, cute.ceil_div(oldest_of_last_row, tile.tile_kv)))
                before = end - 1 - whole_end
                for i in cutlass.range(whole_end - whole_first, unroll=1):
                    self.step(m, events, rows, k_state, v_state, group, thread, Int32(0), before + i, False)
                    k_state.advance()
                    v_state.advance()
                if const_expr(spec.window):
                    before = end - 1 - whole_first
                    for i in cutlass.range(whole_first - first, unroll=1):
                        self.step(m, events, rows, k_state, v_state, group, thread, whole_first - 1 - i, before + i, True)
                        k_state.advance()
                        v_state.advance()
                self.issue_pv(m, events, v_state)
                self.release_q(events, q_at)
                if const_expr(not spec.window):
                    q_row, num_rows, first_pos, head, kv_len, split = self.next_item(events, items)  # under the last P V
                warpgroup.wait_group(0)
                self.release_vt(events, v_state)
                v_state.advance()
                if const_expr(tile.promote_every):
                    if end - 2 - first >= tile.promote_every:  # as many P V were complete before the last step
                        self.add_sum(m, scale_log2)
            else:
                self.release_q(events, q_at)
                if const_expr(not spec.window):
                    q_row, num_rows, first_pos, head, kv_len, split = self.next_item(events, items)
            if const_expr(spec.window):
                # the load warp announces the next item only after it has filled these stages
                for _ in cutlass.range(first - item_first, unroll=1):
                    self.pass_by(events, k_state, v_state)
                    k_state.advance()
                    v_state.advance()
                q_row, num_rows, first_pos, head, kv_len, split = self.next_item(events, items)
            items = items + 1
            self.finish(m, memory, scales, scale_log2, place, row, column)
            if const_expr(tile.split_kv):
                self.store_partial(m, memory, place, row, column)
            else:
                self.store(m, memory, o_tma, o_coords, s_o, place, group, thread)
        if thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # shared memory must outlive the last store

    @cute.jit
    def release_q(self, events, q_at: Int32):
        """The last Q K^T of a work item is done."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(events.q_empty + q_at)

    @cute.jit
    def wait_vt(self, events, v_state):
        """V^T of the next key tile is complete."""
        cute.arch.mbarrier_wait(events.vt_full + v_state.index, v_state.phase)

    @cute.jit
    def release_vt(self, events, v_state):
        """This warp's group has read a V^T stage."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(events.vt_empty + v_state.index)

    @cute.jit
    def pass_by(self, events, k_state, v_state):
        """Release a key tile that none of this group's rows sees."""
        events.k.consumer_wait(k_state, events.k.consumer_try_wait(k_state))
        events.k.consumer_release(k_state)
        self.wait_vt(events, v_state)
        self.release_vt(events, v_state)

    @cute.jit
    def softmax_scale(self, memory, scales, place, row: Int32):
        """(factor from scores to base-2 logits, factor inside the tanh of a soft cap) of one row."""
        logit_scale = scales.sm_scale
        if const_expr(self.spec.k_scale):
            _, qo_head = self.row_of(place, row)
            logit_scale = logit_scale * memory.k_scale[qo_head]
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
        events.k.consumer_release(k_state)
        if const_expr(self.spec.soft_cap):
            cap_scores(m.acc_s, rows.pre_scale)
        self.mask(m, rows, start)
        advance_maximum(m.acc_s, m.row_max, m.row_sum, m.correction, rows.scale_log2, True)
        for r in cutlass.range_constexpr(2):
            exponentiate_row(m.acc_s, m.row_max, m.row_sum, rows.scale_log2, r)
        round_p(m.acc_s, m.p)

    @cute.jit
    def step(
        self,
        m,
        events,
        rows,
        k_state,
        v_state,
        group: Int32,
        thread: Int32,
        kv_tile: Int32,
        done: Int32,
        masked: cutlass.Constexpr,
    ):
        """One key tile: its Q K^T, then P V of the tile before, and its softmax while that P V runs. ``done`` P V are complete."""
        self.issue_qk(m, events, k_state, rows.q_at)
        if const_expr(self.tile.promote_every):
            if done > 0 and done % self.tile.promote_every == 0:
                self.promote(m, rows, group, thread, done == self.tile.promote_every)
        self.issue_pv(m, events, v_state)
        warpgroup.wait_group(1)  # S is complete, P V may still run
        events.k.consumer_release(k_state)
        if const_expr(self.spec.soft_cap):
            cap_scores(m.acc_s, rows.pre_scale)
        if const_expr(masked):
            self.mask(m, rows, kv_tile * self.tile.tile_kv)
        grew = advance_maximum(m.acc_s, m.row_max, m.row_sum, m.correction, rows.scale_log2, False)
        exponentiate_row(m.acc_s, m.row_max, m.row_sum, rows.scale_log2, 0)
        # P V is done well before the exponentials: the second row's hide what waits for it (P's registers, O's accumulator)
        warpgroup.wait_group(0)
        self.release_vt(events, v_state)
        exponentiate_row(m.acc_s, m.row_max, m.row_sum, rows.scale_log2, 1)
        round_p(m.acc_s, m.p)
        if grew:
            scale_rows(m.acc_o, m.correction)

    @cute.jit
    def issue_qk(self, m, events, k_state, q_at: Int32):
        """Start S = Q K^T when k_full says so."""
        events.k.consumer_wait(k_state, events.k.consumer_try_wait(k_state))
        warpgroup.fence()
        for kk in cutlass.range_constexpr(self.spec.head_dim_qk // 32):
            mma = m.qk_first if const_expr(kk == 0) else m.qk
            cute.gemm(mma, m.acc_s, m.frag_q[None, None, kk, q_at], m.frag_k[None, None, kk, k_state.index], m.acc_s)
        warpgroup.commit_group()

    @cute.jit
    def issue_pv(self, m, events, v_state):
        """Start O += P V when vt_full says so."""
        self.wait_vt(events, v_state)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(cute.size(m.p, mode=[2])):
            cute.gemm(m.pv, m.acc_o, m.p[None, None, kk], m.frag_v[None, None, kk, v_state.index], m.acc_o)
        warpgroup.commit_group()

    # ------------------------------------------------------------------------------------------------ the sum in fp32

    @cute.jit
    def promote(self, m, rows, group: Int32, thread: Int32, first: Boolean):
        """sum += O, then O = 0; the ``first`` of a work item overwrites what lies there. No P V is in flight."""
        if first:
            if thread // 32 == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)  # the previous item's O has left for its store
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARP_GROUP)
        else:
            self.add_sum(m, rows.scale_log2)
        for i in cutlass.range_constexpr(0, cute.size(m.acc_o), 4):
            words = [float_bits(m.acc_o[i + j]) for j in range(4)]
            store_shared_4(m.sum_at + Uint32(i // 4 * WARP_GROUP * 16), *words)
        for r in cutlass.range_constexpr(2):
            m.sum_max[r] = m.row_max[r]
        m.acc_o.fill(0.0)

    @cute.jit
    def add_sum(self, m, scale_log2):
        """O += sum, brought from the row maxima of its time to those of now."""
        factor = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            # infinite maxima of rows that see nothing, or past the request's end, give NaN: fmax drops it
            factor[r] = cute.arch.exp2(cute.arch.fmax((m.sum_max[r] - m.row_max[r]) * scale_log2[r], Float32(VANISHED)))
        for i in cutlass.range_constexpr(0, cute.size(m.acc_o), 4):
            words = load_shared_4(m.sum_at + Uint32(i // 4 * WARP_GROUP * 16))
            for j in cutlass.range_constexpr(4):
                m.acc_o[i + j] = m.acc_o[i + j] + bits_float(words[j]) * factor[j // 2]

    # ------------------------------------------------------------------------------------------------ epilogue

    @cute.jit
    def finish(self, m, memory, scales, scale_log2, place, row: Int32, column: Int32):
        """Divide O by its sum, apply the output scales, write the log-sum-exp."""
        out_scale = scales.out_scale * Float32(UNSHIFT)  # O and the sum carry 2^SHIFT; here the sum loses it first
        if const_expr(self.spec.v_scale):
            out_scale = out_scale * memory.v_scale[place.head // self.heads_per_kv]
        factor = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            total = cute.arch.warp_reduction(m.row_sum[r], lambda x, y: x + y, threads_in_group=4) * Float32(UNSHIFT)
            top = m.row_max[r] * scale_log2[r] if m.row_max[r] != -Float32.inf else -Float32.inf
            weight = Float32(1.0)
            q_row, qo_head = self.row_of(place, row + 8 * r)
            if const_expr(self.spec.sinks):
                # the sink is one more logit without a value; it may become the new maximum; the first split counts it
                sink = memory.sinks[qo_head] * Float32(LOG2_E)
                if const_expr(self.tile.split_kv):
                    sink = sink if place.split == 0 else -Float32.inf
                joint = cute.arch.fmax(top, sink)
                reference = joint if joint != -Float32.inf else Float32(0.0)
                weight = cute.arch.exp2(top - reference)
                total = total * weight + cute.arch.exp2(sink - reference)
                top = reference
            factor[r] = cute.arch.rcp_approx(total) * weight * out_scale if total != Float32(0.0) else Float32(0.0)
            if const_expr(self.spec.lse or self.tile.split_kv):
                if column == 0 and row + 8 * r < place.num_rows:
                    lse = top + cute.math.log2(total, fastmath=True)
                    store_lse(memory.lse, memory.lse_partial, lse, q_row, qo_head, place.split, scales.lse_scale)
        scale_rows(m.acc_o, factor)

    @cute.jit
    def row_of(self, place, row: Int32):
        """(row of q and out, query head) of a row of this group."""
        q_row, qo_head = place.q_row + row, place.head
        if const_expr(self.pack > 1):
            q_row, qo_head = place.q_row + row // self.pack, place.head * self.pack + row % self.pack
        return q_row, qo_head

    @cute.jit
    def store_partial(self, m, memory, place, row: Int32, column: Int32):
        """O, normalised, to the partials of this split: fp32, straight from registers."""
        o = rows_cols(m.acc_o)
        pair = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            if row + 8 * r < place.num_rows:
                q_row, qo_head = self.row_of(place, row + 8 * r)
                for c in cutlass.range_constexpr(0, cute.size(o, mode=[1]), 2):
                    pair[0], pair[1] = o[r, c], o[r, c + 1]
                    store_columns(memory.out, memory.out_partial, pair, q_row, qo_head, place.split, column + 4 * c)

    @cute.jit
    def store(self, m, memory, o_tma, o_coords, s_o, place, group: Int32, thread: Int32):
        """O to this group's own buffer and out; the other groups are not involved, and the store runs on under the next work item."""
        head_dim, dtype = self.spec.head_dim_vo, self.out_dtype
        buffer = group * self.o_buffers
        o_tile = s_o[None, None, buffer]
        if thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # this group's previous store has left the buffer
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARP_GROUP)
        to_shared = cute.make_tiled_copy_C(sm90.sm90_get_smem_store_op(LayoutEnum.ROW_MAJOR, dtype, Float32), m.pv).get_slice(thread)
        rounded = cute.make_rmem_tensor_like(m.acc_o, dtype)
        convert_pairs(m.acc_o, rounded)
        cute.copy(to_shared, to_shared.retile(rounded), to_shared.partition_D(o_tile))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARP_GROUP)
        # TMA clips only at the end of the tensor: the last block of a request must not run into the next one
        if const_expr(self.single):
            whole = place.num_rows > 0
        else:
            whole = place.num_rows >= GROUP_ROWS
        if whole:
            if thread // 32 == 0:
                boxes = cute.make_tensor(s_o.iterator, self.layout.row_boxes(head_dim, self.groups * self.o_buffers, dtype).outer)
                rows = self.layout.rows_from(o_coords, place.q_row)
                from_s, to_g = self.layout.partition(o_tma, boxes, rows, self.layout.row_box(head_dim, dtype))
                cute.copy(o_tma, from_s[None, buffer], to_g[None, (0, 0, 0, place.head)])
                cute.arch.cp_async_bulk_commit_group()
        elif const_expr(not self.single):
            chunks = head_dim // 8  # 16-byte chunks of a row
            for i in cutlass.range(thread, place.num_rows * chunks, WARP_GROUP, unroll=1):
                chunk = cute.make_rmem_tensor(8, dtype)
                q_row, qo_head = self.row_of(place, i // chunks)
                cute.autovec_copy(cute.local_tile(o_tile[i // chunks, None], (8,), (i % chunks,)), chunk)
                cute.autovec_copy(chunk, cute.local_tile(memory.out[Int64(q_row), qo_head, None], (8,), (i % chunks,)))


def _allocate(shared, layout, dtype):
    return shared.allocate_tensor(dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)


# ---------------------------------------------------------------------------------------------------------------------- PTX one-liners
@cute.jit
def prmt(a: Uint32, b: Uint32, selector: Int32) -> Uint32:
    """Four of the eight bytes of a (0 to 3) and b (4 to 7), named by the selector's nibbles."""
    return cute.arch.inline_ptx("prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Uint32], read_only_args=[a, b, selector])


@cute.jit
def stmatrix_x4(address: Uint32, offset: cutlass.Constexpr, a: Uint32, b: Uint32, c: Uint32, d: Uint32):
    """Four matrices of 8 rows of 16 bytes; lane ``8 * m + r`` gives the address of row r of matrix m."""
    cute.arch.inline_ptx(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{$r0}+" + str(offset) + "], {{$r1}, {$r2}, {$r3}, {$r4}};",
        read_only_args=[address, a, b, c, d],
    )


@cute.jit
def float_bits(x: Float32) -> Uint32:
    """The 32 bits of a float."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[x])


@cute.jit
def bits_float(x: Uint32) -> Float32:
    """The float of 32 bits."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
