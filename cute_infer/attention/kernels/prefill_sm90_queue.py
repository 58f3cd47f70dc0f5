"""The work queue of the Hopper prefill kernel: ticket -> (request, query block, head, KV split), from live lengths, without the host.

Where GQA groups are packed, the rows of a request are its (query, head in group) pairs, query major, and "head" means KV head.

Tickets are drawn in order from an atomic counter. What ticket t means:

1. *Request sections.* Runs of equal count, at most 32 requests, one per lane, and so that the keys and values of one KV head over the run
   fit the L2 budget; the tickets of a run come before those of the next.
2. *Head sections.* Inside a request section, as many whole GQA groups as fit the budget together: the CTAs in flight share K and V.
3. *Longest first.* Inside both, query blocks in descending block index over all requests (block index major, request minor), heads
   and their KV splits innermost: under a causal mask the block index is the cost, and the queue must run dry on cheap items. With many
   blocks the cheap
   quarter of all head sections comes last.
4. *Shared ends.* Without a causal mask all items of a batch of equal lengths cost the same, and the last round of them may occupy few CTAs.
   Where it occupies so few that every consumer group of it could have a CTA of its own, each is handed out in ``parts``: 64 rows in one
   group, whose tensor cores no other group shares. A group computes the same bits with or without neighbours.

One warp computes this. The section's lengths are read once into shared memory: a ticket then costs no global load, which matters because
the ring covers about two key tiles of time. A single request needs arithmetic only.

Where clusters of two CTAs take two heads of a GQA group at a time, the pair counts as one head here.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

L2_BUDGET_BYTES = 33 << 20  # about half of the 60 MB: K and V of the section beside Q, O and the previous section
TAIL_MIN_BLOCKS = 32  # query blocks per head from which the cheap quarter is held back
NEVER = 2**31 - 1
WARP = 32
COLUMNS = 5  # of the section's table: rows, first row in q, first token or page entry, kv_len, pages


class Lengths(NamedTuple):
    """Live metadata of the batch; the tensors are None where the layout has none."""

    qo_indptr: object
    kv_indptr: object
    kv_last_page_len: object
    total_q: object  # rows of q
    total_kv: object  # tokens of k (single)
    num_heads: object  # query heads; KV heads where groups are packed; pairs where a cluster takes two
    num_splits: object  # items per query block and head
    num_ctas: object = None  # or clusters, that draw tickets; wanted where items may be handed out in parts


class WorkItem(NamedTuple):
    """One query block of one head (and KV split), or one consumer group's part of it. ``num_rows < 0`` marks the end of the queue; a part
    past the end of its request has none."""

    q_row: object  # first row of q and out
    num_rows: object  # rows that belong to the request, from the first of the item on; may exceed the tile, not a part
    first_pos: object  # position of row 0 among the keys: kv_len - qo_len + query; negative when queries outnumber keys
    head: object  # as counted by Lengths.num_heads
    split: object
    kv_len: object
    kv_begin: object  # first token in k and v (ragged), first entry of kv_indices (paged)
    num_pages: object  # entries that belong to the request (paged)
    query: object  # row 0's query, counted from the request's first (where the spec reads it, else 0)
    request: object  # the same


class Cursor(NamedTuple):
    """The section the ticket order stands in; its requests' lengths are in the table, column major, a request per lane."""

    request: object  # the section's requests [request, request_end)
    request_end: object
    ticket: object  # the section's tickets [ticket, ticket_end)
    ticket_end: object
    num_blocks: object  # query blocks per head in the section
    top: object  # blocks of its longest request
    whole: object  # tickets before the first part


