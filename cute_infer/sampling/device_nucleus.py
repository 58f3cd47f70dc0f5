"""Top-p without top-k: a sample says between which two values the threshold lies, one pass adds up, and the few elements between decide.

    sample    every thread's maximum and the first element of every vector, as counts in 1024 bins of 1/32 binade: pushed with the maxima
    window    everybody estimates the mass above every bin: the values where it is p - w and p + w. w is about six standard deviations;
              where elements are few and heavy it is wider
    add up    one pass with the exponential: the exact total, the exact mass above the window, and a list of the elements inside it,
              some 3 % of the row; their masses in 128 fine bins. Barrier "total"
    narrow    the total gives top-p's limit, and the limit a fine bin: everything above it is kept, everything below dropped
    decide    the bin's elements, some tens in the row, go to everybody. Barrier "kept". The mass above each of them is counted exactly

The estimate decides nothing but speed: a window that misses the limit and a list that overflows (thousands of equal values) send the row to
``device_levels``. Every CTA computes the window from the same integers in the same order, so all find the same one.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint32, const_expr

from .device import (
    GROUP,
    KEY_NEG_INF,
    add_exact,
    add_wide,
    divide,
    exact_total,
    group_sum,
    nucleus,
    order_key,
    start_exact,
    warp_inclusive_sum,
)
from .device_cluster import push, push_sum, row_sync, sum_of_warps, this_thread
from .device_row import Row, chunk, mass
from .device_shared import FINE_BINS, LISTED, TIED, Scratch
from .device_window import Pool, find_window, pool

# ---- add up ---------------------------------------------------------------------------------------------------------------------------


@cute.jit
def add_up(cfg: Constexpr, row: Row, lowest: Float32, highest: Float32):
    """This thread's (total mass, mass of x >= highest, bits of the elements inside the window: chunk * vector + j)."""
    high, low = start_exact()
    above_high, above_low = start_exact()
    inside = Uint32(0)
    for c in cutlass.range(cfg.chunks, unroll=cfg.unroll):
        x = chunk(cfg, row, c)
        bits = Uint32(0)
        for j in cutlass.range_constexpr(cfg.vector):
            w = mass(cfg, row, x[j])
            high, low = add_exact(high, low, w)
            above_high, above_low = add_exact(above_high, above_low, w if x[j] >= highest else Float32(0.0))
            bits = bits | (Uint32(1 << j) if x[j] >= lowest and x[j] < highest else Uint32(0))
        inside = inside | (bits << Uint32(c * cfg.vector))
    return exact_total(high, low), exact_total(above_high, above_low), inside


@cute.jit
def fine_bin(x: Float32, top: Float32, scale: Float32) -> Int32:
    """Bin of a listed element, 0 at the top; never increases with x."""
    return Int32(cute.arch.fmin(cute.arch.fmax((top - x) * scale, Float32(0.0)), Float32(FINE_BINS - 1)))


