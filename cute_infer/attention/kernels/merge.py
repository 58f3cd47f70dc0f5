"""Merge attention states: split-KV partials, cascade levels and pairs of states, with one kernel.

    lse = log2(sum_i 2**s_i)            out = sum_i 2**(s_i - lse) * v_i            i in the order given, always the same

One group of lanes owns one (row, head); each lane owns 8 neighbouring elements of it.

Work split
    lanes   min(32, next power of two >= head_dim / 8) lanes of one warp per (row, head). head_dim 128: 16 lanes, 2 (row, head) per warp.
            head_dim > 256 makes several passes over the states. Nothing limits the number of heads: the grid runs over rows x heads.
    batch   a lane loads `batch` states before it uses the first, so a round costs one memory latency.
    ways    1: four independent warps per CTA. Otherwise `ways` warps take states w, w + ways, ... of the same (row, head) and warp 0 folds
            their results in warp order.

Exactness
    A state with s = -inf is empty: its v is never used (it may be NaN), and merging x with empty states returns x bit for bit.
    All states empty: out = 0, lse = -inf. A NaN in s makes the row NaN.
    The order of every sum is fixed, so results are bitwise repeatable and independent of the number of rows.
    out may be v and lse may be s (in-place merge): a (row, head) never leaves its warp, and reads come before writes.

Shared memory: ways * 32 * (8 + 2) * 4 bytes (10 KiB for 8 ways), none for 1.
Memory bound: rows * heads * head_dim * (states * sizeof(v) + sizeof(out)) bytes.
Source: Ye et al., "Cascade Inference" (2024); Milakov & Gimelshein, arXiv:1805.02867.
"""

import typing

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from ..device.args import CUTE_DTYPES
from ..tiles_merge import VECTOR, MergeSpec, MergeTile

WARP = 32
INDEPENDENT_WARPS = 4  # warps per CTA when each works alone: 128 threads


