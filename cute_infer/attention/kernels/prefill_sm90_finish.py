"""The end of a work item in the Hopper prefill kernels: divide O by its sum, sinks, log-sum-exp, and O's way out.

    without sink    out = out_scale * O / l                       lse = m + log2 l
    with sink       M = max(m, sink log2 e)   L = l 2^(m - M) + 2^(sink log2 e - M)
                    out = out_scale * O 2^(m - M) / L             lse = M + log2 L

m and l are a row's running maximum (base 2) and sum, v_scale is part of out_scale. A row that saw nothing and has no sink: 0 and -inf.
O leaves a consumer group through its own buffer and TMA; the rows of a request's last block, which TMA cannot clip, go one by one; the
partials of split KV go straight from registers.
"""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.utils import LayoutEnum

from ..device.output import store_columns, store_lse
from .prefill_sm90_layout import GROUP_ROWS
from .prefill_sm90_softmax import convert_pairs, rows_cols, scale_rows

LOG2_E = math.log2(math.e)
WARP_GROUP = 128


class Place(NamedTuple):
    """Where one consumer group's 64 rows of a work item belong."""

    q_row: object  # row of q and out of the first
    num_rows: object  # rows that belong to the request; may be negative or exceed 64
    head: object
    split: object


class Output(NamedTuple):
    """How O leaves one consumer group."""

    tma: object
    coords: object  # of out, as the layout's ``row_tma`` gives them
    tiles: object  # the O buffers: (row, column, buffer)
    boxes: object  # the same as TMA sees them: (row, column, block, buffer)
    box: object  # static shape of one
    buffer: object  # this group's


class PrefillFinish:
    """``layout``: the kernel's PrefillLayout or PrefillFp8Layout. ``m`` below is the kernel's Math: acc_o, row_max, row_sum, pv."""

    def __init__(self, spec, tile, layout, out_dtype):
        self.spec, self.tile, self.layout, self.out_dtype = spec, tile, layout, out_dtype
        self.pack = spec.group_size if tile.pack_heads else 1  # rows per query
        self.heads_per_kv = spec.group_size // self.pack  # heads, as work items count them, per KV head
        self.single = spec.kv_layout == "single"

    @cute.jit
    def row_of(self, place, row: Int32):
        """(row of q and out, query head) of a row of this group."""
        q_row, qo_head = place.q_row + row, place.head
        if const_expr(self.pack > 1):
            q_row, qo_head = place.q_row + row // self.pack, place.head * self.pack + row % self.pack
        return q_row, qo_head

    @cute.jit
    def normalise(self, m, memory, scales, scale_log2, place, row: Int32, column: Int32, unit: cutlass.Constexpr):
        """Divide O by its sum, apply the output scales, write the log-sum-exp.

        ``scale_log2[r]`` is the softmax scale of row ``row + 8 * r``. O and the sum count in units of ``1 / unit`` (8 bits: P is shifted).
        """
        out_scale = scales.out_scale if const_expr(unit == 1) else scales.out_scale * Float32(unit)
        if const_expr(self.spec.v_scale):
            out_scale = out_scale * memory.v_scale[place.head // self.heads_per_kv]
        factor = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            total = cute.arch.warp_reduction(m.row_sum[r], lambda x, y: x + y, threads_in_group=4)
            if const_expr(unit != 1):
                total = total * Float32(unit)
            top = m.row_max[r] * scale_log2[r] if m.row_max[r] != -Float32.inf else -Float32.inf
            weight = Float32(1.0)
            q_row, qo_head = self.row_of(place, row + 8 * r)
            if const_expr(self.spec.sinks):
                # the sink is one more logit without a value; it may become the new maximum; the first split counts it
                sink = memory.sinks[qo_head] * Float32(LOG2_E)
                if const_expr(self.tile.split_kv):
                    sink = sink if place.split == 0 else -Float32.inf
                joint = cute.arch.fmax(top, sink)
                reference = joint if joint != -Float32.inf else Float32(0.0)
                weight = cute.arch.exp2(top - reference)
                total = total * weight + cute.arch.exp2(sink - reference)
                top = reference
            factor[r] = cute.arch.rcp_approx(total) * weight * out_scale if total != Float32(0.0) else Float32(0.0)
            if const_expr(self.spec.lse or self.tile.split_kv):
                if column == 0 and row + 8 * r < place.num_rows:
                    lse = top + cute.math.log2(total, fastmath=True)
                    store_lse(memory.lse, memory.lse_partial, lse, q_row, qo_head, place.split, scales.lse_scale)
        scale_rows(m.acc_o, factor)

    @cute.jit
    def store_partial(self, m, memory, place, row: Int32, column: Int32):
        """O, normalised, to the partials of this split: fp32, straight from registers."""
        o = rows_cols(m.acc_o)
        pair = cute.make_rmem_tensor(2, Float32)
        for r in cutlass.range_constexpr(2):
            if row + 8 * r < place.num_rows:
                q_row, qo_head = self.row_of(place, row + 8 * r)
                for c in cutlass.range_constexpr(0, cute.size(o, mode=[1]), 2):
                    pair[0], pair[1] = o[r, c], o[r, c + 1]
                    store_columns(memory.out, memory.out_partial, pair, q_row, qo_head, place.split, column + 4 * c)

    @cute.jit
    def store(self, m, memory, output, place, group: Int32, thread: Int32):
        """O to this group's own buffer and out; the other groups are not involved, and the store runs on under the next work item."""
        dtype, tile = self.out_dtype, output.tiles[None, None, output.buffer]
        if thread // 32 == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # this group's previous store has left the buffer
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARP_GROUP)
        to_shared = cute.make_tiled_copy_C(sm90.sm90_get_smem_store_op(LayoutEnum.ROW_MAJOR, dtype, Float32), m.pv).get_slice(thread)
        rounded = cute.make_rmem_tensor_like(m.acc_o, dtype)
        convert_pairs(m.acc_o, rounded)
        cute.copy(to_shared, to_shared.retile(rounded), to_shared.partition_D(tile))
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=WARP_GROUP)
        # TMA clips only at the end of the tensor: the last block of a request must not run into the next one
        if const_expr(self.single):
            whole = place.num_rows > 0
        else:
            whole = place.num_rows >= GROUP_ROWS
        if whole:
            if thread // 32 == 0:
                rows = self.layout.rows_from(output.coords, place.q_row)
                from_s, to_g = self.layout.partition(output.tma, output.boxes, rows, output.box)
                cute.copy(output.tma, from_s[None, output.buffer], to_g[None, (0, 0, 0, place.head)])
                cute.arch.cp_async_bulk_commit_group()
        elif const_expr(not self.single):
            chunks = self.spec.head_dim_vo // 8  # 16-byte chunks of a row
            for i in cutlass.range(thread, place.num_rows * chunks, WARP_GROUP, unroll=1):
                chunk = cute.make_rmem_tensor(8, dtype)
                q_row, qo_head = self.row_of(place, i // chunks)
                cute.autovec_copy(cute.local_tile(tile[i // chunks, None], (8,), (i % chunks,)), chunk)
                cute.autovec_copy(chunk, cute.local_tile(memory.out[Int64(q_row), qo_head, None], (8,), (i % chunks,)))
