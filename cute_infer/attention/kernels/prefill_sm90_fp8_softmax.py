"""Registers of the FP8 Hopper prefill kernel: online softmax, P in e4m3.

P is rounded to e4m3 (largest 448, 3 bits of mantissa down to 2^-6), so its range is used to the top: P = 2^SHIFT exp2(logit - reference),
where the reference may lag behind the true maximum by RESCALE_THRESHOLD; the sum of the row is fp32 and unrounded, and dividing by it
cancels SHIFT.

Source: Milakov & Gimelshein, arXiv:1805.02867; Shah et al., FlashAttention-3, arXiv:2407.08608.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Uint32, const_expr

from .prefill_sm90_softmax import CHAINS, rows_cols

SHIFT = 7.0
RESCALE_THRESHOLD = 1.75  # 2^(7 + 1.75) = 431 < 448
UNSHIFT = 2.0**-SHIFT


@cute.jit
def cap_scores(acc_s: cute.Tensor, pre_scale: cute.Tensor):
    """Soft cap: scores become tanh(q.k * scale / cap), ``pre_scale`` per row; the factor cap joins the softmax scale."""
    s = rows_cols(acc_s)
    for r in cutlass.range_constexpr(2):
        for c in cutlass.range_constexpr(cute.size(s, mode=[1])):
            s[r, c] = cute.math.tanh(s[r, c] * pre_scale[r], fastmath=True)


@cute.jit
def advance_maximum(
    acc_s: cute.Tensor,
    row_max: cute.Tensor,
    row_sum: cute.Tensor,
    correction: cute.Tensor,
    scale_log2: cute.Tensor,
    first: cutlass.Constexpr,
) -> Boolean:
    """Advance the running maximum of both rows to this tile's scores; ``scale_log2`` per row.

    Returns a warp-uniform flag: O must be multiplied by ``correction`` (always False for the ``first`` tile). A row that saw no key keeps
    -inf and sum 0.
    """
    s = rows_cols(acc_s)
    new_max = cute.make_rmem_tensor(2, Float32)
    for r in cutlass.range_constexpr(2):
        part = cute.make_rmem_tensor(CHAINS, Float32)
        for c in cutlass.range_constexpr(cute.size(s, mode=[1])):
            part[c % CHAINS] = s[r, c] if const_expr(c < CHAINS) else cute.arch.fmax(part[c % CHAINS], s[r, c])
        top = part[0]
        for j in cutlass.range_constexpr(1, CHAINS):
            top = cute.arch.fmax(top, part[j])
        top = cute.arch.warp_reduction(top, cute.arch.fmax, threads_in_group=4)
        new_max[r] = cute.arch.fmax(top, row_max[r])
    grew = Boolean(False)
    if const_expr(first):
        for r in cutlass.range_constexpr(2):
            row_max[r] = new_max[r]
    else:
        # -inf - -inf is NaN: fmax drops it, and NaN > threshold is False. From -inf to a number is +inf: rescaled, as it must be.
        growth = cute.arch.fmax((new_max[0] - row_max[0]) * scale_log2[0], (new_max[1] - row_max[1]) * scale_log2[1])
        grew = cute.arch.vote_ballot_sync(growth > Float32(RESCALE_THRESHOLD)) != 0
        if grew:
            for r in cutlass.range_constexpr(2):
                reference = new_max[r] * scale_log2[r] if new_max[r] != -Float32.inf else Float32(0.0)
                correction[r] = cute.arch.exp2(row_max[r] * scale_log2[r] - reference)
                row_max[r] = new_max[r]
                row_sum[r] = row_sum[r] * correction[r]
    return grew


@cute.jit
def exponentiate_row(
    acc_s: cute.Tensor,
    row_max: cute.Tensor,
    row_sum: cute.Tensor,
    scale_log2: cute.Tensor,
    r: cutlass.Constexpr,
):
    """One row: scores -> exp2(scores * scale_log2 - reference + SHIFT), in place, added to the row's sum.

    ``row_sum`` is this lane's share; the four lanes of a row are added once, at the end.
    """
    s = rows_cols(acc_s)
    bias = Float32(SHIFT) - row_max[r] * scale_log2[r] if row_max[r] != -Float32.inf else Float32(0.0)
    part = cute.make_rmem_tensor(CHAINS, Float32)
    for c in cutlass.range_constexpr(cute.size(s, mode=[1])):
        p = cute.arch.exp2(s[r, c] * scale_log2[r] + bias)
        s[r, c] = p
        part[c % CHAINS] = p if const_expr(c < CHAINS) else part[c % CHAINS] + p
    total = part[0]
    for j in cutlass.range_constexpr(1, CHAINS):
        total = total + part[j]
    row_sum[r] = row_sum[r] + total


@cute.jit
def round_p(acc_s: cute.Tensor, p: cute.Tensor):
    """P as the A operand ((4, 2, 2), M, keys / 32) of an 8-bit wgmma, from the accumulator it lies in; the lane keeps its own columns.

    Four neighbouring slots of a row are columns 8 j + 2 t, + 1 and 8 (j + 1) + 2 t, + 1; modes: slot, row or row + 8, slots from 16 on.
    """
    s = rows_cols(acc_s)
    words = cute.recast_tensor(p, Uint32)
    for i in cutlass.range_constexpr(cute.size(words)):
        r, c = i % 2, 4 * (i // 2)
        words[i] = cute.arch.inline_ptx(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, {$r1}, {$r0}; cvt.rn.satfinite.e4m3x2.f32 high, {$r3}, {$r2}; "
            "mov.b32 {$w0}, {low, high}; }",
            write_only_types=[Uint32],
            read_only_args=[s[r, c], s[r, c + 1], s[r, c + 2], s[r, c + 3]],
        )
