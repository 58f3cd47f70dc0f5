"""What a CTA and a warp of the Hopper decode kernel have to do, from the live metadata: item, tokens, page ids.

Nothing is planned. A warp reads kv_indptr and kv_last_page_len of its request, takes its share of the item's slots, and looks its page ids
up, 32 boxes to a load. The shares are runs of neighbouring slots: the ids of a run lie side by side, in a few sectors instead of one each.
Early lengths, which must not stay in L1, are looked up once per CTA: from every warp, the same words would be asked of one slice of L2.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr

NO_PAGE = -(2**31)
RANKED = 256  # requests that longest_first orders among themselves


class Item(NamedTuple):
    """Which query heads and which share of the tokens the cluster serves."""

    request: Int32
    head_group: Int32  # heads_per_item KV heads
    head_block: Int32  # block of query heads inside a group
    split: Int32


class Work(NamedTuple):
    """What one warp streams: ``count`` slots from ``first_slot`` on, counted from token 0 of the request."""

    request: Int32
    kv_head: Int32
    first_slot: Int32
    count: Int32
    begin: Int32  # first token that may be seen
    end: Int32  # one past the last
    origin: Int32  # paged: first entry of the request in kv_indices; else its first token in K and V
    num_pages: Int32  # pages of the cache; also the page id that TMA fills with zeros


class DecodeWork:
    """Device functions that say who does what."""

    def __init__(self, spec, tile, layout):
        self.spec, self.tile, self.layout = spec, tile, layout
        self.tokens_per_id, self.ids_per_step = layout.tokens_per_id, layout.ids_per_step
        self.head_blocks, self.warps_per_head = layout.head_blocks, layout.warps_per_head

    # -------------------------------------------------------------------------------------------------------------------------------- items
    @cute.jit
    def find_item(self, num_splits: Int32, q: cute.Tensor, kv_indptr, window_left: Int32, lane: Int32):
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

    # ------------------------------------------------------------------------------------------------------------------------------- tokens
    @cute.jit
    def find_work(self, item: Item, k, lengths, kv_indptr, window_left: Int32, num_splits: Int32, position: Int32, warp: Int32):
        """The share of the ``position``-th of the cluster's warps of one head; ``lengths`` (of paged KV) as :meth:`lengths` gives them."""
        spec, tile = self.spec, self.tile
        origin, end = Int32(0), Int32(0)
        if const_expr(spec.kv_layout == "paged"):
            origin, following, last = lengths
            pages = following - origin
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
        slots = slots_end - slots_begin if slots_end > slots_begin else Int32(0)
        workers = tile.cluster * self.warps_per_head
        share, rest = slots // workers, slots % workers  # the first ``rest`` warps take one slot more
        first = slots_begin + position * share + (position if position < rest else rest)
        count = share + 1 if position < rest else share
        if const_expr(tile.heads_per_item > 1):
            count = count if kv_head < k.shape[2] else Int32(0)
        return Work(item.request, kv_head, first, count, begin, end, origin, Int32(k.shape[0]))

    # ----------------------------------------------------------------------------------------------------------------------------- metadata
    @cute.jit
    def lengths(self, item: Item, kv_indptr, kv_last_page_len):
        """(First entry of the request, of the next one, tokens on the last page); None where KV has no pages."""
        found = None
        if const_expr(self.spec.kv_layout == "paged"):
            first, following = self.look_up(kv_indptr, item.request, True), self.look_up(kv_indptr, item.request + 1, True)
            found = first, following, self.look_up(kv_last_page_len, item.request, True)
        return found

    @cute.jit
    def ask_early_lengths(self, item: Item, kv_indptr, kv_last_page_len, thread: Int32):
        """A word of :meth:`lengths` for each of a CTA's first three threads, before the programmatic dependency has resolved."""
        word = Int32(0)
        if thread < 3:
            entry = (kv_indptr.iterator + item.request + thread).toint()
            last = (kv_last_page_len.iterator + item.request).toint()
            word = load_fresh(entry if thread < 2 else last)
        return word

    @cute.jit
    def share_early_lengths(self, word: Int32, s_lengths: cute.Tensor, thread: Int32):
        """What :meth:`ask_early_lengths` found, for all threads of the CTA."""
        if thread < 3:
            s_lengths[thread] = word
        cute.arch.sync_threads()
        return s_lengths[0], s_lengths[1], s_lengths[2]

    @cute.jit
    def look_up(self, metadata: cute.Tensor, index: Int32, settled: cutlass.Constexpr):
        """An element of the metadata: past L1 before the programmatic dependency has resolved, so that L1 never holds what may change,
        and ``settled`` through L1, which the warps of a CTA share."""
        if const_expr(self.tile.early_metadata):
            address = (metadata.iterator + index).toint()
            return load_again(address) if const_expr(settled) else load_fresh(address)
        return metadata[index]

    # ----------------------------------------------------------------------------------------------------------------------------- page ids
    @cute.jit
    def load_page_ids(self, work: Work, kv_indices, step: Int32, lane: Int32, settled: cutlass.Constexpr = False):
        """Page ids of ``id_steps`` steps from ``step`` on: lane = (step, box or token). What lies outside [begin, end) is not looked up."""
        ids = Int32(NO_PAGE)
        if const_expr(self.spec.kv_layout == "paged"):
            slot = work.first_slot + step + lane // self.ids_per_step
            token = slot * self.tile.tokens + (lane % self.ids_per_step) * self.tokens_per_id
            entry = work.origin + token // self.spec.page_size
            if token < work.end and token + self.tokens_per_id > work.begin:
                ids = Int32(-1)
                if entry >= 0 and entry < kv_indices.shape[0]:
                    ids = self.look_up(kv_indices, entry, settled)
        return ids

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
    def bound_page_ids(self, work: Work, ids: Int32):
        """A page id outside the cache becomes the one TMA fills with zeros."""
        return ids if ids >= 0 and ids < work.num_pages else work.num_pages


@cute.jit
def load_fresh(address: Int64):
    """An int32 as it is in L2."""
    return cute.arch.inline_ptx("ld.relaxed.gpu.global.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


@cute.jit
def load_again(address: Int64):
    """An int32 that may have changed since it was loaded last: an ordinary load that no compiler merges with an earlier one."""
    return cute.arch.inline_ptx("ld.global.s32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


@cute.jit
def float_bits(x: Float32):
    """The bit pattern of a float."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])
