"""Top-p without top-k: a sample says between which two values the threshold lies, one pass adds up, and the few elements between decide.

    sample    every thread's maximum and the first element of every vector, as counts in 512 bins of 1/16 binade: sent with the maxima
    window    everybody estimates the mass above every bin: the values where it is p - w and p + w. w is about six standard deviations;
              where elements are few and heavy it is wider
    add up    one pass with the exponential: the exact total, the exact mass above the window, and a bit for every element inside it, some
              3 % of the row; their masses in 128 fine bins. Meeting "total"
    narrow    the total gives top-p's limit, and the limit a fine bin: everything above it is kept, everything below dropped
    decide    the bin's elements, some tens in the row, go to everybody. Meeting "kept". The mass above each of them is counted exactly

The estimate decides nothing but speed: a window that misses the limit and a bin that holds too much (thousands of equal values) send the
row to ``device_levels``. Every CTA computes the window from the same integers in the same order, so all find the same one.
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
from .device_cluster import Mail, announce, meet, send, send64, send_sum, send_words, sync_for_copies, this_thread, total_of
from .device_row import Row, chunk, mass
from .device_shared import FINE_BINS, TIED, Scratch, words_of
from .device_window import find_window, pool

CROWDED = 1 << 50  # added to a warp's mass above the window when half of its elements are inside: the fine bins do not hold them

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
            is_above = x[j] >= highest
            above_high, above_low = add_exact(above_high, above_low, w if is_above else Float32(0.0))
            bits = bits | (Uint32(1 << j) if x[j] >= lowest and not is_above else Uint32(0))
        inside = inside | (bits << Uint32(c * cfg.vector))
    return exact_total(high, low), exact_total(above_high, above_low), inside


@cute.jit
def fine_bin(x: Float32, top: Float32, scale: Float32) -> Int32:
    """Bin of an element inside the window, 0 at the top; never increases with x."""
    return Int32(cute.arch.fmin(cute.arch.fmax((top - x) * scale, Float32(0.0)), Float32(FINE_BINS - 1)))


@cute.jit
def next_inside(cfg: Constexpr, row: Row, inside: Uint32):
    """(the element of the highest bit, the other bits)."""
    bit = Int32(31) - Int32(cute.arch.clz(inside))
    x = row.values[bit % cfg.vector, cute.arch.thread_idx()[0], bit // cfg.vector].to(Float32)
    return x, inside ^ (Uint32(1) << Uint32(bit))


@cute.jit
def fill_fine_bins(cfg: Constexpr, row: Row, fine: cute.Tensor, inside: Uint32, top: Float32, scale: Float32):
    """Masses of the elements inside, to this CTA's fine bins: in two halves, whose sums need no carry."""
    while inside != 0:
        x, inside = next_inside(cfg, row, inside)
        b, w = fine_bin(x, top, scale), Uint32(mass(cfg, row, x))
        cute.arch.atomic_add(fine.iterator + b, w & Uint32(0xFFFF), sem="relaxed", scope="cta")
        cute.arch.atomic_add(fine.iterator + (FINE_BINS + b), w >> Uint32(16), sem="relaxed", scope="cta")


