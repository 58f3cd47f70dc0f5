"""Online softmax in base 2 on accumulators seen as ``[rows, columns]`` of one lane.

A row is spread over the 4 lanes of a quad. Scores arrive in log2 units (logit * log2 e), so every exponential is one ``ex2``. Per row a
lane keeps the running maximum m (equal in the quad) and its own share of the running sum l; the shares meet once, in :func:`finish`.

    m' = max(m, max_j s_j)      p_j = 2^(s_j - m')      l' = l 2^(m - m') + sum_j p_j      o' = o 2^(m - m') + sum_j p_j v_j

Rows that have seen only masked scores have m = -inf; they use 0 in place of m, so that 2^(-inf - 0) = 0 and never -inf - -inf = NaN.

Source: Milakov & Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32


@cute.jit
def quad_max(x: Float32):
    """Maximum over the 4 lanes that share a row; a NaN does not win."""
    for i in cutlass.range_constexpr(2):
        x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, 1 << i))
    return x


@cute.jit
def quad_sum(x: Float32):
    """Sum over the 4 lanes that share a row, the same in all of them (butterfly: every lane adds the same pairs)."""
    for i in cutlass.range_constexpr(2):
        x = x + cute.arch.shuffle_sync_bfly(x, 1 << i)
    return x


@cute.jit
def finite(m: Float32):
    """m, or 0 for the -inf of a row that has seen nothing."""
    return m if m != -Float32.inf else Float32(0.0)


@cute.jit
def start(row_max: cute.Tensor, row_sum: cute.Tensor):
    """The state before the first score."""
    row_max.fill(-Float32.inf)
    row_sum.fill(0.0)


@cute.jit
def update(scores: cute.Tensor, acc_o: cute.Tensor, row_max: cute.Tensor, row_sum: cute.Tensor):
    """Take in one tile: scores become probabilities, ``acc_o``, ``row_max``, ``row_sum`` move to the new maximum.

    ``scores [rows, n]`` and ``acc_o [rows, columns]`` are register views (``mma.rows_and_columns``), ``row_max [rows]`` and
    ``row_sum [rows]`` register tensors. Called by whole warps: the rescaling is skipped when no row of the warp moved, which is most of
    the time after the first tiles and changes no bit (the factor would be 1).
    """
    rows = cute.size(scores, mode=[0])
    columns = cute.size(scores, mode=[1])
    new_max = cute.make_rmem_tensor(rows, Float32)
    moved = False
    for r in cutlass.range_constexpr(rows):
        m = row_max[r]
        for c in cutlass.range_constexpr(columns):
            m = cute.arch.fmax(m, scores[r, c])
        new_max[r] = quad_max(m)
        moved = moved | (new_max[r] != row_max[r])
    if cute.arch.vote_ballot_sync(moved) != 0:
        for r in cutlass.range_constexpr(rows):
            factor = cute.arch.exp2(row_max[r] - finite(new_max[r]))
            row_max[r] = new_max[r]
            row_sum[r] = row_sum[r] * factor
            for c in cutlass.range_constexpr(cute.size(acc_o, mode=[1])):
                acc_o[r, c] = acc_o[r, c] * factor
    for r in cutlass.range_constexpr(rows):
        m = finite(new_max[r])
        total = row_sum[r]
        for c in cutlass.range_constexpr(columns):
            p = cute.arch.exp2(scores[r, c] - m)
            scores[r, c] = p
            total = total + p
        row_sum[r] = total


@cute.jit
def finish(row_sum: cute.Tensor):
    """Add up the quad's shares of the row sums, once, after the last tile."""
    for r in cutlass.range_constexpr(cute.size(row_sum)):
        row_sum[r] = quad_sum(row_sum[r])
