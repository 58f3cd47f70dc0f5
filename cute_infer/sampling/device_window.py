"""Where a row's top-p threshold probably lies, from a sample of the row: the first two steps of ``device_nucleus``."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr

from .device import divide, key_value, order_key, warp_inclusive_sum
from .device_cluster import push, this_thread
from .device_row import Row, counts, real_mass
from .device_shared import BINS, FINE_BINS, LISTED, TIED, Scratch, part

BINS_PER_BINADE = 32
SAMPLE_SHIFT = 23 - 5  # keys of probabilities: 2**23 per binade
SAMPLE_WORDS = BINS // 2  # two counts of 16 bits
# times sqrt(p) (1 - p)**0.75: half the window's share of a row of WINDOW_VOCAB elements; the sample errs by about a sixth of it
WINDOW = 0.04
WINDOW_VOCAB = float(1 << 17)
CROWD = 256  # a bin with so many elements is cut where the limit falls, one with fewer is taken whole
SPARSE = 32  # so few weigh much each and one may have been missed: there the window may be
WIDE = 0.05  # of the mass to either side
FAR = float(1 << 29)  # bin numbers stay below


class Pool(NamedTuple):
    """Words of the pool. The first four parts are this CTA's own, the others have a section for every CTA of the cluster."""

    sample: cute.Tensor  # [SAMPLE_WORDS]
    fine: cute.Tensor  # [2 * FINE_BINS] low words, then high words
    extra: cute.Tensor  # [2 * warps] kept masses of listed elements, per warp
    listed: cute.Tensor  # [LISTED] elements of the window: thread * 32 + chunk * vector + j
    samples: cute.Tensor  # [cluster, SAMPLE_WORDS]; the two below take its place after barrier "total"
    tied: cute.Tensor  # [3, cluster, TIED] values, masses and warps of the deciding bin's elements
    extras: cute.Tensor  # [2, row_warps]
    fines: cute.Tensor  # [cluster, 2 * FINE_BINS]


@cute.jit
def pool(cfg: Constexpr, smem: Scratch) -> Pool:
    """Its own counters lie in the first BINS words, which the kernel clears before it reads the row."""
    fine = SAMPLE_WORDS
    extra = fine + 2 * FINE_BINS
    samples = BINS
    tied = samples
    extras = tied + 3 * cfg.cluster * TIED
    fines = samples + cfg.cluster * SAMPLE_WORDS
    listed = fines + cfg.cluster * 2 * FINE_BINS
    return Pool(
        part(smem, 0, SAMPLE_WORDS),
        part(smem, fine, 2 * FINE_BINS),
        part(smem, extra, 2 * cfg.warps),
        part(smem, listed, LISTED),
        part(smem, samples, cfg.cluster * SAMPLE_WORDS),
        part(smem, tied, 3 * cfg.cluster * TIED),
        part(smem, extras, 2 * cfg.row_warps),
        part(smem, fines, cfg.cluster * 2 * FINE_BINS),
    )


# ---- sample ---------------------------------------------------------------------------------------------------------------------------


@cute.jit
def sample_bin(cfg: Constexpr, scale: Float32, x: Float32) -> Int32:
    """Number of x's bin, rising with x and the same in every CTA. scale: log2(e) / T; unused for probabilities."""
    if const_expr(cfg.is_logits):
        place = x * (scale * Float32(BINS_PER_BINADE))
        return Int32(cute.math.floor(cute.arch.fmin(cute.arch.fmax(place, Float32(-FAR)), Float32(FAR))))
    return Int32(order_key(x) >> Uint32(SAMPLE_SHIFT))


@cute.jit
def count_sample(cfg: Constexpr, sample: cute.Tensor, top: Int32, scale: Float32, x: Float32, weight: Constexpr):
    """Count x, if its mass is one of the upper 32 binades."""
    if counts(cfg, x):
        b = top - sample_bin(cfg, scale, x)
        if b < BINS:
            add = Uint32(weight) << (Uint32(b & 1) << Uint32(4))
            cute.arch.atomic_add(sample.iterator + (b >> 1), add, sem="relaxed", scope="cta")


