"""Warp-level matrix work by address: ldmatrix, mma.sync.m16n8k16, shared-memory vectors, cp.async.

Everything below takes 32-bit shared addresses (``Pointer.toint()``), so a tile is no more than ``(address, pitch in bytes)`` and any head
dim that is a multiple of 16 works. Rows are padded by 16 bytes: with an odd number of 16-byte chunks per row the 8 rows of one ldmatrix
matrix fall on 8 different bank groups, so no swizzle is needed.

Fragments of one warp, ``g = lane // 4``, ``t = lane % 4`` (PTX ISA, mma.m16n8k16):

    A  [16 rows, 16 k]   a0 (g, 2t)  a1 (g + 8, 2t)  a2 (g, 2t + 8)  a3 (g + 8, 2t + 8)      each register two neighbours along k
    B  [16 k, 8 columns] b0 (2t, g)  b1 (2t + 8, g)                                          each register two neighbours along k
    C  [16 rows, 8 columns]  c0, c1 (g, 2t), (g, 2t + 1)    c2, c3 (g + 8, 2t), (g + 8, 2t + 1)

An accumulator of N columns is a register tensor of ``N / 8`` tiles of 4 fp32. :func:`rows_and_columns` views it as ``[2, N / 4]``: row r is
``g + 8 * r`` and column c is ``8 * (c // 2) + 2 * t + c % 2`` of the tile (:func:`column`). The wgmma accumulator of one warp has the same
map, so softmax, masks and logits are shared by both architectures.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Constexpr, Float32, Int32, Int64, Uint32

ROW_PADDING = 16  # bytes


# ------------------------------------------------------------------------------------------------------------------------ shared memory
@cute.jit
def load_shared_4(address: Uint32):
    """Four 32-bit words from a 16-byte aligned shared address."""
    return cute.arch.inline_ptx(
        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];", write_only_types=[Uint32] * 4, read_only_args=[address]
    )


@cute.jit
def load_shared_2(address: Uint32):
    """Two 32-bit words from an 8-byte aligned shared address."""
    return cute.arch.inline_ptx("ld.shared.v2.b32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Uint32] * 2, read_only_args=[address])


@cute.jit
def store_shared_4(address: Uint32, a: Uint32, b: Uint32, c: Uint32, d: Uint32):
    """Four 32-bit words to a 16-byte aligned shared address."""
    cute.arch.inline_ptx("st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, a, b, c, d])


@cute.jit
def store_shared_2(address: Uint32, a: Uint32, b: Uint32):
    """Two 32-bit words to an 8-byte aligned shared address."""
    cute.arch.inline_ptx("st.shared.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, a, b])


@cute.jit
def copy_async_16(destination: Uint32, source: Int64, size: Int32):
    """16 bytes global -> shared in the background; only ``size`` of them are read (0, 8 or 16), the rest arrives as zeros."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global.L2::128B [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[destination, source, size]
    )


