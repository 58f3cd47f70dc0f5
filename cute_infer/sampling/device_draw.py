"""What happens to a row whose threshold is known: one token is drawn, or the whole row is written."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint8, Uint32, const_expr

from .device import LN_2, divide, warp_inclusive_sum
from .device_cluster import push_sum, row_sync, sum_of_warps, this_thread
from .device_row import Row, chunk, kept_mass, loop_bound, real_mass
from .device_shared import Scratch


@cute.jit
def put_id(cfg: Constexpr, slot: Int32, index: Int32, mass: Uint32, total: Int64, out: cute.Tensor, valid: cute.Tensor, logprob):
    """The drawn token, by one thread."""
    out[slot] = index
    valid[slot] = Uint8(1)
    if const_expr(cfg.spec.logprob):
        logprob[slot] = Float32(LN_2) * (cute.math.log2(Float32(mass)) - cute.math.log2(Float32(total)))


@cute.jit
def put_nothing(cfg: Constexpr, slot: Int32, out: cute.Tensor, valid: cute.Tensor, logprob):
    """The result of a row without a distribution, by one thread."""
    out[slot] = Int32(0)
    valid[slot] = Uint8(0)
    if const_expr(cfg.spec.logprob):
        logprob[slot] = -Float32.inf


@cute.jit
def walk(
    cfg: Constexpr,
    row: Row,
    slot: Int32,
    threshold: Float32,
    floor: Float32,
    target: Int64,
    before: Int64,
    total: Int64,
    out: cute.Tensor,
    valid: cute.Tensor,
    logprob,
):
    """The warp whose stretch holds `target` finds the token: inverse CDF in index order. `before`: kept mass of the earlier warps."""
    lane = this_thread(cfg.warps, cfg.cluster).lane
    drawn, drawn_mass = Int32(-1), Uint32(0)
    for c in cutlass.range(loop_bound(cfg, row), unroll=1):
        x = chunk(cfg, row, c)
        weights = cute.make_rmem_tensor(cfg.vector, Uint32)
        lane_mass = Int64(0)
        for j in cutlass.range_constexpr(cfg.vector):
            weights[j] = Uint32(kept_mass(cfg, row, x[j], threshold, floor))
            lane_mass += Int64(weights[j])
        to_here = warp_inclusive_sum(lane_mass, lane)
        running = before + to_here - lane_mass
        for j in cutlass.range_constexpr(cfg.vector):
            w = weights[j]
            if running <= target and target < running + Int64(w):
                drawn = (row.first_vector + c * 32) * cfg.vector + j
                drawn_mass = w
            running += Int64(w)
        before += cute.arch.shuffle_sync(to_here, 31)
    if drawn >= 0:
        put_id(cfg, slot, drawn, drawn_mass, total, out, valid, logprob)


@cute.jit
def write(cfg: Constexpr, row: Row, smem: Scratch, threshold: Float32, is_valid, out: cute.Tensor):
    """The whole row: kept logits or -inf ("mask"), kept masses over their sum ("softmax", "renorm")."""
    at = this_thread(cfg.warps, cfg.cluster)
    share, filler = Float32(0.0), Float32(0.0)
    if const_expr(cfg.spec.output != "mask"):
        mine = Float32(0.0)
        for c in cutlass.range(loop_bound(cfg, row), unroll=cfg.unroll):
            x = chunk(cfg, row, c)
            for j in cutlass.range_constexpr(cfg.vector):
                mine += real_mass(cfg, row, x[j]) if x[j] >= threshold else Float32(0.0)
        # thread sums of at most 256 * 2**31 become integers in units of 2**-40 of the largest mass: the rest of the sum is exact
        own = cute.arch.shuffle_sync(warp_inclusive_sum(Int64(mine * Float32(512.0)), at.lane), 31)
        push_sum(smem.kept_low, smem.kept_high, own, at, cfg.cluster)
        row_sync(cfg.cluster)
        total, _, _ = sum_of_warps(smem.kept_low, smem.kept_high, cfg.row_warps, at)
        share = divide(Float32(512.0), Float32(total))
        if row.maximum != row.maximum:
            filler = row.maximum  # NaN in, NaN out; an all -inf or all-zero row becomes zeros
    for c in cutlass.range(loop_bound(cfg, row), unroll=cfg.unroll):
        x = chunk(cfg, row, c)
        y = cute.make_rmem_tensor(cfg.vector, out.element_type)
        for j in cutlass.range_constexpr(cfg.vector):
            keep = x[j] >= threshold
            value = x[j]
            if const_expr(cfg.spec.output == "mask"):
                value = x[j] if keep or not is_valid else -Float32.inf
            else:
                value = real_mass(cfg, row, x[j]) * share if keep else Float32(0.0)
                value = value if is_valid else filler
            y[j] = value.to(out.element_type)
        vector_idx = row.first_vector + c * 32
        if vector_idx * cfg.vector < row.vocab:
            if const_expr(cfg.vector == 1):
                out[vector_idx] = y[0]
            else:
                cute.autovec_copy(y, cute.local_tile(out, (cfg.vector,), (vector_idx,)))
