"""The exact threshold of any row, however many elements it keeps or ties: histograms of counts and masses, level by level.

    cut      histogram of the *thread maxima*: a bin with k of them at or above it bounds the top-k threshold from below, so the next
             level counts few elements instead of the vocabulary
    level 0  counts and masses in 1024 bins; logits: linear in (max - x), which spreads any bell curve over hundreds of bins and keeps
             shared-memory atomics from colliding; probs: logarithmic (the float's own bits)
    level n  the bin where top-k or top-p is reached, split by 1024 on the exact 32-bit key, until it holds one distinct value

Every CTA sums its peers' bins through distributed shared memory and scans them itself: nothing is broadcast, and one barrier per level is
enough. Histograms 1 and 2 alternate between levels, so a buffer is cleared at least one barrier after its last reader; histogram 0
(level 0) is kept, because top-k-first looks for top-p's limit in it again. Peers read until the last level: the caller ends with a barrier.
Source: radix selection, Alabi et al., JEA 17 (2012).
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Float32, Int32, Int64, Uint32, const_expr

from .device import KEY_NEG_INF, add_wide, key_value, nucleus, order_key, warp_inclusive_sum
from .device_cluster import Mail, Thread, peer_load, peer_load_i64, row_sync, share_sum, this_thread, total_of
from .device_row import Row, chunk, counts, loop_bound, mass, total_mass
from .device_shared import BINS, LOG2_BINS, Scratch, clear, part

BINADES = 32  # a mass below 2**-32 of the largest is zero, so level 0 never looks further down
COARSE_SHIFT = 23 + 5 - LOG2_BINS  # 2**23 keys per binade, BINADES = 2**5
NO_COUNT = 0x7FFFFFFF
NO_MASS = 1 << 62


class Bins(NamedTuple):
    """Three histograms side by side: [3 * BINS] each."""

    count: cute.Tensor
    low: cute.Tensor
    high: cute.Tensor


@cute.jit
def bins(cfg: Constexpr, smem: Scratch) -> Bins:
    mass_at = 3 * BINS if const_expr(cfg.has_p) else 0
    return Bins(part(smem, 0, 3 * BINS), part(smem, mass_at, 3 * BINS), part(smem, 2 * mass_at, 3 * BINS))


@cute.jit
def where(cfg: Constexpr) -> Thread:
    return this_thread(cfg.warps, cfg.cluster)


# ---- bins -----------------------------------------------------------------------------------------------------------------------------


@cute.jit
def bin_scale(cfg: Constexpr, row: Row) -> Float32:
    """Logits: level-0 bins per unit of logit; 2**-BINADES of the largest mass is the last bin."""
    return row.scale * Float32(BINS / BINADES)


@cute.jit
def coarse_bin(cfg: Constexpr, row: Row, x: Float32) -> Int32:
    """Level-0 bin of x, 0 for the maximum; never increases with x. Everything far below shares the last bin."""
    if const_expr(cfg.is_logits):
        return Int32(cute.arch.fmin((row.maximum - x) * bin_scale(cfg, row), Float32(BINS - 1)))
    distance = (order_key(row.maximum) - order_key(x)) >> Uint32(COARSE_SHIFT)
    return Int32(distance) if distance < Uint32(BINS) else Int32(BINS - 1)


@cute.jit
def bin_shift(span: Uint32) -> Uint32:
    """Smallest s with (span >> s) < BINS."""
    length = Int32(32) - Int32(cute.arch.clz(span))
    return Uint32(length - LOG2_BINS) if length > LOG2_BINS else Uint32(0)


@cute.jit
def coarse_range(cfg: Constexpr, row: Row, b: Int32):
    """(lowest, highest) key of level-0 bin b."""
    top = order_key(row.maximum)
    if const_expr(cfg.is_logits):
        low = lowest_key(cfg, row, b)
        high = top
        if b > 0:
            high = lowest_key(cfg, row, b - 1) - Uint32(1)
        return low, high
    high = top - (Uint32(b) << Uint32(COARSE_SHIFT))
    low = high - ((Uint32(1) << Uint32(COARSE_SHIFT)) - Uint32(1))
    return low if b < BINS - 1 else Uint32(KEY_NEG_INF), high


@cute.jit
def lowest_key(cfg: Constexpr, row: Row, b: Int32) -> Uint32:
    """Smallest key whose level-0 bin is <= b: the rounding of coarse_bin is inverted exactly, 32 probes of a warp at a time."""
    lane = where(cfg).lane
    low, high = Uint32(KEY_NEG_INF), order_key(row.maximum)
    for _ in cutlass.range(7, unroll=1):  # 32 bits, 5 per round
        step = ((high - low) >> Uint32(5)) + Uint32(1)
        probe = low + Uint32(lane) * step
        probe = probe if probe < high else high
        ballot = cute.arch.vote_ballot_sync(coarse_bin(cfg, row, key_value(probe)) <= b)
        first = Uint32(cute.arch.popc((ballot & -ballot) - Int32(1)))  # first lane that holds; 32 if none
        reach = low + first * step
        if first > 0:
            low = low + (first - Uint32(1)) * step + Uint32(1)
        if first < 32 and reach < high:
            high = reach
        low = low if low < high else high
    return high


@cute.jit
def clear_histogram(cfg: Constexpr, hist: Bins, buffer: Int32):
    tid = cute.arch.thread_idx()[0]
    for j in cutlass.range_constexpr(BINS // cfg.threads):
        i = buffer * BINS + j * cfg.threads + tid
        hist.count[i] = Uint32(0)
        if const_expr(cfg.has_p):
            hist.low[i] = Uint32(0)
            hist.high[i] = Uint32(0)


# ---- tallies --------------------------------------------------------------------------------------------------------------------------


@cute.jit
def tally_coarse(cfg: Constexpr, row: Row, hist: Bins, last_bin: Int32, smallest: Float32, use_k, use_p):
    """Level 0, into histogram 0. Counts only if top-k asks, masses only if top-p does."""
    for c in cutlass.range(loop_bound(cfg, row), unroll=1):
        x = chunk(cfg, row, c)
        for j in cutlass.range_constexpr(cfg.vector):
            b = coarse_bin(cfg, row, x[j])
            if b <= last_bin and counts(cfg, x[j]):
                if const_expr(cfg.has_k):
                    if use_k:
                        cute.arch.atomic_add(hist.count.iterator + b, Uint32(1), sem="relaxed", scope="cta")
                if const_expr(cfg.has_p):
                    if use_p:
                        w = mass(cfg, row, x[j])
                        if w > smallest:
                            add_wide(hist.low, hist.high, b, Uint32(w))


@cute.jit
def tally_keys(cfg: Constexpr, row: Row, hist: Bins, low: Uint32, high: Uint32, shift: Uint32, buffer: Int32, use_p):
    """Level >= 1: elements with low <= key <= high, bins of 2**shift keys from high down."""
    for c in cutlass.range(loop_bound(cfg, row), unroll=1):
        x = chunk(cfg, row, c)
        for j in cutlass.range_constexpr(cfg.vector):
            distance = high - order_key(x[j])
            if distance <= high - low and counts(cfg, x[j]):
                i = buffer * BINS + Int32(distance >> shift)
                cute.arch.atomic_add(hist.count.iterator + i, Uint32(1), sem="relaxed", scope="cta")
                if const_expr(cfg.has_p):
                    if use_p:
                        add_wide(hist.low, hist.high, i, Uint32(mass(cfg, row, x[j])))


# ---- search ---------------------------------------------------------------------------------------------------------------------------


@cute.jit
def set_limits(cfg: Constexpr, smem: Scratch, k_limit: Int32, p_limit: Int64):
    """What the next `find` looks for; in shared memory, where it costs no registers."""
    if cute.arch.thread_idx()[0] == 0:
        smem.count_limit[0] = k_limit
        smem.mass_limit[0] = p_limit


@cute.jit
def find(cfg: Constexpr, smem: Scratch, hist: Bins, buffer: Int32, from_top: Constexpr) -> Int32:
    """First bin, from the top, at which the running count or the running mass reaches its limit; -1 if none does.

    The running sums start at zero (from_top) or at what lies above the bin found last. All threads call this after the barrier that
    completes the histogram. Also left in shared memory: answer = (bin, count above, count), answer_mass = (mass above, mass,
    mass of the whole histogram).
    """
    cute.arch.sync_threads()  # everybody has read the previous answer
    at = where(cfg)
    per, cluster = BINS // cfg.threads, cfg.cluster
    count, all_mass = Int32(0), Int64(0)
    if const_expr(not from_top):
        count = smem.answer[1]
        all_mass = smem.answer_mass[0]
    bin_counts = cute.make_rmem_tensor(per, Int32)
    bin_masses = cute.make_rmem_tensor(per, Int64)
    first = buffer * BINS + at.tid * per
    for j in cutlass.range_constexpr(per):
        bin_counts[j] = Int32(0)
        bin_masses[j] = Int64(0)
    for step in cutlass.range(cluster, unroll=1):
        peer = (at.rank + step) % cluster  # every CTA starts with another peer
        for j in cutlass.range_constexpr(per):
            bin_counts[j] = bin_counts[j] + Int32(peer_load(hist.count, first + j, peer, cluster))
    if const_expr(cfg.has_p):
        for step in cutlass.range(cluster, unroll=1):
            peer = (at.rank + step) % cluster
            for j in cutlass.range_constexpr(per):
                bin_masses[j] = bin_masses[j] + peer_load_i64(hist.low, hist.high, first + j, peer, cluster)
    my_count, my_mass = Int32(0), Int64(0)
    for j in cutlass.range_constexpr(per):
        my_count += bin_counts[j]
        my_mass += bin_masses[j]
    count_to = warp_inclusive_sum(my_count, at.lane)
    mass_to = Int64(0)
    if const_expr(cfg.has_p):
        mass_to = warp_inclusive_sum(my_mass, at.lane)
    if at.lane == 31:
        smem.scan[at.warp] = count_to
        smem.scan_mass[at.warp] = mass_to
    count += count_to - my_count
    all_mass += mass_to - my_mass
    if at.tid == 0:
        smem.answer[0] = Int32(-1)
    cute.arch.sync_threads()
    for w in cutlass.range(at.warp, unroll=1):
        count += smem.scan[w]
        if const_expr(cfg.has_p):
            all_mass += smem.scan_mass[w]
    k_limit, p_limit = smem.count_limit[0], smem.mass_limit[0]
    for j in cutlass.range_constexpr(per):
        before = count >= k_limit or all_mass >= p_limit
        after = count + bin_counts[j] >= k_limit or all_mass + bin_masses[j] >= p_limit
        if after and not before:  # true in exactly one bin, because the sums never fall
            smem.answer[0] = at.tid * per + j
            smem.answer[1] = count
            smem.answer[2] = bin_counts[j]
            smem.answer_mass[0] = all_mass
            smem.answer_mass[1] = bin_masses[j]
        count += bin_counts[j]
        all_mass += bin_masses[j]
    if at.tid == cfg.threads - 1:
        smem.answer_mass[2] = all_mass
    cute.arch.sync_threads()
    return smem.answer[0]


@cute.jit
def cut(cfg: Constexpr, row: Row, smem: Scratch, hist: Bins, k: Int32) -> Int32:
    """A level-0 bin that top-k's threshold cannot lie below: k thread maxima are in it or above. The last bin if there are fewer."""
    thread_max = -Float32.inf
    for c in cutlass.range(loop_bound(cfg, row), unroll=1):
        x = chunk(cfg, row, c)
        for j in cutlass.range_constexpr(cfg.vector):
            thread_max = cute.arch.fmax(thread_max, x[j])
    if counts(cfg, thread_max):
        cute.arch.atomic_add(hist.count.iterator + (BINS + coarse_bin(cfg, row, thread_max)), Uint32(1), sem="relaxed", scope="cta")
    set_limits(cfg, smem, k, Int64(NO_MASS))
    row_sync(cfg.cluster)
    found = find(cfg, smem, hist, Int32(1), True)
    return found if found >= 0 else Int32(BINS - 1)


