"""Top-k for k up to a quarter of a CTA's threads, without a pass over the row: a short list of candidates decides everything.

    cut      in every CTA: a histogram of its thread maxima says which values at least k of them reach. An element below has k elements
             above it in this CTA alone, so it is not among the row's k largest
    list     the few threads whose maximum survives the cut read their elements again and send the survivors, value and index, to CTA 0
    meeting  with the row's maximum, everybody's counts arrive too; a list that does not fit sends the row to ``device_levels``
    rank     CTA 0 cuts the lists once more, as one, then eight lanes a candidate count how many are larger and what they weigh: that is all
             that top-k, top-p and min-p ask about it
    draw     the weights of the kept candidates with a smaller index, likewise; the candidate whose stretch holds the target is the token

Only integers are added, so the order in which candidates arrive changes nothing.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr

from .device import GROUP, divide, group_sum, nucleus, order_key, warp_inclusive_sum
from .device_cluster import Mail, Thread, announce, send, this_thread
from .device_row import Row, chunk, counts, loop_bound, mass, passes_floor, position, real_mass
from .device_shared import BINS, Scratch, clear, part, shortlist_size


class Cut(NamedTuple):
    """Values with (top - position) * scale < limit survive."""

    top: Float32
    scale: Float32
    limit: Float32


class Shortlist(NamedTuple):
    """[cluster * shortlist_size] each. kept: the mass again, or 0 when a filter drops the candidate."""

    value: cute.Tensor
    index: cute.Tensor
    mass: cute.Tensor
    kept: cute.Tensor


@cute.jit
def shortlist(cfg: Constexpr, smem: Scratch) -> Shortlist:
    size = cfg.cluster * shortlist_size(cfg)
    return Shortlist(
        part(smem, BINS, size),
        part(smem, BINS + size, size),
        part(smem, BINS + 2 * size, size),
        part(smem, BINS + 3 * size, size),
    )


@cute.jit
def survives(cfg: Constexpr, cut: Cut, x: Float32):
    return counts(cfg, x) and (cut.top - position(cfg, x)) * cut.scale < cut.limit


@cute.jit
def cut_values(cfg: Constexpr, smem: Scratch, values: cute.Tensor, size: Constexpr, k: Int32) -> Cut:
    """A cut that at least k of the CTA's values survive (all, if there are fewer). `size` values per thread; -inf (probs: 0) is none.

    The histogram, the pool's first BINS words, is clear and stays used.
    """
    at = this_thread(cfg.warps, cfg.cluster)
    high, low = -Float32.inf, Float32.inf
    for i in cutlass.range_constexpr(size):
        if counts(cfg, values[i]):
            high = cute.arch.fmax(high, position(cfg, values[i]))
            low = cute.arch.fmin(low, position(cfg, values[i]))
    for step in cutlass.range_constexpr(5):
        high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, 1 << step))
        low = cute.arch.fmin(low, cute.arch.shuffle_sync_bfly(low, 1 << step))
    if at.lane == 0:
        smem.scan[at.warp] = high.bitcast(Int32)
        smem.answer[at.warp] = low.bitcast(Int32)
    cute.arch.sync_threads()
    high, low = -Float32.inf, Float32.inf
    if at.lane < cfg.warps:
        high = smem.scan[at.lane].bitcast(Float32)
        low = smem.answer[at.lane].bitcast(Float32)
    for step in cutlass.range_constexpr(5):
        high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, 1 << step))
        low = cute.arch.fmin(low, cute.arch.shuffle_sync_bfly(low, 1 << step))
    span = cute.arch.fmin(cute.arch.fmax(high - low, Float32(1e-30)), Float32(1e30))
    scale = divide(Float32(BINS - 1), span)
    for i in cutlass.range_constexpr(size):
        if counts(cfg, values[i]):
            b = Int32(cute.arch.fmin((high - position(cfg, values[i])) * scale, Float32(BINS - 1)))
            cute.arch.atomic_add(smem.pool.iterator + b, Uint32(1), sem="relaxed", scope="cta")
    cute.arch.sync_threads()
    per = BINS // cfg.threads
    found = cute.make_rmem_tensor(per, Int32)
    mine = Int32(0)
    for j in cutlass.range_constexpr(per):
        found[j] = Int32(smem.pool[at.tid * per + j])
        mine += found[j]
    to_here = warp_inclusive_sum(mine, at.lane)
    if at.lane == 31:
        smem.scan[at.warp] = to_here
    if at.tid == 0:
        smem.answer[0] = Int32(BINS - 1)
    cute.arch.sync_threads()
    earlier = Int32(0)
    if at.lane < at.warp:
        earlier = smem.scan[at.lane]
    above = to_here - mine + cute.arch.warp_redux_sync(earlier, "add")
    for j in cutlass.range_constexpr(per):
        if above < k and above + found[j] >= k:
            smem.answer[0] = at.tid * per + j
        above += found[j]
    cute.arch.sync_threads()
    last = smem.answer[0]
    limit = Float32(last + 1) if last < BINS - 1 else Float32.inf
    return Cut(high, scale, limit)


@cute.jit
def send_shortlist(cfg: Constexpr, row: Row, smem: Scratch, mail: Mail, size: Int32, thread_max: Float32, k: Int32):
    """This CTA's survivors, to CTA 0; how many there are, to everybody. Announces `size` bytes more."""
    at = this_thread(cfg.warps, cfg.cluster)
    lists, most = shortlist(cfg, smem), shortlist_size(cfg)
    values = cute.make_rmem_tensor(1, Float32)
    values[0] = thread_max
    cut = cut_values(cfg, smem, values, 1, k)
    if survives(cfg, cut, thread_max):
        for c in cutlass.range(loop_bound(cfg, row), unroll=1):
            x = chunk(cfg, row, c)
            for j in cutlass.range_constexpr(cfg.vector):
                if survives(cfg, cut, x[j]):
                    n = cute.arch.atomic_add(smem.count_limit.iterator, Int32(1), sem="relaxed", scope="cta")
                    if n < most:
                        to = at.rank * most + n
                        send(mail, lists.value, to, x[j].bitcast(Uint32), Int32(0), cfg.cluster)
                        send(mail, lists.index, to, Uint32((row.first_vector + c * 32) * cfg.vector + j), Int32(0), cfg.cluster)
    cute.arch.sync_threads()
    found = smem.count_limit[0]
    if at.warp == 0 and at.lane < cfg.cluster:
        send(mail, smem.listed, at.rank, Uint32(found), at.lane, cfg.cluster)
    found = found if found < most else Int32(most)
    announce(mail, size + 4 + (8 * found if at.lane == 0 else Int32(0)), at, cfg.cluster)