@cute.jit
def list_window(cfg: Constexpr, row: Row, smem: Scratch, words: Pool, inside: Uint32, top: Float32, scale: Float32):
    """Write the window's elements to this CTA's list and their masses to its fine bins."""
    tid = cute.arch.thread_idx()[0]
    if inside != 0:
        n = cute.arch.atomic_add(smem.count_limit.iterator, Int32(cute.arch.popc(inside)), sem="relaxed", scope="cta")
        while inside != 0:
            bit = Int32(31) - Int32(cute.arch.clz(inside))
            inside = inside ^ (Uint32(1) << Uint32(bit))
            if n < LISTED:
                words.listed[n] = Uint32(tid * 32 + bit)
                x = row.values[bit % cfg.vector, tid, bit // cfg.vector].to(Float32)
                add_fine(words.fine, fine_bin(x, top, scale), Uint32(mass(cfg, row, x)))
            n = n + 1


@cute.jit
def add_fine(fine: cute.Tensor, b: Int32, w: Uint32):
    high = cute.make_tensor(fine.iterator + FINE_BINS, cute.make_layout(FINE_BINS))
    add_wide(fine, high, b, w)


@cute.jit
def find_fine_bin(cfg: Constexpr, smem: Scratch, fines: cute.Tensor, above: Int64, limit: Int64) -> Int32:
    """The fine bin in which the mass from the top reaches the limit, or -1; answer_mass[0] is then the mass above it."""
    at = this_thread(cfg.warps, cfg.cluster)
    own = Int64(0)
    if at.tid < FINE_BINS:
        for r in cutlass.range_constexpr(cfg.cluster):
            b = r * (2 * FINE_BINS) + at.tid
            own += Int64(Uint32(fines[b])) + (Int64(Uint32(fines[b + FINE_BINS])) << Int64(32))
    to_here = warp_inclusive_sum(own, at.lane)
    if at.lane == 31:
        smem.scan_mass[at.warp] = to_here
    if at.tid == 0:
        smem.answer[0] = Int32(-1)
    cute.arch.sync_threads()
    if at.tid < FINE_BINS:
        before = above + to_here - own
        for w in cutlass.range(at.warp, unroll=1):
            before += smem.scan_mass[w]
        if before < limit and limit <= before + own:
            smem.answer[0] = at.tid
            smem.answer_mass[0] = before
    cute.arch.sync_threads()
    return smem.answer[0]


# ---- decide ---------------------------------------------------------------------------------------------------------------------------


@cute.jit
def push_decision(cfg: Constexpr, row: Row, smem: Scratch, words: Pool, n: Int32, deciding: Int32, top: Float32, scale: Float32):
    """Listed elements in the deciding bin go to everybody; the masses of those above it are kept, and their sums per warp are pushed."""
    at = this_thread(cfg.warps, cfg.cluster)
    for e in cutlass.range(at.tid, n, cfg.threads, unroll=1):
        element = Int32(words.listed[e])
        owner, c, j = element >> 5, (element & 31) // cfg.vector, element % cfg.vector
        x = row.values[j, owner, c].to(Float32)
        b = fine_bin(x, top, scale)
        if b <= deciding:
            w = Uint32(mass(cfg, row, x))
            if b == deciding:
                i = cute.arch.atomic_add(smem.count_limit.iterator, Int32(1), sem="relaxed", scope="cta")
                if i < TIED:
                    entry = at.rank * TIED + i
                    for r in cutlass.range_constexpr(cfg.cluster):
                        push(words.tied, entry, x.bitcast(Uint32), Int32(r), cfg.cluster)
                        push(words.tied, entry + cfg.cluster * TIED, w, Int32(r), cfg.cluster)
                        push(words.tied, entry + 2 * cfg.cluster * TIED, Uint32(at.rank * cfg.warps + (owner >> 5)), Int32(r), cfg.cluster)
            else:
                if const_expr(cfg.keeps_sums):
                    add_extra(cfg, words, owner >> 5, w)
    cute.arch.sync_threads()
    if at.warp == 0 and at.lane < cfg.cluster:
        push(smem.listed, 2 * cfg.cluster + at.rank, Uint32(smem.count_limit[0]), at.lane, cfg.cluster)
    if const_expr(cfg.keeps_sums):
        for i in cutlass.range(at.tid, cfg.cluster * 2 * cfg.warps, cfg.threads, unroll=1):
            word = i % (2 * cfg.warps)
            to = at.rank * cfg.warps + word % cfg.warps + (word // cfg.warps) * cfg.row_warps
            push(words.extras, to, Uint32(words.extra[word]), i // (2 * cfg.warps), cfg.cluster)


@cute.jit
def add_extra(cfg: Constexpr, words: Pool, warp: Int32, w: Uint32):
    high = cute.make_tensor(words.extra.iterator + cfg.warps, cute.make_layout(cfg.warps))
    add_wide(words.extra, high, warp, w)


@cute.jit
def tied_entry(cfg: Constexpr, smem: Scratch, i: Int32):
    """(where the i-th of the deciding elements lies, one of every CTA in turn; whether it exists)."""
    r, place = i % cfg.cluster, i // cfg.cluster
    is_there = place < Int32(smem.listed[2 * cfg.cluster + r])
    return r * TIED + (place if is_there else Int32(0)), is_there


@cute.jit
def decide(cfg: Constexpr, smem: Scratch, words: Pool, most: Int32, above: Int64, limit: Int64):
    """Find the smallest value kept among the deciding bin's elements (to smem.threshold) and complete the kept mass of every warp."""
    at = this_thread(cfg.warps, cfg.cluster)
    sub = at.lane % GROUP
    per_warp = 32 // GROUP
    for first in cutlass.range(at.warp * per_warp, cfg.cluster * most, cfg.warps * per_warp, unroll=1):
        flat = first + at.lane // GROUP
        entry, is_there = tied_entry(cfg, smem, flat)
        x = words.tied[entry].bitcast(Float32)
        larger, equal = Int64(0), Int64(0)
        for i in cutlass.range(sub, cfg.cluster * most, GROUP, unroll=2):
            place, is_other = tied_entry(cfg, smem, i)
            other = words.tied[place].bitcast(Float32)
            w = Int64(Uint32(words.tied[cfg.cluster * TIED + place])) if is_other else Int64(0)
            larger += w if other > x else Int64(0)
            equal += w if other == x else Int64(0)
        before = above + group_sum(larger)
        through = before + group_sum(equal)
        if is_there and sub == 0 and before < limit:
            if through >= limit:
                smem.threshold[0] = order_key(x)  # equal elements write the same
            if const_expr(cfg.keeps_sums):
                owner = Int32(words.tied[2 * cfg.cluster * TIED + entry])
                add_wide(smem.kept_low, smem.kept_high, owner, Uint32(words.tied[cfg.cluster * TIED + entry]))
    if const_expr(cfg.keeps_sums):
        for g in cutlass.range(at.tid, cfg.row_warps, cfg.threads, unroll=1):
            add_wide(smem.kept_low, smem.kept_high, g, Uint32(words.extras[g]))
            cute.arch.atomic_add(smem.kept_high.iterator + g, Uint32(words.extras[cfg.row_warps + g]), sem="relaxed", scope="cta")
    cute.arch.sync_threads()


@cute.jit
def most_listed(cfg: Constexpr, smem: Scratch, first: Constexpr) -> Int32:
    """The longest of the CTAs' lists."""
    most = Int32(0)
    for r in cutlass.range_constexpr(cfg.cluster):
        n = Int32(smem.listed[first + r])
        most = n if n > most else most
    return most


@cute.jit
def search_nucleus(cfg: Constexpr, row: Row, smem: Scratch, p: Float32):
    """(smallest key that top-p keeps, whether it was found), the same in the whole cluster. After :func:`push_samples` and the barrier.

    When it was found and cfg.keeps_sums, smem.kept_low and kept_high hold every warp's kept mass. Ends with a barrier of the CTA.
    """
    at = this_thread(cfg.warps, cfg.cluster)
    words = pool(cfg, smem)
    key, is_found = Uint32(KEY_NEG_INF), Boolean(False)
    lowest, highest = find_window(cfg, row, smem, p)
    top = cute.arch.fmin(highest, row.maximum)
    scale = divide(Float32(FINE_BINS), cute.arch.fmax(top - lowest, Float32(1e-30)))

    total, above, inside = add_up(cfg, row, lowest, highest)
    push_sum(smem.sum_low, smem.sum_high, cute.arch.shuffle_sync(warp_inclusive_sum(total, at.lane), 31), at, cfg.cluster)
    push_sum(smem.kept_low, smem.kept_high, cute.arch.shuffle_sync(warp_inclusive_sum(above, at.lane), 31), at, cfg.cluster)
    list_window(cfg, row, smem, words, inside, top, scale)
    cute.arch.sync_threads()
    n = smem.count_limit[0]
    if at.warp == 0 and at.lane < cfg.cluster:
        push(smem.listed, cfg.cluster + at.rank, Uint32(n), at.lane, cfg.cluster)
    for i in cutlass.range(at.tid, cfg.cluster * 2 * FINE_BINS, cfg.threads, unroll=1):
        word = i % (2 * FINE_BINS)
        push(words.fines, at.rank * (2 * FINE_BINS) + word, Uint32(words.fine[word]), i // (2 * FINE_BINS), cfg.cluster)
    row_sync(cfg.cluster)

    if at.tid == 0:
        smem.count_limit[0] = Int32(0)  # from here on the deciding bin's elements
    if most_listed(cfg, smem, cfg.cluster) <= LISTED:
        total, _, _ = sum_of_warps(smem.sum_low, smem.sum_high, cfg.row_warps, at)
        above, _, _ = sum_of_warps(smem.kept_low, smem.kept_high, cfg.row_warps, at)
        limit = nucleus(p, total)
        deciding = find_fine_bin(cfg, smem, words.fines, above, limit)
        if deciding >= 0:
            push_decision(cfg, row, smem, words, n, deciding, top, scale)
            row_sync(cfg.cluster)
            most = most_listed(cfg, smem, 2 * cfg.cluster)
            if most <= TIED:
                decide(cfg, smem, words, most, smem.answer_mass[0], limit)
                key = Uint32(smem.threshold[0])
                is_found = Boolean(True)
    if not is_found:
        cute.arch.sync_threads()  # the levels clear the pool
    return key, is_found
