"""Prefill attention for Hopper: single, ragged and paged, one persistent kernel. Deep dive: docs/kernels/prefill_sm90.md.

    out[i, h] = out_scale * v_scale * sum_j softmax_j(logit[i, j]) v[j]     logit = (q . k) * sm_scale * k_scale, soft-capped, masked

A CTA owns one work item at a time: (request, tile_q rows, head) against all keys those rows may see, or one split of them. CTAs live as
long as the launch and draw items from a queue in device memory, longest first (prefill_sm90_queue.py); lengths are read on the device.
Rows are the queries of one query head or, where heads are packed (short queries), the (query, head) pairs of one KV head.

Warp roles (128 * (1 + num_consumer_groups) threads)
    warp group 0           load (prefill_sm90_load.py): warp 0 draws tickets, turns them into work items and loads; where K and V are paged
                           warp 1, or gathered all warps share the loads, otherwise the other three exit
    warp groups 1..        mma: 64 query rows each; S = Q K^T and O += P V by wgmma, softmax in registers, O leaves by TMA
    Registers after setmaxnreg: (24, 240); where the producer walks indptr and page tables (40, 232); where it gathers rows (56, 224);
    24*128 + 2*240*128 = 40*128 + 2*232*128 = 56*128 + 2*224*128 = 64,512 = 384 threads * 168 at entry.

Pipelines (mbarriers)
    name         filled by   waited by     bytes per stage          why
    q_full       load        one group     64 * head_dim_qk * 2     each group waits for its own 64 rows only
    q_empty      that group  load          -                        after the last Q K^T (after the O store where O is staged in Q's place)
    k_full       load        all groups    tile_kv * head_dim_qk*2  K and V arrive separately: S starts one copy earlier
    k_empty      all groups  load          -                        S is complete in registers
    v_full, v_empty          the same for V; v_empty after O += P V
    work_full    load        all groups    - (6 to 10 words)        the next work item, rows < 0 = end of the queue
    work_empty   all groups  load          -                        the words have been read
    The load warps besides warp 0 wait for work_full and arrive at work_empty like a consumer warp. A gathered stage of K or V is filled by
    64 threads' cp.async instead of TMA.

    With ``tile.cluster`` = 2 a stage of K or V is filled by both CTAs, half each, and waits to be emptied by the groups of both.

Named barriers: 1 + g, 128 threads: group g agrees on its O buffer, and on a V tail it has zeroed. Nothing spans two groups after the start.

Order inside a group: Q K^T of tile n is issued before P V of tile n - 1, so the tensor cores work while the softmax of tile n runs;
keys go right to left; the tiles a mask cuts (end of keys, diagonal, window) have their own loops, and only they pay for masking. A group
releases tiles none of its rows see without computing them; so does a group without rows (see ``passes``).

Shared memory (d = 128): Q 2*32 KiB, O 32 KiB, K and V 2 stages * 32 KiB each = 224 of 227 KiB.
Compute bound: 4 * head_dim FLOP per (query, visible key); exp2 runs at 16 per clock and SM, half the time of the wgmmas at d = 128.
Source: Shah et al., FlashAttention-3 (arXiv:2407.08608).
"""

import typing
from enum import IntEnum
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator

from ..device.args import CUTE_DTYPES, fake_args
from ..device.logits import alibi_slope
from .prefill_sm90_finish import LOG2_E, WARP_GROUP, Output, Place, PrefillFinish
from .prefill_sm90_layout import GROUP_ROWS, PrefillLayout
from .prefill_sm90_load import PrefillLoad, Source
from .prefill_sm90_queue import COLUMNS, WARP, Lengths, PrefillQueue
from .prefill_sm90_scores import add_alibi, fetch_mask, hide_masked
from .prefill_sm90_softmax import (
    as_a_operand,
    cap_scores,
    convert_pairs,
    mask_scores,
    online_softmax,
    scale_rows,
)

FAR = 1 << 30  # a window that reaches this far is no window; keeps position arithmetic inside 32 bits


class Role(IntEnum):
    """Warp group roles; consumer group g is warp group 1 + g."""

    LOAD = 0
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
    mask: object
    mask_indptr: object


