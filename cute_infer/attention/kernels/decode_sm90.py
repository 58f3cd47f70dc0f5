"""GQA decode for Hopper: one thread-block cluster per (request, KV head), merged through distributed shared memory.

    out[r, h] = softmax(q[r, h] . K_r^T * sm_scale) V_r        K_r, V_r: the kv_len tokens of request r, KV head h // group_size

What a CTA owns
    An item is a request and ``heads_per_item`` neighbouring KV heads (and, for groups beyond 8 * head_tiles query heads, one block of
    the group). A cluster of C CTAs shares an item: its tokens are cut into slots of T tokens and dealt round-robin to the C * W / HP
    warps that serve a head. No plan, no tickets, no scratch in global memory: lengths and page tables are read live.

Roles
    All warps are alike. A warp owns a ring of S slots (K and V of T tokens each), looks up its page ids one load ahead, issues its
    copies, computes, and refills the slot it has just read. It waits for nobody but its own copies before the merge, so there is no
    producer warp, no empty barrier and no barrier of the CTA in the main loop. Copies are one TMA box of K and one of V per page (or per
    slot, where a page holds several); page sizes no box fits (1, 2, 4, odd ones) are gathered by 16-byte cp.async into the same layout.

Barriers
    full[warp][slot]    mbarrier: 1 arrival + the bytes of both slots (TMA), or 32 arrivals, each after a lane's copies (gather);
                        its phase is the lap of the ring
    cluster barrier     arrive on entry: "my shared memory exists"; waited for just before the first remote store
    CTA barrier         every warp's partial result lies in shared memory
    arrived             mbarrier: 1 arrival + the bytes of all slices and row statistics that this CTA receives from its cluster. Once it
                        turns, nobody writes to this CTA any more, so it may finish and leave

Order and overlap. The kernel starts while its predecessor drains and lets its successor start once its own copies fly; tile flags:
    ``longest_first``   the request axis of the grid is a rank by live length, so no long request starts last
    ``early_metadata``  lengths and page ids are looked up before the programmatic dependency resolves, copies start with them right after,
                        and the same words are read again while the copies fly; had they changed, what came is dropped and fetched anew
    ``prefetch``        what they point to is asked into L2 before the dependency resolves
    ``lets_go``         how far a CTA is when its successor may start

Maths of one slot, transposed so that the few query heads are the 8-wide side of mma.m16n8k16 and 16 tokens fill its rows:
    S^T = K Q^T   ->   P^T = exp2(S^T * scale - max + headroom)   ->   O^T += V^T P^T
    K is read by ldmatrix, V by ldmatrix.trans, and P^T turns from accumulator into operand by one movmatrix per 8x8 block.
    fp8 K and V become fp16 in registers. A lane then owns 4 neighbouring d of K, so Q is loaded with the same permutation; the
    transposed V pairs even and odd d, so rows g and g + 8 of O^T are d = 16 j + 2 g and 16 j + 2 g + 1.
    bf16 queries of an fp8 cache are scaled by a power of two per head to fp16 range; the inverse joins that head's softmax scale, so
    nothing overflows and no bit of q is lost.

Merge, in an order fixed by (warp, rank): every warp writes (max, sum, O) over its own ring; the CTA combines them and pushes slice i
    of the item's outputs to CTA i of the cluster (st.async, counted by ``arrived`` there); each CTA finishes its slice when it is
    complete. Bitwise repeatable, and a request's result does not depend on its neighbours.

Shared memory (bf16, d 128, T 16, W 4, S 3, C 8, 4 heads): rings 4 * 3 * 8 KiB = 96 KiB, merge 2.5 KiB: two CTAs per SM.
Registers: O^T takes head_dim_vo / 4 per head tile, Q head_dim_qk / 8; 0 spills for every tile the table offers.
Memory bound: 2 * kv_len * head_dim bytes-per-element per KV head, once; the tensor cores run below a tenth of their peak.
Deep dive with measurements: docs/kernels/decode_sm90.md. Source: Dao et al., Flash-Decoding (2023); Milakov & Gimelshein, arXiv:1805.02867.
"""

import math
import operator
import typing

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator

from ..device.args import CUTE_DTYPES, fake_args
from ..device.logits import alibi_slope
from ..spec import AttentionSpec
from ..tiles_decode_sm90 import (
    COLUMNS,
    DecodeSm90Tile,
    Rows,
    gathers,
    head_blocks,
    heads_per_block,
    id_steps,
    rows_of,
    slice_elements,
    slot_bytes,
    tokens_per_id,
    warp_region_bytes,
)

LOG2_E = math.log2(math.e)
EVICT_FIRST = 0x12F0000000000000  # createpolicy.fractional.L2::evict_first
NO_PAGE = -(2**31)
RANKED = 256  # requests that longest_first orders among themselves
SWIZZLES = {
    128: warpgroup.SmemLayoutAtomKind.K_SW128,
    64: warpgroup.SmemLayoutAtomKind.K_SW64,
    32: warpgroup.SmemLayoutAtomKind.K_SW32,
}


class Work(typing.NamedTuple):
    """What one warp streams: slots ``first_slot, first_slot + stride, ...``, ``count`` of them, counted from token 0 of the request."""

    request: Int32
    kv_head: Int32
    first_slot: Int32
    stride: Int32
    count: Int32
    begin: Int32  # first token that may be seen
    end: Int32  # one past the last
    origin: Int32  # paged: first entry of the request in kv_indices; else its first token in K and V
    num_pages: Int32  # pages of the cache; also the page id that TMA fills with zeros


class Item(typing.NamedTuple):
    """Which query heads and which share of the tokens the cluster serves."""

    request: Int32
    head_group: Int32  # heads_per_item KV heads
    head_block: Int32  # block of query heads inside a group
    split: Int32


class BoxCopies(typing.NamedTuple):
    """TMA: descriptors, and their views of the cache and of the rings."""

    k_load: cute.CopyAtom
    k_from: cute.Tensor
    k_to: cute.Tensor
    v_load: cute.CopyAtom
    v_from: cute.Tensor
    v_to: cute.Tensor


class RowCopies(typing.NamedTuple):
    """Gather: the cache, and where this warp's ring starts."""

    k: cute.Tensor
    v: cute.Tensor
    ring_address: Uint32