@cute.jit
def push_samples(cfg: Constexpr, row: Row, smem: Scratch, thread_max: Float32, scale: Float32):
    """This CTA's sample and the number of its top bin, to everybody. Ends before the barrier."""
    at = this_thread(cfg.warps, cfg.cluster)
    words = pool(cfg, smem)
    high = thread_max
    for step in cutlass.range_constexpr(5):
        high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, 1 << step))
    if at.lane == 0:
        smem.scan[at.warp] = high.bitcast(Int32)
    cute.arch.sync_threads()
    high = -Float32.inf
    if at.lane < cfg.warps:
        high = smem.scan[at.lane].bitcast(Float32)
    for step in cutlass.range_constexpr(5):
        high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, 1 << step))
    top = sample_bin(cfg, scale, high)
    if at.warp == 0 and at.lane < cfg.cluster:
        push(smem.listed, at.rank, top.bitcast(Uint32), at.lane, cfg.cluster)
    for c in cutlass.range(cfg.chunks, unroll=4):
        x = row.values[0, at.tid, c].to(Float32)
        if x != thread_max:
            count_sample(cfg, words.sample, top, scale, x, cfg.vector)
    count_sample(cfg, words.sample, top, scale, thread_max, 1)
    cute.arch.sync_threads()
    for i in cutlass.range_constexpr((cfg.cluster * SAMPLE_WORDS + cfg.threads - 1) // cfg.threads):
        j = i * cfg.threads + at.tid
        if j < cfg.cluster * SAMPLE_WORDS:
            word = j % SAMPLE_WORDS
            push(words.samples, at.rank * SAMPLE_WORDS + word, Uint32(words.sample[word]), j // SAMPLE_WORDS, cfg.cluster)


# ---- window ---------------------------------------------------------------------------------------------------------------------------


@cute.jit
def value_at(cfg: Constexpr, row: Row, top: Int32, depth: Float32) -> Float32:
    """The value `depth` bins below the upper edge of the row's top bin."""
    if const_expr(cfg.is_logits):
        return divide(Float32(top + 1) - depth, row.scale * Float32(BINS_PER_BINADE))
    below = Uint32(depth * Float32(1 << SAMPLE_SHIFT))
    return key_value((Uint32(top + 1) << Uint32(SAMPLE_SHIFT)) - below)


@cute.jit
def find_window(cfg: Constexpr, row: Row, smem: Scratch, p: Float32):
    """(lowest, highest): top-p's threshold is estimated to be one of lowest <= x < highest."""
    at = this_thread(cfg.warps, cfg.cluster)
    samples = pool(cfg, smem).samples
    top = Int32(smem.listed[0])
    for r in cutlass.range_constexpr(1, cfg.cluster):
        other = Int32(smem.listed[r])
        top = other if other > top else top
    per = BINS // cfg.threads
    found, masses = cute.make_rmem_tensor(per, Int32), cute.make_rmem_tensor(per, Int64)
    for j in cutlass.range_constexpr(per):
        found[j] = Int32(0)
    for r in cutlass.range_constexpr(cfg.cluster):
        shift = top - Int32(smem.listed[r])
        for j in cutlass.range_constexpr(per):
            b = at.tid * per + j - shift
            if b >= 0:
                word = Uint32(samples[r * SAMPLE_WORDS + (b >> 1)])
                found[j] = found[j] + Int32((word >> (Uint32(b & 1) << Uint32(4))) & Uint32(0xFFFF))
    mine = Int64(0)
    for j in cutlass.range_constexpr(per):
        middle = value_at(cfg, row, top, Float32(at.tid * per + j) + Float32(0.5))
        masses[j] = Int64(real_mass(cfg, row, middle) * Float32(found[j]))
        mine += masses[j]
    to_here = warp_inclusive_sum(mine, at.lane)
    if at.lane == 31:
        smem.scan_mass[at.warp] = to_here
    if at.tid == 0:
        for side in cutlass.range_constexpr(2):
            smem.answer[2 * side] = Float32(0.0).bitcast(Int32)
            smem.answer[2 * side + 1] = Float32(BINS - 1).bitcast(Int32)
            smem.answer[4 + side] = Int32(0)
    cute.arch.sync_threads()
    of_warp = Int64(0)
    if at.lane < cfg.warps:
        of_warp = smem.scan_mass[at.lane]
    to_warp = warp_inclusive_sum(of_warp, at.lane)
    total = Float32(cute.arch.shuffle_sync(to_warp, 31))
    above = cute.arch.shuffle_sync(to_warp - of_warp, at.warp) + to_here - mine
    q = cute.arch.fmin(cute.arch.fmax(p, Float32(0.0)), Float32(1.0))
    rest = Float32(1.0) - q
    spread = q * rest * cute.math.sqrt(rest) * divide(Float32(WINDOW_VOCAB), Float32(row.vocab))
    w = Float32(WINDOW) * cute.math.sqrt(spread)
    wide = cute.arch.fmax(w, cute.arch.fmin(Float32(WIDE), rest * Float32(0.5)))
    upper, lower = Int64((q - w) * total), Int64((q + w) * total)
    upper_wide, lower_wide = Int64((q - wide) * total), Int64((q + wide) * total)
    lower = lower if lower > Int64(1) else Int64(1)
    lower_wide = lower_wide if lower_wide > lower else lower
    for j in cutlass.range_constexpr(per):
        after = above + masses[j]
        b = Float32(at.tid * per + j)
        share = divide(Float32(1.0), Float32(masses[j]) + Float32(1.0))
        crowded = found[j] >= CROWD
        if above <= upper and upper < after:
            depth = b + Float32(upper - above) * share if crowded else b - Float32(0.02)
            smem.answer[0] = depth.bitcast(Int32)
            smem.answer[4] = Int32(found[j] < SPARSE)
        if above < lower and lower <= after:
            depth = b + Float32(lower - above) * share if crowded else b + Float32(1.02)
            smem.answer[1] = depth.bitcast(Int32)
            smem.answer[5] = Int32(found[j] < SPARSE)
        if above <= upper_wide and upper_wide < after:
            smem.answer[2] = (b - Float32(0.02)).bitcast(Int32)
        if above < lower_wide and lower_wide <= after:
            smem.answer[3] = (b + Float32(1.02)).bitcast(Int32)
        above = after
    cute.arch.sync_threads()
    first = (smem.answer[2] if smem.answer[4] != 0 else smem.answer[0]).bitcast(Float32)
    last = (smem.answer[3] if smem.answer[5] != 0 else smem.answer[1]).bitcast(Float32)
    highest = Float32.inf
    if first > Float32(0.0):
        highest = value_at(cfg, row, top, first)
    return value_at(cfg, row, top, last), highest
