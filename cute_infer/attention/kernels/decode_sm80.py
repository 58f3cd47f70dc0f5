"""Decode attention with cp.async and mma.sync: one query row per request, every option, every architecture from sm_80 on.

One CTA owns (request, KV head, block of 16 query heads of the group, KV split). The query heads of the block are the 16 rows of the
MMA, so a group of G heads reads its KV once per 16 heads.

Warps (all alike; there is no barrier between them before the merge)
    Warp w takes steps w, w + warps, ... of the CTA's token range. It owns a ring of ``stages`` slots of ``tokens`` tokens, fills it with
    cp.async for itself, and keeps a private online softmax and a private 16 x head_dim_vo accumulator.

One step
    wait for the slot; refill the slot of the previous step; [fp8: widen the bytes into a 16-bit tile]; [RoPE: rotate K in place];
    S = Q K^T; scale, soft cap, ALiBi; mask (only steps that touch the ends of the range); softmax; O += P V

Merge
    Every warp leaves (max, sum, O) in shared memory, over the rings it no longer needs; the CTA adds them up in warp order, so the result
    is bitwise repeatable, and writes 4 columns per thread.

Shared memory (head_dim 128, 16 bit, 4 warps x 2 slots x 16 tokens): Q 4.3 + rings 68 KiB, see ``tiles_decode_sm80.SharedMemory``.
Memory bound: kv_len * (head_dim_qk + head_dim_vo) * bytes per request and KV head.
Source: Dao et al., Flash-Decoding (crfm.stanford.edu, 2023-10-12).
"""

import typing

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.memory import SmemAllocator

from ..device import fp8, logits, mask, mma, output, pages, rope, softmax
from ..device.args import CUTE_DTYPES, fake_args
from ..spec import AttentionSpec
from ..tiles_decode_sm80 import ROWS, DecodeSm80Tile, head_blocks, merge_pitch, padded, pitch, shared_memory

REGISTER_Q_DIM = 128  # up to here Q's fragments stay in registers (dim / 4 of them)
MERGE_COLUMNS = 4  # output columns one thread adds up


