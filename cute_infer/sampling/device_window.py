"""Where a row's top-p threshold probably lies, from a sample of the row: the first two steps of ``device_nucleus``."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32, const_expr

from .device import divide, key_value, order_key, warp_inclusive_sum
from .device_cluster import Mail, announce, send, send_words, sync_for_copies, this_thread
from .device_row import ONE, Row, real_mass
from .device_shared import BINS, FINE_BINS, SAMPLE_BINS, SAMPLE_WORDS, TIED, Scratch, part

BINS_PER_BINADE = 16
SAMPLE_SHIFT = 23 - 4  # keys of probabilities: 2**23 per binade
HALF = SAMPLE_BINS // 2
# times sqrt(p) (1 - p)**0.75: half the window's share of a row of WINDOW_VOCAB elements; the sample errs by about a sixth of it
WINDOW = 0.04
WINDOW_VOCAB = float(1 << 17)
CROWD = 256  # a bin with so many elements is cut where the limit falls, one with fewer is taken whole
SPARSE = 32  # so few weigh much each and one may have been missed: there the window may be
WIDE = 0.05  # of the mass to either side
FAR = float(1 << 21)  # bin numbers stay below
ROUND = float(3 << 22)  # x + ROUND is rounded to a whole number, which its lower bits hold


class Pool(NamedTuple):
    """Words of the pool. The first two parts are this CTA's own, the others have a section for every CTA of the cluster."""

    sample: cute.Tensor  # [SAMPLE_WORDS]
    fine: cute.Tensor  # [2 * FINE_BINS] lower 16 bits of masses, then the rest
    samples: cute.Tensor  # [cluster, SAMPLE_WORDS]; the next one takes its place after the meeting "total"
    tied: cute.Tensor  # [cluster, TIED, 4] value, mass and warp of the deciding bin's elements
    fines: cute.Tensor  # [cluster, 2 * FINE_BINS]


@cute.jit
def pool(cfg: Constexpr, smem: Scratch) -> Pool:
    """Its own counters lie in the first BINS words, which are clear when a row begins."""
    fines = BINS + cfg.cluster * max(SAMPLE_WORDS, 4 * TIED)
    return Pool(
        part(smem, 0, SAMPLE_WORDS),
        part(smem, SAMPLE_WORDS, 2 * FINE_BINS),
        part(smem, BINS, cfg.cluster * SAMPLE_WORDS),
        part(smem, BINS, cfg.cluster * 4 * TIED),
        part(smem, fines, cfg.cluster * 2 * FINE_BINS),
    )


# ---- sample ---------------------------------------------------------------------------------------------------------------------------


@cute.jit
def sample_bin(cfg: Constexpr, scale: Float32, x: Float32) -> Int32:
    """Number of x's bin, rising with x and the same in every CTA. scale: log2(e) / T; unused for probabilities."""
    if const_expr(cfg.is_logits):
        place = cute.arch.fmin(cute.arch.fmax(x * (scale * Float32(BINS_PER_BINADE)), Float32(-FAR)), Float32(FAR))
        return (place + Float32(ROUND)).bitcast(Int32)
    return Int32(order_key(x) >> Uint32(SAMPLE_SHIFT))


@cute.jit
def count_sample(cfg: Constexpr, sample: cute.Tensor, top: Int32, scale: Float32, x: Float32, weight: Int32, counts):
    """Count x, if `counts` and its mass is one of the upper 32 binades."""
    b = Uint32(top - sample_bin(cfg, scale, x))
    if counts and b < Uint32(SAMPLE_BINS):
        add = Uint32(weight) if b < Uint32(HALF) else Uint32(weight << 16)
        cute.arch.atomic_add(sample.iterator + Int32(b & Uint32(HALF - 1)), add, sem="relaxed", scope="cta")


@cute.jit
def send_samples(cfg: Constexpr, row: Row, smem: Scratch, mail: Mail, size: Int32, thread_max: Float32, scale: Float32):
    """This CTA's sample and the number of its top bin, to everybody. Announces `size` bytes more."""
    at = this_thread(cfg.warps, cfg.cluster)
    words = pool(cfg, smem)
    high = Uint32(cute.arch.warp_redux_sync(order_key(thread_max), "umax"))
    if at.lane == 0:
        smem.scan[at.warp] = high.bitcast(Int32)
    cute.arch.sync_threads()
    high = Uint32(0)
    if at.lane < cfg.warps:
        high = smem.scan[at.lane].bitcast(Uint32)
    high = Uint32(cute.arch.warp_redux_sync(high, "umax"))
    top = sample_bin(cfg, scale, key_value(high))
    for c in cutlass.range(cfg.chunks, unroll=4):
        x = row.values[0, at.tid, c].to(Float32)
        count_sample(cfg, words.sample, top, scale, x, Int32(cfg.vector), x != thread_max)
    count_sample(cfg, words.sample, top, scale, thread_max, Int32(1), True)
    sync_for_copies(cfg.cluster)
    if at.warp == 0 and at.lane < cfg.cluster:
        send(mail, smem.listed, at.rank, top.bitcast(Uint32), at.lane, cfg.cluster)
    send_words(mail, words.samples, at.rank * SAMPLE_WORDS, words.sample, SAMPLE_WORDS, at, cfg.warps, cfg.cluster)
    announce(mail, size + 4 * (1 + SAMPLE_WORDS), at, cfg.cluster)


