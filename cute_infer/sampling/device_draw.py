"""What happens to a row whose threshold is known: one token is drawn, or the whole row is written."""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint8, Uint32, const_expr

from .device import LN_2, divide, warp_inclusive_sum, warp_sum64
from .device_cluster import Mail, share_sum, this_thread, total_of
from .device_row import Row, chunk, chunk_of_memory, kept_mass, loop_bound, real_mass
from .device_shared import Scratch

WALK_CHUNKS = 4  # read at once by the warp that walks


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
    """The warp whose stretch holds `target` finds the token: inverse CDF in index order. `before`: kept mass of the earlier warps.

    First the chunk, then the token in it.
    """
    lane = this_thread(cfg.warps, cfg.cluster).lane
    place, mine, running = Int32(0), Int64(0), before
    together = WALK_CHUNKS if const_expr(cfg.fetches and cfg.chunks % WALK_CHUNKS == 0) else 1
    for first in cutlass.range(0, loop_bound(cfg, row), together, unroll=1):
        x = [chunk_again(cfg, row, first + i) for i in range(together)]
        for i in cutlass.range_constexpr(together):
            lane_mass = Int64(0)
            for j in cutlass.range_constexpr(cfg.vector):
                lane_mass += Int64(Uint32(kept_mass(cfg, row, x[i][j], threshold, floor)))
            after = running + warp_sum64(lane_mass)
            if running <= target and target < after:
                place, mine, before = first + i, lane_mass, running
            running = after
    values = chunk_again(cfg, row, place)
    running = before + warp_inclusive_sum(mine, lane) - mine
    drawn, drawn_mass = Int32(-1), Uint32(0)
    for j in cutlass.range_constexpr(cfg.vector):
        w = Uint32(kept_mass(cfg, row, values[j], threshold, floor))
        if running <= target and target < running + Int64(w):
            drawn = (row.first_vector + place * 32) * cfg.vector + j
            drawn_mass = w
        running += Int64(w)
    if drawn >= 0:
        put_id(cfg, slot, drawn, drawn_mass, total, out, valid, logprob)


@cute.jit
def chunk_again(cfg: Constexpr, row: Row, c: Int32) -> cute.Tensor:
    """Chunk c of this thread, from memory where shared memory receives the next row already."""
    if const_expr(cfg.fetches):
        return chunk_of_memory(cfg, row, c)
    return chunk(cfg, row, c)


@cute.jit
def write(cfg: Constexpr, row: Row, smem: Scratch, met: Int32, threshold: Float32, is_valid, out: cute.Tensor) -> Int32:
    """The whole row: kept logits or -inf ("mask"), kept masses over their sum ("softmax", "renorm"). Returns `met`."""
    at = this_thread(cfg.warps, cfg.cluster)
    share, filler = Float32(0.0), Float32(0.0)
    if const_expr(cfg.spec.output != "mask"):
        mine = Float32(0.0)
        for c in cutlass.range(loop_bound(cfg, row), unroll=cfg.unroll):
            x = chunk(cfg, row, c)
            for j in cutlass.range_constexpr(cfg.vector):
                mine += real_mass(cfg, row, x[j]) if x[j] >= threshold else Float32(0.0)
        # thread sums of at most 256 * 2**31 become integers in units of 2**-40 of the largest mass: the rest of the sum is exact
        met = share_sum(Mail(smem.mail, met), smem.kept, Int64(mine * Float32(512.0)), at, cfg.warps, cfg.cluster)
        share = divide(Float32(512.0), Float32(total_of(smem.kept, cfg.row_warps, at)))
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
    return met