class Caches(NamedTuple):
    """What the load warps need of K and V beside their TMA descriptors; None where nothing is paged."""

    k: object  # gathered: the tensors
    v: object
    pages: object  # how many there are
    k_heads: object  # a tile of several pages: elements from head to head
    v_heads: object


class Events(NamedTuple):
    """Pipelines and mbarriers of a CTA."""

    k: object
    v: object
    q_full: object
    q_empty: object
    work_full: object
    work_empty: object
    work: object  # the words of the next work item
    table: object  # the queue's notes on the requests it is handing out
    mail: object = None  # clusters: the ticket, for the CTA that draws none
    mail_sent: object = None  # mbarriers: it is there, in that CTA; it has been read, in the one that draws
    mail_read: object = None


class Rows(NamedTuple):
    """What all key tiles of one work item share, for one thread of a consumer group."""

    q_at: object  # buffer of Q
    pos: object  # position among the keys of the query of the thread's first row
    column: object  # the thread's first column of a key tile
    kv_len: object
    window_left: object
    scale_log2: object  # scores to base-2 logits
    pre_scale: object  # factor inside the tanh of a soft cap
    group: object
    thread: object  # of the group
    bias: object


class Bias(NamedTuple):
    """What ALiBi and custom masks need to know of the two rows of a thread; None where the spec has neither."""

    scale: object  # ALiBi: scores to base-2 logits; ``Rows.scale_log2`` is 1 then
    slopes: object  # base-2 units
    key_of_query: object  # the key at distance 0
    row_bits: object  # custom mask: bit address of the row's first key
    mask_end: object  # byte address
    words: object  # of the mask, for the tile at hand


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


