"""The load warps of the Hopper prefill kernel: work items from the queue, and their Q, K and V into shared memory.

Who loads what depends on where K and V lie:

    contiguous        warp 0: items, Q, K, V                                     boxes of a whole tile, one warp issues them in time
                      or warp 0: items, Q, K       warp 1: V                     where the tile says so (v_warp)
    pages, TMA        warp 0: items, Q, K       warp 1: V                        a box per page: issuing them takes time
    pages, gathered   warps 0, 2: K (warp 0 also items, Q)     warps 1, 3: V     16-byte copies by address: see ``gather``

Warp 0 leads: it draws tickets and announces items, also to the load warps that follow it. Page ids are requested one tile ahead, those of
an item's first tile before its Q, and looked at only when they are needed, so their latency is hidden. A page id outside the cache sets
``status[0]`` and reads as zeros.

Gathered tiles. A warp copies half the rows of a tile: 8 lanes share a row, 16 bytes each, so one instruction moves 128 contiguous bytes of
4 rows. A lane works out the addresses of one or two rows and its neighbours get them by shuffles: issue slots are what limits the gather.
Rows past the end of the keys are filled with zeros, so stale bytes never reach shared memory. Each thread's copies arrive at the mbarrier
of the stage by themselves; the consumers then order them before wgmma by a proxy fence.

Clusters. Two CTAs work on two heads of a GQA group, so they walk the same tiles. Each loads half of every tile and TMA writes it to both; a
stage is full when both halves are there, and empty when the consumers of both CTAs have released it. The first CTA draws the tickets and
stores each in the other's shared memory (``events.mail``).
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Int16, Int32, Int64, Uint32, const_expr

from ..device.mma import copy_async_16
from .prefill_sm90_layout import GROUP_ROWS, ROW_GROUP, block_columns
from .prefill_sm90_queue import WARP

LANES_PER_ROW = 8  # of a gathered row
ROWS_AT_ONCE = WARP // LANES_PER_ROW  # rows of one copy instruction of a warp
SEGMENTS_OF_8 = 0x181F  # shfl: clamp 31, segments of 8 lanes
NO_PAGE = -1


class Source(NamedTuple):
    """K or V as its load warps see it. Gathered: ``tensor`` and ``address``; else the TMA fields."""

    ring: object
    tma: object
    coords: object
    boxes: object  # shared memory, as TMA sees it
    head_stride: object  # where a tile spans pages
    tensor: object
    address: object  # of the ring


class Request(NamedTuple):
    """Where the keys of a work item lie."""

    kv_begin: object
    num_pages: object
    kv_len: object


class PrefillLoad:
    """Device functions of the load warps."""

    def __init__(self, spec, tile, dtype, layout, queue):
        self.spec, self.tile, self.dtype, self.layout, self.queue = spec, tile, dtype, layout, queue
        self.groups, self.stages, self.q_buffers = tile.num_consumer_groups, tile.num_stages, tile.num_q_buffers
        self.pack = spec.group_size if tile.pack_heads else 1
        self.heads_per_kv = spec.group_size // self.pack
        self.group_queries = GROUP_ROWS // self.pack
        self.paged = spec.kv_layout == "paged"
        self.gathers = layout.gather
        self.warps = 2 if self.gathers else 1  # that share K, and as many for V
        self.cluster = tile.cluster
        self.followers = 2 * self.warps - 1 if self.paged or tile.v_warp else 0  # load warps besides warp 0
        self.words = 10 if self.followers or queue.numbered else 6  # of an announced work item
        self.arrivals = WARP * self.warps if self.gathers else 1  # that fill a stage
        self.share = tile.tile_kv // self.warps  # rows of a gathered tile that one warp copies
        assert self.share % WARP == 0 or not self.gathers
        self.ids_per_lane = self.share // WARP if self.gathers else 1

    # ------------------------------------------------------------------------------------------------ roles

    @cute.jit
    def lead(self, events, memory, lengths, scales, q_tma, q_coords, s_q, k, v, reachable: Int32):
        """Warp 0: work items in ticket order, their Q and K, and V where nobody else loads it. The ring hides the queue's latency."""
        spec = self.spec
        lane = cute.arch.lane_idx()
        cta, _, _ = cute.arch.block_idx()
        num_ctas, _, _ = cute.arch.grid_dim()
        if const_expr(self.cluster > 1):
            cta, num_ctas = cta // self.cluster, num_ctas // self.cluster  # clusters from here on
        t_q = cute.make_tensor(s_q.iterator, self.layout.row_boxes(spec.head_dim_qk, self.layout.q_tiles).outer)

        lengths = lengths._replace(num_ctas=num_ctas)
        requests_per_section, heads_per_section = self.queue.section_sizes(lengths)
        cursor = self.queue.start(lengths, events.table, requests_per_section)
        cursor, item = self.queue.find(lengths, events.table, cursor, Int32(cta), requests_per_section, heads_per_section)
        item = self.own_head(item)
        ids, first, end = cute.make_rmem_tensor(self.ids_per_lane, Int32), Int32(0), Int32(0)
        if const_expr(self.paged):
            first, end = self.begin(ids, memory, item, scales)
        self.publish(events, memory, item, Int32(0))
        items = Int32(1)  # published so far
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        while item.num_rows >= 0:
            if const_expr(not self.paged):
                first, end = self.span(item, scales)
            kv_head = item.head // self.heads_per_kv
            buffer, phase = self.q_place(items - 1)
            for g in cutlass.range_constexpr(self.groups):
                at = g * self.q_buffers + buffer
                cute.arch.mbarrier_wait(events.q_empty + at, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(events.q_full + at, GROUP_ROWS * spec.head_dim_qk * self.dtype.width // 8)
                rows = self.layout.rows_from(q_coords, item.q_row + self.group_queries * g)
                to_s, from_g = self.layout.partition(q_tma, t_q, rows, self.layout.row_box(spec.head_dim_qk))
                cute.copy(q_tma, from_g[None, (0, 0, 0, item.head)], to_s[None, at], tma_bar_ptr=events.q_full + at)
            if const_expr(self.paged):
                request = Request(item.kv_begin, item.num_pages, item.kv_len)
                state = self.walk(k, memory, request, kv_head, first, end, state, ids, Int32(0), reachable)
            else:
                sources = (k,) if const_expr(self.followers > 0) else (k, v)
                state = self.walk_contiguous(sources, item.kv_begin, kv_head, first, end, state)
            # Drawn after the last load: the ring still holds unread tiles, which hides the latency, and a later draw balances better.
            ticket = self.draw(events, memory, items) + num_ctas
            cursor, item = self.queue.find(lengths, events.table, cursor, ticket, requests_per_section, heads_per_section)
            item = self.own_head(item)
            if const_expr(self.paged):
                first, end = self.begin(ids, memory, item, scales)
            self.publish(events, memory, item, items)
            items = items + 1
        if (lane == 0) & (self.rank() == 0):
            # Every CTA drew its last ticket before this count: the last one resets both words for the next launch.
            if cute.arch.atomic_add(memory.status.iterator + 2, Int32(1), sem="acq_rel", scope="gpu") == num_ctas - 1:
                memory.status[1] = 0
                memory.status[2] = 0

    def rank(self):
        """Which CTA of its cluster this is."""
        return cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster()) if self.cluster > 1 else Int32(0)

    def own_head(self, item):
        """The CTA's own item where the queue hands out pairs of heads."""
        return item._replace(head=item.head * self.cluster + self.rank()) if self.cluster > 1 else item

    @cute.jit
    def draw(self, events, memory, items: Int32):
        """The next number of the counter, the ``items``-th for this CTA; CTAs of a cluster get the same."""
        ticket = Int32(0)
        if const_expr(self.cluster == 1):
            if cute.arch.lane_idx() == 0:
                ticket = cute.arch.atomic_add(memory.status.iterator + 1, Int32(1), sem="relaxed", scope="gpu")
            ticket = cute.arch.shuffle_sync(ticket, 0)
        elif self.rank() == 0:
            if cute.arch.lane_idx() == 0:
                ticket = cute.arch.atomic_add(memory.status.iterator + 1, Int32(1), sem="relaxed", scope="gpu")
            ticket = cute.arch.shuffle_sync(ticket, 0)
            cute.arch.mbarrier_wait(events.mail_read, items & 1)  # the phase before the first is complete
            if cute.arch.lane_idx() == 0:
                _store_to_peer(events.mail.iterator.toint(), ticket, events.mail_sent.toint())
        else:
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(events.mail_sent, 4)
            cute.arch.mbarrier_wait(events.mail_sent, (items & 1) ^ 1)
            ticket = cute.arch.make_warp_uniform(events.mail[0])
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive(events.mail_read, 0)
        return ticket

    @cute.jit
    def follow(self, events, memory, scales, source, rank: Int32, reachable: Int32):
        """Another load warp: the ``rank``-th share of K or V of every work item that warp 0 announces."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        ids = cute.make_rmem_tensor(self.ids_per_lane, Int32)
        items = Int32(0)
        num_rows = Int32(0)
        while num_rows >= 0:
            cute.arch.mbarrier_wait(events.work_full, items & 1)
            work = events.work
            num_rows, first_pos, head, kv_len, split = work[1], work[2], work[3], work[4], work[5]
            request = Request(work[6], work[7], kv_len)
            self.taken(events)
            items = items + 1
            if num_rows >= 0:
                first, end = self.queue.kv_tiles(first_pos, num_rows, kv_len, split, scales.num_splits, scales.window_left)
                if const_expr(self.paged):
                    self.fetch_ids(ids, memory, request, end - 1, first, rank)
                    state = self.walk(source, memory, request, head // self.heads_per_kv, first, end, state, ids, rank, reachable)
                else:
                    state = self.walk_contiguous((source,), request.kv_begin, head // self.heads_per_kv, first, end, state)

    @cute.jit
    def begin(self, ids, memory, item, scales):
        """[first, end): the tiles of a work item over pages; the page ids of the first to load are requested."""
        first, end = self.span(item, scales)
        self.fetch_ids(ids, memory, Request(item.kv_begin, item.num_pages, item.kv_len), end - 1, first, Int32(0))
        return first, end

    @cute.jit
    def span(self, item, scales):
        """[first, end): the tiles of a work item."""
        return self.queue.kv_tiles(item.first_pos, item.num_rows, item.kv_len, item.split, scales.num_splits, scales.window_left)

    @cute.jit
    def walk(self, source, memory, request, kv_head: Int32, first: Int32, end: Int32, state, ids, rank: Int32, reachable: Int32):
        """This warp's share of the tiles [first, end) of K or V, right to left, the page ids of the last being on their way; the state of
        the ring after them."""
        next_ids = cute.make_rmem_tensor(self.ids_per_lane, Int32)
        for i in cutlass.range(end - first, unroll=1):
            kv_tile = end - 1 - i
            self.fetch_ids(next_ids, memory, request, kv_tile - 1, first, rank)
            self.check_ids(ids, source, memory, request, kv_tile, rank, reachable)
            if const_expr(self.gathers):
                addresses = self.row_addresses(source, ids, kv_tile, kv_head, rank)
                source.ring.sync_object_empty.wait(state.index, state.phase)
                self.gather(source, ids, addresses, state.index, rank)
                cute.arch.cp_async_mbarrier_arrive_noinc(source.ring.producer_get_barrier(state))
            else:
                source.ring.producer_acquire(state)
                self.load_tile(source, source.coords, state, kv_tile, kv_head, ids[0])
            state.advance()
            for j in cutlass.range_constexpr(self.ids_per_lane):
                ids[j] = next_ids[j]
        return state

    @cute.jit
    def walk_contiguous(self, sources, kv_begin: Int32, kv_head: Int32, first: Int32, end: Int32, state):
        """The tiles [first, end) of those of K and V that this warp loads, right to left: masked tiles first; the state after them."""
        coords = [self.contiguous(source.coords, kv_begin) for source in sources]
        for i in cutlass.range(end - first, unroll=1):
            for s in cutlass.range_constexpr(len(sources)):
                sources[s].ring.producer_acquire(state)
                self.load_tile(sources[s], coords[s], state, end - 1 - i, kv_head, Int32(0))
            state.advance()
        return state

    # ------------------------------------------------------------------------------------------------ work items

    @cute.jit
    def publish(self, events, memory, item, items: Int32):
        """Hand a work item to the consumer groups and the following load warps; ``items`` were handed over before."""
        mask_begin = Int32(0)
        if const_expr(self.spec.custom_mask):
            if item.num_rows >= 0:
                mask_begin = memory.mask_indptr[item.request]
        cute.arch.mbarrier_wait(events.work_empty, (items & 1) ^ 1)
        if cute.arch.lane_idx() == 0:
            events.work[0] = item.q_row
            events.work[1] = item.num_rows
            events.work[2] = item.first_pos
            events.work[3] = item.head
            events.work[4] = item.kv_len
            events.work[5] = item.split
            if const_expr(self.followers > 0):
                events.work[6] = item.kv_begin
                events.work[7] = item.num_pages
            if const_expr(self.queue.numbered):
                events.work[8] = item.query
                events.work[9] = mask_begin
            cute.arch.mbarrier_arrive(events.work_full)

    @cute.jit
    def taken(self, events):
        """This warp has read the words of the work item."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(events.work_empty)

    @cute.jit
    def q_place(self, turn: Int32):
        """(buffer, phase) of the Q of the ``turn``-th work item of this CTA."""
        buffer, phase = Int32(0), turn & 1
        if const_expr(self.q_buffers == 2):
            buffer, phase = turn & 1, (turn >> 1) & 1
        return buffer, phase

    # ------------------------------------------------------------------------------------------------ K and V

    def contiguous(self, coords, kv_begin):
        """The request's own view of K or V."""
        return cute.domain_offset((kv_begin, 0, 0, 0, 0), coords) if self.spec.kv_layout == "ragged" else coords

    @cute.jit
    def entry_of(self, request, kv_tile: Int32, rank: Int32, j: cutlass.Constexpr):
        """(entry of the request's page table, whether it is needed) of this lane's j-th id of a tile.

        It belongs to the tile's ``lane``-th box, or gathered to a row of this warp's share: that of the copy instruction
        ``8 j + lane % 8``, in which this lane's 8 neighbours copy it.
        """
        lane = cute.arch.lane_idx()
        if const_expr(self.gathers):
            token = self.token_of(kv_tile, rank, j)
            entry = token // self.spec.page_size
            wanted = token < request.kv_len
        else:
            entry = kv_tile * self.tile.tile_kv // self.spec.page_size + lane
            wanted = lane < self.layout.boxes
        return entry, wanted & (entry < request.num_pages)

    @cute.jit
    def fetch_ids(self, ids, memory, request, kv_tile: Int32, first: Int32, rank: Int32):
        """Request the page ids of a tile, if it is one of those from ``first`` on; nothing waits for them until ``check_ids``."""
        for j in cutlass.range_constexpr(self.ids_per_lane):
            entry, wanted = self.entry_of(request, kv_tile, rank, j)
            position = request.kv_begin + entry
            inside = (position >= 0) & (position < memory.kv_indices.shape[0])
            ids[j] = _load_if(memory.kv_indices.iterator.toint() + Int64(position) * 4, wanted & inside & (kv_tile >= first))

    @cute.jit
    def check_ids(self, ids, source, memory, request, kv_tile: Int32, rank: Int32, reachable: Int32):
        """Pages that do not exist become the first past the end, where TMA reads zeros, or NO_PAGE; needed ones are reported."""
        lost = Boolean(False)
        for j in cutlass.range_constexpr(self.ids_per_lane):
            _, wanted = self.entry_of(request, kv_tile, rank, j)
            known = (ids[j] >= 0) & (ids[j] < reachable)
            lost = lost | (wanted & (known == 0))
            missing = Int32(NO_PAGE) if const_expr(self.gathers) else Int32(source.coords.shape[4])
            ids[j] = ids[j] if known else missing
        if lost:
            memory.status[0] = 1

    @cute.jit
    def load_tile(self, source, coords, state, kv_tile: Int32, kv_head: Int32, page_ids: Int32):
        """K or V of one key tile by TMA: one box, or a box per page; in a cluster this CTA's share of it, for all."""
        layout, stage, barrier = self.layout, state.index, source.ring.producer_get_barrier(state)
        target, rank = {"tma_bar_ptr": barrier}, Int32(0)
        if const_expr(self.cluster > 1):
            target["mcast_mask"], rank = Int16((1 << self.cluster) - 1), self.rank()
        columns = cute.size(source.boxes, mode=[1]) * cute.size(source.boxes, mode=[2])
        if const_expr(layout.boxes == 1):
            columns = columns * self.cluster
        to_s, from_g = layout.partition(source.tma, source.boxes, coords, layout.kv_box(columns))
        if const_expr(layout.boxes == 1):
            box, page = kv_tile, Int32(0)
            if const_expr(self.paged):
                box, page = kv_tile % layout.tiles_per_page, cute.arch.shuffle_sync(page_ids, 0)
            cute.copy(source.tma, from_g[None, (box, 0, rank, kv_head, page)], to_s[None, rank, stage], **target)
        else:
            column, block = layout.head_start(kv_head, source.head_stride, columns)
            at_head = cute.domain_offset((0, column, block, 0, 0), coords)
            to_s, from_g = layout.partition(source.tma, source.boxes, at_head, layout.kv_box(columns))
            for j in cutlass.range_constexpr(0, layout.boxes, self.cluster):
                page = cute.arch.shuffle_sync(page_ids, j + rank)
                cute.copy(source.tma, from_g[None, (0, 0, 0, 0, page)], to_s[None, j + rank, stage], **target)

    @cute.jit
    def token_of(self, kv_tile: Int32, rank: Int32, j: cutlass.Constexpr):
        """The token of this lane's j-th row of a gathered tile, counted from the request's first."""
        lane = cute.arch.lane_idx()
        row = (j * LANES_PER_ROW + lane % LANES_PER_ROW) * ROWS_AT_ONCE + lane // LANES_PER_ROW
        return kv_tile * self.tile.tile_kv + rank * self.share + row

    @cute.jit
    def row_addresses(self, source, ids, kv_tile: Int32, kv_head: Int32, rank: Int32):
        """Global addresses of this lane's rows of a gathered tile; where there is no page, of some row that exists."""
        width, (page_stride, token_stride, head_stride, _) = self.dtype.width // 8, source.tensor.layout.stride
        head = source.tensor.iterator.toint() + Int64(kv_head) * head_stride * width
        addresses = cute.make_rmem_tensor(self.ids_per_lane, Int64)
        for j in cutlass.range_constexpr(self.ids_per_lane):
            offset = Int64(cutlass.max(ids[j], 0)) * page_stride
            if const_expr(self.spec.page_size > 1):
                offset = offset + Int64(self.token_of(kv_tile, rank, j) % self.spec.page_size) * token_stride
            addresses[j] = head + offset * width
        return addresses

    @cute.jit
    def gather(self, source, ids, addresses, stage: Int32, rank: Int32):
        """This warp's rows of one key tile of K or V, 16 bytes a lane; ``ids`` and ``addresses`` are those of the lane's rows."""
        lane = cute.arch.lane_idx()
        tile_kv, columns, width = self.tile.tile_kv, source.tensor.shape[3], self.dtype.width // 8
        row_bytes = block_columns(columns) * width  # of a block
        chunks = columns * width // 16  # of a row
        target = source.address + Uint32(stage * (tile_kv * columns * width) + rank * (self.share * row_bytes))
        places = []
        for c in cutlass.range_constexpr(0, chunks, LANES_PER_ROW):
            chunk = c + lane % LANES_PER_ROW
            block = target + Uint32(chunk * 16 // row_bytes * (tile_kv * row_bytes))
            # the swizzle repeats every ROW_GROUP rows, two instructions
            rows = (lane // LANES_PER_ROW, lane // LANES_PER_ROW + ROWS_AT_ONCE)
            places.append([block + self.swizzled(row * row_bytes + chunk * 16 % row_bytes, row_bytes) for row in rows])
        # bit i: the row of the lane's i-th neighbour has no page
        gone = [cute.arch.vote_ballot_sync(ids[j] < 0) >> (lane & -LANES_PER_ROW) for j in range(self.ids_per_lane)]
        for g in cutlass.range_constexpr(self.share // ROWS_AT_ONCE):
            j, neighbour = g // LANES_PER_ROW, g % LANES_PER_ROW
            address = _shuffle_address(addresses[j], neighbour) + lane % LANES_PER_ROW * 16
            size = Int32(0) if gone[j] & (1 << neighbour) != 0 else Int32(16)
            for c in cutlass.range_constexpr(0, chunks, LANES_PER_ROW):
                place = places[c // LANES_PER_ROW][g % 2] + Uint32(g // 2 * ROW_GROUP * row_bytes)
                if const_expr(c + LANES_PER_ROW > chunks):
                    if c + lane % LANES_PER_ROW < chunks:
                        copy_async_16(place, address + c * 16, size)
                else:
                    copy_async_16(place, address + c * 16, size)

    def swizzled(self, offset, row_bytes):
        """Byte offset in a block, swizzled as TMA and wgmma have it: 16-byte chunks within ``row_bytes`` trade places by row."""
        return Uint32(offset ^ ((offset >> 3) & (row_bytes - 16)))


@cute.jit
def _store_to_peer(address: Uint32, value: Int32, barrier: Uint32):
    """A word to the same shared-memory address of CTA 1 of the cluster, counted by the barrier at the same address there."""
    cute.arch.inline_ptx(
        "{ .reg .u32 a, b; mapa.shared::cluster.u32 a, {$r0}, 1; mapa.shared::cluster.u32 b, {$r1}, 1; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [a], {$r2}, [b]; }",
        read_only_args=[address, barrier, value],
    )


@cute.jit
def _load_if(address: Int64, condition):
    """A page id from global memory, or NO_PAGE: predicated, because a branch would wait for the load."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.s32 {$w0}, -1; @p ld.global.nc.s32 {$w0}, [{$r0}]; }",
        write_only_types=[Int32],
        read_only_args=[address, Int32(condition)],
    )


@cute.jit
def _shuffle_address(address: Int64, neighbour: cutlass.Constexpr):
    """The address that lane ``neighbour`` of this lane's 8 neighbours has."""
    shuffle = f"shfl.sync.idx.b32 {{part}}, {{part}}, {neighbour}, {SEGMENTS_OF_8}, -1; "
    return cute.arch.inline_ptx(
        "{ .reg .b32 low, high; mov.b64 {low, high}, {$r0}; "
        + shuffle.format(part="low")
        + shuffle.format(part="high")
        + "mov.b64 {$w0}, {low, high}; }",
        write_only_types=[Int64],
        read_only_args=[address],
    )