class DecodeSm80:
    """See the module docstring. ``spec`` and ``tile`` hold every static fact."""

    def __init__(self, spec: AttentionSpec, tile: DecodeSm80Tile):
        self.spec, self.tile = spec, tile
        self.dtype = CUTE_DTYPES[spec.q_dtype]
        self.kv_dtype = CUTE_DTYPES[spec.kv_dtype]
        self.smem = shared_memory(spec, tile)
        self.dim_qk, self.dim_vo = padded(spec.head_dim_qk), padded(spec.head_dim_vo)
        self.pitch_k, self.pitch_v = pitch(spec.head_dim_qk), pitch(spec.head_dim_vo)
        self.narrow = spec.kv_bits == 8
        self.rope = spec.pos_encoding == "ROPE_LLAMA"
        width = spec.kv_bits // 8
        # rows of a ring slot, and the slot: K rows, then V rows
        self.slot_pitch_k = self.dim_qk if self.narrow else self.pitch_k
        self.slot_pitch_v = self.dim_vo if self.narrow else self.pitch_v
        self.slot_k = tile.tokens * self.slot_pitch_k
        self.slot = self.slot_k + tile.tokens * self.slot_pitch_v
        self.lanes = pages.lanes_per_row(self.dim_qk * width, self.dim_vo * width)
        self.passes = pages.passes(tile.tokens, 32, self.lanes)

    def abi(self) -> tuple:
        return fake_args(self.spec, self.tile.split_kv)

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
        mask_bits: typing.Optional[cute.Tensor],
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
        stream,
    ):
        # One flat axis: y and z of a grid end at 65535. Splits of a request are neighbours, then its heads.
        grid = q.shape[0] * k.shape[2] * head_blocks(self.spec) * num_splits
        self.kernel(
            q, k, v, out, lse, kv_indptr, kv_indices, kv_last_page_len, sinks, k_scale, v_scale, out_partial, lse_partial, status,
            sm_scale, out_scale, soft_cap, lse_scale, rope_rcp_scale, rope_log2_theta, window_left, num_splits,
        ).launch(grid=[grid, 1, 1], block=[self.tile.threads, 1, 1], stream=stream)  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        out: cute.Tensor,
        lse: typing.Optional[cute.Tensor],
        kv_indptr: typing.Optional[cute.Tensor],
        kv_indices: typing.Optional[cute.Tensor],
        kv_last_page_len: typing.Optional[cute.Tensor],
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
    ):
        spec, tile, at = self.spec, self.tile, self.smem
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = thread % 32
        blocks = head_blocks(spec)
        block = cute.arch.block_idx()[0]
        split = block % num_splits
        block = block // num_splits
        head_block = block % blocks
        kv_head = block // blocks % k.shape[2]
        request = block // blocks // k.shape[2]
        base = Uint32(SmemAllocator().allocate(at.total, byte_alignment=128).toint())

        # ------------------------------------------------------------------------------------------- this warp's share of the tokens
        first, kv_len = pages.kv_extent(spec, k, kv_indptr, kv_last_page_len, request)
        lo, hi = mask.kv_range(False, spec.window, kv_len - 1, kv_len - 1, kv_len, window_left)
        first_tile = lo // tile.tile_kv
        chunk = cute.ceil_div(cute.ceil_div(hi, tile.tile_kv) - first_tile, num_splits) * tile.tile_kv
        begin = first_tile * tile.tile_kv + split * chunk + warp * tile.tokens
        end = cutlass.min(first_tile * tile.tile_kv + (split + 1) * chunk, hi)
        steps = cutlass.max(cute.ceil_div(end - begin, tile.tile_kv), Int32(0))

        # -------------------------------------------------------------------------------------- prologue: Q and the first ring slots
        pages.copy_query_rows(
            spec, q, base + at.q, self.pitch_k, request, head_block * ROWS, Int32(spec.group_size), kv_head, thread, tile.threads, ROWS
        )
        cute.arch.cp_async_commit_group()
        ring = base + Uint32(at.ring) + Uint32(warp * (tile.stages * self.slot))
        ids = cute.make_rmem_tensor(self.passes, Int32)
        for s in cutlass.range_constexpr(tile.stages - 1):
            if s < steps:
                self.find_pages(ids, kv_indices, first, begin, s, lo, hi, lane)
                self.fill(ids, k, v, status, ring + Uint32(s * self.slot), first, begin, s, lo, hi, kv_head, lane)
            cute.arch.cp_async_commit_group()
        if tile.stages - 1 < steps:
            self.find_pages(ids, kv_indices, first, begin, tile.stages - 1, lo, hi, lane)
        if const_expr(self.rope):
            rope.write_table(base + at.table, spec.head_dim_qk, rope_rcp_scale, rope_log2_theta, thread, tile.threads)
        cute.arch.cp_async_wait_group(tile.stages - 1)
        cute.arch.sync_threads()
        if const_expr(self.rope):
            rope.rotate_rows(
                base + at.q, self.pitch_k, ROWS, spec.head_dim_qk, base + at.table, kv_len - 1, Int32(0), ROWS, thread, tile.threads,
                self.dtype,
            )  # fmt: skip
            cute.arch.sync_threads()
        q_address = base + Uint32(at.q) + mma.lane_offset_a(lane, self.pitch_k)
        q_frag = None
        if const_expr(self.dim_qk <= REGISTER_Q_DIM):
            q_frag = mma.load_a(q_address, self.dim_qk)

        # ------------------------------------------------------------------------------------------------------------------ main loop
        scale = sm_scale
        if const_expr(spec.k_scale):
            scale = sm_scale * k_scale[kv_head]
        slopes = cute.make_rmem_tensor(2, Float32)
        qo_idx = cute.make_rmem_tensor(2, Int32)
        row_lo = cute.make_rmem_tensor(2, Int32)
        row_hi = cute.make_rmem_tensor(2, Int32)
        for r in cutlass.range_constexpr(2):
            slopes[r] = Float32(0.0)
            if const_expr(spec.pos_encoding == "ALIBI"):
                head = kv_head * spec.group_size + head_block * ROWS + lane // 4 + 8 * r
                slopes[r] = logits.alibi_slope(head, q.shape[1])
            qo_idx[r] = Int32(0)  # request-relative: the only query of its request
            row_lo[r] = lo
            row_hi[r] = hi
        acc_o = cute.make_rmem_tensor(self.dim_vo // 2, Float32)
        acc_o.fill(0.0)
        acc_s = cute.make_rmem_tensor(tile.tokens // 2, Float32)
        scores = mma.rows_and_columns(acc_s)
        o_rows = mma.rows_and_columns(acc_o)
        row_max = cute.make_rmem_tensor(2, Float32)
        row_sum = cute.make_rmem_tensor(2, Float32)
        softmax.start(row_max, row_sum)
        k_lane = mma.lane_offset_b(lane, self.pitch_k)
        v_lane = mma.lane_offset_a(lane, self.pitch_v)

        slot = Int32(0)
        free = Int32(tile.stages - 1)
        for i in cutlass.range(steps, unroll=1):
            cute.arch.cp_async_wait_group(tile.stages - 2)
            cute.arch.sync_warp()  # the slot has arrived for every lane, and every lane has read the slot that is refilled now
            if i + (tile.stages - 1) < steps:
                self.fill(
                    ids, k, v, status, ring + Uint32(free * self.slot), first, begin, i + (tile.stages - 1), lo, hi, kv_head, lane
                )
            cute.arch.cp_async_commit_group()
            if i + tile.stages < steps:
                self.find_pages(ids, kv_indices, first, begin, i + tile.stages, lo, hi, lane)

            token = begin + i * tile.tile_kv
            k_tile = ring + Uint32(slot * self.slot)
            v_tile = k_tile + Uint32(self.slot_k)
            if const_expr(self.narrow):
                wide = base + Uint32(at.wide) + Uint32(warp * (tile.tokens * (self.pitch_k + self.pitch_v)))
                fp8.widen_rows(k_tile, wide, self.pitch_k, tile.tokens, self.dim_qk, lane, 32, self.kv_dtype, self.dtype)
                k_tile = wide
                wide = wide + Uint32(tile.tokens * self.pitch_k)
                fp8.widen_rows(v_tile, wide, self.pitch_v, tile.tokens, self.dim_vo, lane, 32, self.kv_dtype, self.dtype)
                v_tile = wide
                cute.arch.sync_warp()
            if const_expr(self.rope):
                rope.rotate_rows(
                    k_tile, self.pitch_k, tile.tokens, spec.head_dim_qk, base + at.table, token, Int32(0), 1, lane, 32, self.dtype
                )
                cute.arch.sync_warp()

            mma.q_times_k(acc_s, q_frag, q_address, k_tile + k_lane, self.dim_qk, tile.tokens, self.pitch_k, self.dtype)
            logits.scale(acc_s, spec.soft_cap, scale, soft_cap)
            if const_expr(spec.pos_encoding == "ALIBI"):
                logits.alibi(scores, slopes, qo_idx, token, lane)
            if token < lo or token + tile.tokens > hi:
                mask.band(scores, row_lo, row_hi, token, lane)
            softmax.update(scores, o_rows, row_max, row_sum)
            mma.p_times_v(acc_o, acc_s, v_tile + v_lane, self.dim_vo, tile.tokens, self.pitch_v, self.dtype)

            slot = slot + 1 if slot + 1 < tile.stages else Int32(0)
            free = free + 1 if free + 1 < tile.stages else Int32(0)
        cute.arch.cp_async_wait_group(0)
        softmax.finish(row_sum)

        # ---------------------------------------------------------------------------------------------------------- merge of the warps
        cute.arch.sync_threads()  # no warp reads its ring any more
        self.leave_partial(base, o_rows, row_max, row_sum, warp, lane)
        cute.arch.sync_threads()
        factor = out_scale
        if const_expr(spec.v_scale):
            factor = out_scale * v_scale[kv_head]
        self.merge(
            base, out, lse, sinks, out_partial, lse_partial, factor, lse_scale, request, kv_head, head_block, split, thread
        )

    @cute.jit
    def find_pages(self, ids: cute.Tensor, kv_indices, first: Int32, begin: Int32, step, lo: Int32, hi: Int32, lane: Int32):
        """Fetch this lane's page ids for one of the warp's steps."""
        token = begin + step * self.tile.tile_kv
        pages.load_page_ids(self.spec, ids, kv_indices, first, token, lo, hi, lane, 32, self.tile.tokens, self.lanes)

    @cute.jit
    def fill(
        self,
        ids: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        status: cute.Tensor,
        slot: Uint32,
        first: Int32,
        begin: Int32,
        step,
        lo: Int32,
        hi: Int32,
        kv_head: Int32,
        lane: Int32,
    ):
        """Start the copy of one step's K and V into a ring slot."""
        spec, tokens, lanes = self.spec, self.tile.tokens, self.lanes
        token = begin + step * self.tile.tile_kv
        v_slot = slot + Uint32(self.slot_k)
        pages.check_page_ids(spec, ids, k, status, first, token, lo, hi, lane, 32, tokens, lanes)
        pages.copy_rows(spec, k, ids, slot, self.slot_pitch_k, spec.head_dim_qk, first, token, kv_head, lane, 32, tokens, lanes)
        pages.copy_rows(spec, v, ids, v_slot, self.slot_pitch_v, spec.head_dim_vo, first, token, kv_head, lane, 32, tokens, lanes)

    def partials(self, base: Uint32):
        """Shared-memory views of the merge: O ``[row, column, warp]`` and (max, sum) ``[row, 2, warp]``, fp32."""
        p = merge_pitch(self.spec.head_dim_vo)
        o_ptr = cute.make_ptr(Float32, Int32(base + self.smem.ring), cute.AddressSpace.smem, assumed_align=16)
        stats_ptr = cute.make_ptr(Float32, Int32(base + self.smem.stats), cute.AddressSpace.smem, assumed_align=16)
        s_o = cute.make_tensor(o_ptr, cute.make_layout((ROWS, self.dim_vo, self.tile.warps), stride=(p, 1, ROWS * p)))
        s_stats = cute.make_tensor(stats_ptr, cute.make_layout((ROWS, 2, self.tile.warps), stride=(2, 1, 2 * ROWS)))
        return s_o, s_stats

    @cute.jit
    def leave_partial(self, base: Uint32, o_rows: cute.Tensor, row_max: cute.Tensor, row_sum: cute.Tensor, warp: Int32, lane: Int32):
        """Write this warp's (max, sum, unnormalised O) to shared memory."""
        s_o, s_stats = self.partials(base)
        for r in cutlass.range_constexpr(2):
            row = lane // 4 + 8 * r
            if lane % 4 == 0:
                s_stats[row, 0, warp] = row_max[r]
                s_stats[row, 1, warp] = row_sum[r]
            for c in cutlass.range_constexpr(0, self.dim_vo // 4, 2):
                pair = cute.make_rmem_tensor(2, Float32)
                pair[0] = o_rows[r, c]
                pair[1] = o_rows[r, c + 1]
                cute.autovec_copy(pair, cute.local_tile(s_o[row, None, warp], (2,), (4 * (c // 2) + lane % 4,)))

    @cute.jit
    def merge(
        self,
        base: Uint32,
        out: cute.Tensor,
        lse: typing.Optional[cute.Tensor],
        sinks: typing.Optional[cute.Tensor],
        out_partial: typing.Optional[cute.Tensor],
        lse_partial: typing.Optional[cute.Tensor],
        out_factor: Float32,
        lse_scale: Float32,
        request: Int32,
        kv_head: Int32,
        head_block: Int32,
        split: Int32,
        thread: Int32,
    ):
        """Add up the warps in order and write the CTA's rows, MERGE_COLUMNS columns per thread."""
        spec, tile = self.spec, self.tile
        s_o, s_stats = self.partials(base)
        per_row = spec.head_dim_vo // MERGE_COLUMNS
        rows = cutlass.min(Int32(ROWS), spec.group_size - head_block * ROWS)
        for e in cutlass.range(thread, rows * per_row, tile.threads, unroll=1):
            row = e // per_row
            part = e % per_row
            head = kv_head * spec.group_size + head_block * ROWS + row
            peak = s_stats[row, 0, 0]
            for w in cutlass.range_constexpr(1, tile.warps):
                peak = cute.arch.fmax(peak, s_stats[row, 0, w])
            total = Float32(0.0)
            sums = cute.make_rmem_tensor(MERGE_COLUMNS, Float32)
            sums.fill(0.0)
            for w in cutlass.range_constexpr(tile.warps):
                weight = cute.arch.exp2(s_stats[row, 0, w] - softmax.finite(peak))
                total = total + s_stats[row, 1, w] * weight
                values = cute.make_rmem_tensor(MERGE_COLUMNS, Float32)
                cute.autovec_copy(cute.local_tile(s_o[row, None, w], (MERGE_COLUMNS,), (part,)), values)
                for i in cutlass.range_constexpr(MERGE_COLUMNS):
                    sums[i] = sums[i] + values[i] * weight
            sink = None
            if const_expr(spec.sinks):
                sink = output.sink_of(sinks, head, split)
            weight, row_lse = output.weight_and_lse(peak, total, sink)
            for i in cutlass.range_constexpr(MERGE_COLUMNS):
                sums[i] = sums[i] * (weight * out_factor)
            output.store_columns(out, out_partial, sums, request, head, split, part * MERGE_COLUMNS)
            if part == 0:
                output.store_lse(lse, lse_partial, row_lse, request, head, split, lse_scale)
