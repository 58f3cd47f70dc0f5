"""GQA decode for Hopper: one thread-block cluster per (request, KV head), merged through distributed shared memory.

    out[r, h] = softmax(q[r, h] . K_r^T * sm_scale) V_r        K_r, V_r: the kv_len tokens of request r, KV head h // group_size

What a CTA owns
    An item is a request and ``heads_per_item`` neighbouring KV heads (and, for groups beyond 8 * head_tiles query heads, one block of
    the group). A cluster of C CTAs shares an item: its tokens are cut into slots of T tokens, and each of the C * W / HP warps that
    serve a head takes a run of them. No plan, no tickets, no scratch in global memory: lengths and page tables are read live.

Roles
    All warps are alike. A warp owns a ring of S slots (K and V of T tokens each), looks up its page ids one load ahead, issues its
    copies, computes, and refills the slot it has just read. It waits for nobody but its own copies before the merge, so there is no
    producer warp, no empty barrier and no barrier of the CTA in the main loop. Copies are one TMA box of K and one of V per page (or per
    slot, where a page holds several); page sizes no box fits (1, 2, 4, odd ones) are gathered by 16-byte cp.async into the same layout.

Barriers
    full[warp][slot]    mbarrier: 1 arrival + the bytes of both slots (TMA), or 32 arrivals, each after a lane's copies (gather);
                        its phase is the lap of the ring
    cluster barrier     arrive on entry: "my shared memory exists"; waited for just before the first remote store
    CTA barrier         every warp's partial result lies in shared memory; early metadata: so do the lengths that three threads looked up
    arrived             mbarrier: 1 arrival + the bytes of all slices and row statistics that this CTA receives from its cluster. Once it
                        turns, nobody writes to this CTA any more, so it may finish and leave

Order and overlap. The kernel starts while its predecessor drains and lets its successor start once its own copies fly; tile flags:
    ``longest_first``   the request axis of the grid is a rank by live length, so no long request starts last
    ``early_metadata``  lengths and page ids are looked up before the programmatic dependency resolves, copies start with them right after,
                        and the same words are read again while the copies fly; had they changed, what came is dropped and fetched anew
    ``prefetch``        what they point to is asked into L2 before the dependency resolves
    ``lets_go``         how far a CTA is when its successor may start

Files, in the order of the kernel
    decode_sm90_layout.py   how work is dealt, shared memory, TMA boxes        decode_sm90_query.py    queries and factors
    decode_sm90_work.py     item, tokens and page ids from live metadata       decode_sm90_math.py     S^T = K Q^T, softmax, O^T += V^T P^T
    decode_sm90_load.py     copies into a warp's ring                          decode_sm90_merge.py    warps, cluster, output

Shared memory (bf16, d 128, T 16, W 4, S 3, C 8, 4 heads): rings 4 * 3 * 8 KiB = 96 KiB, merge 2.5 KiB: two CTAs per SM.
Registers: O^T takes head_dim_vo / 4 per head tile, Q head_dim_qk / 8; 0 spills for every tile the table offers.
Memory bound: 2 * kv_len * head_dim bytes-per-element per KV head, once; the tensor cores run below a tenth of their peak.
Deep dive with measurements: docs/kernels/decode_sm90.md. Source: Dao et al., Flash-Decoding (2023); Milakov & Gimelshein, arXiv:1805.02867.
"""

import typing

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from ..device.args import fake_args
from ..spec import AttentionSpec
from ..tiles_decode_sm90 import DecodeSm90Tile
from .decode_sm90_layout import DecodeLayout
from .decode_sm90_load import BoxCopies, DecodeLoad, RowCopies
from .decode_sm90_math import DecodeMath
from .decode_sm90_merge import DecodeMerge
from .decode_sm90_query import DecodeQuery
from .decode_sm90_work import DecodeWork


