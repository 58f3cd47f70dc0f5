"""Online softmax of the Hopper prefill kernel for 8-bit K and V: that of ``prefill_sm90_softmax.py`` with a scale per row.

bf16 queries become fp16 under a power of two of their row, which the row's softmax scale takes back. fp16 P is the product's operand:
O keeps its reference maximum until some row maximum of the warp has grown by more than 2^8, so P stays below 2^8.

Source: Milakov & Gimelshein, arXiv:1805.02867; Shah et al., FlashAttention-3, arXiv:2407.08608.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr

from .prefill_sm90_softmax import CHAINS, RESCALE_THRESHOLD, rows_cols


@cute.jit
def online_softmax(
    acc_s: cute.Tensor,
    row_max: cute.Tensor,
    row_sum: cute.Tensor,
    correction: cute.Tensor,
    scale_log2: cute.Tensor,
    first: cutlass.Constexpr,
) -> Boolean:
    """Scores -> exp2(scores * scale_log2[r] - reference), in place; advances the running maximum and sum of both rows.

    Returns a warp-uniform flag: O must be multiplied by ``correction`` (always False for the ``first`` tile, O is still zero).
    ``row_sum`` is this lane's share; the four lanes of a row are added once, at the end. A row that saw no key keeps -inf and sum 0.
    """
    s = rows_cols(acc_s)
    columns = cute.size(s, mode=[1])
    new_max = cute.make_rmem_tensor(2, Float32)
    for r in cutlass.range_constexpr(2):
        part = cute.make_rmem_tensor(CHAINS, Float32)
        for c in cutlass.range_constexpr(columns):
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
    for r in cutlass.range_constexpr(2):
        bias = -(row_max[r] * scale_log2[r]) if row_max[r] != -Float32.inf else Float32(0.0)
        part = cute.make_rmem_tensor(CHAINS, Float32)
        for c in cutlass.range_constexpr(columns):
            p = cute.arch.exp2(s[r, c] * scale_log2[r] + bias)
            s[r, c] = p
            part[c % CHAINS] = p if const_expr(c < CHAINS) else part[c % CHAINS] + p
        total = part[0]
        for j in cutlass.range_constexpr(1, CHAINS):
            total = total + part[j]
        row_sum[r] = row_sum[r] + total
    return grew