class PrefillSm90:
    """See the module docstring. ``tile`` is a ``tiles_prefill_sm90.PrefillSm90Tile``."""

    def __init__(self, spec, tile):
        self.spec, self.tile = spec, tile
        self.dtype = CUTE_DTYPES[spec.q_dtype]
        self.groups = tile.num_consumer_groups
        self.stages = tile.num_stages
        self.q_buffers = tile.num_q_buffers
        self.o_in_q = tile.num_q_buffers == 1  # O staged in Q's place
        self.pack = spec.group_size if tile.pack_heads else 1  # rows per query
        self.heads_per_kv = spec.group_size // self.pack  # heads, as work items count them, per KV head
        self.group_queries = GROUP_ROWS // self.pack  # queries of one consumer group
        # Half a key tile, for a last tile whose other half lies right of the diagonal; both halves are whole wgmma and P V steps.
        # Three groups lack the registers for a second set of scores (192 bytes of spills at head_dim 64).
        self.causal = spec.causal and not spec.custom_mask  # a custom mask replaces the causal one
        self.halves = self.causal and tile.tile_kv % 32 == 0 and self.groups == 2
        self.half = tile.tile_kv // 2 if self.halves else tile.tile_kv
        self.single = spec.kv_layout == "single"
        self.cluster = tile.cluster
        assert self.heads_per_kv % tile.cluster == 0, "a cluster takes heads of one GQA group"
        self.layout = PrefillLayout(spec, tile, self.dtype, tile.cluster)
        # Parts of an item pay where one group alone is much faster than in company, which three at head_dim 64 leave little room for.
        self.queue = PrefillQueue(spec, tile, self.groups if self.groups == 2 else 1, tile.cluster)
        # Whether a group may pass tiles by. In a full single request in three groups only the last block could, and the extra loop keeps
        # ptxas from proving the main loop warp-uniform (32 R2UR per key tile); with two groups that cost 766 -> 721 TFLOP/s at 16k
        # [H200, 2026-11-22] until .maxntid mended it.
        self.passes = self.causal or spec.window or not self.single or tile.split_kv or self.queue.parts > 1
        self.loads = PrefillLoad(spec, tile, self.dtype, self.layout, self.queue)
        self.finish = PrefillFinish(spec, tile, self.layout, self.dtype)
        # Whether V may end in stale bytes: a contiguous single K/V ends where TMA clips and fills zeros, a gathered tile where it was told.
        self.stale_tail = not self.single and not self.layout.gather
        self.alibi = spec.pos_encoding == "ALIBI"

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
        tile, dtype = self.tile, self.dtype
        qk = lambda keys: sm90.make_trivial_tiled_mma(  # noqa: E731
            dtype, dtype, OperandMajorMode.K, OperandMajorMode.K, Float32, (1, 1, 1), (GROUP_ROWS, keys)
        )
        pv = sm90.make_trivial_tiled_mma(
            dtype,
            dtype,
            OperandMajorMode.K,
            OperandMajorMode.MN,
            Float32,
            (1, 1, 1),
            (GROUP_ROWS, self.spec.head_dim_vo),
            a_source=warpgroup.OperandSource.RMEM,
        )
        load = cpasync.CopyBulkTensorTileG2SOp()
        store = cpasync.CopyBulkTensorTileS2GOp()
        q_tma, q_coords = self.layout.row_tma(load, q)
        k_tma, k_coords, v_tma, v_coords = None, None, None, None
        if const_expr(not self.layout.gather):
            load_kv = cpasync.CopyBulkTensorTileG2SMulticastOp() if const_expr(self.cluster > 1) else load
            k_tma, k_coords = self.layout.kv_tma(load_kv, k)
            v_tma, v_coords = self.layout.kv_tma(load_kv, v)
        o_tma, o_coords = self.layout.row_tma(store, out)
        batch = 1 if const_expr(self.single) else qo_indptr.shape[0] - 1
        heads = q.shape[1] // self.pack // self.cluster
        # rows of a request fill all its query blocks but one
        most_items = (q.shape[0] * self.pack // tile.tile_q + batch) * heads * num_splits
        clusters = cutlass.max(1, cutlass.min(most_items * self.queue.parts, num_ctas // self.cluster))
        total_kv = k.shape[1] if const_expr(self.single) else 0
        self.kernel(
            qk(tile.tile_kv),
            qk(tile.tile_kv),
            qk(self.half),
            qk(self.half),
            pv,
            q_tma,
            q_coords,
            k_tma,
            k_coords,
            v_tma,
            v_coords,
            o_tma,
            o_coords,
            self.caches(k, v),
            Memory(out, lse, kv_indices, sinks, k_scale, v_scale, out_partial, lse_partial, status, mask, mask_indptr),
            Lengths(qo_indptr, kv_indptr, kv_last_page_len, q.shape[0], total_kv, heads, num_splits),
            Scales(sm_scale, out_scale, soft_cap, lse_scale, cutlass.min(window_left, FAR), num_splits),
        ).launch(
            grid=[clusters * self.cluster, 1, 1],
            block=[tile.num_threads, 1, 1],
            cluster=[self.cluster, 1, 1] if self.cluster > 1 else None,
            # .maxntid in place of .reqntid: told the exact block, ptxas drops the shuffle that makes a warp's group uniform, and with it
            # the uniform registers of all wgmma descriptors in causal kernels: 48 R2UR per key tile, 558 instead of 516 instructions.
            max_number_threads=[tile.num_threads, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    def caches(self, k, v):
        layout = self.layout
        if self.spec.kv_layout != "paged":
            return Caches(None, None, None, None, None)
        if layout.gather:
            return Caches(k, v, Int32(k.shape[0]), None, None)
        strides = (Int64(k.layout.stride[2]), Int64(v.layout.stride[2])) if layout.boxes > 1 else (None, None)
        return Caches(None, None, Int32(k.shape[0]), *strides)

    # ================================================================================================ kernel

    @cute.kernel
    def kernel(
        self,
        qk_first: cute.TiledMma,
        qk: cute.TiledMma,
        qk_half_first: cute.TiledMma,
        qk_half: cute.TiledMma,
        pv: cute.TiledMma,
        q_tma: cute.CopyAtom,
        q_coords: cute.Tensor,
        k_tma: typing.Optional[cute.CopyAtom],
        k_coords: typing.Optional[cute.Tensor],
        v_tma: typing.Optional[cute.CopyAtom],
        v_coords: typing.Optional[cute.Tensor],
        o_tma: cute.CopyAtom,
        o_coords: cute.Tensor,
        caches: Caches,
        memory: Memory,
        lengths: Lengths,
        scales: Scales,
    ):
        """Shared memory, pipelines, dispatch to the roles."""
        tile, spec, dtype = self.tile, self.spec, self.dtype
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARP_GROUP)
        for mma in (qk_first, qk_half_first):
            mma.set(warpgroup.Field.ACCUMULATE, False)
        for mma in (qk, qk_half):
            mma.set(warpgroup.Field.ACCUMULATE, True)
        pv.set(warpgroup.Field.ACCUMULATE, True)

        shared = SmemAllocator()
        allocate = lambda layout: shared.allocate_tensor(dtype, layout.outer, byte_alignment=1024, swizzle=layout.inner)  # noqa: E731
        num_q = self.layout.q_tiles
        s_q = allocate(self.layout.tiles(GROUP_ROWS, spec.head_dim_qk, num_q))
        s_k = allocate(self.layout.kv_tiles(spec.head_dim_qk))
        s_v = allocate(self.layout.kv_tiles(spec.head_dim_vo))
        s_o = s_q if const_expr(self.o_in_q) else allocate(self.layout.tiles(GROUP_ROWS, spec.head_dim_vo, self.groups))
        k_bars = shared.allocate_array(Int64, 2 * self.stages)
        v_bars = shared.allocate_array(Int64, 2 * self.stages)
        q_full = shared.allocate_array(Int64, num_q)
        q_empty = shared.allocate_array(Int64, num_q)
        work_bars = shared.allocate_array(Int64, 2)
        work = shared.allocate_tensor(Int32, cute.make_layout(self.loads.words), byte_alignment=16)
        table = shared.allocate_tensor(Int32, cute.make_layout(COLUMNS * WARP), byte_alignment=16)
        mail, mail_sent, mail_read = None, None, None
        if const_expr(self.cluster > 1):
            mail_sent, mail_read = shared.allocate_array(Int64, 1), shared.allocate_array(Int64, 1)
            mail = shared.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=16)
        if warp == 0:
            for descriptor in (q_tma, k_tma, v_tma, o_tma):
                if const_expr(descriptor is not None):
                    cpasync.prefetch_descriptor(descriptor)
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(num_q):
                    cute.arch.mbarrier_init(q_full + i, 1)
                    cute.arch.mbarrier_init(q_empty + i, 4)  # one arrival per warp of the group
                cute.arch.mbarrier_init(work_bars, 1)
                cute.arch.mbarrier_init(work_bars + 1, 4 * self.groups + self.loads.followers)
                if const_expr(self.cluster > 1):
                    cute.arch.mbarrier_init(mail_sent, 1)
                    cute.arch.mbarrier_init(mail_read, 1)
        ring = lambda bars, columns: pipeline.PipelineTmaAsync.create(  # noqa: E731
            barrier_storage=bars,
            num_stages=self.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, self.loads.arrivals),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 4 * self.groups * self.cluster),
            cta_layout_vmnk=cute.make_layout((1, self.cluster, 1, 1)),
            tx_count=tile.tile_kv * columns * dtype.width // 8,
            defer_sync=True,
        )
        k_ring, v_ring = ring(k_bars, spec.head_dim_qk), ring(v_bars, spec.head_dim_vo)
        events = Events(k_ring, v_ring, q_full, q_empty, work_bars, work_bars + 1, work, table, mail, mail_sent, mail_read)
        cute.arch.mbarrier_init_fence()
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        if group == Role.LOAD:
            cute.arch.setmaxregister_decrease(tile.producer_regs)
            k = self.source(events.k, k_tma, k_coords, s_k, caches.k, caches.k_heads, spec.head_dim_qk)
            v = self.source(events.v, v_tma, v_coords, s_v, caches.v, caches.v_heads, spec.head_dim_vo)
            if warp == 0:
                self.loads.lead(events, memory, lengths, scales, q_tma, q_coords, s_q, k, v, caches.pages)
            if const_expr(self.loads.followers > 0):
                if warp % 2 == 1 and warp <= self.loads.followers:
                    self.loads.follow(events, memory, scales, v, warp // 2, caches.pages)
            if const_expr(self.loads.followers > 1):
                if warp == 2:
                    self.loads.follow(events, memory, scales, k, Int32(1), caches.pages)
        else:
            cute.arch.setmaxregister_increase(tile.consumer_regs)
            self.mma(events, memory, scales, qk_first, qk, qk_half_first, qk_half, pv, o_tma, o_coords, s_q, s_k, s_v, s_o)
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()  # a CTA must outlive what its peer sends it
            cute.arch.cluster_wait()

    def source(self, ring, tma, coords, shared, tensor, head_stride, columns):
        """K or V for the load warps."""
        if self.layout.gather:
            return Source(ring, None, None, None, None, tensor, Uint32(shared.iterator.toint()))
        boxes = cute.make_tensor(shared.iterator, self.layout.kv_boxes(columns).outer)
        return Source(ring, tma, coords, boxes, head_stride, None, None)

    # ================================================================================================ mma

    @cute.jit
    def mma(self, events, memory, scales, qk_first, qk, qk_half_first, qk_half, pv, o_tma, o_coords, s_q, s_k, s_v, s_o):
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
        p = cute.make_rmem_tensor_like(acc_s, self.dtype)
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
        # the same with the left half of a key tile: half the scores, half the P V steps, the same registers
        half_s = cute.make_rmem_tensor(qk_half.partition_shape_C((GROUP_ROWS, self.half)), Float32)
        half_p = cute.make_rmem_tensor_like(half_s, self.dtype)
        half_k = cute.local_tile(s_k, (self.half, spec.head_dim_qk), (0, 0, None))
        left = m._replace(
            qk_first=qk_half_first,
            qk=qk_half,
            frag_k=qk_half.make_fragment_B(qk_half.get_slice(0).partition_B(half_k)),
            acc_s=half_s,
            p=half_p,
            frag_p=as_a_operand(half_p),
        )
        head_dim = spec.head_dim_vo
        o_tiles = self.layout.o_view(s_o, self.layout.tiles(GROUP_ROWS, head_dim, self.groups))
        o_boxes = self.layout.o_view(s_o, self.layout.row_boxes(head_dim, self.groups))
        output = Output(o_tma, o_coords, o_tiles, o_boxes, self.layout.row_box(head_dim), group)
        k_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        v_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        q_row, num_rows, first_pos, head, kv_len, split, query, mask_begin = self.next_item(events, Int32(0))
        items = Int32(1)  # taken so far
        while num_rows >= 0:
            item_first, item_end = self.queue.kv_tiles(first_pos, num_rows, kv_len, split, scales.num_splits, scales.window_left)
            group_pos = first_pos + group * self.group_queries  # position of the group's first query
            pos = group_pos + row // self.pack
            place = Place(q_row + group * self.group_queries, num_rows - group * GROUP_ROWS, head, split)
            first, end = item_first, item_end
            if const_expr(self.passes):
                first, end = self.group_tiles(item_first, item_end, group_pos, place.num_rows, kv_len, scales.window_left)
            scale_log2, pre_scale = self.softmax_scale(memory, scales, head)
            buffer, phase = self.loads.q_place(items - 1)
            q_at = group * self.q_buffers + buffer
            group_query = query + group * self.group_queries
            bias, scale_log2 = self.bias(memory, place, group_query, row, column, kv_len, mask_begin, scale_log2)
            rows = Rows(q_at, pos, column, kv_len, scales.window_left, scale_log2, pre_scale, group, thread, bias)
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
                last = (end - 1) * tile.tile_kv
                left_of = end - 1  # tiles [first, left_of) follow
                if const_expr(self.halves):
                    seen = cutlass.min(kv_len, group_pos + self.group_queries) - last
                    if seen <= self.half and end - first > 1:
                        self.first_tile(left, events, rows, k_state, v_state, s_v, last)
                        k_state.advance()
                        left_of = end - 2
                        start = left_of * tile.tile_kv
                        self.step(m, left, events, rows, k_state, v_state, start, True)
                        k_state.advance()
                        v_state.advance()
                    else:
                        self.first_tile(m, events, rows, k_state, v_state, s_v, last)
                        k_state.advance()
                else:
                    self.first_tile(m, events, rows, k_state, v_state, s_v, last)
                    k_state.advance()
                # ---- tiles [whole_first, whole_end) are seen whole by all 64 rows of this group
                whole_end = left_of
                if const_expr(self.causal):
                    # of the tiles that follow only those left of every row's diagonal are whole
                    seen_by_all = cutlass.max(0, group_pos + 1) // tile.tile_kv
                    whole_end = cutlass.max(first, cutlass.min(whole_end, seen_by_all))
                    for i in cutlass.range(left_of - whole_end, unroll=1):
                        start = (left_of - 1 - i) * tile.tile_kv
                        self.step(m, m, events, rows, k_state, v_state, start, True)
                        k_state.advance()
                        v_state.advance()
                whole_first = first
                if const_expr(spec.window):
                    oldest_of_last_row = cutlass.max(0, group_pos + (self.group_queries - 1) - scales.window_left)
                    whole_first = cutlass.min(whole_end, cutlass.max(first, cute.ceil_div(oldest_of_last_row, tile.tile_kv)))
                for i in cutlass.range(whole_end - whole_first, unroll=1):
                    start = (whole_end - 1 - i) * tile.tile_kv if const_expr(self.queue.numbered) else Int32(0)
                    self.step(m, m, events, rows, k_state, v_state, start, False)
                    k_state.advance()
                    v_state.advance()
                if const_expr(spec.window):
                    for i in cutlass.range(whole_first - first, unroll=1):
                        start = (whole_first - 1 - i) * tile.tile_kv
                        self.step(m, m, events, rows, k_state, v_state, start, True)
                        k_state.advance()
                        v_state.advance()
                self.issue_pv(m, events, v_state)
                self.release_q(events, q_at)
                if const_expr(not spec.window):
                    q_row, num_rows, first_pos, head, kv_len, split, query, mask_begin = self.next_item(events, items)  # under the last P V
                warpgroup.wait_group(0)
                events.v.consumer_release(v_state)
                v_state.advance()
            else:
                self.release_q(events, q_at)
                if const_expr(not spec.window):
                    q_row, num_rows, first_pos, head, kv_len, split, query, mask_begin = self.next_item(events, items)
            if const_expr(spec.window):
                # the load warp announces the next item only after it has filled these stages
                for _ in cutlass.range(first - item_first, unroll=1):
                    self.pass_by(events, k_state, v_state)
                    k_state.advance()
                    v_state.advance()
                q_row, num_rows, first_pos, head, kv_len, split, query, mask_begin = self.next_item(events, items)
            items = items + 1
            self.finish.normalise(m, memory, scales, (scale_log2, scale_log2), place, row, column, 1)
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
        if const_expr(self.causal):
            seen = cute.ceil_div(cutlass.max(0, cutlass.min(kv_len, group_pos + self.group_queries)), self.tile.tile_kv)
            group_end = cutlass.max(first, cutlass.min(end, seen))
        if group_rows <= 0:
            group_end = first
        if const_expr(self.spec.window):
            group_first = cutlass.min(group_end, cutlass.max(first, cutlass.max(0, group_pos - window_left) // self.tile.tile_kv))
        return group_first, group_end

    @cute.jit
    def release_q(self, events, q_at: Int32):
        """The last Q K^T of a work item is done. Where O takes Q's place it is released after the store instead."""
        if const_expr(not self.o_in_q):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(events.q_empty + q_at)

    @cute.jit
    def next_item(self, events, items: Int32):
        """(q_row, num_rows, first_pos, head, kv_len, split, query, mask_begin) of the ``items``-th work item; the last two where used."""
        cute.arch.mbarrier_wait(events.work_full, items & 1)
        uniform = cute.arch.make_warp_uniform
        q_row, num_rows, first_pos = uniform(events.work[0]), uniform(events.work[1]), uniform(events.work[2])
        head, kv_len, split = uniform(events.work[3]), uniform(events.work[4]), uniform(events.work[5])
        query, mask_begin = Int32(0), Int32(0)
        if const_expr(self.queue.numbered):
            query, mask_begin = uniform(events.work[8]), uniform(events.work[9])
        self.loads.taken(events)
        return q_row, num_rows, first_pos, head, kv_len, split, query, mask_begin

    @cute.jit
    def pass_by(self, events, k_state, v_state):
        """Release a key tile that none of this group's rows sees."""
        events.k.consumer_wait(k_state, events.k.consumer_try_wait(k_state))
        events.k.consumer_release(k_state)
        events.v.consumer_wait(v_state, events.v.consumer_try_wait(v_state))
        events.v.consumer_release(v_state)

    @cute.jit
    def softmax_scale(self, memory, scales, head: Int32):
        """(factor from scores to base-2 logits, factor inside the tanh of a soft cap)."""
        logit_scale = scales.sm_scale
        if const_expr(self.spec.k_scale):
            logit_scale = logit_scale * memory.k_scale[head // self.heads_per_kv]
        scale_log2, pre_scale = logit_scale * Float32(LOG2_E), Float32(1.0)
        if const_expr(self.spec.soft_cap):
            scale_log2, pre_scale = scales.soft_cap * Float32(LOG2_E), logit_scale / scales.soft_cap
        return scale_log2, pre_scale

    @cute.jit
    def bias(self, memory, place, group_query: Int32, row: Int32, column: Int32, kv_len: Int32, mask_begin: Int32, scale_log2: Float32):
        """(Bias of the thread's rows, factor from what becomes of the scores to base-2 logits). ``group_query`` is the query of the
        group's first row, counted from the request's first."""
        scale, slopes, key_of_query, row_bits, mask_end, words = None, None, None, None, None, None
        if const_expr(self.alibi):
            scale, scale_log2 = scale_log2, Float32(1.0)
            slopes, key_of_query = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Int32)
            for r in cutlass.range_constexpr(2):
                _, qo_head = self.finish.row_of(place, row + 8 * r)
                slopes[r] = alibi_slope(qo_head, Int32(memory.out.shape[1])) * Float32(LOG2_E)
                key_of_query[r] = group_query + (row + 8 * r) // self.pack - column
        if const_expr(self.spec.custom_mask):
            first = memory.mask.iterator.toint()
            mask_end = first + Int64(memory.mask.shape[0])
            row_bits, words = cute.make_rmem_tensor(2, Int64), cute.make_rmem_tensor(4, Uint32)
            for r in cutlass.range_constexpr(2):
                row_bits[r] = (first + Int64(mask_begin)) * 8 + Int64(group_query + (row + 8 * r) // self.pack) * Int64(kv_len)
        return Bias(scale, slopes, key_of_query, row_bits, mask_end, words), scale_log2

    @cute.jit
    def fetch_mask(self, rows, start: Int32):
        """Start to read the custom mask of the key tile at ``start``."""
        if const_expr(self.spec.custom_mask):
            fetch_mask(rows.bias.words, rows.bias.row_bits, rows.bias.mask_end, start, rows.thread)

    @cute.jit
    def modify(self, m, rows, start: Int32):
        """Soft cap, ALiBi and custom mask, on every key tile."""
        if const_expr(self.spec.soft_cap):
            cap_scores(m.acc_s, rows.pre_scale)
        if const_expr(self.alibi):
            distance = cute.make_rmem_tensor(2, Int32)
            for r in cutlass.range_constexpr(2):
                distance[r] = start - rows.bias.key_of_query[r]
            add_alibi(m.acc_s, rows.bias.scale, rows.bias.slopes, distance)
        if const_expr(self.spec.custom_mask):
            hide_masked(m.acc_s, rows.bias.words, rows.bias.row_bits, rows.thread)

    @cute.jit
    def mask(self, m, rows, start: Int32):
        """Apply every mask to the scores of the key tile that begins at ``start``."""
        origin = start + rows.column
        key_end, diagonal, oldest = rows.kv_len - origin, rows.pos + 1 - origin, rows.pos - rows.window_left - origin
        mask_scores(m.acc_s, key_end, diagonal, oldest, 8 // self.pack, self.causal, self.spec.window)

    @cute.jit
    def first_tile(self, m, events, rows, k_state, v_state, s_v, start: Int32):
        """The first key tile of a work item: Q K^T and softmax. Its P V belongs to the next step."""
        self.fetch_mask(rows, start)
        self.issue_qk(m, events, k_state, rows.q_at)
        warpgroup.wait_group(0)
        events.k.consumer_release(k_state)
        self.modify(m, rows, start)
        self.mask(m, rows, start)
        online_softmax(m.acc_s, m.row_max, m.row_sum, m.correction, rows.scale_log2, True)
        convert_pairs(m.acc_s, m.p)
        if const_expr(self.stale_tail):
            if start + self.tile.tile_kv > rows.kv_len:
                self.zero_v_tail(events, s_v, v_state, rows.kv_len - start, rows.group, rows.thread)

    @cute.jit
    def step(self, m, before, events, rows, k_state, v_state, start: Int32, masked: cutlass.Constexpr):
        """One key tile: its Q K^T, then P V of the tile ``before``, and its softmax while that P V runs."""
        self.fetch_mask(rows, start)
        self.issue_qk(m, events, k_state, rows.q_at)
        self.issue_pv(before, events, v_state)
        warpgroup.wait_group(1)  # S is complete, P V may still run
        events.k.consumer_release(k_state)
        self.modify(m, rows, start)
        if const_expr(masked):
            self.mask(m, rows, start)
        grew = online_softmax(m.acc_s, m.row_max, m.row_sum, m.correction, rows.scale_log2, False)
        warpgroup.wait_group(0)
        events.v.consumer_release(v_state)
        convert_pairs(m.acc_s, m.p)
        if grew:
            scale_rows(m.acc_o, m.correction)

    @cute.jit
    def arrived(self, ring, state):
        """Wait for a stage of K or V."""
        ring.consumer_wait(state, ring.consumer_try_wait(state))
        if const_expr(self.layout.gather):
            cute.arch.fence_proxy("async.shared", space="cta")  # cp.async wrote it; wgmma reads through another proxy

    @cute.jit
    def issue_qk(self, m, events, k_state, q_at: Int32):
        """Start S = Q K^T when k_full says so."""
        self.arrived(events.k, k_state)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(cute.size(m.frag_q, mode=[2])):
            cute.gemm(
                m.qk_first if const_expr(kk == 0) else m.qk,
                m.acc_s,
                m.frag_q[None, None, kk, q_at],
                m.frag_k[None, None, kk, k_state.index],
                m.acc_s,
            )
        warpgroup.commit_group()

    @cute.jit
    def issue_pv(self, m, events, v_state):
        """Start O += P V when v_full says so."""
        self.arrived(events.v, v_state)
        warpgroup.fence()
        for kk in cutlass.range_constexpr(cute.size(m.frag_p, mode=[2])):
            cute.gemm(m.pv, m.acc_o, m.frag_p[None, None, kk], m.frag_v[None, None, kk, v_state.index], m.acc_o)
        warpgroup.commit_group()

    @cute.jit
    def zero_v_tail(self, events, s_v, v_state, rows: Int32, group: Int32, thread: Int32):
        """Zero the V rows of a tile from ``rows`` on: they belong to the next request or to nobody, and 0 * NaN is NaN.

        Every group does it for itself; two groups store the same zeros, and none releases the stage before it has read its own.
        """
        events.v.consumer_wait(v_state, events.v.consumer_try_wait(v_state))
        chunks = self.spec.head_dim_vo // 8  # 16-byte chunks of a row
        zeros = cute.make_rmem_tensor(8, self.dtype)
        zeros.fill(0.0)
        for i in cutlass.range(rows * chunks + thread, self.tile.tile_kv * chunks, WARP_GROUP, unroll=1):
            cute.autovec_copy(zeros, cute.local_tile(s_v[i // chunks, None, v_state.index], (8,), (i % chunks,)))
        cute.arch.fence_proxy("async.shared", space="cta")  # before wgmma reads what these stores wrote
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARP_GROUP)