@cute.jit
def find_fine_bin(cfg: Constexpr, smem: Scratch, fines: cute.Tensor, above: Int64, limit: Int64) -> Int32:
    """The fine bin in which the mass from the top reaches the limit, or -1; answer_mass[0] is then the mass above it."""
    at = this_thread(cfg.warps, cfg.cluster)
    own = Int64(0)
    if at.tid < FINE_BINS:
        low, high = Uint32(0), Uint32(0)
        for r in cutlass.range_constexpr(cfg.cluster):
            low = low + Uint32(fines[r * (2 * FINE_BINS) + at.tid])
            high = high + Uint32(fines[r * (2 * FINE_BINS) + FINE_BINS + at.tid])
        own = Int64(low) + (Int64(high) << Int64(16))
    to_here = warp_inclusive_sum(own, at.lane)
    if at.lane == 31:
        smem.scan_mass[at.warp] = to_here
    if at.tid == 0:
        smem.answer[0] = Int32(-1)
    cute.arch.sync_threads()
    if at.tid < FINE_BINS:
        before = above + to_here - own
        for w in cutlass.range_constexpr(FINE_BINS // 32):
            before += smem.scan_mass[w] if w < at.warp else Int64(0)
        if before < limit and limit <= before + own:
            smem.answer[0] = at.tid
            smem.answer_mass[0] = before
    cute.arch.sync_threads()
    return smem.answer[0]


# ---- decide ---------------------------------------------------------------------------------------------------------------------------


@cute.jit
def send_decision(
    cfg: Constexpr,
    row: Row,
    smem: Scratch,
    mail: Mail,
    tied: cute.Tensor,
    inside: Uint32,
    deciding: Int32,
    above: Int64,
    top: Float32,
    scale: Float32,
):
    """The elements of the deciding bin go to everybody, and every warp's sum of what lies above it."""
    at = this_thread(cfg.warps, cfg.cluster)
    while inside != 0:
        x, inside = next_inside(cfg, row, inside)
        b = fine_bin(x, top, scale)
        if b <= deciding:
            w = Uint32(mass(cfg, row, x))
            if b == deciding:
                i = cute.arch.atomic_add(smem.count_limit.iterator, Int32(1), sem="relaxed", scope="cta")
                if i < TIED:
                    entry = 4 * (at.rank * TIED + i)
                    pair = Int64(x.bitcast(Uint32)) | (Int64(w) << Int64(32))
                    for r in cutlass.range_constexpr(cfg.cluster):
                        send64(mail, halves(tied), entry // 2, pair, Int32(r), cfg.cluster)
                        send(mail, tied, entry + 2, Uint32(at.warp_in_row), Int32(r), cfg.cluster)
            else:
                above += Int64(w)
    if const_expr(cfg.keeps_sums):
        send_sum(mail, smem.kept, above, at, cfg.cluster)
    cute.arch.sync_threads()
    n = smem.count_limit[0]
    if at.warp == 0 and at.lane < cfg.cluster:
        send(mail, smem.listed, cfg.cluster + at.rank, Uint32(n), at.lane, cfg.cluster)
    n = n if n < TIED else Int32(TIED)
    announce(mail, 12 * n + (4 + 8 * cfg.warps * cfg.keeps_sums), at, cfg.cluster)


@cute.jit
def halves(tied: cute.Tensor) -> cute.Tensor:
    """The entries as pairs of words."""
    return cute.make_tensor(cute.recast_ptr(tied.iterator, dtype=Int64), cute.make_layout(cute.size(tied) // 2))


@cute.jit
def tied_entry(cfg: Constexpr, smem: Scratch, i: Int32):
    """(first word of the i-th of the deciding elements, one of every CTA in turn; whether it exists)."""
    r, place = i % cfg.cluster, i // cfg.cluster
    is_there = place < Int32(smem.listed[cfg.cluster + r])
    return 4 * (r * TIED + (place if is_there else Int32(0))), is_there


@cute.jit
def decide(cfg: Constexpr, smem: Scratch, tied: cute.Tensor, most: Int32, above: Int64, limit: Int64):
    """Find the smallest value kept among the deciding bin's elements (to smem.threshold) and complete the kept mass of every warp."""
    at = this_thread(cfg.warps, cfg.cluster)
    sub = at.lane % GROUP
    per_warp = 32 // GROUP
    low, high = words_of(smem.kept, cfg.row_warps)
    for first in cutlass.range(at.warp * per_warp, cfg.cluster * most, cfg.warps * per_warp, unroll=1):
        flat = first + at.lane // GROUP
        entry, is_there = tied_entry(cfg, smem, flat)
        x = tied[entry].bitcast(Float32)
        larger, equal = Int64(0), Int64(0)
        for i in cutlass.range(sub, cfg.cluster * most, GROUP, unroll=2):
            place, is_other = tied_entry(cfg, smem, i)
            other = tied[place].bitcast(Float32)
            w = Int64(Uint32(tied[place + 1])) if is_other else Int64(0)
            larger += w if other > x else Int64(0)
            equal += w if other == x else Int64(0)
        before = above + group_sum(larger)
        through = before + group_sum(equal)
        if is_there and sub == 0 and before < limit:
            if through >= limit:
                smem.threshold[0] = order_key(x)  # equal elements write the same
            if const_expr(cfg.keeps_sums):
                add_wide(low, high, 2 * Int32(tied[entry + 2]), Uint32(tied[entry + 1]))
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
def search_nucleus(cfg: Constexpr, row: Row, smem: Scratch, met: Int32, p: Float32):
    """(smallest key that top-p keeps, whether it was found, `met`), the same in the whole cluster. After the meeting for the samples.

    When it was found and cfg.keeps_sums, smem.kept holds every warp's kept mass. Ends with a barrier of the CTA.
    """
    at = this_thread(cfg.warps, cfg.cluster)
    words = pool(cfg, smem)
    key, is_found = Uint32(KEY_NEG_INF), Boolean(False)
    lowest, highest = find_window(cfg, row, smem, p)
    top = cute.arch.fmin(highest, row.maximum)
    scale = divide(Float32(FINE_BINS), cute.arch.fmax(top - lowest, Float32(1e-30)))

    own, own_above, inside = add_up(cfg, row, lowest, highest)
    mail = Mail(smem.mail, met)
    send_sum(mail, smem.sums, own, at, cfg.cluster)
    crowded = Int32(cute.arch.warp_redux_sync(Int32(cute.arch.popc(inside)), "add")) > 16 * cfg.chunks * cfg.vector
    sent = own_above
    if crowded:
        sent = Int64(CROWDED) if at.lane == 0 else Int64(0)
    else:
        fill_fine_bins(cfg, row, words.fine, inside, top, scale)
    send_sum(mail, smem.above, sent, at, cfg.cluster)
    sync_for_copies(cfg.cluster)
    send_words(mail, words.fines, at.rank * (2 * FINE_BINS), words.fine, 2 * FINE_BINS, at, cfg.warps, cfg.cluster)
    announce(mail, Int32(16 * cfg.warps + 8 * FINE_BINS), at, cfg.cluster)
    met = meet(mail, cfg.cluster)

    total = total_of(smem.sums, cfg.row_warps, at)
    above = total_of(smem.above, cfg.row_warps, at)
    limit = nucleus(p, total)
    deciding = Int32(-1)
    if above < limit:
        deciding = find_fine_bin(cfg, smem, words.fines, above, limit)
    if deciding >= 0:
        mail = Mail(smem.mail, met)
        send_decision(cfg, row, smem, mail, words.tied, inside, deciding, own_above, top, scale)
        met = meet(mail, cfg.cluster)
        most = most_listed(cfg, smem, cfg.cluster)
        if most <= TIED:
            decide(cfg, smem, words.tied, most, smem.answer_mass[0], limit)
            key = Uint32(smem.threshold[0])
            is_found = Boolean(True)
    if not is_found:
        cute.arch.sync_threads()  # the levels clear the pool
    return key, is_found, met
