"""The maths of one slot of the Hopper decode kernel, transposed: tokens are the 16 rows of mma.m16n8k16, query heads its 8 columns.

    S^T = K Q^T   ->   P^T = exp2(S^T * scale - max + headroom)   ->   O^T += V^T P^T

K is read by ldmatrix, V by ldmatrix.trans, and P^T turns from accumulator into operand by one movmatrix per 8x8 block. fp8 K and V become
fp16 in registers: a lane then owns 4 neighbouring d of K, so Q is loaded with the same permutation, and the transposed V pairs even and odd
d, so accumulator rows g and g + 8 of O^T tile j are d = 16 j + 2 g and 16 j + 2 g + 1.

Columns 2t and 2t + 1 of a head tile belong to lane t of a quad; a lane keeps (maximum, sum) for each, [2 * head tiles].
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Uint32, const_expr

from ..device.mma import ldmatrix_x4, mma_m16n8k16, pack_2
from .decode_sm90_query import LOG2_E


class DecodeMath:
    """Device functions of the main loop."""

    def __init__(self, spec, tile, layout):
        self.spec, self.tile, self.layout = spec, tile, layout
        self.k_rows, self.v_rows, self.box_tokens = layout.k_rows, layout.v_rows, layout.box_tokens
        self.head_tiles, self.token_tiles = layout.head_tiles, layout.token_tiles
        self.fp8 = spec.kv_bits == 8
        self.dtype = Float16 if self.fp8 or spec.q_dtype == "float16" else BFloat16  # of the mma's operands
        # fp16 has few small numbers: keep probabilities below 2^8 instead of below 1, the sums carry the same factor.
        self.headroom = 8.0 if self.dtype is Float16 else 0.0
        self.transformed = spec.soft_cap or spec.pos_encoding == "ALIBI"  # scores become base-2 logits before the softmax
        # One or two tiles of scores leave the tensor core idle between dependent MMAs: two accumulators take turns.
        self.score_chains = 2 if self.token_tiles * self.head_tiles <= 2 else 1

    # ------------------------------------------------------------------------------------------------------------------------------ S = K Q
    @cute.jit
    def scores(self, r_q: cute.Tensor, address: Uint32, lane_offsets: cute.Tensor):
        """S^T = K Q^T, [4 accumulators, token tile, head tile]: rows g and g + 8 are tokens, columns 2t and 2t + 1 heads."""
        rows, chains = self.k_rows, self.score_chains
        sums = cute.make_rmem_tensor(cute.make_layout((4, self.token_tiles, self.head_tiles, chains)), Float32)
        sums.fill(0.0)
        for column in cutlass.range_constexpr(rows.bytes // 32):
            for token_tile in cutlass.range_constexpr(self.token_tiles):
                offset = lane_offsets[column % (rows.panel_bytes // 32)]
                k = ldmatrix_x4(address + offset, self.layout.fragment_offset(rows, token_tile, column), False)
                if const_expr(self.fp8):  # a 32-byte column holds two k16 steps
                    for half in cutlass.range_constexpr(2):
                        a0, a2 = self.widen(k[2 * half])
                        a1, a3 = self.widen(k[2 * half + 1])
                        for head_tile in cutlass.range_constexpr(self.head_tiles):
                            b = r_q[None, 2 * column + half, head_tile]
                            chain = (2 * column + half) % chains
                            mma_m16n8k16(sums[None, token_tile, head_tile, chain], 0, (a0, a1, a2, a3), b[0], b[1], self.dtype)
                else:
                    for head_tile in cutlass.range_constexpr(self.head_tiles):
                        b = r_q[None, column, head_tile]
                        mma_m16n8k16(sums[None, token_tile, head_tile, column % chains], 0, k, b[0], b[1], self.dtype)
        s = sums[None, None, None, 0]
        for chain in cutlass.range_constexpr(1, chains):
            for i in cutlass.range_constexpr(cute.size(s)):
                s[i] = s[i] + sums[None, None, None, chain][i]
        return s

    @cute.jit
    def transform(self, s: cute.Tensor, factor: cute.Tensor, slope: cute.Tensor, soft_cap: Float32, distance: Int32, lane: Int32):
        """Soft cap and ALiBi: raw scores -> base-2 logits. ``distance`` is the first token's position relative to the query (<= 0).

        cap * tanh(x / cap) = cap - 2 cap / (1 + exp(2 x / cap)), exact to fp32 rounding where tanh.approx is wrong in the fourth digit.
        ALiBi adds slope * kv_idx; measured from the query it stays small, and the merge adds the rest to the LSE.
        """
        if const_expr(self.transformed):
            cap = soft_cap * LOG2_E
            for head_tile in cutlass.range_constexpr(self.head_tiles):
                for token_tile in cutlass.range_constexpr(self.token_tiles):
                    for i in cutlass.range_constexpr(4):
                        column = 2 * head_tile + i % 2
                        x = s[i, token_tile, head_tile] * factor[column]
                        if const_expr(self.spec.soft_cap):
                            x = cap - 2.0 * cap * cute.arch.rcp_approx(1.0 + cute.arch.exp2(x))
                        if const_expr(self.spec.pos_encoding == "ALIBI"):
                            x = x + slope[column] * Float32(distance + token_tile * 16 + i // 2 * 8 + lane // 4)
                        s[i, token_tile, head_tile] = x

    @cute.jit
    def hide(self, s: cute.Tensor, begin: Int32, end: Int32, lane: Int32):
        """Scores of tokens outside [begin, end) of the slot -> -inf."""
        for head_tile in cutlass.range_constexpr(self.head_tiles):
            for token_tile in cutlass.range_constexpr(self.token_tiles):
                for i in cutlass.range_constexpr(4):
                    token = token_tile * 16 + i // 2 * 8 + lane // 4
                    if token < begin or token >= end:
                        s[i, token_tile, head_tile] = -Float32.inf

    # ------------------------------------------------------------------------------------------------------------------------------------ P
    @cute.jit
    def exponent(self, x: Float32, factor: Float32):
        """Score -> base-2 logit; a multiplication that fuses with the subtraction of the maximum."""
        return x if const_expr(self.transformed) else x * factor

    @cute.jit
    def softmax(self, s: cute.Tensor, o: cute.Tensor, top: cute.Tensor, total: cute.Tensor, factor: cute.Tensor):
        """Online softmax of one slot: rescale what came before when a maximum moves; P^T as operand B [b0 b1, token tile, head tile]."""
        p = cute.make_rmem_tensor(cute.make_layout((2, self.token_tiles, self.head_tiles)), Uint32)
        d_tiles = self.spec.head_dim_vo // 16
        for head_tile in cutlass.range_constexpr(self.head_tiles):
            left, right = 2 * head_tile, 2 * head_tile + 1  # the two columns of this lane
            new_left, new_right = top[left], top[right]
            for token_tile in cutlass.range_constexpr(self.token_tiles):
                x = s[None, token_tile, head_tile]
                new_left = cute.arch.fmax(new_left, cute.arch.fmax(x[0], x[2]))
                new_right = cute.arch.fmax(new_right, cute.arch.fmax(x[1], x[3]))
            new_left, new_right = over_rows(new_left, cute.arch.fmax), over_rows(new_right, cute.arch.fmax)
            shift_left = self.exponent(new_left, factor[left]) - self.headroom
            shift_right = self.exponent(new_right, factor[right]) - self.headroom
            if cute.arch.vote_ballot_sync((new_left != top[left]) or (new_right != top[right])) != 0:
                old_left = cute.arch.exp2(self.exponent(top[left], factor[left]) - self.headroom - shift_left)
                old_right = cute.arch.exp2(self.exponent(top[right], factor[right]) - self.headroom - shift_right)
                top[left], top[right] = new_left, new_right
                total[left], total[right] = total[left] * old_left, total[right] * old_right
                for d in cutlass.range_constexpr(d_tiles):
                    at = 4 * (head_tile * d_tiles + d)
                    o[at], o[at + 1] = o[at] * old_left, o[at + 1] * old_right
                    o[at + 2], o[at + 3] = o[at + 2] * old_left, o[at + 3] * old_right
            sum_left, sum_right = total[left], total[right]
            for token_tile in cutlass.range_constexpr(self.token_tiles):
                x = s[None, token_tile, head_tile]
                p0 = cute.arch.exp2(self.exponent(x[0], factor[left]) - shift_left)
                p1 = cute.arch.exp2(self.exponent(x[1], factor[right]) - shift_right)
                p2 = cute.arch.exp2(self.exponent(x[2], factor[left]) - shift_left)
                p3 = cute.arch.exp2(self.exponent(x[3], factor[right]) - shift_right)
                sum_left = sum_left + (p0 + p2)
                sum_right = sum_right + (p1 + p3)
                p[0, token_tile, head_tile] = transpose_pair(p0, p1, self.dtype)
                p[1, token_tile, head_tile] = transpose_pair(p2, p3, self.dtype)
            total[left], total[right] = sum_left, sum_right
        return p

    # ----------------------------------------------------------------------------------------------------------------------------- O += V P
    @cute.jit
    def zero_v(self, address: Uint32, begin: Int32, end: Int32, lane: Int32):
        """V rows outside [begin, end) of the slot -> 0: they may hold NaN, and 0 * NaN is NaN. The swizzle stays inside a row."""
        rows, pieces = self.v_rows, self.v_rows.panel_bytes // 16
        for i in cutlass.range(lane, self.tile.tokens * pieces, 32, unroll=1):
            token = i // pieces
            if token < begin or token >= end:
                piece = address + Uint32(self.layout.row_offset(rows, token) + i % pieces * 16)
                for panel in cutlass.range_constexpr(rows.panels):
                    store_zeros(piece, panel * self.box_tokens * rows.panel_bytes)
        cute.arch.fence_proxy("async.shared", space="cta")  # TMA refills this slot
        cute.arch.sync_warp()

    @cute.jit
    def accumulate(self, o: cute.Tensor, p: cute.Tensor, address: Uint32, lane_offsets: cute.Tensor):
        """O^T += V^T P^T."""
        rows = self.v_rows
        d_tiles = self.spec.head_dim_vo // 16
        acc = cute.make_tensor(o.iterator, cute.make_layout((4, d_tiles, self.head_tiles)))
        for token_tile in cutlass.range_constexpr(self.token_tiles):
            for column in cutlass.range_constexpr(rows.bytes // 32):
                offset = lane_offsets[column % (rows.panel_bytes // 32)]
                v = ldmatrix_x4(address + offset, self.layout.fragment_offset(rows, token_tile, column), True)
                if const_expr(self.fp8):
                    for half in cutlass.range_constexpr(2):
                        a0, a1 = self.widen_transposed(v[2 * half])
                        a2, a3 = self.widen_transposed(v[2 * half + 1])
                        for head_tile in cutlass.range_constexpr(self.head_tiles):
                            b = p[None, token_tile, head_tile]
                            mma_m16n8k16(acc[None, 2 * column + half, head_tile], 0, (a0, a1, a2, a3), b[0], b[1], self.dtype)
                else:
                    for head_tile in cutlass.range_constexpr(self.head_tiles):
                        b = p[None, token_tile, head_tile]
                        mma_m16n8k16(acc[None, column, head_tile], 0, v, b[0], b[1], self.dtype)

    # -------------------------------------------------------------------------------------------------------------------------- fp8 to fp16
    @cute.jit
    def widen(self, word: Uint32):
        """Four fp8 in memory order -> two pairs of fp16, exact. e5m2 is the upper byte of fp16."""
        if const_expr(self.spec.kv_dtype == "float8_e5m2"):
            return permute_bytes(word, 0x1404), permute_bytes(word, 0x3424)
        return widen_e4m3(word)

    @cute.jit
    def widen_transposed(self, word: Uint32):
        """Bytes (token, d), (token, d + 1), (token + 1, d), (token + 1, d + 1) -> fp16 pairs of the two tokens for d and for d + 1."""
        if const_expr(self.spec.kv_dtype == "float8_e5m2"):
            return permute_bytes(word, 0x2404), permute_bytes(word, 0x3414)
        return widen_e4m3(permute_bytes(word, 0x3120))


@cute.jit
def transpose_pair(low: Float32, high: Float32, dtype: cutlass.Constexpr):
    """Two columns of this lane's row -> a 16-bit pair, then the transposed 8x8 block: accumulator layout becomes operand B."""
    pair = pack_2(low, high, dtype)
    return cute.arch.inline_ptx("movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};", write_only_types=[Uint32], read_only_args=[pair])