@cute.jit
def fits(cfg: Constexpr, smem: Scratch):
    """Whether every CTA's list was long enough. After the meeting; the same in all CTAs."""
    most = Int32(0)
    for r in cutlass.range_constexpr(cfg.cluster):
        listed = Int32(smem.listed[r])
        most = listed if listed > most else most
    return most <= shortlist_size(cfg)


@cute.jit
def gather(cfg: Constexpr, row: Row, smem: Scratch, k: Int32) -> Int32:
    """CTA 0 closes up the lists, without what a second cut drops, and weighs what is left. Returns how many that is."""
    at = this_thread(cfg.warps, cfg.cluster)
    lists, size = shortlist(cfg, smem), shortlist_size(cfg)
    per = (cfg.cluster * size + cfg.threads - 1) // cfg.threads
    values, places = cute.make_rmem_tensor(per, Float32), cute.make_rmem_tensor(per, Uint32)
    clear(cfg, smem, 0, BINS)
    for i in cutlass.range_constexpr(per):
        entry = i * cfg.threads + at.tid
        values[i] = -Float32.inf
        places[i] = Uint32(0)
        if entry < cfg.cluster * size:
            if entry % size < Int32(smem.listed[entry // size]):
                values[i] = lists.value[entry].bitcast(Float32)
                places[i] = Uint32(lists.index[entry])
    if at.tid == 0:
        smem.count_limit[0] = Int32(0)
    cute.arch.sync_threads()
    cut = cut_values(cfg, smem, values, per, k)
    for i in cutlass.range_constexpr(per):
        if survives(cfg, cut, values[i]):
            n = cute.arch.atomic_add(smem.count_limit.iterator, Int32(1), sem="relaxed", scope="cta")
            lists.value[n] = values[i].bitcast(Uint32)
            lists.index[n] = places[i]
            lists.mass[n] = Uint32(mass(cfg, row, values[i]))
    cute.arch.sync_threads()
    return smem.count_limit[0]


@cute.jit
def listed_total(weights: cute.Tensor, n: Int32, at: Thread) -> Int64:
    """Sum of the first n weights, by every warp for itself."""
    mine = Int64(0)
    for i in cutlass.range(at.lane, n, 32, unroll=1):
        mine += Int64(Uint32(weights[i]))
    return cute.arch.shuffle_sync(warp_inclusive_sum(mine, at.lane), 31)


@cute.jit
def filter_shortlist(
    cfg: Constexpr, row: Row, smem: Scratch, n: Int32, k: Int32, p: Float32, use_p, p_limit: Int64, floor: Float32
) -> Uint32:
    """Fill `kept`: a candidate stays iff fewer than k are larger, the mass above it is below p's limit, and min-p lets it.

    p_limit counts when top-p is a share of the whole row's mass; else p is a share of what top-k leaves. Returns the smallest key kept, for
    this thread's candidates; the caller takes the minimum. Ends with a barrier.
    """
    at = this_thread(cfg.warps, cfg.cluster)
    lists = shortlist(cfg, smem)
    lowest = Uint32(0xFFFFFFFF)
    if const_expr(cfg.k_first):
        if use_p:  # what top-k leaves, first
            for first in cutlass.range(at.warp * (32 // GROUP), n, cfg.warps * (32 // GROUP), unroll=1):
                e, is_mine = candidate(first, n, at)
                above, _ = above_of(lists, n, lists.value[e].bitcast(Float32), at)
                weight = Uint32(lists.mass[e])
                if is_mine:
                    lists.kept[e] = weight if above < k else Uint32(0)
            cute.arch.sync_threads()
            p_limit = nucleus(p, listed_total(lists.kept, n, at))
            cute.arch.sync_threads()
    for first in cutlass.range(at.warp * (32 // GROUP), n, cfg.warps * (32 // GROUP), unroll=1):
        e, is_mine = candidate(first, n, at)
        x = lists.value[e].bitcast(Float32)
        above, mass_above = above_of(lists, n, x, at)
        keep = above < k and mass_above < p_limit
        if const_expr(cfg.spec.min_p != "none"):
            keep = keep and passes_floor(cfg, x, real_mass(cfg, row, x), floor)
        weight = Uint32(lists.mass[e])
        if is_mine:
            lists.kept[e] = weight if keep else Uint32(0)
        if is_mine and keep:
            key = order_key(x)
            lowest = key if key < lowest else lowest
    cute.arch.sync_threads()
    return lowest


@cute.jit
def candidate(first: Int32, n: Int32, at: Thread):
    """(this lane's candidate, of the 32 / GROUP that its warp looks at from `first` on; whether it is there and this lane writes it)."""
    e = first + at.lane // GROUP
    return e if e < n else n - 1, e < n and at.lane % GROUP == 0


@cute.jit
def above_of(lists: Shortlist, n: Int32, x: Float32, at: Thread):
    """(how many of the first n candidates are larger than x, what they weigh), by the GROUP lanes that have the same x."""
    above, mass_above = Int32(0), Int64(0)
    for i in cutlass.range(at.lane % GROUP, n, GROUP, unroll=4):
        if lists.value[i].bitcast(Float32) > x:
            above += Int32(1)
            mass_above += Int64(Uint32(lists.mass[i]))
    return group_sum(above), group_sum(mass_above)


@cute.jit
def find_drawn(cfg: Constexpr, smem: Scratch, n: Int32, target: Int64):
    """(this thread's candidate that the running sum of kept masses, in index order, brings past the target or -1, its mass)."""
    lists = shortlist(cfg, smem)
    drawn, drawn_mass = Int32(-1), Uint32(0)
    at = this_thread(cfg.warps, cfg.cluster)
    for first in cutlass.range(at.warp * (32 // GROUP), n, cfg.warps * (32 // GROUP), unroll=1):
        e, is_mine = candidate(first, n, at)
        own = Uint32(lists.kept[e])
        index = Uint32(lists.index[e])
        before = Int64(0)
        for i in cutlass.range(at.lane % GROUP, n, GROUP, unroll=4):
            if Uint32(lists.index[i]) < index:
                before += Int64(Uint32(lists.kept[i]))
        before = group_sum(before)
        if is_mine and before <= target and target < before + Int64(own):
            drawn = Int32(index)
            drawn_mass = own
    return drawn, drawn_mass