# ---------------------------------------------------------------------------------------------------------------------- warp primitives
@cute.jit
def ldmatrix_x4(address: Uint32, offset: Constexpr, transpose: Constexpr):
    """Four 8x8 matrices of 16-bit elements; lane ``8 * m + r`` gives the address of row r of matrix m."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4"
        + (".trans" if transpose else "")
        + ".shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}+"
        + str(offset)
        + "];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


@cute.jit
def mma_m16n8k16(acc: cute.Tensor, tile: Constexpr, a, b0: Uint32, b1: Uint32, dtype: Constexpr):
    """``acc[4 * tile : 4 * tile + 4] += A B``; a is four registers, ``dtype`` Float16 or BFloat16."""
    name = "bf16" if cutlass.const_expr(dtype is BFloat16) else "f16"
    c = 4 * tile
    d = cute.arch.inline_ptx(
        "mma.sync.aligned.m16n8k16.row.col.f32."
        + name
        + "."
        + name
        + ".f32 {{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}};",
        write_only_types=[Float32] * 4,
        read_only_args=[a[0], a[1], a[2], a[3], b0, b1, acc[c], acc[c + 1], acc[c + 2], acc[c + 3]],
    )
    for i in cutlass.range_constexpr(4):
        acc[c + i] = d[i]


@cute.jit
def pack_2(low: Float32, high: Float32, dtype: Constexpr):
    """Two fp32 rounded to ``dtype`` in one register, ``low`` in the lower half."""
    name = "bf16x2" if cutlass.const_expr(dtype is BFloat16) else "f16x2"
    return cute.arch.inline_ptx(
        "cvt.rn." + name + ".f32 {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[high, low]
    )


@cute.jit
def unpack_2(word: Uint32, dtype: Constexpr):
    """The two 16-bit elements of a register as fp32, lower half first."""
    if cutlass.const_expr(dtype is BFloat16):
        return cute.arch.inline_ptx(
            "{ shl.b32 {$w0}, {$r0}, 16; and.b32 {$w1}, {$r0}, 0xffff0000; }", write_only_types=[Float32] * 2, read_only_args=[word]
        )
    return cute.arch.inline_ptx(
        "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0}; cvt.f32.f16 {$w0}, l; cvt.f32.f16 {$w1}, h; }",
        write_only_types=[Float32] * 2,
        read_only_args=[word],
    )


# --------------------------------------------------------------------------------------------------------------------------- fragments
@cute.jit
def lane_offset_a(lane: Int32, pitch: Constexpr):
    """This lane's ldmatrix offset for A (rows x k, k contiguous) and for V read transposed (tokens x columns)."""
    return Uint32((lane % 16) * pitch + (lane // 16) * 16)


@cute.jit
def lane_offset_b(lane: Int32, pitch: Constexpr):
    """This lane's ldmatrix offset for B stored as (columns x k, k contiguous), two column tiles per ldmatrix: K of Q K^T."""
    return Uint32((lane % 8 + 8 * (lane // 16)) * pitch + (lane // 8 % 2) * 16)


@cute.jit
def load_a(address: Uint32, dim: Constexpr):
    """All A fragments of a [16, dim] tile, 4 registers per 16 columns; ``address`` includes :func:`lane_offset_a`."""
    frag = cute.make_rmem_tensor(dim // 4, Uint32)
    for k in cutlass.range_constexpr(dim // 16):
        a = ldmatrix_x4(address, 32 * k, False)
        for i in cutlass.range_constexpr(4):
            frag[4 * k + i] = a[i]
    return frag


@cute.jit
def q_times_k(
    acc_s: cute.Tensor, q_frag, q_address: Uint32, k_address: Uint32, dim: Constexpr, tokens: Constexpr, pitch: Constexpr, dtype: Constexpr
):
    """``acc_s [16, tokens] = Q [16, dim] K [tokens, dim]^T``, overwriting acc_s.

    Q comes from registers (``q_frag`` of :func:`load_a`) or, when that is None, from shared memory again (``q_address`` with
    :func:`lane_offset_a`): above 128 columns the registers are worth more than the reload. ``k_address`` includes :func:`lane_offset_b`.
    """
    acc_s.fill(0.0)
    for k in cutlass.range_constexpr(dim // 16):
        if cutlass.const_expr(q_frag is None):
            a = ldmatrix_x4(q_address, 32 * k, False)
        else:
            a = (q_frag[4 * k], q_frag[4 * k + 1], q_frag[4 * k + 2], q_frag[4 * k + 3])
        for n in cutlass.range_constexpr(tokens // 16):
            b = ldmatrix_x4(k_address, 16 * n * pitch + 32 * k, False)
            mma_m16n8k16(acc_s, 2 * n, a, b[0], b[1], dtype)
            mma_m16n8k16(acc_s, 2 * n + 1, a, b[2], b[3], dtype)


@cute.jit
def p_times_v(
    acc_o: cute.Tensor, acc_p: cute.Tensor, v_address: Uint32, dim: Constexpr, tokens: Constexpr, pitch: Constexpr, dtype: Constexpr
):
    """``acc_o [16, dim] += P [16, tokens] V [tokens, dim]``.

    The accumulator of two neighbouring 8-column tiles is, pair by pair, the A fragment of 16 tokens: P needs a rounding and no data
    movement. V is transposed by ldmatrix; ``v_address`` includes :func:`lane_offset_a`.
    """
    for k in cutlass.range_constexpr(tokens // 16):
        p = 8 * k
        a = (
            pack_2(acc_p[p], acc_p[p + 1], dtype),
            pack_2(acc_p[p + 2], acc_p[p + 3], dtype),
            pack_2(acc_p[p + 4], acc_p[p + 5], dtype),
            pack_2(acc_p[p + 6], acc_p[p + 7], dtype),
        )
        for n in cutlass.range_constexpr(dim // 16):
            b = ldmatrix_x4(v_address, 16 * k * pitch + 32 * n, True)
            mma_m16n8k16(acc_o, 2 * n, a, b[0], b[1], dtype)
            mma_m16n8k16(acc_o, 2 * n + 1, a, b[2], b[3], dtype)


@cute.jit
def rows_and_columns(acc: cute.Tensor):
    """A flat accumulator as ``[2 rows, N / 4 columns]`` of this lane; no data movement."""
    tiles = cute.size(acc) // 4
    return cute.make_tensor(acc.iterator, cute.make_layout((2, (2, tiles)), stride=(2, (1, 4))))


@cute.jit
def column(c: Constexpr, lane: Int32):
    """Column inside the tile of column c of :func:`rows_and_columns`."""
    return 8 * (c // 2) + c % 2 + 2 * (lane % 4)
