"""From q.k to a score in log2 units: scale, soft cap, ALiBi, in this order; masks come after.

    plain       s = qk * sm_scale * log2 e
    soft cap    s = cap * tanh(qk * sm_scale / cap) * log2 e
    ALiBi       s + slope_h * (kv_idx - qo_idx) * log2 e
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, const_expr

from .mma import column

LOG2E = math.log2(math.e)


@cute.jit
def scale(scores: cute.Tensor, soft_capped: Constexpr, sm_scale: Float32, soft_cap: Float32):
    """Raw products q.k to log2 units, in place; ``sm_scale`` and ``soft_cap`` are natural.

    tanh(x) = 1 - 2 / (1 + e^(2x)) instead of tanh.approx: the latter is good to 2^-11 of its value, 0.02 of a logit near a cap of 50,
    which a probability shows. This form costs one more special-function operation and errs by about 1e-7 of the cap.
    """
    if const_expr(soft_capped):
        cap = soft_cap * LOG2E
        inside = sm_scale / soft_cap * (2.0 * LOG2E)
        for i in cutlass.range_constexpr(cute.size(scores)):
            scores[i] = cap - 2.0 * cap * cute.arch.rcp_approx(1.0 + cute.arch.exp2(scores[i] * inside))
    else:
        factor = sm_scale * LOG2E
        for i in cutlass.range_constexpr(cute.size(scores)):
            scores[i] = scores[i] * factor


@cute.jit
def alibi_slope(head: Int32, num_heads: Int32):
    """The ALiBi slope of a query head, natural units.

    With n the largest power of two not above num_heads: 2^(-8 (h + 1) / n) for the first n heads, then 2^(-4 (2 (h - n) + 1) / n).
    """
    # Through floats: with n as 1 << (31 - clz), the compiler's range analysis takes n for negative and drops the first branch.
    n = cute.arch.exp2(Float32(31 - cute.arch.clz(num_heads)))
    h = Float32(head)
    exponent = -8.0 * (h + 1.0) if h < n else -4.0 * (2.0 * (h - n) + 1.0)
    return cute.arch.exp2(exponent / n)


@cute.jit
def alibi(scores: cute.Tensor, slopes: cute.Tensor, qo_idx: cute.Tensor, first_key: Int32, lane: Int32):
    """Add ``slopes[r] * (kv_idx - qo_idx[r])`` in log2 units; ``first_key`` is the key of column 0."""
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        slope = slopes[r] * LOG2E
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            scores[r, c] = scores[r, c] + slope * Float32(first_key + column(c, lane) - qo_idx[r])