class DecodeSm90:
    """See the module docstring. ``spec`` says what to compute, ``tile`` how large the pieces are."""

    def __init__(self, spec: AttentionSpec, tile: DecodeSm90Tile):
        self.spec, self.tile = spec, tile
        self.kv_dtype, self.o_dtype = CUTE_DTYPES[spec.kv_dtype], CUTE_DTYPES[spec.o_dtype]
        self.fp8 = spec.kv_bits == 8
        self.half = self.fp8 or spec.q_dtype == "float16"  # mma operands are fp16, else bf16
        self.rescale_q = self.fp8 and spec.q_dtype == "bfloat16"
        # fp16 has few small numbers: keep probabilities below 2^8 instead of below 1, the sums carry the same factor.
        self.headroom = 8.0 if self.half else 0.0
        self.transformed = spec.soft_cap or spec.pos_encoding == "ALIBI"  # scores become base-2 logits before the softmax

        self.k_rows, self.v_rows = rows_of(spec.head_dim_qk, spec.kv_bits), rows_of(spec.head_dim_vo, spec.kv_bits)
        self.k_slot, self.v_slot = slot_bytes(spec, tile)
        self.warp_region = warp_region_bytes(spec, tile)
        self.gathers = gathers(spec)
        self.tokens_per_id, self.id_steps = tokens_per_id(spec, tile), id_steps(spec, tile)
        self.ids_per_step = tile.tokens // self.tokens_per_id
        self.box_tokens = tile.tokens if self.gathers else self.tokens_per_id  # tokens stored together in shared memory
        self.boxes = tile.tokens // self.box_tokens

        self.heads = heads_per_block(spec, tile)
        self.head_blocks = head_blocks(spec, tile)
        self.head_tiles = -(-self.heads // COLUMNS)
        self.rows = self.heads * tile.heads_per_item  # output rows of an item
        self.warps_per_head = tile.warps // tile.heads_per_item
        self.slice = slice_elements(spec, tile)
        self.token_tiles = tile.tokens // 16
        # One or two tiles of scores leave the tensor core idle between dependent MMAs: two accumulators take turns.
        self.score_chains = 2 if self.token_tiles * self.head_tiles <= 2 else 1
        # accumulator rows g and g + 8 of O^T tile j are d = 16 j + d_step g and d_gap further
        self.d_step, self.d_gap = (2, 1) if self.fp8 else (1, 8)
        assert tile.tokens % 16 == 0 and tile.warps % tile.heads_per_item == 0 and self.id_steps > 0, tile
        if tile.early_metadata:
            assert spec.kv_layout == "paged" and not self.gathers and tile.stages <= self.id_steps, tile
            assert not tile.longest_first, tile  # lengths that may still change would give every CTA another order
            assert tile.lets_go != "never" and tile.prefetch <= self.id_steps, tile
        else:
            assert tile.prefetch == 0, tile  # the page ids would not be known early enough
        assert tile.lets_go in ("filled", "refilled", "merging", "never"), tile
        assert self.gathers or not spec.page_size or tile.tokens % self.box_tokens == 0 == spec.page_size % self.box_tokens, tile

    def abi(self) -> tuple:
        """Stand-ins for the arguments of :meth:`__call__`."""
        return fake_args(self.spec, self.tile.split_kv)

    # ------------------------------------------------------------------------------------------------------------------- host side
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
        tile = self.tile
        k_ring, v_ring = self.ring_layout(self.k_rows), self.ring_layout(self.v_rows)
        k_load, k_coords, v_load, v_coords = None, None, None, None
        if const_expr(not self.gathers):
            k_load, k_coords = self.tma_load(k, k_ring, self.k_rows)
            v_load, v_coords = self.tma_load(v, v_ring, self.v_rows)
        head_groups = cute.ceil_div(k.shape[2], tile.heads_per_item)
        self.kernel(
            q, k, v, k_load, k_coords, v_load, v_coords, k_ring, v_ring, out, lse, kv_indptr, kv_indices, kv_last_page_len, sinks,
            k_scale, v_scale, out_partial, lse_partial, status, sm_scale, out_scale, soft_cap, lse_scale, window_left, num_splits,
        ).launch(
            grid=[tile.cluster, self.head_blocks * head_groups * num_splits, q.shape[0]],
            block=[32 * tile.warps, 1, 1],
            cluster=[tile.cluster, 1, 1],
            stream=stream,
            min_blocks_per_mp=tile.ctas_per_sm,
            preferred_smem_carveout=100,  # percent; left open, the compiler asks a GPU for its size
            use_pdl=tile.lets_go != "never",
        )  # fmt: skip

    def ring_layout(self, rows: Rows):
        """Shared-memory layout (token, element, panel, box, (slot, warp)) of all rings of K or V; K and V slots alternate."""
        width = self.kv_dtype.width // 8
        atom = warpgroup.make_smem_layout_atom(SWIZZLES[rows.panel_bytes], self.kv_dtype)
        slot = cute.tile_to_shape(atom, (self.box_tokens, rows.panel_bytes // width, rows.panels, self.boxes), (0, 1, 2, 3))
        rings = cute.make_layout(
            (self.tile.stages, self.tile.warps), stride=((self.k_slot + self.v_slot) // width, self.warp_region // width)
        )
        return cute.make_composed_layout(slot.inner, 0, cute.append(slot.outer, rings))

    @cute.jit
    def tma_load(self, cache: cute.Tensor, ring: cute.ComposedLayout, rows: cutlass.Constexpr):
        """TMA of one box: (box_tokens tokens, one row) of one head and page. The page id is the last coordinate."""
        panel = rows.panel_bytes * 8 // self.kv_dtype.width
        page, token, head, _ = cache.layout.stride
        view = cute.make_tensor(
            cache.iterator,
            cute.make_layout((cache.shape[1], panel, rows.panels, cache.shape[2], cache.shape[0]), stride=(token, 1, panel, head, page)),
        )
        box = cute.slice_(ring, (None, None, None, 0, (0, 0)))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), view, box, (self.box_tokens, panel, rows.panels))

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
        tile = self.tile
        thread = cute.arch.thread_idx()[0]
        lane = thread % 32
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank, _, _ = cute.arch.block_idx()
        if const_expr(not self.gathers):
            if warp == 0:
                cpasync.prefetch_descriptor(k_load)
                cpasync.prefetch_descriptor(v_load)
        memory = SmemAllocator()
        ring = memory.allocate(tile.warps * self.warp_region, byte_alignment=1024)
        s_k = cute.make_tensor(cute.recast_ptr(ring, k_ring.inner, dtype=self.kv_dtype), k_ring.outer)
        s_v = cute.make_tensor(cute.recast_ptr(ring + self.k_slot, v_ring.inner, dtype=self.kv_dtype), v_ring.outer)
        partial = cute.make_layout(
            (self.heads, self.spec.head_dim_vo, tile.warps), stride=(self.spec.head_dim_vo + 4, 1, self.warp_region // 4)
        )
        s_o = cute.make_tensor(cute.recast_ptr(ring, dtype=Float32), partial)  # over the rings, once they are read
        s_sum = memory.allocate_tensor(Float32, cute.make_layout((2, self.heads, tile.warps)), byte_alignment=16)
        s_row = memory.allocate_tensor(Float32, cute.make_layout((2, self.rows)), byte_alignment=16)
        barriers = memory.allocate_array(Int64, tile.warps * tile.stages + 1)
        full, arrived = barriers + warp * tile.stages, barriers + tile.warps * tile.stages
        if lane == 0:
            for slot in cutlass.range_constexpr(tile.stages):
                cute.arch.mbarrier_init(full + slot, 32 if self.gathers else 1)
        if const_expr(tile.cluster > 1):
            if thread == 0:
                cute.arch.mbarrier_init(arrived, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()
        if const_expr(tile.cluster > 1):
            if thread == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(arrived, self.bytes_from_peers(rank))
            cute.arch.cluster_arrive_relaxed()

        if const_expr(not tile.early_metadata and tile.lets_go != "never"):
            cute.arch.griddepcontrol_wait()

        item = self.find_item(num_splits, q, kv_indptr, window_left, lane)
        position = rank * self.warps_per_head + warp // tile.heads_per_item
        work = self.find_work(item, k, kv_indptr, kv_last_page_len, window_left, num_splits, position, warp)
        ids = self.load_page_ids(work, kv_indices, Int32(0), lane)
        next_ids = self.load_page_ids(work, kv_indices, Int32(self.id_steps), lane)

        ring_address = Uint32(ring.toint()) + Uint32(warp * self.warp_region)
        if const_expr(self.gathers):
            copies = RowCopies(k, v, ring_address)
        else:
            k_copies = self.partition(k_load, k_coords, s_k, self.k_rows, work)
            v_copies = self.partition(v_load, v_coords, s_v, self.v_rows, work)
            copies = BoxCopies(*k_copies, *v_copies)
        slot, lap = Int32(0), Int32(0)
        if const_expr(tile.early_metadata):
            bounded = self.bound_page_ids(work, ids)
            self.prefetch_ring(copies, work, bounded)
            cute.arch.griddepcontrol_wait()
            self.fill_ring(copies, full, work, bounded, warp, lane)
            guess, work = work, self.find_work(item, k, kv_indptr, kv_last_page_len, window_left, num_splits, position, warp, True)
            ids_now = self.load_page_ids(guess, kv_indices, Int32(0), lane, True)
            next_ids_now = self.load_page_ids(guess, kv_indices, Int32(self.id_steps), lane, True)
        else:
            ids = self.check_page_ids(work, ids, status)
            for i in cutlass.range_constexpr(tile.stages):
                if i < work.count:
                    if const_expr(i > 0 and i % self.id_steps == 0):
                        ids = self.check_page_ids(work, next_ids, status)
                        next_ids = self.load_page_ids(work, kv_indices, Int32(i + self.id_steps), lane)
                    self.fill(copies, full, work, ids, Int32(i), Int32(i), warp, lane)
        if const_expr(tile.lets_go == "filled"):
            cute.arch.griddepcontrol_launch_dependents()
        elif const_expr(tile.lets_go == "refilled"):
            if work.count <= tile.stages:
                cute.arch.griddepcontrol_launch_dependents()

        factor, slope = self.softmax_factors(item, work.kv_head, q, k_scale, sm_scale, soft_cap, lane)
        r_q = self.load_q(q, item, work.kv_head, factor, lane)
        if warp == 0:
            self.load_row_constants(s_row, item, out, sinks, v_scale, out_scale, work, lane)
        k_lane, v_lane = self.lane_offsets(lane)
        o = cute.make_rmem_tensor(self.spec.head_dim_vo // 4 * self.head_tiles, Float32)
        o.fill(0.0)
        top, total = cute.make_rmem_tensor(2 * self.head_tiles, Float32), cute.make_rmem_tensor(2 * self.head_tiles, Float32)
        top.fill(-Float32.inf)
        total.fill(0.0)

        if const_expr(tile.early_metadata):
            stale = guess.origin != work.origin or guess.end != work.end or ids != ids_now or next_ids != next_ids_now
            if cute.arch.vote_ballot_sync(stale) != 0:  # the previous kernel wrote the metadata: drop what was fetched, fetch again
                self.drain_ring(full, guess)
                lap = Int32(1)
                ids = self.load_page_ids(work, kv_indices, Int32(0), lane, True)
                next_ids = self.load_page_ids(work, kv_indices, Int32(self.id_steps), lane, True)
                self.fill_ring(copies, full, work, self.bound_page_ids(work, ids), warp, lane)
            ids = self.check_page_ids(work, ids, status)
        for step in cutlass.range(work.count, unroll=1):
            token = (work.first_slot + step * work.stride) * tile.tokens
            cute.arch.mbarrier_wait(full + slot, lap)  # K and V of this slot have landed
            k_address = ring_address + Uint32(slot * (self.k_slot + self.v_slot))
            v_address = k_address + Uint32(self.k_slot)
            scores = self.scores(r_q, k_address, k_lane)
            self.transform(scores, factor, slope, soft_cap, token - (work.end - 1), lane)
            if token + tile.tokens > work.end or token < work.begin:
                self.hide(scores, work.begin - token, work.end - token, lane)
                if const_expr(not self.gathers):  # a row that was not wanted was filled with zeros
                    self.zero_v(v_address, work.begin - token, work.end - token, lane)
            p = self.softmax(scores, o, top, total, factor)
            self.accumulate(o, p, v_address, v_lane)
            ahead = step + tile.stages
            if ahead < work.count:
                if ahead % self.id_steps == 0:
                    ids = self.check_page_ids(work, next_ids, status)
                    next_ids = self.load_page_ids(work, kv_indices, ahead + self.id_steps, lane, True)
                cute.arch.sync_warp()  # every lane has read the slot
                self.fill(copies, full, work, ids, ahead, slot, warp, lane)
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
        self.store_partial(o, top, total, s_o, s_sum, factor, warp, lane)
        cute.arch.sync_threads()
        if const_expr(tile.split_kv):
            out_partial, lse_partial = out_partial[item.split, None, None, None], lse_partial[item.split, None, None]
            self.merge(memory, s_o, s_sum, s_row, arrived, item, out_partial, lse_partial, Float32(1.0), work, thread, rank)
        else:
            self.merge(memory, s_o, s_sum, s_row, arrived, item, out, lse, lse_scale, work, thread, rank)

    # ------------------------------------------------------------------------------------------------------------- what there is to do
    @cute.jit
    def find_item(self, num_splits: Int32, q: cute.Tensor, kv_indptr: typing.Optional[cute.Tensor], window_left: Int32, lane: Int32):
        """Decode the block index: head block fastest, so that CTAs that read the same KV start together."""
        _, column, request = cute.arch.block_idx()
        if const_expr(self.tile.longest_first and kv_indptr is not None):
            request = self.request_of_rank(request, Int32(q.shape[0]), kv_indptr, window_left, lane)
        head_block, split = Int32(0), Int32(0)
        if const_expr(self.tile.split_kv):
            split = column % num_splits
            column = column // num_splits
        if const_expr(self.head_blocks > 1):
            head_block = column % self.head_blocks
            column = column // self.head_blocks
        return Item(request, column, head_block, split)

    @cute.jit
    def request_of_rank(self, rank: Int32, batch: Int32, kv_indptr: cute.Tensor, window_left: Int32, lane: Int32):
        """The request that is ``rank``-th from the longest among its RANKED neighbours, by live lengths; ties go by index.

        CTAs start in the order of their block index, so long requests start first and short ones fill the last wave. The order decides
        when a request runs, never what it computes. Lengths count in pages and rounded down to 2 bits below the leading one: 7 bits, whose
        value at the rank is found bit by bit, by counting. Every warp does it for itself.
        """
        window = rank // RANKED * RANKED
        target = rank - window
        sizes = cute.make_rmem_tensor(RANKED // 32, Int32)
        for i in cutlass.range_constexpr(RANKED // 32):
            request = window + 32 * i + lane
            safe = request if request < batch else batch - 1  # no branch: all loads are in flight together
            length = (kv_indptr[safe + 1] - kv_indptr[safe]) * max(1, self.spec.page_size)
            if const_expr(self.spec.window):
                length = length if length < window_left + 1 else window_left + 1
            size = (float_bits(Float32(length)) >> 21) - (127 << 2)
            size = size if size > 0 else Int32(0)
            sizes[i] = size if request < batch else Int32(-1)
        size = Int32(0)  # invariant: more than target requests are of this size or above
        for i in cutlass.range_constexpr(7):
            larger = size + (64 >> i)
            size = larger if self.count_from(sizes, larger) > target else size
        nth = target - self.count_from(sizes, size + 1)
        chosen = Int32(-1)
        below = (Uint32(1) << Uint32(lane)) - 1
        for i in cutlass.range_constexpr(RANKED // 32):
            same = Uint32(cute.arch.vote_ballot_sync(sizes[i] == size))
            before = cute.arch.popc(same & below)
            chosen = window + 32 * i + lane if sizes[i] == size and before == nth else chosen
            nth = nth - cute.arch.popc(same)
        return cute.arch.warp_redux_sync(chosen, "max")

    @cute.jit
    def count_from(self, sizes: cute.Tensor, least: Int32):
        """How many of the warp's values are at least ``least``."""
        count = Int32(0)
        for i in cutlass.range_constexpr(cute.size(sizes)):
            count = count + (Int32(1) if sizes[i] >= least else Int32(0))
        return cute.arch.warp_redux_sync(count, "add")

    @cute.jit
    def look_up(self, metadata: cute.Tensor, index: Int32, settled: cutlass.Constexpr):
        """An element of the metadata: past L1 before the programmatic dependency has resolved, so that L1 never holds what may change,
        and ``settled`` through L1, which the warps of a CTA share."""
        if const_expr(self.tile.early_metadata):
            address = (metadata.iterator + index).toint()
            return load_again(address) if const_expr(settled) else load_fresh(address)
        return metadata[index]

    @cute.jit
    def find_work(
        self,
        item: Item,
        k: cute.Tensor,
        kv_indptr: typing.Optional[cute.Tensor],
        kv_last_page_len: typing.Optional[cute.Tensor],
        window_left: Int32,
        num_splits: Int32,
        position: Int32,
        warp: Int32,
        settled: cutlass.Constexpr = False,
    ):
        """This warp's share, from the live lengths: the slots of the item, dealt round-robin over the cluster's warps of one head."""
        spec, tile = self.spec, self.tile
        origin, end = Int32(0), Int32(0)
        if const_expr(spec.kv_layout == "paged"):
            origin = self.look_up(kv_indptr, item.request, settled)
            pages = self.look_up(kv_indptr, item.request + 1, settled) - origin
            last = self.look_up(kv_last_page_len, item.request, settled)
            end = (pages - 1) * spec.page_size + last if pages > 0 else Int32(0)
        elif const_expr(spec.kv_layout == "ragged"):
            origin = kv_indptr[item.request]
            end = kv_indptr[item.request + 1] - origin
        else:
            end = Int32(k.shape[1])
        begin = Int32(0)
        if const_expr(spec.window):  # the query sits at end - 1 and sees window_left tokens before it
            begin = end - 1 - window_left
            begin = begin if begin > 0 else Int32(0)
        kv_head = item.head_group * tile.heads_per_item + warp % tile.heads_per_item
        slots_begin = begin // tile.tokens
        slots_end = cute.ceil_div(end, tile.tokens) if end > 0 else Int32(0)
        if const_expr(tile.split_kv):
            share = cute.ceil_div(slots_end - slots_begin, num_splits)
            slots_begin = slots_begin + item.split * share
            slots_end = slots_begin + share if slots_begin + share < slots_end else slots_end
        stride = tile.cluster * self.warps_per_head
        first = slots_begin + position
        count = cute.ceil_div(slots_end - first, stride) if slots_end > first else Int32(0)
        if const_expr(tile.heads_per_item > 1):
            count = count if kv_head < k.shape[2] else Int32(0)
        return Work(item.request, kv_head, first, Int32(stride), count, begin, end, origin, Int32(k.shape[0]))

    # ------------------------------------------------------------------------------------------------------------------------ loads
    @cute.jit
    def load_page_ids(
        self, work: Work, kv_indices: typing.Optional[cute.Tensor], step: Int32, lane: Int32, settled: cutlass.Constexpr = False
    ):
        """Page ids of ``id_steps`` steps from ``step`` on: lane = (step, box or token). What lies outside [begin, end) is not looked up."""
        ids = Int32(NO_PAGE)
        if const_expr(self.spec.kv_layout == "paged"):
            slot = work.first_slot + (step + lane // self.ids_per_step) * work.stride
            token = slot * self.tile.tokens + (lane % self.ids_per_step) * self.tokens_per_id
            entry = work.origin + token // self.spec.page_size
            if token < work.end and token + self.tokens_per_id > work.begin:
                ids = Int32(-1)
                if entry >= 0 and entry < kv_indices.shape[0]:
                    ids = self.look_up(kv_indices, entry, settled)
        return ids

    @cute.jit
    def bound_page_ids(self, work: Work, ids: Int32):
        """A page id outside the cache becomes the one TMA fills with zeros."""
        return ids if ids >= 0 and ids < work.num_pages else work.num_pages

    @cute.jit
    def check_page_ids(self, work: Work, ids: Int32, status: cute.Tensor):
        """:meth:`bound_page_ids`, and unless no page was wanted a bad one raises the status flag."""
        if const_expr(self.spec.kv_layout == "paged"):
            bounded = self.bound_page_ids(work, ids)
            if bounded != ids and ids != NO_PAGE:
                status[0] = 1
            ids = bounded
        return ids

    @cute.jit
    def partition(self, load: cute.CopyAtom, coords: cute.Tensor, ring: cute.Tensor, rows: cutlass.Constexpr, work: Work):
        """TMA views: source (box, (token box, 0, 0, head, page)), destination (box, box of the slot, (slot, warp))."""
        if const_expr(self.spec.kv_layout == "ragged"):
            coords = cute.domain_offset((work.origin, 0, 0, 0, 0), coords)
        boxes = cute.zipped_divide(coords, (self.box_tokens, rows.panel_bytes * 8 // self.kv_dtype.width, rows.panels))
        to, source = cpasync.tma_partition(load, 0, cute.make_layout(1), cute.group_modes(ring, 0, 3), boxes)
        return load, source, to

    @cute.jit
    def prefetch_ring(self, copies, work: Work, ids: Int32):
        """Ask L2 for the first ``prefetch`` slots. Only a hint: L2 is where every kernel's writes meet, so nothing stale can be kept."""
        for i in cutlass.range_constexpr(self.tile.prefetch):
            if i < work.count:
                for box in cutlass.range_constexpr(self.boxes):
                    source = self.box_source(work, ids, Int32(i), box)
                    with cute.arch.elect_one():
                        cute.prefetch(copies.k_load, copies.k_from[None, source])
                        cute.prefetch(copies.v_load, copies.v_from[None, source])

    @cute.jit
    def fill_ring(self, copies, full: cute.Pointer, work: Work, ids: Int32, warp: Int32, lane: Int32):
        """Start the copies of the first steps, all of whose page ids are in ``ids``."""
        for i in cutlass.range_constexpr(self.tile.stages):
            if i < work.count:
                self.fill(copies, full, work, ids, Int32(i), Int32(i), warp, lane)

    @cute.jit
    def drain_ring(self, full: cute.Pointer, work: Work):
        """Wait for what :meth:`fill_ring` started and bring every slot's barrier to its second phase."""
        for i in cutlass.range_constexpr(self.tile.stages):
            if i < work.count:
                cute.arch.mbarrier_wait(full + i, 0)
            else:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(full + i)

    @cute.jit
    def fill(self, copies, full: cute.Pointer, work: Work, ids: Int32, step: Int32, slot: Int32, warp: Int32, lane: Int32):
        """Start the copies of one step into a slot of this warp's ring."""
        if const_expr(self.gathers):
            self.copy_rows(copies, work, ids, step, slot, lane)
            cute.arch.cp_async_mbarrier_arrive_noinc(full + slot)  # this lane arrives when its copies are complete
        else:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, self.tile.tokens * (self.k_rows.bytes + self.v_rows.bytes))
            self.copy_boxes(copies, full, work, ids, step, slot, warp)

    @cute.jit
    def copy_boxes(self, copies: BoxCopies, full: cute.Pointer, work: Work, ids: Int32, step: Int32, slot: Int32, warp: Int32):
        """One TMA box of K and one of V per page (or per slot, where a page holds several)."""
        for box in cutlass.range_constexpr(self.boxes):
            source, to = self.box_source(work, ids, step, box), (slot, warp)
            for load, src, dst in ((copies.k_load, copies.k_from, copies.k_to), (copies.v_load, copies.v_from, copies.v_to)):
                if const_expr(self.tile.evict_first):
                    cute.copy(load, src[None, source], dst[None, box, to], tma_bar_ptr=full + slot, cache_policy=Int64(EVICT_FIRST))
                else:
                    cute.copy(load, src[None, source], dst[None, box, to], tma_bar_ptr=full + slot)

    @cute.jit
    def box_source(self, work: Work, ids: Int32, step: Int32, box: cutlass.Constexpr):
        """Where a box of a step comes from: (box of the page or of the request, 0, 0, KV head, page)."""
        spec = self.spec
        token_box, page = work.first_slot + step * work.stride, Int32(0)
        if const_expr(spec.kv_layout == "paged"):
            token_box = token_box % (spec.page_size // self.box_tokens) if spec.page_size > self.box_tokens else Int32(0)
            page = cute.arch.shuffle_sync(ids, (step % self.id_steps) * self.boxes + box)
        return token_box, 0, 0, work.kv_head, page

    @cute.jit
    def copy_rows(self, copies: RowCopies, work: Work, ids: Int32, step: Int32, slot: Int32, lane: Int32):
        """Gather: 16-byte pieces of the slot's rows, neighbouring lanes on neighbouring pieces, into the layout TMA would have written."""
        page_size, tokens = self.spec.page_size, self.tile.tokens
        first_token = (work.first_slot + step * work.stride) * tokens
        address = copies.ring_address + Uint32(slot * (self.k_slot + self.v_slot))
        for cache, rows, start in ((copies.k, self.k_rows, 0), (copies.v, self.v_rows, self.k_slot)):
            pieces, per_panel = rows.bytes // 16, rows.panel_bytes // 16
            for i in cutlass.range_constexpr(tokens * pieces // 32):
                token, piece = (32 * i + lane) // pieces, (32 * i + lane) % pieces
                page = cute.arch.shuffle_sync(ids, (step % self.id_steps) * tokens + token)
                column = piece * (128 // self.kv_dtype.width)
                source = cache.iterator + cute.crd2idx((Int64(page), (first_token + token) % page_size, work.kv_head, column), cache.layout)
                flip = token // (128 // rows.panel_bytes) % per_panel
                panel = start + self.row_offset(rows, token) + piece // per_panel * (tokens * rows.panel_bytes)
                place = address + Uint32(panel + (piece % per_panel ^ flip) * 16)
                copy_16_bytes(place, source.toint(), Int32(16) if page < work.num_pages else Int32(0))

    @cute.jit
    def lane_offsets(self, lane: Int32):
        """Byte offsets, inside 16 tokens of a panel, of the 16-byte row piece this lane names to ldmatrix.x4; entry j is 32-byte column j.

        K:            matrices (tokens 0-7, piece 2j), (8-15, 2j), (0-7, 2j + 1), (8-15, 2j + 1) are registers a0..a3 of K as mma operand A.
        V, 16 bit:    transposed, (tokens 0-7, 2j), (0-7, 2j + 1), (8-15, 2j), (8-15, 2j + 1) are a0..a3 of V^T.
        V, 8 bit:     addressed like K; transposition moves pairs of d, which ``accumulate`` separates.
        """
        row, piece = lane % 16, lane // 16
        k_lane = self.swizzled(self.k_rows, row, piece)
        if const_expr(not self.fp8):
            row, piece = lane % 8 + 8 * (lane // 16), lane // 8 % 2
        return k_lane, self.swizzled(self.v_rows, row, piece)

    @cute.jit
    def swizzled(self, rows: cutlass.Constexpr, row: Int32, piece: Int32):
        """Offsets of pieces ``2j + piece`` of a row: the TMA swizzle XORs the piece with bits 7 and up of the row's address."""
        pieces = rows.panel_bytes // 16
        flip = row // (128 // rows.panel_bytes) % pieces
        offsets = cute.make_rmem_tensor(pieces // 2, Uint32)
        start = self.row_offset(rows, row)
        for j in cutlass.range_constexpr(pieces // 2):
            offsets[j] = Uint32(start + ((2 * j + piece) ^ flip) * 16)
        return offsets

    def row_offset(self, rows: Rows, row):
        """Bytes from the slot to a token's first panel (``row`` static or not); box after box, panel after panel, token after token."""
        return row // self.box_tokens * (self.box_tokens * rows.bytes) + row % self.box_tokens * rows.panel_bytes

    def fragment_offset(self, rows: Rows, token_tile: int, column: int) -> int:
        """Static part of the address of 16 tokens x 32 bytes: ``column`` counts 32-byte columns of the row."""
        per_panel = rows.panel_bytes // 32
        return self.row_offset(rows, 16 * token_tile) + column // per_panel * self.box_tokens * rows.panel_bytes

    # ---------------------------------------------------------------------------------------------------------------- query and scales
    @cute.jit
    def query_head(self, item: Item, kv_head: Int32, head: Int32):
        """Global index of query head ``head`` of this block, and whether the group has it."""
        in_group = item.head_block * self.heads + head
        exists = head < self.heads and in_group < self.spec.group_size
        return kv_head * self.spec.group_size + in_group, exists

    @cute.jit
    def softmax_factors(
        self,
        item: Item,
        kv_head: Int32,
        q: cute.Tensor,
        k_scale: typing.Optional[cute.Tensor],
        sm_scale: Float32,
        soft_cap: Float32,
        lane: Int32,
    ):
        """Per column of this lane (heads 2t and 2t + 1 of a tile): raw score -> argument of exp2 (or of the cap), and the ALiBi slope."""
        factor, slope = cute.make_rmem_tensor(2 * self.head_tiles, Float32), cute.make_rmem_tensor(2 * self.head_tiles, Float32)
        scale = sm_scale
        if const_expr(k_scale is not None):
            head = kv_head if kv_head < k_scale.shape[0] else Int32(0)
            scale = scale * k_scale[head]
        if const_expr(self.spec.soft_cap):
            scale = scale / soft_cap * 2.0  # cap * tanh(x / cap) is written with exp2(2 log2(e) x / cap)
        factor.fill(scale * LOG2_E)
        slope.fill(0.0)
        if const_expr(self.spec.pos_encoding == "ALIBI"):
            for i in cutlass.range_constexpr(2 * self.head_tiles):
                head, _ = self.query_head(item, kv_head, i // 2 * COLUMNS + lane % 4 * 2 + i % 2)
                slope[i] = alibi_slope(head, q.shape[1]) * LOG2_E
        return factor, slope

    @cute.jit
    def load_q(self, q: cute.Tensor, item: Item, kv_head: Int32, factor: cute.Tensor, lane: Int32):
        """Q^T as mma operand B, [b0 b1, d tile, head tile]: column = head lane / 4, rows = d.

        The softmax compares raw scores and needs a positive factor: the sign of the scale moves into q, a zero scale becomes a tiny one.
        """
        d_tiles = self.spec.head_dim_qk // 16
        r_q = cute.make_rmem_tensor(cute.make_layout((2, d_tiles, self.head_tiles)), Uint32)
        column, quad = lane // 4, lane % 4
        sign = Uint32(0x80008000) if factor[0] < 0.0 else Uint32(0)
        for i in cutlass.range_constexpr(2 * self.head_tiles):
            factor[i] = cute.arch.fmax(factor[i] if factor[i] > 0.0 else -factor[i], Float32(1e-30))
        for tile in cutlass.range_constexpr(self.head_tiles):
            head, exists = self.query_head(item, kv_head, tile * COLUMNS + column)
            exists = exists and head < q.shape[1]
            row = q[item.request, head if exists else 0, None]
            x = cute.make_rmem_tensor(cute.make_layout((4, d_tiles)), q.element_type)
            for d in cutlass.range_constexpr(d_tiles):
                if const_expr(self.fp8):  # d = 16 j + 4 t + 0..3, as the converted K holds them
                    cute.autovec_copy(cute.local_tile(row, (4,), (d * 4 + quad,)), x[None, d])
                else:  # d = 16 j + 2 t + 0..1 and 8 further
                    for half in cutlass.range_constexpr(2):
                        pair = cute.local_tile(row, (2,), (d * 8 + half * 4 + quad,))
                        cute.autovec_copy(pair, cute.local_tile(x[None, d], (2,), (half,)))
            if const_expr(self.rescale_q):
                pairs = self.to_half(x, factor, tile, column, quad)
            else:
                pairs = cute.recast_tensor(x, Uint32)
            for d in cutlass.range_constexpr(d_tiles):
                for half in cutlass.range_constexpr(2):
                    pair = pairs[half, d] ^ sign
                    r_q[half, d, tile] = pair if exists else Uint32(0)
        return r_q

    @cute.jit
    def to_half(self, x: cute.Tensor, factor: cute.Tensor, tile: cutlass.Constexpr, column: Int32, quad: Int32):
        """bf16 head rows -> fp16 pairs, times the power of two that brings the row's largest element into [2^13, 2^14).

        bf16 has fewer mantissa bits than fp16, so only elements 2^-24 below the largest lose bits. The inverse multiplies the factors
        of the lanes that own the head's column of S^T.
        """
        wide = cute.make_rmem_tensor(x.layout, Float32)
        wide.store(x.load().to(Float32))
        largest = Float32(0.0)
        for i in cutlass.range_constexpr(cute.size(x)):
            largest = cute.arch.fmax(largest, wide[i] if wide[i] > 0.0 else -wide[i])
        for offset in cutlass.range_constexpr(2):  # the four lanes of a column hold the row together
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, 1 << offset))
        exponent = (float_bits(largest) >> 23) & 255
        exponent = exponent if exponent > 64 else Int32(64)  # a row of zeros: the factor must stay a normal number
        power = bits_float((267 - exponent) << 23)
        inverse = bits_float((exponent - 13) << 23)
        for c in cutlass.range_constexpr(2):
            factor[2 * tile + c] = factor[2 * tile + c] * cute.arch.shuffle_sync(inverse, (2 * quad + c) * 4)
        halves = cute.make_rmem_tensor(x.layout, Float16)
        for i in cutlass.range_constexpr(cute.size(x)):
            wide[i] = wide[i] * power
        halves.store(wide.load().to(Float16))
        return cute.recast_tensor(halves, Uint32)

    @cute.jit
    def load_row_constants(
        self,
        s_row: cute.Tensor,
        item: Item,
        out: cute.Tensor,
        sinks: typing.Optional[cute.Tensor],
        v_scale: typing.Optional[cute.Tensor],
        out_scale: Float32,
        work: Work,
        lane: Int32,
    ):
        """Per output row: the factor of the output, and the sink's base-2 logit (-inf without one). Read early, used in the merge."""
        for row in cutlass.range(lane, self.rows, 32, unroll=1):
            kv_head = item.head_group * self.tile.heads_per_item + row // self.heads
            head, exists = self.query_head(item, kv_head, row % self.heads)
            exists = exists and head < out.shape[1]
            scale, sink = out_scale, -Float32.inf
            if const_expr(v_scale is not None):
                if exists:
                    scale = scale * v_scale[kv_head]
            if const_expr(sinks is not None):
                if exists and item.split == 0:  # one split counts it
                    sink = sinks[head] * LOG2_E
            s_row[0, row] = scale
            s_row[1, row] = sink

    # ------------------------------------------------------------------------------------------------------------------- maths of a slot
    @cute.jit
    def scores(self, r_q: cute.Tensor, address: Uint32, lane_offsets: cute.Tensor):
        """S^T = K Q^T, [4 accumulators, token tile, head tile]: rows g and g + 8 are tokens, columns 2t and 2t + 1 heads."""
        rows, chains = self.k_rows, self.score_chains
        sums = cute.make_rmem_tensor(cute.make_layout((4, self.token_tiles, self.head_tiles, chains)), Float32)
        sums.fill(0.0)
        for column in cutlass.range_constexpr(rows.bytes // 32):
            for token_tile in cutlass.range_constexpr(self.token_tiles):
                offset = lane_offsets[column % (rows.panel_bytes // 32)]
                k = load_matrices(address + offset, self.fragment_offset(rows, token_tile, column), False)
                if const_expr(self.fp8):  # a 32-byte column holds two k16 steps
                    for half in cutlass.range_constexpr(2):
                        a0, a2 = self.widen(k[2 * half])
                        a1, a3 = self.widen(k[2 * half + 1])
                        for head_tile in cutlass.range_constexpr(self.head_tiles):
                            b = r_q[None, 2 * column + half, head_tile]
                            chain = (2 * column + half) % chains
                            multiply(sums[None, token_tile, head_tile, chain], (a0, a1, a2, a3), b[0], b[1], self.half)
                else:
                    for head_tile in cutlass.range_constexpr(self.head_tiles):
                        b = r_q[None, column, head_tile]
                        multiply(sums[None, token_tile, head_tile, column % chains], k, b[0], b[1], self.half)
        s = sums[None, None, None, 0]
        for chain in cutlass.range_constexpr(1, chains):
            for i in cutlass.range_constexpr(cute.size(s)):
                s[i] = s[i] + sums[None, None, None, chain][i]
        return s

    @cute.jit
    def widen(self, word: Uint32):
        """Four fp8 in memory order -> two pairs of fp16, exact. e5m2 is the upper byte of fp16."""
        if const_expr(self.spec.kv_dtype == "float8_e5m2"):
            return permute_bytes(word, 0x1404), permute_bytes(word, 0x3424)
        return widen_e4m3(word)

    @cute.jit
    def widen_transposed(self, word: Uint32):
        """Bytes (token, d), (token, d + 1), (token + 1, d), (token + 1, d + 1) -> fp16 pairs of the two tokens for d and for d + 1."""
        if const_expr(self.spec.kv_dtype == "float8_e5m2"):
            return permute_bytes(word, 0x2404), permute_bytes(word, 0x3414)
        return widen_e4m3(permute_bytes(word, 0x3120))

    @cute.jit
    def transform(self, s: cute.Tensor, factor: cute.Tensor, slope: cute.Tensor, soft_cap: Float32, distance: Int32, lane: Int32):
        """Soft cap and ALiBi: raw scores -> base-2 logits. ``distance`` is the first token's position relative to the query (<= 0).

        cap * tanh(x / cap) = cap - 2 cap / (1 + exp(2 x / cap)), exact to fp32 rounding where tanh.approx is wrong in the fourth digit.
        ALiBi adds slope * kv_idx; measured from the query it stays small, and the merge adds the rest to the LSE.
        """
        if const_expr(self.transformed):
            cap = soft_cap * LOG2_E
            for head_tile in cutlass.range_constexpr(self.head_tiles):
                for token_tile in cutlass.range_constexpr(self.token_tiles):
                    for i in cutlass.range_constexpr(4):
                        column = 2 * head_tile + i % 2
                        x = s[i, token_tile, head_tile] * factor[column]
                        if const_expr(self.spec.soft_cap):
                            x = cap - 2.0 * cap * cute.arch.rcp_approx(1.0 + cute.arch.exp2(x))
                        if const_expr(self.spec.pos_encoding == "ALIBI"):
                            x = x + slope[column] * Float32(distance + token_tile * 16 + i // 2 * 8 + lane // 4)
                        s[i, token_tile, head_tile] = x

    @cute.jit
    def hide(self, s: cute.Tensor, begin: Int32, end: Int32, lane: Int32):
        """Scores of tokens outside [begin, end) of the slot -> -inf."""
        for head_tile in cutlass.range_constexpr(self.head_tiles):
            for token_tile in cutlass.range_constexpr(self.token_tiles):
                for i in cutlass.range_constexpr(4):
                    token = token_tile * 16 + i // 2 * 8 + lane // 4
                    if token < begin or token >= end:
                        s[i, token_tile, head_tile] = -Float32.inf

    @cute.jit
    def zero_v(self, address: Uint32, begin: Int32, end: Int32, lane: Int32):
        """V rows outside [begin, end) of the slot -> 0: they may hold NaN, and 0 * NaN is NaN. The swizzle stays inside a row."""
        rows, pieces = self.v_rows, self.v_rows.panel_bytes // 16
        for i in cutlass.range(lane, self.tile.tokens * pieces, 32, unroll=1):
            token = i // pieces
            if token < begin or token >= end:
                piece = address + Uint32(self.row_offset(rows, token) + i % pieces * 16)
                for panel in cutlass.range_constexpr(rows.panels):
                    store_zeros(piece, panel * self.box_tokens * rows.panel_bytes)
        cute.arch.fence_proxy("async.shared", space="cta")  # TMA refills this slot
        cute.arch.sync_warp()

    @cute.jit
    def exponent(self, x: Float32, factor: Float32):
        """Score -> base-2 logit; a multiplication that fuses with the subtraction of the maximum."""
        return x if const_expr(self.transformed) else x * factor

    @cute.jit
    def softmax(self, s: cute.Tensor, o: cute.Tensor, top: cute.Tensor, total: cute.Tensor, factor: cute.Tensor):
        """Online softmax of one slot: rescale what came before when a maximum moves; P^T as operand B [b0 b1, token tile, head tile]."""
        p = cute.make_rmem_tensor(cute.make_layout((2, self.token_tiles, self.head_tiles)), Uint32)
        d_tiles = self.spec.head_dim_vo // 16
        for head_tile in cutlass.range_constexpr(self.head_tiles):
            left, right = 2 * head_tile, 2 * head_tile + 1  # the two columns of this lane
            new_left, new_right = top[left], top[right]
            for token_tile in cutlass.range_constexpr(self.token_tiles):
                x = s[None, token_tile, head_tile]
                new_left = cute.arch.fmax(new_left, cute.arch.fmax(x[0], x[2]))
                new_right = cute.arch.fmax(new_right, cute.arch.fmax(x[1], x[3]))
            new_left, new_right = over_rows(new_left, cute.arch.fmax), over_rows(new_right, cute.arch.fmax)
            shift_left = self.exponent(new_left, factor[left]) - self.headroom
            shift_right = self.exponent(new_right, factor[right]) - self.headroom
            if cute.arch.vote_ballot_sync((new_left != top[left]) or (new_right != top[right])) != 0:
                old_left = cute.arch.exp2(self.exponent(top[left], factor[left]) - self.headroom - shift_left)
                old_right = cute.arch.exp2(self.exponent(top[right], factor[right]) - self.headroom - shift_right)
                top[left], top[right] = new_left, new_right
                total[left], total[right] = total[left] * old_left, total[right] * old_right
                for d in cutlass.range_constexpr(d_tiles):
                    at = 4 * (head_tile * d_tiles + d)
                    o[at], o[at + 1] = o[at] * old_left, o[at + 1] * old_right
                    o[at + 2], o[at + 3] = o[at + 2] * old_left, o[at + 3] * old_right
            sum_left, sum_right = total[left], total[right]
            for token_tile in cutlass.range_constexpr(self.token_tiles):
                x = s[None, token_tile, head_tile]
                p0 = cute.arch.exp2(self.exponent(x[0], factor[left]) - shift_left)
                p1 = cute.arch.exp2(self.exponent(x[1], factor[right]) - shift_right)
                p2 = cute.arch.exp2(self.exponent(x[2], factor[left]) - shift_left)
                p3 = cute.arch.exp2(self.exponent(x[3], factor[right]) - shift_right)
                sum_left = sum_left + (p0 + p2)
                sum_right = sum_right + (p1 + p3)
                p[0, token_tile, head_tile] = transpose_pair(p0, p1, self.half)
                p[1, token_tile, head_tile] = transpose_pair(p2, p3, self.half)
            total[left], total[right] = sum_left, sum_right
        return p

    @cute.jit
    def accumulate(self, o: cute.Tensor, p: cute.Tensor, address: Uint32, lane_offsets: cute.Tensor):
        """O^T += V^T P^T."""
        rows = self.v_rows
        d_tiles = self.spec.head_dim_vo // 16
        acc = cute.make_tensor(o.iterator, cute.make_layout((4, d_tiles, self.head_tiles)))
        for token_tile in cutlass.range_constexpr(self.token_tiles):
            for column in cutlass.range_constexpr(rows.bytes // 32):
                offset = lane_offsets[column % (rows.panel_bytes // 32)]
                v = load_matrices(address + offset, self.fragment_offset(rows, token_tile, column), True)
                if const_expr(self.fp8):
                    for half in cutlass.range_constexpr(2):
                        a0, a1 = self.widen_transposed(v[2 * half])
                        a2, a3 = self.widen_transposed(v[2 * half + 1])
                        for head_tile in cutlass.range_constexpr(self.head_tiles):
                            b = p[None, token_tile, head_tile]
                            multiply(acc[None, 2 * column + half, head_tile], (a0, a1, a2, a3), b[0], b[1], self.half)
                else:
                    for head_tile in cutlass.range_constexpr(self.head_tiles):
                        b = p[None, token_tile, head_tile]
                        multiply(acc[None, column, head_tile], v, b[0], b[1], self.half)

    # ------------------------------------------------------------------------------------------------------------------------- merge
    @cute.jit
    def store_partial(
        self,
        o: cute.Tensor,
        top: cute.Tensor,
        total: cute.Tensor,
        s_o: cute.Tensor,
        s_sum: cute.Tensor,
        factor: cute.Tensor,
        warp: Int32,
        lane: Int32,
    ):
        """This warp's (base-2 maximum, sum, O) -> shared memory. O goes over the warp's own ring, whose copies were waited for and read."""
        d_tiles = self.spec.head_dim_vo // 16
        row, quad = lane // 4, lane % 4
        for i in cutlass.range_constexpr(2 * self.head_tiles):
            head = i // 2 * COLUMNS + 2 * quad + i % 2
            total_i = over_rows(total[i], operator.add)
            if head < self.heads:
                if row == 0:
                    s_sum[0, head, warp] = self.exponent(top[i], factor[i]) - self.headroom
                    s_sum[1, head, warp] = total_i
                for d in cutlass.range_constexpr(d_tiles):
                    at = 4 * (i // 2 * d_tiles + d) + i % 2
                    s_o[head, 16 * d + self.d_step * row, warp] = o[at]
                    s_o[head, 16 * d + self.d_step * row + self.d_gap, warp] = o[at + 2]

    @cute.jit
    def combine_warps(self, s_sum: cute.Tensor, row: Int32):
        """Of one output row: the maximum over the CTA's warps (-1e30 when none saw a token), each warp's weight, and the sum."""
        head, kv = row % self.heads, row // self.heads
        weights = cute.make_rmem_tensor(self.warps_per_head, Float32)
        top = Float32(-1e30)
        for w in cutlass.range_constexpr(self.warps_per_head):
            top = cute.arch.fmax(top, s_sum[0, head, w * self.tile.heads_per_item + kv])
        total = Float32(0.0)
        for w in cutlass.range_constexpr(self.warps_per_head):
            warp = w * self.tile.heads_per_item + kv
            weights[w] = cute.arch.exp2(s_sum[0, head, warp] - top)
            total = total + s_sum[1, head, warp] * weights[w]
        return top, weights, total

    @cute.jit
    def combine_pair(self, s_o: cute.Tensor, s_sum: cute.Tensor, pair: Int32, pairs: cutlass.Constexpr):
        """Of one pair of outputs: maximum and sum of its row, and both values, over the CTA's warps."""
        tile, half_dim = self.tile, self.spec.head_dim_vo // 2
        if const_expr(pairs % (32 * tile.warps) != 0):
            pair = pair if pair < pairs else Int32(0)  # no branch: what is too much is not used
        row, column = pair // half_dim, pair % half_dim
        top, weights, total = self.combine_warps(s_sum, row)
        x, y = Float32(0.0), Float32(0.0)
        xy = cute.make_rmem_tensor(2, Float32)
        for w in cutlass.range_constexpr(self.warps_per_head):
            source = s_o[row % self.heads, None, w * tile.heads_per_item + row // self.heads]
            cute.autovec_copy(cute.local_tile(source, (2,), (column,)), xy)
            x, y = x + xy[0] * weights[w], y + xy[1] * weights[w]
        return top, total, x, y

    @cute.jit
    def bytes_from_peers(self, rank: Int32):
        """What CTA ``rank`` receives in the merge: from every CTA of the cluster (itself too) its slice, and a maximum and sum per row."""
        left = self.rows * self.spec.head_dim_vo - rank * self.slice
        mine = left if left < self.slice else Int32(self.slice)
        mine = mine if mine > 0 else Int32(0)
        return self.tile.cluster * (4 * mine + 8 * self.rows)

    @cute.jit
    def merge(
        self,
        memory: SmemAllocator,
        s_o: cute.Tensor,
        s_sum: cute.Tensor,
        s_row: cute.Tensor,
        arrived: cute.Pointer,
        item: Item,
        out: cute.Tensor,
        lse: typing.Optional[cute.Tensor],
        lse_scale: Float32,
        work: Work,
        thread: Int32,
        rank: Int32,
    ):
        """Combine the warps, exchange slices in the cluster, write out."""
        tile, dim = self.tile, self.spec.head_dim_vo
        threads, pairs = 32 * tile.warps, self.rows * dim // 2
        if const_expr(tile.cluster > 1):
            s_slice = memory.allocate_tensor(Float32, cute.make_layout((self.slice, tile.cluster)), byte_alignment=16)
            s_peer = memory.allocate_tensor(Float32, cute.make_layout((2, self.rows, tile.cluster)), byte_alignment=16)
            cute.arch.cluster_wait()  # every peer runs: its shared memory may be written
        together = min(2, -(-pairs // threads))  # pairs of a thread whose loads are in flight at once
        for first in cutlass.range(thread, pairs, threads * together, unroll=1):
            sums = [self.combine_pair(s_o, s_sum, first + i * threads, pairs) for i in range(together)]
            for i in cutlass.range_constexpr(together):
                pair, (top, total, x, y) = first + i * threads, sums[i]
                if pair < pairs or const_expr(pairs % (threads * together) == 0):
                    if const_expr(tile.cluster == 1):
                        row, column = pair // (dim // 2), pair % (dim // 2)
                        self.write(item, out, lse, lse_scale, s_row, row, column, top, total, x, y, work)
                    else:
                        place = (s_slice.iterator + rank * self.slice + 2 * pair % self.slice).toint()
                        push(Uint32(place), Uint32(arrived.toint()), 2 * pair // self.slice, x, y)
        if const_expr(tile.cluster > 1):
            for i in cutlass.range(thread, self.rows * tile.cluster, threads, unroll=1):
                row, peer = i % self.rows, i // self.rows
                top, weights, total = self.combine_warps(s_sum, row)
                push(Uint32((s_peer.iterator + (rank * self.rows + row) * 2).toint()), Uint32(arrived.toint()), peer, top, total)
            cute.arch.mbarrier_wait(arrived, 0)  # everything this CTA was to get; nobody writes to it any more
            for i in cutlass.range(thread, self.slice // 2, threads, unroll=1):
                pair = rank * (self.slice // 2) + i
                if pair < pairs:
                    row, column = pair // (dim // 2), pair % (dim // 2)
                    top = s_peer[0, row, 0]
                    for peer in cutlass.range_constexpr(1, tile.cluster):
                        top = cute.arch.fmax(top, s_peer[0, row, peer])
                    x, y, total = Float32(0.0), Float32(0.0), Float32(0.0)
                    xy = cute.make_rmem_tensor(2, Float32)
                    for peer in cutlass.range_constexpr(tile.cluster):
                        weight = cute.arch.exp2(s_peer[0, row, peer] - top)
                        cute.autovec_copy(cute.local_tile(s_slice[None, peer], (2,), (i,)), xy)
                        x, y = x + xy[0] * weight, y + xy[1] * weight
                        total = total + s_peer[1, row, peer] * weight
                    self.write(item, out, lse, lse_scale, s_row, row, column, top, total, x, y, work)

    @cute.jit
    def write(
        self,
        item: Item,
        out: cute.Tensor,
        lse: typing.Optional[cute.Tensor],
        lse_scale: Float32,
        s_row: cute.Tensor,
        row: Int32,
        column: Int32,
        top: Float32,
        total: Float32,
        x: Float32,
        y: Float32,
        work: Work,
    ):
        """Normalise and store elements 2 column and 2 column + 1 of an output row, and its LSE."""
        kv_head = item.head_group * self.tile.heads_per_item + row // self.heads
        head, exists = self.query_head(item, kv_head, row % self.heads)
        if exists and head < out.shape[1]:
            ahead = Float32(0.0)  # ALiBi was measured from the query's position: slope * (kv_len - 1) is still missing
            if const_expr(self.spec.pos_encoding == "ALIBI"):
                ahead = alibi_slope(head, out.shape[1]) * LOG2_E * Float32(work.end - 1)
            if const_expr(self.spec.sinks):
                sink = s_row[1, row] - ahead
                new_top = cute.arch.fmax(top, sink)
                old = cute.arch.exp2(top - new_top)
                total = total * old + cute.arch.exp2(sink - new_top)
                x, y, top = x * old, y * old, new_top
            factor = s_row[0, row] * cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
            xy = cute.make_rmem_tensor(2, Float32)
            xy[0], xy[1] = x * factor, y * factor
            narrow = cute.make_rmem_tensor(2, out.element_type)
            narrow.store(xy.load().to(out.element_type))
            cute.autovec_copy(narrow, cute.local_tile(out[item.request, head, None], (2,), (column,)))
            if const_expr(lse is not None):
                if column == 0:
                    value = (top + cute.math.log2(total, fastmath=True) + ahead) * lse_scale if total > 0.0 else -Float32.inf
                    lse[item.request, head] = value


# ------------------------------------------------------------------------------------------------------------------- PTX one-liners
@cute.jit
def load_matrices(address: Uint32, offset: cutlass.Constexpr, transposed: cutlass.Constexpr):
    """Four 8x8 matrices of 16-bit words; every lane names one row of 16 bytes."""
    shape = "m8n8.x4.trans" if transposed else "m8n8.x4"
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned." + shape + ".shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+" + str(offset) + "];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


@cute.jit
def multiply(c: cute.Tensor, a, b0: Uint32, b1: Uint32, half: cutlass.Constexpr):
    """c (four fp32 of a 16 x 8 tile) += A (16 x 16) B (16 x 8), fp16 or bf16."""
    ty = "f16" if half else "bf16"
    r = cute.arch.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32." + ty + "." + ty + ".f32 {{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, "
        "{{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
    )
    for i in cutlass.range_constexpr(4):
        c[i] = r[i]


@cute.jit
def transpose_pair(low: Float32, high: Float32, half: cutlass.Constexpr):
    """Two columns of this lane's row -> a 16-bit pair, then the transposed 8x8 block: accumulator layout becomes operand B."""
    ty = "f16x2" if half else "bf16x2"
    pair = cute.arch.inline_ptx("cvt.rn." + ty + ".f32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[high, low])
    return cute.arch.inline_ptx("movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[pair])


@cute.jit
def widen_e4m3(word: Uint32):
    """Four e4m3 -> two pairs of fp16, exact."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 a, b; mov.b32 {a, b}, {$r0}; cvt.rn.f16x2.e4m3x2 {$w0}, a; cvt.rn.f16x2.e4m3x2 {$w1}, b; }",
        write_only_types=[Uint32, Uint32],
        read_only_args=[word],
    )


@cute.jit
def permute_bytes(word: Uint32, selector: cutlass.Constexpr):
    """Byte i of the result is byte (selector nibble i) of ``word``; nibbles 4 to 7 select zeros."""
    return Uint32(cute.arch.prmt(Int32(word), Int32(0), selector))


@cute.jit
def copy_16_bytes(to: Uint32, source: Int64, count: Int32):
    """Asynchronous copy of 16 bytes past L1 to shared memory; what ``count`` leaves is filled with zeros, and 0 reads nothing."""
    cute.arch.inline_ptx("cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[to, source, count])


@cute.jit
def store_zeros(address: Uint32, offset: cutlass.Constexpr):
    """16 zero bytes to shared memory."""
    cute.arch.inline_ptx(
        "{ .reg .b32 z; mov.b32 z, 0; st.shared.v4.b32 [{$r0}+" + str(offset) + "], {z, z, z, z}; }", read_only_args=[address]
    )


@cute.jit
def push(address: Uint32, barrier: Uint32, peer: Int32, x: Float32, y: Float32):
    """Two floats to the same shared-memory address of another CTA of the cluster, counted by that CTA's barrier."""
    cute.arch.inline_ptx(
        "{ .reg .u32 a, b; mapa.shared::cluster.u32 a, {$r0}, {$r2}; mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a], {{$r3}, {$r4}}, [b]; }",
        read_only_args=[address, barrier, Uint32(peer), x, y],
    )


@cute.jit
def load_fresh(address: Int64):
    """An int32 as it is in L2."""
    return cute.arch.inline_ptx("ld.relaxed.gpu.global.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


@cute.jit
def load_again(address: Int64):
    """An int32 that may have changed since it was loaded last: an ordinary load that no compiler merges with an earlier one."""
    return cute.arch.inline_ptx("ld.global.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


@cute.jit
def over_rows(x: Float32, op: cutlass.Constexpr):
    """Reduce over the eight lanes that hold the same columns of an accumulator."""
    for i in cutlass.range_constexpr(3):
        x = op(x, cute.arch.shuffle_sync_bfly(x, 4 << i))
    return x


@cute.jit
def float_bits(x: Float32):
    """The bit pattern of a float."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


@cute.jit
def bits_float(x: Int32):
    """The float with a bit pattern."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