class DecodeSm90:
    """See the module docstring. ``spec`` says what to compute, ``tile`` how large the pieces are."""

    def __init__(self, spec: AttentionSpec, tile: DecodeSm90Tile):
        self.spec, self.tile = spec, tile
        self.layout = DecodeLayout(spec, tile)
        self.work = DecodeWork(spec, tile, self.layout)
        self.load = DecodeLoad(spec, tile, self.layout)
        self.query = DecodeQuery(spec, tile, self.layout)
        self.math = DecodeMath(spec, tile, self.layout)
        self.merge = DecodeMerge(spec, tile, self.layout, self.query, self.math)
        self.gathers, self.id_steps, self.head_tiles = self.layout.gathers, self.layout.id_steps, self.layout.head_tiles
        assert tile.lets_go in ("filled", "refilled", "merging", "never"), tile
        if tile.early_metadata:
            assert spec.kv_layout == "paged" and not self.gathers and tile.stages <= self.id_steps, tile
            assert not tile.longest_first, tile  # lengths that may still change would give every CTA another order
            assert tile.lets_go != "never" and tile.prefetch <= self.id_steps, tile
        else:
            assert tile.prefetch == 0, tile  # the page ids would not be known early enough

    def abi(self) -> tuple:
        """Stand-ins for the arguments of :meth:`__call__`."""
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
        tile, layout = self.tile, self.layout
        k_ring, v_ring = layout.ring_layout(layout.k_rows), layout.ring_layout(layout.v_rows)
        k_load, k_coords, v_load, v_coords = None, None, None, None
        if const_expr(not self.gathers):
            k_load, k_coords = layout.tma_load(k, k_ring, layout.k_rows)
            v_load, v_coords = layout.tma_load(v, v_ring, layout.v_rows)
        head_groups = cute.ceil_div(k.shape[2], tile.heads_per_item)
        self.kernel(
            q, k, v, k_load, k_coords, v_load, v_coords, k_ring, v_ring, out, lse, kv_indptr, kv_indices, kv_last_page_len, sinks,
            k_scale, v_scale, out_partial, lse_partial, status, sm_scale, out_scale, soft_cap, lse_scale, window_left, num_splits,
        ).launch(
            grid=[tile.cluster, layout.head_blocks * head_groups * num_splits, q.shape[0]],
            block=[32 * tile.warps, 1, 1],
            cluster=[tile.cluster, 1, 1],
            stream=stream,
            min_blocks_per_mp=tile.ctas_per_sm,
            preferred_smem_carveout=100,  # percent; left open, the compiler asks a GPU for its size
            use_pdl=tile.lets_go != "never",
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------------------- kernel
    @cute.kernel
    def kernel(
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        k_load: typing.Optional[cute.CopyAtom],
        k_coords: typing.Optional[cute.Tensor],
        v_load: typing.Optional[cute.CopyAtom],
        v_coords: typing.Optional[cute.Tensor],
        k_ring: cute.ComposedLayout,
        v_ring: cute.ComposedLayout,
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
        window_left: Int32,
        num_splits: Int32,
    ):
        tile, layout = self.tile, self.layout
        thread = cute.arch.thread_idx()[0]
        lane = thread % 32
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank, _, _ = cute.arch.block_idx()
        if const_expr(not self.gathers):
            if warp == 0:
                cpasync.prefetch_descriptor(k_load)
                cpasync.prefetch_descriptor(v_load)
        if const_expr(not tile.early_metadata and tile.lets_go != "never"):
            cute.arch.griddepcontrol_wait()
        item = self.work.find_item(num_splits, q, kv_indptr, window_left, lane)
        if const_expr(tile.early_metadata):
            word = self.work.ask_early_lengths(item, kv_indptr, kv_last_page_len, thread)
        else:
            lengths = self.work.lengths(item, kv_indptr, kv_last_page_len)

        # set up while the lengths are on their way
        shared = self.layout.allocate(SmemAllocator(), k_ring, v_ring, warp)
        full = shared.full
        if lane == 0:
            for slot in cutlass.range_constexpr(tile.stages):
                cute.arch.mbarrier_init(full + slot, 32 if self.gathers else 1)
        if const_expr(tile.cluster > 1):
            if thread == 0:
                cute.arch.mbarrier_init(shared.arrived, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        if const_expr(tile.cluster > 1):
            if thread == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(shared.arrived, self.merge.bytes_from_peers(rank))
            cute.arch.cluster_arrive_relaxed()

        if const_expr(tile.early_metadata):
            lengths = self.work.share_early_lengths(word, shared.s_lengths, thread)
        position = rank * layout.warps_per_head + warp // tile.heads_per_item
        work = self.work.find_work(item, k, lengths, kv_indptr, window_left, num_splits, position, warp)
        ids = self.work.load_page_ids(work, kv_indices, Int32(0), lane)
        next_ids = self.work.load_page_ids(work, kv_indices, Int32(self.id_steps), lane)

        ring_address = Uint32(shared.ring.toint()) + Uint32(warp * layout.warp_region)
        if const_expr(self.gathers):
            copies = RowCopies(k, v, ring_address)
        else:
            k_copies = self.load.partition(k_load, k_coords, shared.s_k, layout.k_rows, work)
            v_copies = self.load.partition(v_load, v_coords, shared.s_v, layout.v_rows, work)
            copies = BoxCopies(*k_copies, *v_copies)
        slot, lap = Int32(0), Int32(0)
        if const_expr(tile.early_metadata):
            sources = self.load.ring_sources(work, self.work.bound_page_ids(work, ids))
            self.load.prefetch_ring(copies, work, sources)
            cute.arch.griddepcontrol_wait()
            self.load.fill_ring(copies, full, work, sources, warp)
            # The second look and q are asked for together and used below: a warp issues in order, so using the one before asking for the
            # other would put two trips to memory behind the copies instead of one.
            lengths = self.work.lengths(item, kv_indptr, kv_last_page_len)
            ids_now = self.work.load_page_ids(work, kv_indices, Int32(0), lane, True)
            next_ids_now = self.work.load_page_ids(work, kv_indices, Int32(self.id_steps), lane, True)
            q_words = self.query.ask_q(q, item, work.kv_head, lane)
        else:
            q_words = self.query.ask_q(q, item, work.kv_head, lane)  # behind the page ids, ahead of the copies
            ids = self.work.check_page_ids(work, ids, status)
            for i in cutlass.range_constexpr(tile.stages):
                if i < work.count:
                    if const_expr(i > 0 and i % self.id_steps == 0):
                        ids = self.work.check_page_ids(work, next_ids, status)
                        next_ids = self.work.load_page_ids(work, kv_indices, Int32(i + self.id_steps), lane)
                    self.load.fill(copies, full, work, ids, Int32(i), Int32(i), warp, lane)
        if const_expr(tile.lets_go == "filled"):
            cute.arch.griddepcontrol_launch_dependents()
        elif const_expr(tile.lets_go == "refilled"):
            if work.count <= tile.stages:
                cute.arch.griddepcontrol_launch_dependents()

        factor, slope = self.query.softmax_factors(item, work.kv_head, q, k_scale, sm_scale, soft_cap, lane)
        if warp == 0:
            self.query.load_row_constants(shared.s_row, item, out, sinks, v_scale, out_scale, lane)
        r_q = self.query.pack_q(q_words, item, work.kv_head, Int32(q.shape[1]), factor, lane)
        k_lane, v_lane = layout.lane_offsets(lane)
        o = cute.make_rmem_tensor(self.spec.head_dim_vo // 4 * self.head_tiles, Float32)
        o.fill(0.0)
        top, total = cute.make_rmem_tensor(2 * self.head_tiles, Float32), cute.make_rmem_tensor(2 * self.head_tiles, Float32)
        top.fill(-Float32.inf)
        total.fill(0.0)

        if const_expr(tile.early_metadata):
            guess, work = work, self.work.find_work(item, k, lengths, kv_indptr, window_left, num_splits, position, warp)
            stale = guess.origin != work.origin or guess.end != work.end or ids != ids_now or next_ids != next_ids_now
            if cute.arch.vote_ballot_sync(stale) != 0:  # the previous kernel wrote the metadata: drop what was fetched, fetch again
                self.load.drain_ring(full, guess)
                lap = Int32(1)
                ids = self.work.load_page_ids(work, kv_indices, Int32(0), lane, True)
                next_ids = self.work.load_page_ids(work, kv_indices, Int32(self.id_steps), lane, True)
                self.load.fill_ring(copies, full, work, self.load.ring_sources(work, self.work.bound_page_ids(work, ids)), warp)
            ids = self.work.check_page_ids(work, ids, status)
        for step in cutlass.range(work.count, unroll=1):
            token = (work.first_slot + step) * tile.tokens
            cute.arch.mbarrier_wait(full + slot, lap)  # K and V of this slot have landed
            k_address = ring_address + Uint32(slot * (layout.k_slot + layout.v_slot))
            v_address = k_address + Uint32(layout.k_slot)
            scores = self.math.scores(r_q, k_address, k_lane)
            self.math.transform(scores, factor, slope, soft_cap, token - (work.end - 1), lane)
            if token + tile.tokens > work.end or token < work.begin:
                self.math.hide(scores, work.begin - token, work.end - token, lane)
                if const_expr(not self.gathers):  # a row that was not wanted was filled with zeros
                    self.math.zero_v(v_address, work.begin - token, work.end - token, lane)
            p = self.math.softmax(scores, o, top, total, factor)
            self.math.accumulate(o, p, v_address, v_lane)
            ahead = step + tile.stages
            if ahead < work.count:
                if ahead % self.id_steps == 0:
                    ids = self.work.check_page_ids(work, next_ids, status)
                    next_ids = self.work.load_page_ids(work, kv_indices, ahead + self.id_steps, lane, True)
                cute.arch.sync_warp()  # every lane has read the slot
                self.load.fill(copies, full, work, ids, ahead, slot, warp, lane)
                if const_expr(tile.lets_go == "refilled"):
                    if ahead + 1 == work.count:
                        cute.arch.griddepcontrol_launch_dependents()
            slot = slot + 1
            if slot == tile.stages:
                slot = Int32(0)
                lap = lap ^ 1

        if const_expr(tile.lets_go == "merging"):
            cute.arch.griddepcontrol_launch_dependents()
        cute.arch.sync_warp()  # every lane has read the last slots, which the partial result overwrites
        self.merge.store_partial(shared, o, top, total, factor, warp, lane)
        cute.arch.sync_threads()
        if const_expr(tile.split_kv):
            out_partial, lse_partial = out_partial[item.split, None, None, None], lse_partial[item.split, None, None]
            self.merge.merge(shared, item, work, out_partial, lse_partial, Float32(1.0), thread, rank)
        else:
            self.merge.merge(shared, item, work, out, lse, lse_scale, thread, rank)
