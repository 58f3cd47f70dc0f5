"""Prefill and append attention with cp.async and mma.sync: every option, every architecture from sm_80 on.

One CTA owns (request, KV head, tile of packed query rows, KV split). Packed row r of a request is query ``r // group_size`` and head
``r % group_size``, so the heads of a group read K and V together and short requests still fill the rows.

Which CTA does what: the grid's x is an upper bound on the query tiles that needs no lengths; each CTA walks qo_indptr, 32 requests a
step, to the request that holds its tile, and CTAs beyond the last tile leave. Causal tiles start with the longest.

Warps (all alike): each owns 16 query rows, their softmax and their 16 x head_dim_vo accumulator, and reads every KV tile.

One KV tile
    wait for the slot; barrier; refill the slot of the previous tile; [fp8: widen the bytes into a 16-bit tile, barrier];
    [RoPE: rotate K in place, barrier]; S = Q K^T; scale, soft cap, ALiBi; custom mask; band mask (only tiles that some row does not see
    whole); softmax; O += P V
Tiles outside the causal or window range of the CTA's rows are never visited.

Shared memory (head_dim 128, 16 bit, 64 x 2 stages): 68 KiB of rings, in which Q passes through; see ``tiles_prefill_sm80.SharedMemory``.
Compute bound: 4 * head_dim * pairs FLOP per query head; mma.sync reaches about 60 % of what wgmma does.
Source: Dao, FlashAttention-2 (arXiv:2307.08691).
"""

import typing

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.memory import SmemAllocator

from ..device import fp8, logits, mask, mma, output, pages, rope, softmax
from ..device.args import CUTE_DTYPES, fake_args
from ..spec import AttentionSpec
from ..tiles_decode_sm80 import padded, pitch
from ..tiles_prefill_sm80 import REGISTER_Q_DIM, ROWS_PER_WARP, PrefillSm80Tile, shared_memory


