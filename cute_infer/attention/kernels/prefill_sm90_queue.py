"""The work queue of the Hopper prefill kernel: ticket -> (request, query block, head), from live lengths, without the host.

Tickets are drawn in order from an atomic counter. What ticket t means:

1. *Request sections.* When the keys and values of one KV head over the whole batch exceed the L2 budget, requests are cut in runs of
   equal count; the tickets of a run come before those of the next.
2. *Head sections.* Inside a request section, as many whole GQA groups as fit the budget together: the CTAs in flight share K and V.
3. *Longest first.* Inside both, query blocks in descending block index over all requests (block index major, request minor), heads
   innermost: under a causal mask the block index is the cost, and the queue must run dry on cheap items. With many blocks the cheap
   quarter of all head sections comes last.

One warp computes this, 32 requests a step; a single request needs arithmetic only.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

L2_BUDGET_BYTES = 33 << 20  # about half of the 60 MB: K and V of the section beside Q, O and the previous section
TAIL_MIN_BLOCKS = 32  # query blocks per head from which the cheap quarter is held back
NEVER = 2**31 - 1


class Lengths(NamedTuple):
    """Live metadata of the batch; the tensors are None where the layout has none."""

    qo_indptr: object
    kv_indptr: object
    kv_last_page_len: object
    total_q: object  # rows of q
    total_kv: object  # tokens of k (single)
    num_heads: object  # query heads


class WorkItem(NamedTuple):
    """One query block of one head. ``num_rows == 0`` marks the end of the queue."""

    q_row: object  # first row in q and out
    num_rows: object  # rows that belong to the request, from q_row on; may exceed the tile
    first_pos: object  # position of row 0 among the keys: kv_len - qo_len + row; negative when rows outnumber keys
    qo_head: object
    kv_len: object
    kv_begin: object  # first token in k and v (ragged), first entry of kv_indices (paged)
    num_pages: object  # entries that belong to the request (paged)


class Cursor(NamedTuple):
    """Where the ticket order stands: the request section and the last block level looked at."""

    request: object  # the section's requests [request, request_end)
    request_end: object
    ticket: object  # the section's tickets [ticket, ticket_end)
    ticket_end: object
    num_blocks: object  # query blocks per head in the section
    top: object  # blocks of its longest request
    level: object  # block index last looked at
    level_begin: object  # query blocks before that level
    level_size: object  # requests that have a block of that index


class PrefillQueue:
    """Device functions of the queue; every lane of the calling warp gets the same answer."""

    def __init__(self, spec, tile):
        self.tile_q = tile.tile_q
        self.group_size = spec.group_size
        self.causal = spec.causal
        self.page_size = spec.page_size
        self.single = spec.kv_layout == "single"
        self.budget_tokens = L2_BUDGET_BYTES // (2 * (spec.head_dim_qk + spec.head_dim_vo))

    # ------------------------------------------------------------------------------------------------ lengths

    @cute.jit
    def rows_of(self, lengths, request: Int32, request_end: Int32):
        """Query rows of a request; 0 past the end. Clamped to q, so that a wrong indptr cannot write outside."""
        rows = Int32(0)
        if request < request_end:
            rows = cutlass.max(0, cutlass.min(lengths.qo_indptr[request + 1], lengths.total_q) - lengths.qo_indptr[request])
        return rows

    @cute.jit
    def blocks_from(self, lengths, request: Int32, request_end: Int32, level: Int32):
        """Query blocks of [request, request_end) whose index is ``level`` or more."""
        lane = cute.arch.lane_idx()
        count = Int32(0)
        for base in cutlass.range(request, request_end, 32, unroll=1):
            blocks = cute.ceil_div(self.rows_of(lengths, base + lane, request_end), self.tile_q)
            count = count + cute.arch.warp_redux_sync(cutlass.max(blocks - level, 0), "add")
        return count

    @cute.jit
    def most_blocks(self, lengths, request: Int32, request_end: Int32):
        """Query blocks of the longest request in [request, request_end)."""
        lane = cute.arch.lane_idx()
        top = Int32(0)
        for base in cutlass.range(request, request_end, 32, unroll=1):
            blocks = cute.ceil_div(self.rows_of(lengths, base + lane, request_end), self.tile_q)
            top = cutlass.max(top, cute.arch.warp_redux_sync(blocks, "max"))
        return top

    # ------------------------------------------------------------------------------------------------ sections

    @cute.jit
    def section_sizes(self, lengths):
        """(requests per request section, heads per head section)."""
        batch = Int32(1)
        tokens = lengths.total_kv
        if const_expr(not self.single):
            batch = lengths.qo_indptr.shape[0] - 1
            tokens = lengths.kv_indptr[batch] - lengths.kv_indptr[0]
            if const_expr(self.page_size > 0):
                # compared in pages below one budget's worth, so the product cannot overflow
                tokens = cutlass.min(tokens, (NEVER - 1) // self.page_size) * self.page_size
        sections = cutlass.max(1, cutlass.min(batch, cute.ceil_div(tokens, self.budget_tokens)))
        requests = cutlass.max(1, cute.ceil_div(batch, sections))
        fit = cutlass.max(1, self.budget_tokens // cutlass.max(1, tokens // sections))  # KV heads that fit together
        kv_heads = lengths.num_heads // self.group_size
        head_sections = cute.ceil_div(kv_heads, fit)
        return requests, self.group_size * cute.ceil_div(kv_heads, head_sections)

    @cute.jit
    def start(self, lengths, requests_per_section: Int32):
        """Cursor on the first request section."""
        if const_expr(self.single):
            blocks = cute.ceil_div(lengths.total_q, self.tile_q)
            zero = Int32(0)
            cursor = Cursor(zero, Int32(1), zero, blocks * lengths.num_heads, blocks, blocks, zero, zero, zero)
        else:
            cursor = self.enter_section(lengths, Int32(0), Int32(0), requests_per_section)
        return cursor

    @cute.jit
    def enter_section(self, lengths, request: Int32, ticket: Int32, requests_per_section: Int32):
        """Cursor on the section that begins with ``request``; past the last request its tickets never end."""
        batch = lengths.qo_indptr.shape[0] - 1
        request_end = cutlass.min(batch, request + requests_per_section)
        num_blocks = self.blocks_from(lengths, request, request_end, Int32(0))
        top = self.most_blocks(lengths, request, request_end)
        ticket_end = ticket + num_blocks * lengths.num_heads if request < batch else Int32(NEVER)
        return Cursor(request, request_end, ticket, ticket_end, num_blocks, top, Int32(0), Int32(0), Int32(0))

    # ------------------------------------------------------------------------------------------------ tickets

    @cute.jit
    def find(self, lengths, cursor, ticket: Int32, requests_per_section: Int32, heads_per_section: Int32):
        """(cursor, work item) of a ticket; tickets of one CTA only grow."""
        if const_expr(self.single):
            past_end = ticket >= cursor.ticket_end
        else:
            while ticket >= cursor.ticket_end:
                cursor = self.enter_section(lengths, cursor.request_end, cursor.ticket_end, requests_per_section)
            past_end = cursor.request >= lengths.qo_indptr.shape[0] - 1
        zero = Int32(0)
        item = WorkItem(zero, zero, zero, zero, zero, zero, zero)
        if not past_end:
            place, head = self.split(ticket - cursor.ticket, cursor.num_blocks, lengths.num_heads, heads_per_section)
            if const_expr(self.single):
                block = cursor.num_blocks - 1 - place
                row = block * self.tile_q
                item = WorkItem(row, lengths.total_q - row, row + lengths.total_kv - lengths.total_q, head, lengths.total_kv, zero, zero)
            else:
                cursor = self.seek(lengths, cursor, place)
                request = self.pick_request(lengths, cursor, place - cursor.level_begin)
                item = self.describe(lengths, request, cursor, head)
        return cursor, item

    @cute.jit
    def split(self, ticket: Int32, num_blocks: Int32, num_heads: Int32, heads_per_section: Int32):
        """Ticket within a request section -> (place in the longest-first list of query blocks, query head)."""
        first = Int32(0)
        span = num_blocks
        if const_expr(self.causal):
            # the expensive blocks of every head section, then the cheap quarter of every head section
            cheap = num_blocks // 4 if num_blocks >= TAIL_MIN_BLOCKS else Int32(0)
            span = num_blocks - cheap
            if ticket >= span * num_heads:
                ticket = ticket - span * num_heads
                first = span
                span = cheap
        section = ticket // (heads_per_section * span)
        rest = ticket - section * heads_per_section * span
        heads = cutlass.min(heads_per_section, num_heads - section * heads_per_section)
        place = rest // heads
        return first + place, section * heads_per_section + rest - place * heads

    @cute.jit
    def seek(self, lengths, cursor, place: Int32):
        """Cursor whose level holds the ``place``-th query block of the section; most tickets stay on the level of the last one."""
        level, begin, size = cursor.level, cursor.level_begin, cursor.level_size
        if place < begin or place >= begin + size:
            # blocks_from(level) falls from num_blocks at 0 to 0 at top: the wanted level is the last with blocks_from(level) > place
            level = Int32(0)
            at_level = cursor.num_blocks
            above = cursor.top
            begin = Int32(0)
            while above - level > 1:
                middle = (level + above) // 2
                count = self.blocks_from(lengths, cursor.request, cursor.request_end, middle)
                if count > place:
                    level = middle
                    at_level = count
                else:
                    above = middle
                    begin = count
            size = at_level - begin
        return cursor._replace(level=level, level_begin=begin, level_size=size)

    @cute.jit
    def pick_request(self, lengths, cursor, rank: Int32):
        """The ``rank``-th request of the section that has a block of the cursor's level."""
        lane = cute.arch.lane_idx()
        base = cursor.request
        found = Int32(-1)
        while found < 0 and base < cursor.request_end:
            has_block = self.rows_of(lengths, base + lane, cursor.request_end) > cursor.level * self.tile_q
            holders = cute.arch.vote_ballot_sync(has_block)
            before = cute.arch.popc(holders & ((Int32(1) << lane) - 1))
            chosen = cute.arch.vote_ballot_sync(has_block & (before == rank))
            if chosen != 0:
                found = base + cute.arch.popc(chosen - 1)
            rank = rank - cute.arch.popc(holders)
            base = base + 32
        return found

    @cute.jit
    def describe(self, lengths, request: Int32, cursor, head: Int32):
        """The work item of a request at the cursor's level."""
        rows = self.rows_of(lengths, request, cursor.request_end)
        kv_begin = lengths.kv_indptr[request]
        kv_len = cutlass.max(0, lengths.kv_indptr[request + 1] - kv_begin)
        num_pages = Int32(0)
        if const_expr(self.page_size > 0):
            num_pages = kv_len
            kv_len = (num_pages - 1) * self.page_size + lengths.kv_last_page_len[request] if num_pages > 0 else Int32(0)
        row = cursor.level * self.tile_q
        return WorkItem(lengths.qo_indptr[request] + row, rows - row, row + kv_len - rows, head, kv_len, kv_begin, num_pages)
