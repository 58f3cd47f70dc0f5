"""Rotary position embedding (neox halves) of rows in shared memory.

    angle(pos, d) = pos * theta^(-2 d / D) / rope_scale          d = 0 .. D/2 - 1
    x'[d] = x[d] cos - x[d + D/2] sin        x'[d + D/2] = x[d + D/2] cos + x[d] sin

Positions reach 128k, where rounding the angle to fp32 costs 0.004 of a radian and sin.approx, made for [-pi, pi], much more. So the
frequencies are kept in *turns* (angle / 2 pi) as a sum of two fp32 (``hi + lo``, computed once per CTA in fp64): the whole turns of
``pos * hi`` drop out exactly, an fma recovers the rounding error of that product, and the angle handed over is in [-pi, pi]. What is left,
0.001 at position 131071 and theta 1e4, is the rounding of the argument log2(theta) itself.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Float64, Int32, Uint32

from .mma import load_shared_2, load_shared_4, pack_2, store_shared_2, unpack_2

TABLE_BYTES = 8  # one (hi, lo) pair


@cute.jit
def _exp2_f64(x: Float64):
    """2^x to about 1e-14, by the Taylor series of e^(ln2 f) on |f| < 1 and an exponent put together by hand."""
    n = Int32(x)  # towards zero
    y = (x - Float64(n)) * math.log(2.0)
    p = Float64(1.0 / math.factorial(16))
    for i in cutlass.range_constexpr(15, -1, -1):
        p = p * y + 1.0 / math.factorial(i)
    power = cute.arch.inline_ptx("mov.b64 {$w0}, {{$r0}, {$r1}};", write_only_types=[Float64], read_only_args=[Int32(0), (n + 1023) << 20])
    return p * power


@cute.jit
def write_table(table: Uint32, dim: Constexpr, rcp_scale: Float32, log2_theta: Float32, rank: Int32, threads: Constexpr):
    """Frequencies in turns, ``(hi, lo)`` fp32 pairs for d = 0 .. dim / 2 - 1, at shared address ``table`` (16-byte aligned)."""
    for d in cutlass.range(rank, dim // 2, threads, unroll=1):
        turns = _exp2_f64(Float64(log2_theta) * (Float64(d) * (-2.0 / dim))) * Float64(rcp_scale) * (0.5 / math.pi)
        hi = Float32(turns)
        lo = Float32(turns - Float64(hi))
        cute.arch.inline_ptx("st.shared.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[table + Uint32(d * TABLE_BYTES), hi, lo])


@cute.jit
def sin_cos(position: Float32, hi: Uint32, lo: Uint32):
    """``(sin, cos)`` of ``2 pi * position * (hi + lo)``. One block of PTX: the .rn forms must not be contracted."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 a, n, e, k; "
        "mul.rn.f32 a, {$r0}, {$r1}; neg.f32 n, a; fma.rn.f32 e, {$r0}, {$r1}, n; fma.rn.f32 e, {$r0}, {$r2}, e; "
        "cvt.rni.f32.f32 k, a; sub.rn.f32 a, a, k; add.rn.f32 a, a, e; mul.rn.f32 a, a, 0f40C90FDB; "
        "sin.approx.f32 {$w0}, a; cos.approx.f32 {$w1}, a; }",
        write_only_types=[Float32, Float32],
        read_only_args=[position, hi, lo],
    )


@cute.jit
def rotate_rows(
    rows_at: Uint32,
    pitch: Constexpr,
    rows: Constexpr,
    dim: Constexpr,
    table: Uint32,
    first_position: Int32,
    first_row: Int32,
    rows_per_position: Constexpr,
    rank: Int32,
    threads: Constexpr,
    dtype: Constexpr,
):
    """Rotate ``rows`` rows of ``dim`` 16-bit elements in place, row r at ``first_position + (first_row + r) // rows_per_position``.

    A thread takes 4 neighbouring dims of both halves: dim is a multiple of 8, so both are 8-byte aligned.
    """
    units = dim // 8
    for e in cutlass.range(rank, rows * units, threads, unroll=1):
        row = e // units
        unit = e % units
        position = Float32(first_position + (first_row + row) // rows_per_position)
        low_at = rows_at + Uint32(row * pitch + unit * 8)
        high_at = low_at + Uint32(dim)
        low, high = load_shared_2(low_at), load_shared_2(high_at)
        f01 = load_shared_4(table + Uint32(unit * 4 * TABLE_BYTES))
        f23 = load_shared_4(table + Uint32(unit * 4 * TABLE_BYTES + 16))
        a0, b0 = _rotate_2(low[0], high[0], position, f01, dtype)
        a1, b1 = _rotate_2(low[1], high[1], position, f23, dtype)
        store_shared_2(low_at, a0, a1)
        store_shared_2(high_at, b0, b1)


@cute.jit
def _rotate_2(low: Uint32, high: Uint32, position: Float32, frequencies, dtype: Constexpr):
    x0, x1 = unpack_2(low, dtype)
    y0, y1 = unpack_2(high, dtype)
    s0, c0 = sin_cos(position, frequencies[0], frequencies[1])
    s1, c1 = sin_cos(position, frequencies[2], frequencies[3])
    return pack_2(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1, dtype), pack_2(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1, dtype)
