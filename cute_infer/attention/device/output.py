"""The end of an attention row: normalise, log-sum-exp, store as result or as one split's partial.

    without sink    out = o / l                        lse = m + log2 l
    with sink       M = max(m, sink log2 e)            L = l 2^(m - M) + 2^(sink log2 e - M)
                    out = o 2^(m - M) / L              lse = M + log2 L

A row that saw nothing (l = 0, no sink) gives out = 0 and lse = -inf. A NaN stays a NaN.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from .logits import LOG2E
from .softmax import finite


@cute.jit
def sink_of(sinks, head: Int32, split: Int32):
    """A head's sink logit in log2 units; only split 0 counts it."""
    return sinks[head] * LOG2E if split == 0 else -Float32.inf


@cute.jit
def weight_and_lse(row_max: Float32, row_sum: Float32, sink):
    """``(factor for o, lse base 2)``; ``row_max`` in log2 units, ``row_sum`` complete, ``sink`` in log2 units or None."""
    m = row_max
    total = row_sum
    factor = Float32(1.0)
    if const_expr(sink is not None):
        m = cute.arch.fmax(row_max, sink)
        factor = cute.arch.exp2(row_max - finite(m))
        total = row_sum * factor + cute.arch.exp2(sink - finite(m))
    empty = total == 0.0
    weight = Float32(0.0) if empty else factor / total
    lse = -Float32.inf if empty else m + cute.math.log2(total, fastmath=True)
    return weight, lse


@cute.jit
def store_lse(lse, lse_partial, value: Float32, token: Int32, head: Int32, split: Int32, lse_scale: Float32):
    """Write a row's log-sum-exp: base 2 to the split's partials when there are splits, else scaled to ``lse`` if it is wanted."""
    if const_expr(lse_partial is not None):
        lse_partial[split, Int64(token), head] = value
    else:
        if const_expr(lse is not None):
            lse[Int64(token), head] = value * lse_scale


@cute.jit
def store_columns(out, out_partial, values: cute.Tensor, token: Int32, head: Int32, split: Int32, column: Int32):
    """Write ``values [n]`` fp32 to columns ``column ..`` (a multiple of n, a power of two) of a row: partial or result."""
    n = cute.size(values)
    if const_expr(out_partial is not None):
        row = out_partial[split, Int64(token), head, None]
        for i in cutlass.range_constexpr(n):
            row[column + i] = values[i]
    else:
        rounded = cute.make_rmem_tensor(n, out.element_type)
        rounded.store(values.load().to(out.element_type))
        cute.autovec_copy(rounded, cute.local_tile(out[Int64(token), head, None], (n,), (column // n,)))
