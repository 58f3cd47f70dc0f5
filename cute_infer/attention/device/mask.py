"""Which keys a query sees: the range of KV tiles worth visiting, and -inf for every score outside.

A query row sits at position ``pos = kv_len - qo_len + qo_idx`` (decode: ``kv_len - 1``) and sees keys ``lo <= kv_idx < hi`` with

    hi = min(kv_len, pos + 1) if causal else kv_len          lo = max(0, pos - window_left) if window else 0

A custom mask replaces causal (not the window). Scores are views ``[rows, columns]`` of one lane (``mma.rows_and_columns``).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr


@cute.jit
def kv_range(causal: Constexpr, window: Constexpr, first_pos: Int32, last_pos: Int32, kv_len: Int32, window_left: Int32):
    """``[lo, hi)``: keys that at least one of the rows at positions ``first_pos .. last_pos`` sees; empty when ``lo >= hi``."""
    lo = Int32(0)
    hi = kv_len
    if const_expr(causal):
        hi = cutlass.max(cutlass.min(kv_len, last_pos + 1), Int32(0))
    if const_expr(window):
        lo = cutlass.max(first_pos - window_left, Int32(0))
    return lo, hi


@cute.jit
def band(scores: cute.Tensor, lo: cute.Tensor, hi: cute.Tensor, first_key: Int32, lane: Int32):
    """Scores of keys outside row r's ``[lo[r], hi[r])`` become -inf, even NaN ones; ``first_key`` is the key of column 0."""
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        # compare against the column's constant part: one subtraction per row instead of one addition per score
        below = lo[r] - first_key - 2 * (lane % 4)
        above = hi[r] - first_key - 2 * (lane % 4)
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            j = 8 * (c // 2) + c % 2
            s = scores[r, c]
            scores[r, c] = s if (j >= below) & (j < above) else -Float32.inf


@cute.jit
def custom(
    scores: cute.Tensor,
    bits: cute.Tensor,
    first_byte: Int32,
    qo_idx: cute.Tensor,
    hi: cute.Tensor,
    kv_len: Int32,
    first_key: Int32,
    lane: Int32,
):
    """Scores whose bit is 0 become -inf. Bit ``qo_idx * kv_len + kv_idx`` of a request is bit ``i % 8`` of byte ``first_byte + i // 8``.

    Only keys below row r's ``hi[r]`` are looked up (a row that does not exist has ``hi = 0``); the others are the band's business.
    """
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        row_bit = Int64(qo_idx[r]) * Int64(kv_len) + Int64(first_key)
        row_byte = bits.iterator.toint() + Int64(first_byte) + (row_bit >> Int64(3))
        for odd in cutlass.range_constexpr(2):
            # Columns 8 j + at of this lane: their bits are one byte apart, so one address and one shift serve them all.
            at = 2 * (lane % 4) + odd
            bit = Int32(row_bit & Int64(7)) + at
            address = row_byte + Int64(bit >> 3)
            flag = Int32(1) << (bit & 7)
            for j in cutlass.range_constexpr(cute.size(scores, mode=[1]) // 2):
                word = _load_byte_if(address, j, first_key + at + 8 * j < hi[r])
                s = scores[r, 2 * j + odd]
                scores[r, 2 * j + odd] = s if (word & flag) != 0 else -Float32.inf


@cute.jit
def _load_byte_if(address: Int64, offset: Constexpr, condition):
    """A byte from global memory, or 0xff (every key kept)."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 255; @p ld.global.nc.u8 {$w0}, [{$r0}+" + str(offset) + "]; }",
        write_only_types=[Int32],
        read_only_args=[address, Int32(condition)],
    )
