"""The merge of the Hopper decode kernel: warps through shared memory, CTAs through their cluster's, in an order fixed by (warp, rank).

    warp:     (maximum, sum, O) over its own ring        --barrier of the CTA-->
    CTA:      combines its warps and pushes slice i of the item's outputs to CTA i of the cluster (st.async, counted by ``arrived`` there)
    cluster:  each CTA finishes its slice as soon as that is complete; it waits for no one else

Bitwise repeatable, and a request's result does not depend on its neighbours.
"""

import operator

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, const_expr

from ..device.logits import alibi_slope
from ..tiles_decode_sm90 import COLUMNS
from .decode_sm90_layout import Shared
from .decode_sm90_math import over_rows
from .decode_sm90_query import LOG2_E
from .decode_sm90_work import Item, Work


class DecodeMerge:
    """Device functions after the main loop."""

    def __init__(self, spec, tile, layout, query, math):
        self.spec, self.tile, self.layout, self.query, self.math = spec, tile, layout, query, math
        self.heads, self.head_tiles, self.rows = layout.heads, layout.head_tiles, layout.rows
        self.warps_per_head, self.slice = layout.warps_per_head, layout.slice
        # accumulator rows g and g + 8 of O^T tile j are d = 16 j + d_step g and d_gap further
        self.d_step, self.d_gap = (2, 1) if spec.kv_bits == 8 else (1, 8)

    # -------------------------------------------------------------------------------------------------------------------------------- warps
    @cute.jit
    def store_partial(self, shared: Shared, o, top, total, factor, warp: Int32, lane: Int32):
        """This warp's (base-2 maximum, sum, O) -> shared memory. O goes over the warp's own ring, whose copies were waited for and read."""
        s_o, s_sum, d_tiles = shared.s_o, shared.s_sum, self.spec.head_dim_vo // 16
        row, quad = lane // 4, lane % 4
        for i in cutlass.range_constexpr(2 * self.head_tiles):
            head = i // 2 * COLUMNS + 2 * quad + i % 2
            total_i = over_rows(total[i], operator.add)
            if head < self.heads:
                if row == 0:
                    s_sum[0, head, warp] = self.math.exponent(top[i], factor[i]) - self.math.headroom
                    s_sum[1, head, warp] = total_i
                for d in cutlass.range_constexpr(d_tiles):
                    at = 4 * (i // 2 * d_tiles + d) + i % 2
                    s_o[head, 16 * d + self.d_step * row, warp] = o[at]
                    s_o[head, 16 * d + self.d_step * row + self.d_gap, warp] = o[at + 2]

    @cute.jit
    def combine_warps(self, s_sum: cute.Tensor, row: Int32):
        """Of one output row: the maximum over the CTA's warps (-1e30 when none saw a token), each warp's weight, and the sum."""
        head, kv = row % self.heads, row // self.heads
        weights = cute.make_rmem_tensor(self.warps_per_head, Float32)
        top = Float32(-1e30)
        for w in cutlass.range_constexpr(self.warps_per_head):
            top = cute.arch.fmax(top, s_sum[0, head, w * self.tile.heads_per_item + kv])
        total = Float32(0.0)
        for w in cutlass.range_constexpr(self.warps_per_head):
            warp = w * self.tile.heads_per_item + kv
            weights[w] = cute.arch.exp2(s_sum[0, head, warp] - top)
            total = total + s_sum[1, head, warp] * weights[w]
        return top, weights, total

    @cute.jit
    def combine_pair(self, shared: Shared, pair: Int32, pairs: cutlass.Constexpr):
        """Of one pair of outputs: maximum and sum of its row, and both values, over the CTA's warps."""
        tile, half_dim = self.tile, self.spec.head_dim_vo // 2
        if const_expr(pairs % (32 * tile.warps) != 0):
            pair = pair if pair < pairs else Int32(0)  # no branch: what is too much is not used
        row, column = pair // half_dim, pair % half_dim
        top, weights, total = self.combine_warps(shared.s_sum, row)
        x, y = Float32(0.0), Float32(0.0)
        xy = cute.make_rmem_tensor(2, Float32)
        for w in cutlass.range_constexpr(self.warps_per_head):
            source = shared.s_o[row % self.heads, None, w * tile.heads_per_item + row // self.heads]
            cute.autovec_copy(cute.local_tile(source, (2,), (column,)), xy)
            x, y = x + xy[0] * weights[w], y + xy[1] * weights[w]
        return top, total, x, y

    # ------------------------------------------------------------------------------------------------------------------------------ cluster
    @cute.jit
    def bytes_from_peers(self, rank: Int32):
        """What CTA ``rank`` receives in the merge: from every CTA of the cluster (itself too) its slice, and a maximum and sum per row."""
        left = self.rows * self.spec.head_dim_vo - rank * self.slice
        mine = left if left < self.slice else Int32(self.slice)
        mine = mine if mine > 0 else Int32(0)
        return self.tile.cluster * (4 * mine + 8 * self.rows)

    @cute.jit
    def merge(self, shared: Shared, item: Item, work: Work, out, lse, lse_scale: Float32, thread: Int32, rank: Int32):
        """Combine the warps, exchange slices in the cluster, write out."""
        tile, dim = self.tile, self.spec.head_dim_vo
        threads, pairs = 32 * tile.warps, self.rows * dim // 2
        s_slice, s_peer, arrived = shared.s_slice, shared.s_peer, shared.arrived
        if const_expr(tile.cluster > 1):
            cute.arch.cluster_wait()  # every peer runs: its shared memory may be written
        together = min(2, -(-pairs // threads))  # pairs of a thread whose loads are in flight at once
        for first in cutlass.range(thread, pairs, threads * together, unroll=1):
            sums = [self.combine_pair(shared, first + i * threads, pairs) for i in range(together)]
            for i in cutlass.range_constexpr(together):
                pair, (top, total, x, y) = first + i * threads, sums[i]
                if pair < pairs or const_expr(pairs % (threads * together) == 0):
                    if const_expr(tile.cluster == 1):
                        row, column = pair // (dim // 2), pair % (dim // 2)
                        self.write(shared.s_row, item, work, out, lse, lse_scale, row, column, top, total, x, y)
                    else:
                        place = (s_slice.iterator + rank * self.slice + 2 * pair % self.slice).toint()
                        push(Uint32(place), Uint32(arrived.toint()), 2 * pair // self.slice, x, y)
        if const_expr(tile.cluster > 1):
            for i in cutlass.range(thread, self.rows * tile.cluster, threads, unroll=1):
                row, peer = i % self.rows, i // self.rows
                top, weights, total = self.combine_warps(shared.s_sum, row)
                push(Uint32((s_peer.iterator + (rank * self.rows + row) * 2).toint()), Uint32(arrived.toint()), peer, top, total)
            cute.arch.mbarrier_wait(arrived, 0)  # everything this CTA was to get; nobody writes to it any more
            for i in cutlass.range(thread, self.slice // 2, threads, unroll=1):
                pair = rank * (self.slice // 2) + i
                if pair < pairs:
                    row, column = pair // (dim // 2), pair % (dim // 2)
                    top = s_peer[0, row, 0]
                    for peer in cutlass.range_constexpr(1, tile.cluster):
                        top = cute.arch.fmax(top, s_peer[0, row, peer])
                    x, y, total = Float32(0.0), Float32(0.0), Float32(0.0)
                    xy = cute.make_rmem_tensor(2, Float32)
                    for peer in cutlass.range_constexpr(tile.cluster):
                        weight = cute.arch.exp2(s_peer[0, row, peer] - top)
                        cute.autovec_copy(cute.local_tile(s_slice[None, peer], (2,), (i,)), xy)
                        x, y = x + xy[0] * weight, y + xy[1] * weight
                        total = total + s_peer[1, row, peer] * weight
                    self.write(shared.s_row, item, work, out, lse, lse_scale, row, column, top, total, x, y)

    # ------------------------------------------------------------------------------------------------------------------------------- output
    @cute.jit
    def write(
        self, s_row, item: Item, work: Work, out, lse, lse_scale: Float32, row: Int32, column: Int32,
        top: Float32, total: Float32, x: Float32, y: Float32,
    ):  # fmt: skip
        """Normalise and store elements 2 column and 2 column + 1 of an output row, and its LSE."""
        kv_head = item.head_group * self.tile.heads_per_item + row // self.heads
        head, exists = self.query.query_head(item, kv_head, row % self.heads)
        if exists and head < out.shape[1]:
            ahead = Float32(0.0)  # ALiBi was measured from the query's position: slope * (kv_len - 1) is still missing
            if const_expr(self.spec.pos_encoding == "ALIBI"):
                ahead = alibi_slope(head, out.shape[1]) * LOG2_E * Float32(work.end - 1)
            if const_expr(self.spec.sinks):
                sink = s_row[1, row] - ahead
                new_top = cute.arch.fmax(top, sink)
                old = cute.arch.exp2(top - new_top)
                total = total * old + cute.arch.exp2(sink - new_top)
                x, y, top = x * old, y * old, new_top
            factor = s_row[0, row] * cute.arch.rcp_approx(total) if total > 0.0 else Float32(0.0)
            xy = cute.make_rmem_tensor(2, Float32)
            xy[0], xy[1] = x * factor, y * factor
            narrow = cute.make_rmem_tensor(2, out.element_type)
            narrow.store(xy.load().to(out.element_type))
            cute.autovec_copy(narrow, cute.local_tile(out[item.request, head, None], (2,), (column,)))
            if const_expr(lse is not None):
                if column == 0:
                    value = (top + cute.math.log2(total, fastmath=True) + ahead) * lse_scale if total > 0.0 else -Float32.inf
                    lse[item.request, head] = value


@cute.jit
def push(address: Uint32, barrier: Uint32, peer: Int32, x: Float32, y: Float32):
    """Two floats to the same shared-memory address of another CTA of the cluster, counted by that CTA's barrier."""
    cute.arch.inline_ptx(
        "{ .reg .u32 a, b; mapa.shared::cluster.u32 a, {$r0}, {$r2}; mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a], {{$r3}, {$r4}}, [b]; }",
        read_only_args=[address, barrier, Uint32(peer), x, y],
    )
