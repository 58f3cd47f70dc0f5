"""Queries, softmax factors and output factors of the Hopper decode kernel: what a warp keeps besides KV.

bf16 queries of an fp8 cache are scaled by a power of two per head to the range of fp16; the inverse joins that head's softmax factor, so
nothing overflows and no bit of q is lost.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32, Uint32, const_expr

from ..device.logits import alibi_slope
from ..tiles_decode_sm90 import COLUMNS
from .decode_sm90_work import Item, float_bits

LOG2_E = math.log2(math.e)


class DecodeQuery:
    """Device functions for the query side."""

    def __init__(self, spec, tile, layout):
        self.spec, self.tile, self.layout = spec, tile, layout
        self.heads, self.head_tiles, self.rows = layout.heads, layout.head_tiles, layout.rows
        self.fp8 = spec.kv_bits == 8
        self.rescale_q = self.fp8 and spec.q_dtype == "bfloat16"

    @cute.jit
    def query_head(self, item: Item, kv_head: Int32, head: Int32):
        """Global index of query head ``head`` of this block, and whether the group has it."""
        in_group = item.head_block * self.heads + head
        exists = head < self.heads and in_group < self.spec.group_size
        return kv_head * self.spec.group_size + in_group, exists

    @cute.jit
    def softmax_factors(self, item: Item, kv_head: Int32, q, k_scale, sm_scale: Float32, soft_cap: Float32, lane: Int32):
        """Per column of this lane (heads 2t and 2t + 1 of a tile): raw score -> argument of exp2 (or of the cap), and the ALiBi slope."""
        factor, slope = cute.make_rmem_tensor(2 * self.head_tiles, Float32), cute.make_rmem_tensor(2 * self.head_tiles, Float32)
        scale = sm_scale
        if const_expr(k_scale is not None):
            head = kv_head if kv_head < k_scale.shape[0] else Int32(0)
            scale = scale * k_scale[head]
        if const_expr(self.spec.soft_cap):
            scale = scale / soft_cap * 2.0  # cap * tanh(x / cap) is written with exp2(2 log2(e) x / cap)
        factor.fill(scale * LOG2_E)
        slope.fill(0.0)
        if const_expr(self.spec.pos_encoding == "ALIBI"):
            for i in cutlass.range_constexpr(2 * self.head_tiles):
                head, _ = self.query_head(item, kv_head, i // 2 * COLUMNS + lane % 4 * 2 + i % 2)
                slope[i] = alibi_slope(head, q.shape[1]) * LOG2_E
        return factor, slope

    @cute.jit
    def ask_q(self, q: cute.Tensor, item: Item, kv_head: Int32, lane: Int32):
        """This lane's elements of the query rows, [4, d tile, head tile], as they are: loads that nothing has waited for yet."""
        d_tiles = self.spec.head_dim_qk // 16
        x = cute.make_rmem_tensor(cute.make_layout((4, d_tiles, self.head_tiles)), q.element_type)
        column, quad = lane // 4, lane % 4
        for tile in cutlass.range_constexpr(self.head_tiles):
            head, exists = self.query_head(item, kv_head, tile * COLUMNS + column)
            row = q[item.request, head if exists and head < q.shape[1] else 0, None]
            for d in cutlass.range_constexpr(d_tiles):
                if const_expr(self.fp8):  # d = 16 j + 4 t + 0..3, as the converted K holds them
                    cute.autovec_copy(cute.local_tile(row, (4,), (d * 4 + quad,)), x[None, d, tile])
                else:  # d = 16 j + 2 t + 0..1 and 8 further
                    for half in cutlass.range_constexpr(2):
                        pair = cute.local_tile(row, (2,), (d * 8 + half * 4 + quad,))
                        cute.autovec_copy(pair, cute.local_tile(x[None, d, tile], (2,), (half,)))
        return x

    @cute.jit
    def pack_q(self, x: cute.Tensor, item: Item, kv_head: Int32, num_heads: Int32, factor: cute.Tensor, lane: Int32):
        """:meth:`ask_q`'s elements as mma operand B (Q^T), [b0 b1, d tile, head tile]: column = head lane / 4, rows = d.

        The softmax compares raw scores and needs a positive factor: the sign of the scale moves into q, a zero scale becomes a tiny one.
        """
        d_tiles = self.spec.head_dim_qk // 16
        r_q = cute.make_rmem_tensor(cute.make_layout((2, d_tiles, self.head_tiles)), Uint32)
        column, quad = lane // 4, lane % 4
        sign = Uint32(0x80008000) if factor[0] < 0.0 else Uint32(0)
        for i in cutlass.range_constexpr(2 * self.head_tiles):
            factor[i] = cute.arch.fmax(factor[i] if factor[i] > 0.0 else -factor[i], Float32(1e-30))
        for tile in cutlass.range_constexpr(self.head_tiles):
            head, exists = self.query_head(item, kv_head, tile * COLUMNS + column)
            exists = exists and head < num_heads
            if const_expr(self.rescale_q):
                pairs = self.to_half(x[None, None, tile], factor, tile, column, quad)
            else:
                pairs = cute.recast_tensor(x[None, None, tile], Uint32)
            for d in cutlass.range_constexpr(d_tiles):
                for half in cutlass.range_constexpr(2):
                    pair = pairs[half, d] ^ sign
                    r_q[half, d, tile] = pair if exists else Uint32(0)
        return r_q

    @cute.jit
    def to_half(self, x: cute.Tensor, factor: cute.Tensor, tile: cutlass.Constexpr, column: Int32, quad: Int32):
        """bf16 head rows -> fp16 pairs, times the power of two that brings the row's largest element into [2^13, 2^14).

        bf16 has fewer mantissa bits than fp16, so only elements 2^-24 below the largest lose bits. The inverse multiplies the factors
        of the lanes that own the head's column of S^T.
        """
        wide = cute.make_rmem_tensor(x.layout, Float32)
        wide.store(x.load().to(Float32))
        largest = Float32(0.0)
        for i in cutlass.range_constexpr(cute.size(x)):
            largest = cute.arch.fmax(largest, wide[i] if wide[i] > 0.0 else -wide[i])
        for offset in cutlass.range_constexpr(2):  # the four lanes of a column hold the row together
            largest = cute.arch.fmax(largest, cute.arch.shuffle_sync_bfly(largest, 1 << offset))
        exponent = (float_bits(largest) >> 23) & 255
        exponent = exponent if exponent > 64 else Int32(64)  # a row of zeros: the factor must stay a normal number
        power = bits_float((267 - exponent) << 23)
        inverse = bits_float((exponent - 13) << 23)
        for c in cutlass.range_constexpr(2):
            factor[2 * tile + c] = factor[2 * tile + c] * cute.arch.shuffle_sync(inverse, (2 * quad + c) * 4)
        halves = cute.make_rmem_tensor(x.layout, Float16)
        for i in cutlass.range_constexpr(cute.size(x)):
            wide[i] = wide[i] * power
        halves.store(wide.load().to(Float16))
        return cute.recast_tensor(halves, Uint32)

    @cute.jit
    def load_row_constants(self, s_row, item: Item, out, sinks, v_scale, out_scale: Float32, lane: Int32):
        """Per output row: the factor of the output, and the sink's base-2 logit (-inf without one). Read early, used in the merge."""
        for row in cutlass.range(lane, self.rows, 32, unroll=1):
            kv_head = item.head_group * self.tile.heads_per_item + row // self.heads
            head, exists = self.query_head(item, kv_head, row % self.heads)
            exists = exists and head < out.shape[1]
            scale, sink = out_scale, -Float32.inf
            if const_expr(v_scale is not None):
                if exists:
                    scale = scale * v_scale[kv_head]
            if const_expr(sinks is not None):
                if exists and item.split == 0:  # one split counts it
                    sink = sinks[head] * LOG2_E
            s_row[0, row] = scale
            s_row[1, row] = sink


@cute.jit
def bits_float(x: Int32):
    """The float with a bit pattern."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x])