class PrefillSm80:
    """See the module docstring. ``spec`` and ``tile`` hold every static fact."""

    def __init__(self, spec: AttentionSpec, tile: PrefillSm80Tile):
        self.spec, self.tile = spec, tile
        self.dtype = CUTE_DTYPES[spec.q_dtype]
        self.kv_dtype = CUTE_DTYPES[spec.kv_dtype]
        self.smem = shared_memory(spec, tile)
        self.dim_qk, self.dim_vo = padded(spec.head_dim_qk), padded(spec.head_dim_vo)
        self.pitch_k, self.pitch_v = pitch(spec.head_dim_qk), pitch(spec.head_dim_vo)
        self.narrow = spec.kv_bits == 8
        self.rope = spec.pos_encoding == "ROPE_LLAMA"
        self.causal = spec.causal and not spec.custom_mask
        width = spec.kv_bits // 8
        # rows of a ring slot, and the slot: K rows, then V rows
        self.slot_pitch_k = self.dim_qk if self.narrow else self.pitch_k
        self.slot_pitch_v = self.dim_vo if self.narrow else self.pitch_v
        self.slot_k = tile.tile_kv * self.slot_pitch_k
        self.slot = self.slot_k + tile.tile_kv * self.slot_pitch_v
        self.lanes = pages.lanes_per_row(self.dim_qk * width, self.dim_vo * width)
        self.passes = pages.passes(tile.tile_kv, tile.threads, self.lanes)

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
        tile_q = self.tile.tile_q
        batch = Int32(1)
        if const_expr(qo_indptr is not None):
            batch = Int32(qo_indptr.shape[0]) - 1
        # sum of ceil(rows_i / tile_q) <= (sum of rows_i + batch * (tile_q - 1)) / tile_q
        tiles = (q.shape[0] * self.spec.group_size + batch * (tile_q - 1)) // tile_q
        self.kernel(
            q, k, v, out, lse, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, mask_bits, mask_indptr, sinks, k_scale, v_scale,
            out_partial, lse_partial, status, sm_scale, out_scale, soft_cap, lse_scale, rope_rcp_scale, rope_log2_theta, window_left,
            num_splits, batch,
        ).launch(grid=[tiles, k.shape[2], num_splits], block=[self.tile.threads, 1, 1], stream=stream)  # fmt: skip

    @cute.kernel
    def kernel(
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
        batch: Int32,
    ):
        spec, tile, at = self.spec, self.tile, self.smem
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = thread % 32
        index, kv_head, split = cute.arch.block_idx()
        if const_expr(self.causal):
            index = cute.arch.grid_dim()[0] - 1 - index  # the last tiles of a request see the most keys: start them first
        base = Uint32(SmemAllocator().allocate(at.total, byte_alignment=128).toint())

        request, q_tile, qo_begin, qo_len = self.find_tile(q, qo_indptr, batch, index, lane)
        rows = qo_len * spec.group_size
        first_row = q_tile * tile.tile_q
        if first_row < rows:  # otherwise the grid's bound was generous
            # ---------------------------------------------------------------------------------------- the tiles these rows visit
            first, kv_len = pages.kv_extent(spec, k, kv_indptr, kv_last_page_len, request)
            first_pos = kv_len - qo_len + first_row // spec.group_size
            last_pos = kv_len - qo_len + (cutlass.min(first_row + tile.tile_q, rows) - 1) // spec.group_size
            lo, hi = mask.kv_range(self.causal, spec.window, first_pos, last_pos, kv_len, window_left)
            begin = lo // tile.tile_kv
            end = cute.ceil_div(hi, tile.tile_kv)
            chunk = cute.ceil_div(cutlass.max(end - begin, Int32(0)), num_splits)
            begin = begin + split * chunk
            steps = cutlass.max(cutlass.min(chunk, end - begin), Int32(0))
            begin = begin * tile.tile_kv
            # every row sees every key of a tile inside [full_lo, full_hi)
            _, full_hi = mask.kv_range(self.causal, False, first_pos, first_pos, kv_len, window_left)
            full_lo, _ = mask.kv_range(False, spec.window, last_pos, last_pos, kv_len, window_left)

            # -------------------------------------------------------------------------------- prologue: Q and the first ring slots
            pages.copy_query_rows(
                spec, q, base + Uint32(at.q), self.pitch_k, qo_begin, first_row, rows, kv_head, thread, tile.threads, tile.tile_q
            )
            cute.arch.cp_async_commit_group()
            ids = cute.make_rmem_tensor(self.passes, Int32)
            for s in cutlass.range_constexpr(tile.stages - 1):
                if s < steps:
                    self.find_pages(ids, kv_indices, first, begin, s, lo, hi, thread)
                    self.fill(ids, k, v, status, base + Uint32(s * self.slot), first, begin, s, lo, hi, kv_head, thread)
                cute.arch.cp_async_commit_group()
            if tile.stages - 1 < steps:
                self.find_pages(ids, kv_indices, first, begin, tile.stages - 1, lo, hi, thread)
            if const_expr(self.rope):
                rope.write_table(base + Uint32(at.table), spec.head_dim_qk, rope_rcp_scale, rope_log2_theta, thread, tile.threads)
            cute.arch.cp_async_wait_group(tile.stages - 1)
            cute.arch.sync_threads()
            if const_expr(self.rope):
                rope.rotate_rows(
                    base + Uint32(at.q), self.pitch_k, tile.tile_q, spec.head_dim_qk, base + Uint32(at.table), kv_len - qo_len, first_row,
                    spec.group_size, thread, tile.threads, self.dtype,
                )  # fmt: skip
                cute.arch.sync_threads()
            q_address = base + Uint32(at.q) + Uint32(warp * (ROWS_PER_WARP * self.pitch_k)) + mma.lane_offset_a(lane, self.pitch_k)
            q_frag = None
            if const_expr(spec.head_dim_qk <= REGISTER_Q_DIM):
                q_frag = mma.load_a(q_address, self.dim_qk)

            # ------------------------------------------------------------------------------------------------- what each row sees
            slopes = cute.make_rmem_tensor(2, Float32)
            qo_idx = cute.make_rmem_tensor(2, Int32)
            row_lo = cute.make_rmem_tensor(2, Int32)
            row_hi = cute.make_rmem_tensor(2, Int32)
            for r in cutlass.range_constexpr(2):
                row = first_row + warp * ROWS_PER_WARP + lane // 4 + 8 * r
                qo_idx[r] = row // spec.group_size
                slopes[r] = Float32(0.0)
                if const_expr(spec.pos_encoding == "ALIBI"):
                    slopes[r] = logits.alibi_slope(kv_head * spec.group_size + row % spec.group_size, q.shape[1])
                pos = kv_len - qo_len + qo_idx[r]
                seen_lo, seen_hi = mask.kv_range(self.causal, spec.window, pos, pos, kv_len, window_left)
                row_lo[r] = seen_lo
                row_hi[r] = seen_hi if row < rows else Int32(0)
            mask_begin = Int32(0)
            if const_expr(spec.custom_mask):
                mask_begin = mask_indptr[request]
            scale = sm_scale
            if const_expr(spec.k_scale):
                scale = sm_scale * k_scale[kv_head]

            # -------------------------------------------------------------------------------------------------------- main loop
            acc_o = cute.make_rmem_tensor(self.dim_vo // 2, Float32)
            acc_o.fill(0.0)
            acc_s = cute.make_rmem_tensor(tile.tile_kv // 2, Float32)
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
                cute.arch.sync_threads()  # the tile has arrived for every thread, and every warp has read the slot that is refilled now
                if i + (tile.stages - 1) < steps:
                    self.fill(
                        ids, k, v, status, base + Uint32(free * self.slot), first, begin, i + (tile.stages - 1), lo, hi, kv_head, thread
                    )
                cute.arch.cp_async_commit_group()
                if i + tile.stages < steps:
                    self.find_pages(ids, kv_indices, first, begin, i + tile.stages, lo, hi, thread)

                token = begin + i * tile.tile_kv
                k_tile = base + Uint32(slot * self.slot)
                v_tile = k_tile + Uint32(self.slot_k)
                if const_expr(self.narrow):
                    wide_k = base + Uint32(at.wide)
                    wide_v = wide_k + Uint32(tile.tile_kv * self.pitch_k)
                    fp8.widen_rows(k_tile, wide_k, self.pitch_k, tile.tile_kv, self.dim_qk, thread, tile.threads, self.kv_dtype, self.dtype)
                    fp8.widen_rows(v_tile, wide_v, self.pitch_v, tile.tile_kv, self.dim_vo, thread, tile.threads, self.kv_dtype, self.dtype)
                    k_tile = wide_k
                    v_tile = wide_v
                    cute.arch.sync_threads()
                if const_expr(self.rope):
                    rope.rotate_rows(
                        k_tile, self.pitch_k, tile.tile_kv, spec.head_dim_qk, base + Uint32(at.table), token, Int32(0), 1, thread,
                        tile.threads, self.dtype,
                    )  # fmt: skip
                    cute.arch.sync_threads()

                mma.q_times_k(acc_s, q_frag, q_address, k_tile + k_lane, self.dim_qk, tile.tile_kv, self.pitch_k, self.dtype)
                logits.scale(acc_s, spec.soft_cap, scale, soft_cap)
                if const_expr(spec.pos_encoding == "ALIBI"):
                    logits.alibi(scores, slopes, qo_idx, token, lane)
                if const_expr(spec.custom_mask):
                    mask.custom(scores, mask_bits, mask_begin, qo_idx, row_hi, kv_len, token, lane)
                if token < full_lo or token + tile.tile_kv > full_hi:
                    mask.band(scores, row_lo, row_hi, token, lane)
                softmax.update(scores, o_rows, row_max, row_sum)
                mma.p_times_v(acc_o, acc_s, v_tile + v_lane, self.dim_vo, tile.tile_kv, self.pitch_v, self.dtype)

                slot = slot + 1 if slot + 1 < tile.stages else Int32(0)
                free = free + 1 if free + 1 < tile.stages else Int32(0)
            cute.arch.cp_async_wait_group(0)
            softmax.finish(row_sum)

            # --------------------------------------------------------------------------------------------------------- epilogue
            factor = out_scale
            if const_expr(spec.v_scale):
                factor = out_scale * v_scale[kv_head]
            for r in cutlass.range_constexpr(2):
                row = first_row + warp * ROWS_PER_WARP + lane // 4 + 8 * r
                if row < rows:
                    token = qo_begin + row // spec.group_size
                    head = kv_head * spec.group_size + row % spec.group_size
                    sink = None
                    if const_expr(spec.sinks):
                        sink = output.sink_of(sinks, head, split)
                    weight, row_lse = output.weight_and_lse(row_max[r], row_sum[r], sink)
                    for n in cutlass.range_constexpr(spec.head_dim_vo // 8):
                        pair = cute.make_rmem_tensor(2, Float32)
                        for c in cutlass.range_constexpr(2):
                            pair[c] = o_rows[r, 2 * n + c] * (weight * factor)
                        output.store_columns(out, out_partial, pair, token, head, split, 8 * n + 2 * (lane % 4))
                    if lane % 4 == 0:
                        output.store_lse(lse, lse_partial, row_lse, token, head, split, lse_scale)

    @cute.jit
    def find_tile(self, q: cute.Tensor, qo_indptr, batch: Int32, index: Int32, lane: Int32):
        """``(request, query tile of it, first query, number of queries)`` of the index-th query tile; no queries when there is none."""
        request = Int32(0)
        q_tile = index
        qo_begin = Int32(0)
        qo_len = Int32(0)
        if const_expr(qo_indptr is None):
            qo_len = Int32(q.shape[0])
        else:
            start = Int32(0)  # requests start .. start + 31 are looked at together; q_tile counts from the first of them
            while start < batch:
                candidate = cutlass.min(start + lane, batch - 1)
                at = qo_indptr[candidate]
                length = qo_indptr[candidate + 1] - at
                length = length if start + lane < batch else Int32(0)
                tiles = cute.ceil_div(length * self.spec.group_size, self.tile.tile_q)
                through = tiles  # tiles of requests start .. candidate
                for i in cutlass.range_constexpr(5):
                    before = cute.arch.shuffle_sync(through, cutlass.max(lane - (1 << i), Int32(0)))
                    through = through + before if lane >= 1 << i else through
                hits = cute.arch.vote_ballot_sync(through > q_tile)
                if hits != 0:
                    owner = cute.arch.popc((hits & (0 - hits)) - 1)  # the first lane
                    request = start + owner
                    q_tile = q_tile - cute.arch.shuffle_sync(through - tiles, owner)
                    qo_begin = cute.arch.shuffle_sync(at, owner)
                    # rows past the end of q would be an indptr that belongs to another batch
                    qo_len = cutlass.min(cute.arch.shuffle_sync(length, owner), q.shape[0] - qo_begin)
                    start = batch
                else:
                    q_tile = q_tile - cute.arch.shuffle_sync(through, 31)
                    start = start + 32
        return request, q_tile, qo_begin, qo_len

    @cute.jit
    def find_pages(self, ids: cute.Tensor, kv_indices, first: Int32, begin: Int32, step, lo: Int32, hi: Int32, thread: Int32):
        """Fetch this thread's page ids for one KV tile."""
        tile = self.tile
        token = begin + step * tile.tile_kv
        pages.load_page_ids(self.spec, ids, kv_indices, first, token, lo, hi, thread, tile.threads, tile.tile_kv, self.lanes)

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
        thread: Int32,
    ):
        """Start the copy of one tile of K and V into a ring slot."""
        spec, threads, rows, lanes = self.spec, self.tile.threads, self.tile.tile_kv, self.lanes
        token = begin + step * rows
        v_slot = slot + Uint32(self.slot_k)
        pages.check_page_ids(spec, ids, k, status, first, token, lo, hi, thread, threads, rows, lanes)
        pages.copy_rows(spec, k, ids, slot, self.slot_pitch_k, spec.head_dim_qk, first, token, kv_head, thread, threads, rows, lanes)
        pages.copy_rows(spec, v, ids, v_slot, self.slot_pitch_v, spec.head_dim_vo, first, token, kv_head, thread, threads, rows, lanes)