class MergeStates:
    """The merge of any number of states (or of two separate ones) for one head dim and pair of dtypes."""

    def __init__(self, spec: MergeSpec, tile: MergeTile):
        self.spec = spec
        self.tile = tile
        self.v_type = CUTE_DTYPES[spec.v_dtype]
        self.o_type = CUTE_DTYPES[spec.o_dtype]
        self.chunks = spec.head_dim // VECTOR
        self.lanes = min(WARP, 1 << (self.chunks - 1).bit_length())
        self.passes = -(-self.chunks // self.lanes)
        self.items_per_warp = WARP // self.lanes
        self.warps = INDEPENDENT_WARPS if tile.ways == 1 else tile.ways
        self.items_per_cta = self.items_per_warp * (self.warps // tile.ways)
        assert not (spec.pair and tile != MergeTile(2, 1)), "a pair is one round of two loads"

    def abi(self) -> tuple:
        """Stand-ins for ``(v, s, v_other, s_other, mask, out, lse, lse_scale, stream)``.

        v        [states, rows, heads, head_dim]; any strides that keep rows on 16-byte boundaries
        s        [states, rows, heads] fp32 base 2, any strides
        v_other, s_other   the second state of a pair, [1, rows, heads, ...]; else None
        mask     [rows] uint8 or None
        out      [rows, heads, head_dim]
        lse      [rows, heads] fp32 or None; receives the merged base-2 LSE times lse_scale
        """
        spec = self.spec
        rows, heads, states = cute.sym_int(), cute.sym_int(), 1 if spec.pair else cute.sym_int()

        def vectors(dtype, *leading):
            strides = tuple(cute.sym_int64(divisibility=128 // dtype.width) for _ in leading)
            return make_fake_tensor(dtype, (*leading, spec.head_dim), (*strides, 1), assumed_align=16)

        def scores(*shape):
            return make_fake_tensor(Float32, shape, tuple(cute.sym_int64() for _ in shape), assumed_align=4)

        return (
            vectors(self.v_type, states, rows, heads),
            scores(states, rows, heads),
            vectors(self.v_type, 1, rows, heads) if spec.pair else None,
            scores(1, rows, heads) if spec.pair else None,
            make_fake_tensor(cutlass.Uint8, (rows,), (1,), assumed_align=1) if spec.masked else None,
            vectors(self.o_type, rows, heads),
            scores(rows, heads) if spec.lse else None,
            Float32(1.0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        v: cute.Tensor,
        s: cute.Tensor,
        v_other: typing.Optional[cute.Tensor],
        s_other: typing.Optional[cute.Tensor],
        mask: typing.Optional[cute.Tensor],
        out: cute.Tensor,
        lse: typing.Optional[cute.Tensor],
        lse_scale: Float32,
        stream: cuda.CUstream,
    ):
        items = out.shape[0] * out.shape[1]
        self.kernel(v, s, v_other, s_other, mask, out, lse, lse_scale).launch(
            grid=[cute.ceil_div(items, self.items_per_cta), 1, 1], block=[self.warps * WARP, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        v: cute.Tensor,
        s: cute.Tensor,
        v_other: typing.Optional[cute.Tensor],
        s_other: typing.Optional[cute.Tensor],
        mask: typing.Optional[cute.Tensor],
        out: cute.Tensor,
        lse: typing.Optional[cute.Tensor],
        lse_scale: Float32,
    ):
        thread = cute.arch.thread_idx()[0]
        cta = cute.arch.block_idx()[0]
        warp, lane = thread // WARP, thread % WARP
        way = warp if const_expr(self.tile.ways > 1) else Int32(0)
        warp_in_items = Int32(0) if const_expr(self.tile.ways > 1) else warp

        rows, heads = out.shape[0], out.shape[1]
        item = cta * self.items_per_cta + warp_in_items * self.items_per_warp + lane // self.lanes
        live = item < rows * heads
        item = item if live else Int32(0)  # idle lanes repeat item 0 so that no lane leaves the warp; they store nothing
        row, head = item // heads, item % heads
        writes = live and way == 0
        if const_expr(self.spec.masked):
            writes = writes and mask[row] != 0

        exchange = self.allocate_exchange() if const_expr(self.tile.ways > 1) else None
        peak, total = -Float32.inf, Float32(0.0)
        for p in cutlass.range(self.passes, unroll=1):
            chunk = lane % self.lanes + p * self.lanes
            owns = Boolean(True)
            if const_expr(self.passes * self.lanes != self.chunks):
                owns = chunk < self.chunks
                chunk = chunk if owns else Int32(0)
            acc = cute.make_rmem_tensor(VECTOR, Float32)
            acc.fill(0.0)
            peak, total = self.accumulate(v, s, v_other, s_other, row, head, chunk, way, acc)
            if const_expr(self.tile.ways > 1):
                peak, total = self.combine_ways(exchange, peak, total, acc, warp, lane)
            if writes and owns:
                norm = self.reciprocal(total)
                result = cute.make_rmem_tensor(VECTOR, self.o_type)
                result.store((acc.load() * norm).to(self.o_type))
                cute.autovec_copy(result, cute.local_tile(out[row, head, None], (VECTOR,), (chunk,)))

        if const_expr(self.spec.lse):
            cute.arch.sync_warp()  # lse may be s: every lane has read it before one lane writes it
            if writes and lane % self.lanes == 0:
                lse[row, head] = -Float32.inf if total == 0.0 else (peak + cute.math.log2(total)) * lse_scale

    @cute.jit
    def accumulate(self, v, s, v_other, s_other, row, head, chunk, way, acc):
        """Fold the states of this way into ``acc``; returns ``(peak, total)``: the largest s and sum of 2**(s_i - peak)."""
        batch = self.tile.batch
        batch_s = cute.make_rmem_tensor(batch, Float32)
        batch_v = cute.make_rmem_tensor((VECTOR, batch), self.v_type)
        peak, total = -Float32.inf, Float32(0.0)
        if const_expr(self.spec.pair):
            self.load_state(v, s, Int32(0), row, head, chunk, batch_s, batch_v, 0)
            self.load_state(v_other, s_other, Int32(0), row, head, chunk, batch_s, batch_v, 1)
            peak, total = self.fold(batch_s, batch_v, peak, total, acc)
        else:
            round_size = batch * self.tile.ways
            for r in cutlass.range(cute.ceil_div(v.shape[0], round_size), unroll=1):
                for b in cutlass.range_constexpr(batch):
                    self.load_state(v, s, r * round_size + b * self.tile.ways + way, row, head, chunk, batch_s, batch_v, b)
                peak, total = self.fold(batch_s, batch_v, peak, total, acc)
        return peak, total

    @cute.jit
    def load_state(self, v, s, state, row, head, chunk, batch_s, batch_v, slot: cutlass.Constexpr):
        """Load one state into ``slot``; past the last state the slot is an empty state."""
        states = v.shape[0]
        exists = state < states
        state = state if exists else states - 1  # a repeated read of a line that is already on its way
        score = s[state, row, head]
        batch_s[slot] = score if exists else -Float32.inf
        cute.autovec_copy(cute.local_tile(v[state, row, head, None], (VECTOR,), (chunk,)), batch_v[None, slot])

    @cute.jit
    def fold(self, batch_s, batch_v, peak, total, acc):
        """Add a batch of states to the running ``(peak, total, acc)``; acc and total are relative to 2**peak."""
        batch = self.tile.batch
        new_peak = peak
        for b in cutlass.range_constexpr(batch):
            new_peak = cute.arch.fmax(new_peak, batch_s[b])
        anchor = Float32(0.0) if new_peak == -Float32.inf else new_peak  # -inf - -inf would be NaN
        keep = cute.math.exp2(peak - anchor, fastmath=True)
        total = total * keep
        for i in cutlass.range_constexpr(VECTOR):
            acc[i] = acc[i] * keep
        for b in cutlass.range_constexpr(batch):
            present = batch_s[b] != -Float32.inf
            weight = cute.math.exp2(batch_s[b] - anchor, fastmath=True)
            total = total + weight
            for i in cutlass.range_constexpr(VECTOR):
                value = batch_v[i, b].to(Float32)
                acc[i] = acc[i] + weight * (value if present else Float32(0.0))
        return new_peak, total

    @cute.jit
    def reciprocal(self, total):
        """1 / total, where a lone state's total of 1 stays exactly 1 and an empty row's total of 0 becomes 0 (its acc is 0 too)."""
        approximate = cute.arch.rcp_approx(total)
        return total if total == 0.0 or total == 1.0 else approximate

    def allocate_exchange(self):
        """Shared memory through which the ways meet: (acc [8, lane, way], peak [lane, way], total [lane, way])."""
        smem, ways = SmemAllocator(), self.tile.ways
        return (
            smem.allocate_tensor(Float32, cute.make_layout((VECTOR, WARP, ways)), byte_alignment=16),
            smem.allocate_tensor(Float32, cute.make_layout((WARP, ways)), byte_alignment=16),
            smem.allocate_tensor(Float32, cute.make_layout((WARP, ways)), byte_alignment=16),
        )

    @cute.jit
    def combine_ways(self, exchange, peak, total, acc, warp, lane):
        """Fold the results of all warps of the CTA, in warp order; meaningful in warp 0."""
        ways = self.tile.ways
        s_acc, s_peak, s_total = exchange
        if const_expr(self.passes > 1):
            cute.arch.sync_threads()  # warp 0 has read the previous pass
        cute.autovec_copy(acc, s_acc[None, lane, warp])
        s_peak[lane, warp] = peak
        s_total[lane, warp] = total
        cute.arch.sync_threads()
        if warp == 0:
            all_peak = peak
            for w in cutlass.range_constexpr(1, ways):
                all_peak = cute.arch.fmax(all_peak, s_peak[lane, w])
            anchor = Float32(0.0) if all_peak == -Float32.inf else all_peak
            keep = cute.math.exp2(peak - anchor, fastmath=True)
            total = total * keep
            for i in cutlass.range_constexpr(VECTOR):
                acc[i] = acc[i] * keep
            for w in cutlass.range_constexpr(1, ways):
                weight = cute.math.exp2(s_peak[lane, w] - anchor, fastmath=True)
                total = total + weight * s_total[lane, w]
                part = cute.make_rmem_tensor(VECTOR, Float32)
                cute.autovec_copy(s_acc[None, lane, w], part)
                for i in cutlass.range_constexpr(VECTOR):
                    acc[i] = acc[i] + weight * part[i]
            peak = all_peak
        return peak, total