@cute.jit
def refine(cfg: Constexpr, row: Row, smem: Scratch, hist: Bins, coarse: Int32, use_p, buffer: Int32):
    """Split the bin until one distinct value (or one element) is left. Returns (threshold key, buffer for the next level)."""
    low, high = coarse_range(cfg, row, coarse)
    while low < high and smem.answer[2] != 1:
        shift = bin_shift(high - low)
        clear_histogram(cfg, hist, buffer)
        cute.arch.sync_threads()
        tally_keys(cfg, row, hist, low, high, shift, buffer, use_p)
        row_sync(cfg.cluster)
        found = find(cfg, smem, hist, buffer, False)
        buffer = Int32(3) - buffer
        if found >= 0:
            high = high - (Uint32(found) << shift)
            span = (Uint32(1) << shift) - Uint32(1)
            if high - low > span:
                low = high - span
        else:
            high = low  # cannot happen: the bin was chosen because it reaches a limit
    return low, buffer


@cute.jit
def search_levels(cfg: Constexpr, row: Row, smem: Scratch, met: Int32, k: Int32, p: Float32, use_k, use_p):
    """(smallest key that top-k and top-p keep, `met`). Every value it branches on is the same in the whole cluster."""
    hist = bins(cfg, smem)
    clear(cfg, smem, 0, 3 * BINS)
    if const_expr(cfg.has_p):
        clear(cfg, smem, 3 * BINS, 6 * BINS)
    at = where(cfg)
    p_limit = Int64(NO_MASS)
    smallest = Float32(0.0)  # masses up to this cannot be needed to reach p_limit
    last_bin = Int32(BINS - 1)
    after_k = Boolean(False)  # top-p's limit is a share of what top-k leaves, known once that is
    if const_expr(cfg.k_first):
        after_k = use_k and use_p
    if const_expr(cfg.has_p):
        if use_p and not after_k:
            met = share_sum(Mail(smem.mail, met), smem.sums, total_mass(cfg, row), at, cfg.warps, cfg.cluster)
            total = total_of(smem.sums, cfg.row_warps, at)
            p_limit = nucleus(p, total)
            # vocab * smallest <= total - p_limit, so the masses above `smallest` still reach p_limit. Rounded down generously.
            smallest = Float32(total - p_limit) * cute.arch.rcp_approx(Float32(row.vocab)) * Float32(0.999)
    cute.arch.sync_threads()  # the pool is clear
    if const_expr(cfg.has_k):
        if use_k:
            last_bin = cut(cfg, row, smem, hist, k)
    key = Uint32(KEY_NEG_INF)
    set_limits(cfg, smem, k if use_k else Int32(NO_COUNT), p_limit)
    tally_coarse(cfg, row, hist, last_bin, smallest, use_k, use_p)
    row_sync(cfg.cluster)
    rounds = Int32(1)  # two when top-p looks again in what top-k has left
    if after_k:
        rounds = Int32(2)
    buffer = Int32(1)  # the cut's histogram: its last reader arrived at the barrier of level 0
    while rounds > 0:
        found = find(cfg, smem, hist, Int32(0), True)
        if found >= 0:
            low, buffer = refine(cfg, row, smem, hist, found, use_p, buffer)
            key = low if low > key else key
        rounds = rounds - 1
        if const_expr(cfg.k_first):
            if rounds > 0:
                reached = smem.answer_mass[2]  # fewer than k tokens: top-k keeps them all
                if found >= 0:
                    reached = smem.answer_mass[0] + smem.answer_mass[1]
                set_limits(cfg, smem, Int32(NO_COUNT), nucleus(p, reached))
    return key, met
