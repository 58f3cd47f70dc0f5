"""The copies of the Hopper decode kernel: every warp fills the slots of its own ring.

One TMA box of K and one of V per page (or per slot, where a page holds several). Page sizes no box fits (1, 2, 4, odd ones) are gathered by
16-byte cp.async into the same layout. Either way what lies outside the cache arrives as zeros.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync

from .decode_sm90_work import Work

EVICT_FIRST = 0x12F0000000000000  # createpolicy.fractional.L2::evict_first


class BoxCopies(NamedTuple):
    """TMA: descriptors, and their views of the cache and of the rings."""

    k_load: cute.CopyAtom
    k_from: cute.Tensor
    k_to: cute.Tensor
    v_load: cute.CopyAtom
    v_from: cute.Tensor
    v_to: cute.Tensor


class RowCopies(NamedTuple):
    """Gather: the cache, and where this warp's ring starts."""

    k: cute.Tensor
    v: cute.Tensor
    ring_address: Uint32


class DecodeLoad:
    """Device functions that fill rings."""

    def __init__(self, spec, tile, layout):
        self.spec, self.tile, self.layout = spec, tile, layout
        self.k_rows, self.v_rows, self.k_slot, self.v_slot = layout.k_rows, layout.v_rows, layout.k_slot, layout.v_slot
        self.gathers, self.boxes, self.box_tokens, self.id_steps = layout.gathers, layout.boxes, layout.box_tokens, layout.id_steps

    # --------------------------------------------------------------------------------------------------------------------------------- ring
    def ring_sources(self, work: Work, ids: Int32) -> tuple:
        """Where the boxes of the first steps come from, step by step, as far as ``ids`` are asked for before the main loop."""
        steps = max(self.tile.stages, self.tile.prefetch)
        return tuple(tuple(self.box_source(work, ids, Int32(i), box) for box in range(self.boxes)) for i in range(steps))

    @cute.jit
    def prefetch_ring(self, copies, work: Work, sources):
        """Ask L2 for the first ``prefetch`` slots. Only a hint: L2 is where every kernel's writes meet, so nothing stale can be kept."""
        for i in cutlass.range_constexpr(self.tile.prefetch):
            if i < work.count:
                for box in cutlass.range_constexpr(self.boxes):
                    with cute.arch.elect_one():
                        cute.prefetch(copies.k_load, copies.k_from[None, sources[i][box]])
                        cute.prefetch(copies.v_load, copies.v_from[None, sources[i][box]])

    @cute.jit
    def fill_ring(self, copies, full: cute.Pointer, work: Work, sources, warp: Int32):
        """Start the copies of the first steps, from :meth:`ring_sources`."""
        for i in cutlass.range_constexpr(self.tile.stages):
            if i < work.count:
                self.fill_boxes(copies, full, sources[i], Int32(i), warp)

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
            sources = tuple(self.box_source(work, ids, step, box) for box in range(self.boxes))
            self.fill_boxes(copies, full, sources, slot, warp)

    # -------------------------------------------------------------------------------------------------------------------------------- boxes
    @cute.jit
    def partition(self, load: cute.CopyAtom, coords: cute.Tensor, ring: cute.Tensor, rows: cutlass.Constexpr, work: Work):
        """TMA views: source (box, (token box, 0, 0, head, page)), destination (box, box of the slot, (slot, warp))."""
        if const_expr(self.spec.kv_layout == "ragged"):
            coords = cute.domain_offset((work.origin, 0, 0, 0, 0), coords)
        boxes = cute.zipped_divide(coords, (self.box_tokens, rows.panel_bytes * 8 // self.layout.kv_dtype.width, rows.panels))
        to, source = cpasync.tma_partition(load, 0, cute.make_layout(1), cute.group_modes(ring, 0, 3), boxes)
        return load, source, to

    @cute.jit
    def fill_boxes(self, copies: BoxCopies, full: cute.Pointer, sources, slot: Int32, warp: Int32):
        """One TMA box of K and one of V per page (or per slot, where a page holds several)."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full + slot, self.tile.tokens * (self.k_rows.bytes + self.v_rows.bytes))
        for box in cutlass.range_constexpr(self.boxes):
            source, to = sources[box], (slot, warp)
            for load, src, dst in ((copies.k_load, copies.k_from, copies.k_to), (copies.v_load, copies.v_from, copies.v_to)):
                if const_expr(self.tile.evict_first):
                    cute.copy(load, src[None, source], dst[None, box, to], tma_bar_ptr=full + slot, cache_policy=Int64(EVICT_FIRST))
                else:
                    cute.copy(load, src[None, source], dst[None, box, to], tma_bar_ptr=full + slot)

    @cute.jit
    def box_source(self, work: Work, ids: Int32, step: Int32, box: cutlass.Constexpr):
        """Where a box of a step comes from: (box of the page or of the request, 0, 0, KV head, page)."""
        spec = self.spec
        token_box, page = work.first_slot + step, Int32(0)
        if const_expr(spec.kv_layout == "paged"):
            token_box = token_box % (spec.page_size // self.box_tokens) if spec.page_size > self.box_tokens else Int32(0)
            page = cute.arch.shuffle_sync(ids, (step % self.id_steps) * self.boxes + box)
        return token_box, 0, 0, work.kv_head, page

    # --------------------------------------------------------------------------------------------------------------------------------- rows
    @cute.jit
    def copy_rows(self, copies: RowCopies, work: Work, ids: Int32, step: Int32, slot: Int32, lane: Int32):
        """Gather: 16-byte pieces of the slot's rows, neighbouring lanes on neighbouring pieces, into the layout TMA would have written."""
        page_size, tokens = self.spec.page_size, self.tile.tokens
        first_token = (work.first_slot + step) * tokens
        address = copies.ring_address + Uint32(slot * (self.k_slot + self.v_slot))
        for cache, rows, start in ((copies.k, self.k_rows, 0), (copies.v, self.v_rows, self.k_slot)):
            pieces, per_panel = rows.bytes // 16, rows.panel_bytes // 16
            for i in cutlass.range_constexpr(tokens * pieces // 32):
                token, piece = (32 * i + lane) // pieces, (32 * i + lane) % pieces
                page = cute.arch.shuffle_sync(ids, (step % self.id_steps) * tokens + token)
                column = piece * (128 // self.layout.kv_dtype.width)
                source = cache.iterator + cute.crd2idx((Int64(page), (first_token + token) % page_size, work.kv_head, column), cache.layout)
                flip = token // (128 // rows.panel_bytes) % per_panel
                panel = start + self.layout.row_offset(rows, token) + piece // per_panel * (tokens * rows.panel_bytes)
                place = address + Uint32(panel + (piece % per_panel ^ flip) * 16)
                copy_16_bytes(place, source.toint(), Int32(16) if page < work.num_pages else Int32(0))


@cute.jit
def copy_16_bytes(to: Uint32, source: Int64, count: Int32):
    """Asynchronous copy of 16 bytes past L1 to shared memory; what ``count`` leaves is filled with zeros, and 0 reads nothing."""
    cute.arch.inline_ptx("cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[to, source, count])