class PrefillQueue:
    """Device functions of the queue; every lane of the calling warp gets the same answer."""

    def __init__(self, spec, tile, parts=1, cluster=1):
        self.tile_q, self.tile_kv = tile.tile_q, tile.tile_kv
        self.split_kv, self.window = tile.split_kv, spec.window
        self.pack = spec.group_size if tile.pack_heads else 1  # rows per query
        self.heads_per_kv = spec.group_size // self.pack // cluster  # as Lengths.num_heads counts them
        self.causal = spec.causal and not spec.custom_mask
        self.parts = 1 if self.causal or tile.split_kv else parts  # of an item: under a causal mask the last ones are cheap anyway
        self.numbered = spec.custom_mask or spec.pos_encoding == "ALIBI"  # items say which request and query they are
        self.page_size = spec.page_size
        self.single = spec.kv_layout == "single"
        self.budget_tokens = L2_BUDGET_BYTES // (2 * (spec.head_dim_qk + spec.head_dim_vo))

    # ------------------------------------------------------------------------------------------------ lengths

    @cute.jit
    def read_request(self, lengths, request: Int32, request_end: Int32):
        """The table's columns for one request, zeros past the end. Rows are clamped to q, so that a wrong indptr cannot write outside."""
        rows, q_row, kv_begin, kv_len, num_pages = Int32(0), Int32(0), Int32(0), Int32(0), Int32(0)
        if request < request_end:
            q_row = lengths.qo_indptr[request]
            rows = cutlass.max(0, cutlass.min(lengths.qo_indptr[request + 1], lengths.total_q) - q_row) * self.pack
            kv_begin = lengths.kv_indptr[request]
            kv_len = cutlass.max(0, lengths.kv_indptr[request + 1] - kv_begin)
            if const_expr(self.page_size > 0):
                num_pages = kv_len
                kv_len = (num_pages - 1) * self.page_size + lengths.kv_last_page_len[request] if num_pages > 0 else Int32(0)
        return rows, q_row, kv_begin, kv_len, num_pages

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
        sections = cutlass.max(cutlass.min(batch, cute.ceil_div(tokens, self.budget_tokens)), cutlass.max(1, cute.ceil_div(batch, WARP)))
        requests = cutlass.max(1, cute.ceil_div(batch, sections))
        fit = cutlass.max(1, self.budget_tokens // cutlass.max(1, tokens // sections))  # KV heads that fit together
        kv_heads = lengths.num_heads // self.heads_per_kv
        head_sections = cute.ceil_div(kv_heads, fit)
        return requests, self.heads_per_kv * cute.ceil_div(kv_heads, head_sections)

    @cute.jit
    def start(self, lengths, table, requests_per_section: Int32):
        """Cursor on the first request section."""
        if const_expr(self.single):
            blocks = cute.ceil_div(lengths.total_q * self.pack, self.tile_q)
            whole, ticket_end = self.share_end(lengths, Int32(0), blocks * lengths.num_heads * lengths.num_splits)
            cursor = Cursor(Int32(0), Int32(1), Int32(0), ticket_end, blocks, blocks, whole)
        else:
            cursor = self.enter_section(lengths, table, Int32(0), Int32(0), requests_per_section)
        return cursor

    @cute.jit
    def enter_section(self, lengths, table, request: Int32, ticket: Int32, requests_per_section: Int32):
        """Cursor on the section that begins with ``request``; past the last request its tickets never end."""
        lane = cute.arch.lane_idx()
        batch = lengths.qo_indptr.shape[0] - 1
        request_end = cutlass.min(batch, request + requests_per_section)
        columns = self.read_request(lengths, request + lane, request_end)
        cute.arch.sync_warp()  # the previous section's readers are done
        for i in cutlass.range_constexpr(COLUMNS):
            table[WARP * i + lane] = columns[i]
        cute.arch.sync_warp()
        blocks = cute.ceil_div(columns[0], self.tile_q)
        num_blocks = cute.arch.warp_redux_sync(blocks, "add")
        top = cute.arch.warp_redux_sync(blocks, "max")
        ticket_end = ticket + num_blocks * lengths.num_heads * lengths.num_splits if request < batch else Int32(NEVER)
        whole = ticket_end
        if const_expr(self.parts > 1):
            if request < batch and request_end == batch:
                whole, ticket_end = self.share_end(lengths, ticket, ticket_end)
        return Cursor(request, request_end, ticket, ticket_end, num_blocks, top, whole)

    @cute.jit
    def share_end(self, lengths, first: Int32, end: Int32):
        """(tickets of whole items, of all) of the last section, where its items are the tickets [first, end)."""
        whole = end
        if const_expr(self.parts > 1):
            last_round = cutlass.min(end % lengths.num_ctas, end - first)
            if last_round * self.parts <= lengths.num_ctas:
                whole = end - last_round
                end = whole + last_round * self.parts
        return whole, end

    # ------------------------------------------------------------------------------------------------ tickets

    @cute.jit
    def find(self, lengths, table, cursor, ticket: Int32, requests_per_section: Int32, heads_per_section: Int32):
        """(cursor, work item) of a ticket; tickets of one CTA only grow."""
        if const_expr(self.single):
            past_end = ticket >= cursor.ticket_end
        else:
            while ticket >= cursor.ticket_end:
                cursor = self.enter_section(lengths, table, cursor.request_end, cursor.ticket_end, requests_per_section)
            past_end = cursor.request >= lengths.qo_indptr.shape[0] - 1
        zero = Int32(0)
        item = WorkItem(zero, Int32(-1), zero, zero, zero, zero, zero, zero, zero, zero)
        if not past_end:
            part = Int32(0)
            if const_expr(self.parts > 1):
                of_parts = ticket - cursor.whole
                if of_parts >= 0:
                    ticket = cursor.whole + of_parts // self.parts
                    part = of_parts % self.parts + 1
            splits = lengths.num_splits
            place, unit = self.divide(ticket - cursor.ticket, cursor.num_blocks, lengths.num_heads * splits, heads_per_section * splits)
            head = unit // splits
            split = unit - head * splits
            if const_expr(self.single):
                block = cursor.num_blocks - 1 - place
                query = block * (self.tile_q // self.pack)
                left = lengths.total_q - query
                numbered = query if const_expr(self.numbered) else zero
                item = WorkItem(query, left * self.pack, lengths.total_kv - left, head, split, lengths.total_kv, zero, zero, numbered, zero)
            else:
                member, level = self.seek(table, cursor, place)
                item = self.describe(table, cursor, member, level, head, split)
            if const_expr(self.parts > 1):
                if part > 0:
                    item = self.part(item, part - 1)
        return cursor, item

    @cute.jit
    def divide(self, ticket: Int32, num_blocks: Int32, num_units: Int32, units_per_section: Int32):
        """Ticket within a request section -> (place in the longest-first list of query blocks, unit); a unit is a split of a head."""
        first = Int32(0)
        span = num_blocks
        if const_expr(self.causal):
            # the expensive blocks of every head section, then the cheap quarter of every head section
            cheap = num_blocks // 4 if num_blocks >= TAIL_MIN_BLOCKS else Int32(0)
            span = num_blocks - cheap
            if ticket >= span * num_units:
                ticket = ticket - span * num_units
                first = span
                span = cheap
        section = ticket // (units_per_section * span)
        rest = ticket - section * units_per_section * span
        units = cutlass.min(units_per_section, num_units - section * units_per_section)
        place = rest // units
        return first + place, section * units_per_section + rest - place * units

    @cute.jit
    def seek(self, table, cursor, place: Int32):
        """(section member, block index) of the ``place``-th query block: block index major, descending; request minor."""
        lane = cute.arch.lane_idx()
        blocks = cute.ceil_div(table[lane], self.tile_q)
        # blocks at or above a level fall from num_blocks at 0 to 0 at top: the wanted level is the last with more than ``place``
        level, above, before = Int32(0), cursor.top, Int32(0)
        while above - level > 1:
            middle = (level + above) // 2
            count = cute.arch.warp_redux_sync(cutlass.max(blocks - middle, 0), "add")
            if count > place:
                level = middle
            else:
                above = middle
                before = count
        has_block = blocks > level
        holders = cute.arch.vote_ballot_sync(has_block)
        rank = cute.arch.popc(holders & ((Int32(1) << lane) - 1))
        chosen = cute.arch.vote_ballot_sync(has_block & (rank == place - before))
        return cute.arch.popc(chosen - 1), level

    @cute.jit
    def describe(self, table, cursor, member: Int32, level: Int32, head: Int32, split: Int32):
        """The work item of a section member's ``level``-th query block."""
        left = table[member] - level * self.tile_q
        query = level * (self.tile_q // self.pack)
        kv_begin, kv_len, num_pages = table[2 * WARP + member], table[3 * WARP + member], table[4 * WARP + member]
        numbers = (query, cursor.request + member) if const_expr(self.numbered) else (Int32(0), Int32(0))
        return WorkItem(table[WARP + member] + query, left, kv_len - left // self.pack, head, split, kv_len, kv_begin, num_pages, *numbers)

    @cute.jit
    def part(self, item, part: Int32):
        """64 rows of a work item."""
        rows = self.tile_q // self.parts
        queries = part * (rows // self.pack)
        num_rows = cutlass.max(0, cutlass.min(rows, item.num_rows - part * rows))
        query = item.query + queries if const_expr(self.numbered) else item.query
        return item._replace(q_row=item.q_row + queries, num_rows=num_rows, first_pos=item.first_pos + queries, query=query)

    # ------------------------------------------------------------------------------------------------ what an item reads

    @cute.jit
    def kv_tiles(self, first_pos: Int32, num_rows: Int32, kv_len: Int32, split: Int32, num_splits: Int32, window_left: Int32):
        """[first, end): the key tiles of a work item, those that some row of it sees; empty when none is visible."""
        end, first = kv_len, Int32(0)
        if const_expr(self.causal):
            queries = cute.ceil_div(cutlass.min(num_rows, self.tile_q), self.pack)
            end = cutlass.max(0, cutlass.min(kv_len, first_pos + queries))
        if const_expr(self.window):
            first = cutlass.max(0, first_pos - window_left) // self.tile_kv
        end = cute.ceil_div(end, self.tile_kv)
        if const_expr(self.split_kv):
            visible, begin = cutlass.max(0, end - first), first
            first = begin + visible * split // num_splits
            end = begin + visible * (split + 1) // num_splits
        return first, end