@cute.jit
def widen_e4m3(word: Uint32):
    """Four e4m3 -> two pairs of fp16, exact."""
    return cute.arch.inline_ptx(
        "{ .reg .b16 a, b; mov.b32 {a, b}, {$r0}; cvt.rn.f16x2.e4m3x2 {$w0}, a; cvt.rn.f16x2.e4m3x2 {$w1}, b; }",
        write_only_types=[Uint32, Uint32],
        read_only_args=[word],
    )


@cute.jit
def permute_bytes(word: Uint32, selector: cutlass.Constexpr):
    """Byte i of the result is byte (selector nibble i) of ``word``; nibbles 4 to 7 select zeros."""
    return Uint32(cute.arch.prmt(Int32(word), Int32(0), selector))


@cute.jit
def store_zeros(address: Uint32, offset: cutlass.Constexpr):
    """16 zero bytes to shared memory."""
    cute.arch.inline_ptx(
        "{ .reg .b32 z; mov.b32 z, 0; st.shared.v4.b32 [{$r0}+" + str(offset) + "], {z, z, z, z}; }", read_only_args=[address]
    )


@cute.jit
def over_rows(x: Float32, op: cutlass.Constexpr):
    """Reduce over the eight lanes that hold the same columns of an accumulator."""
    for i in cutlass.range_constexpr(3):
        x = op(x, cute.arch.shuffle_sync_bfly(x, 4 << i))
    return x