# ---- window ---------------------------------------------------------------------------------------------------------------------------


@cute.jit
def value_at(cfg: Constexpr, row: Row, top: Int32, depth: Float32) -> Float32:
    """The value `depth` bins below the upper edge of the row's top bin."""
    if const_expr(cfg.is_logits):
        edge = top.bitcast(Float32) - Float32(ROUND) + Float32(0.5)
        return divide(edge - depth, row.scale * Float32(BINS_PER_BINADE))
    below = Uint32(depth * Float32(1 << SAMPLE_SHIFT))
    return key_value((Uint32(top + 1) << Uint32(SAMPLE_SHIFT)) - below)


@cute.jit
def middle_mass(cfg: Constexpr, row: Row, top: Int32, b: Int32) -> Float32:
    """The mass of a value in the middle of bin b."""
    if const_expr(cfg.is_logits):
        binades = (top - b).bitcast(Float32) - Float32(ROUND)
        return cute.arch.exp2(binades * Float32(1.0 / BINS_PER_BINADE) - row.maximum * row.scale) * Float32(ONE)
    return real_mass(cfg, row, value_at(cfg, row, top, Float32(b) + Float32(0.5)))


@cute.jit
def find_window(cfg: Constexpr, row: Row, smem: Scratch, p: Float32):
    """(lowest, highest): top-p's threshold is estimated to be one of lowest <= x < highest."""
    at = this_thread(cfg.warps, cfg.cluster)
    samples = pool(cfg, smem).samples
    top = Int32(smem.listed[0])
    for r in cutlass.range_constexpr(1, cfg.cluster):
        other = Int32(smem.listed[r])
        top = other if other > top else top
    per = max(1, SAMPLE_BINS // cfg.threads)
    found, masses = cute.make_rmem_tensor(per, Int32), cute.make_rmem_tensor(per, Int64)
    mine = Int64(0)
    for j in cutlass.range_constexpr(per):
        found[j] = Int32(0)
        for r in cutlass.range_constexpr(cfg.cluster):
            b = Uint32(at.tid * per + j - (top - Int32(smem.listed[r])))
            word = Uint32(samples[r * SAMPLE_WORDS + Int32(b & Uint32(HALF - 1))])
            word = word >> Uint32(16) if b >= Uint32(HALF) else word & Uint32(0xFFFF)
            found[j] = found[j] + (Int32(word) if b < Uint32(SAMPLE_BINS) else Int32(0))
        if const_expr(cfg.threads > SAMPLE_BINS):
            found[j] = found[j] if at.tid < SAMPLE_BINS else Int32(0)
        masses[j] = Int64(0)
        if found[j] > 0:
            masses[j] = Int64(middle_mass(cfg, row, top, at.tid * per + j) * Float32(found[j]))
        mine += masses[j]
    to_here = warp_inclusive_sum(mine, at.lane)
    if at.lane == 31:
        smem.scan_mass[at.warp] = to_here
    if at.tid == 0:
        for side in cutlass.range_constexpr(2):
            smem.answer[2 * side] = Float32(0.0).bitcast(Int32)
            smem.answer[2 * side + 1] = Float32(SAMPLE_BINS - 1).bitcast(Int32)
            smem.answer[4 + side] = Int32(0)
    cute.arch.sync_threads()
    all_mass, above = Int64(0), to_here - mine
    for i in cutlass.range_constexpr(cfg.warps):
        of_warp = smem.scan_mass[i]
        all_mass += of_warp
        above += of_warp if i < at.warp else Int64(0)
    total = Float32(all_mass)
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
        if above < after:
            bin_top = Float32(at.tid * per + j)
            share = divide(Float32(1.0), Float32(masses[j]))
            crowded = found[j] >= CROWD
            if above <= upper and upper < after:
                depth = bin_top + Float32(upper - above) * share if crowded else bin_top - Float32(0.02)
                smem.answer[0] = depth.bitcast(Int32)
                smem.answer[4] = Int32(found[j] < SPARSE)
            if above < lower and lower <= after:
                depth = bin_top + Float32(lower - above) * share if crowded else bin_top + Float32(1.02)
                smem.answer[1] = depth.bitcast(Int32)
                smem.answer[5] = Int32(found[j] < SPARSE)
            if above <= upper_wide and upper_wide < after:
                smem.answer[2] = (bin_top - Float32(0.02)).bitcast(Int32)
            if above < lower_wide and lower_wide <= after:
                smem.answer[3] = (bin_top + Float32(1.02)).bitcast(Int32)
        above = after
    cute.arch.sync_threads()
    first = (smem.answer[2] if smem.answer[4] != 0 else smem.answer[0]).bitcast(Float32)
    last = (smem.answer[3] if smem.answer[5] != 0 else smem.answer[1]).bitcast(Float32)
    highest = Float32.inf
    if first > Float32(0.0):
        highest = value_at(cfg, row, top, first)
    return value_at(cfg, row, top, last), highest
