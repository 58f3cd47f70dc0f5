"""Chain speculative sampling: accept draft tokens while they look like the target model's, then draw one token of its own.

One CTA of 1024 threads owns one sequence. Thread i decides draft token i: accepted iff u_i * p_i < q_i, with p_i and q_i the draft's and
the target's probability of the token, compared in double. The first rejected position (or the one after the last) draws from

    mass(x) = trunc(2**40 * max(q(x) - p(x), 0))        after a rejection
              trunc(2**40 * q(x))                       when every draft token was accepted, or when q <= p everywhere

in two passes over that position's rows: integer sums per warp, then the warp that holds the target walks to the token in index order.
Integers make the result bitwise repeatable, and equal to the reference's.

Barriers: the accept votes; the warps' sums (twice when the residual is empty). Shared memory: 0.5 KiB.
Memory bound: 2 * vocab * 4 bytes per sequence, the second pass from L2. Source: Chen et al., arXiv:2302.01318; Leviathan et al., ICML 2023.
"""

import typing

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from .device import draw_below, uniform53, warp_inclusive_sum
from .tiles import ChainSpec, ChainTile

UNIT = float(1 << 40)  # masses are integers in units of 2**-40
UNROLL = 4


class ChainKernel:
    def __init__(self, spec: ChainSpec, tile: ChainTile):
        self.spec, self.tile = spec, tile
        self.vector = 4 if spec.aligned else 1
        self.warps = tile.threads // 32
        assert self.warps == 32  # one lane per warp sum

    def abi(self) -> tuple:
        """Stand-ins for the arguments of ``__call__``.

        draft [batch, num_draft, vocab], target [batch, num_draft + 1, vocab] fp32; draft_ids [batch, num_draft] int32;
        out_ids [batch, num_draft + 1], accepted [batch], emitted [batch] int32; seed, offset [batch] int64 or None;
        seed_value, offset_value, row_in_counter as in kernels_rows.py.
        """
        batch, vocab = cute.sym_int(), cute.sym_int(divisibility=self.vector)

        def stride():
            return cute.sym_int64(divisibility=self.vector)

        def probs():
            shape = (batch, cute.sym_int(), vocab)
            return make_fake_tensor(Float32, shape, (stride(), stride(), 1), assumed_align=4 * self.vector)

        def ids():
            return make_fake_tensor(Int32, (batch, cute.sym_int()), (cute.sym_int64(), 1), assumed_align=4)

        def per_row(dtype, present=True):
            return make_fake_tensor(dtype, (batch,), (cute.sym_int64(),), assumed_align=dtype.width // 8) if present else None

        return (
            probs(),
            ids(),
            probs(),
            ids(),
            per_row(Int32),
            per_row(Int32),
            per_row(Int64, self.spec.seed == "row"),
            per_row(Int64, self.spec.offset == "row"),
            Int64(0),
            Int64(0),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        draft: cute.Tensor,
        draft_ids: cute.Tensor,
        target: cute.Tensor,
        out_ids: cute.Tensor,
        accepted: cute.Tensor,
        emitted: cute.Tensor,
        seed: typing.Optional[cute.Tensor],
        offset: typing.Optional[cute.Tensor],
        seed_value: Int64,
        offset_value: Int64,
        row_in_counter: Int32,
        stream: cuda_driver.CUstream,
    ):
        self.kernel(
            draft, draft_ids, target, out_ids, accepted, emitted, seed, offset, seed_value, offset_value, row_in_counter
        ).launch(grid=[target.shape[0], 1, 1], block=[self.tile.threads, 1, 1], stream=stream)

    @cute.kernel
    def kernel(
        self,
        draft: cute.Tensor,
        draft_ids: cute.Tensor,
        target: cute.Tensor,
        out_ids: cute.Tensor,
        accepted: cute.Tensor,
        emitted: cute.Tensor,
        seed: typing.Optional[cute.Tensor],
        offset: typing.Optional[cute.Tensor],
        seed_value: Int64,
        offset_value: Int64,
        row_in_counter: Int32,
    ):
        tid = cute.arch.thread_idx()[0]
        b = cute.arch.block_idx()[0]
        lane, warp = tid % 32, tid // 32
        num_draft, vocab = Int32(draft.shape[1]), Int32(target.shape[2])
        smem = SmemAllocator()
        votes = smem.allocate_tensor(Int32, cute.make_layout(2), byte_alignment=8)  # (accepted, first rejected)
        sums = smem.allocate_tensor(Int64, cute.make_layout(32), byte_alignment=16)
        key, count = seed_value, offset_value
        if const_expr(seed is not None):
            key = seed[b]
        if const_expr(offset is not None):
            count = offset[b]
        row = b * row_in_counter

        if tid == 0:
            votes[0] = Int32(0)
            votes[1] = num_draft
        cute.arch.sync_threads()
        for i in cutlass.range(tid, num_draft, self.tile.threads, unroll=1):
            token = draft_ids[b, i]
            accept = Int32(0)
            if token >= 0 and token < vocab:
                u = Float64(uniform53(key, count, row, i + 1)) * Float64(2.0**-53)
                p, q = draft[Int64(b), Int64(i), token], target[Int64(b), Int64(i), token]
                if u * Float64(p) < Float64(q):
                    accept = Int32(1)
            if accept == 1:
                cute.arch.atomic_add(votes.iterator, Int32(1), sem="relaxed", scope="cta")
            else:
                cute.arch.atomic_min(votes.iterator + 1, i, sem="relaxed", scope="cta")
        cute.arch.sync_threads()
        stop = votes[1]  # position of the token of our own
        for i in cutlass.range(tid, num_draft + 1, self.tile.threads, unroll=1):
            if i < stop:
                out_ids[b, i] = draft_ids[b, i]
            if i > stop:
                out_ids[b, i] = Int32(-1)
        if tid == 0:
            accepted[b] = votes[0]
            emitted[b] = stop

        q_row = target[Int64(b), Int64(stop), None]
        p_stop = stop if stop < num_draft else Int32(0)  # never read past the draft; unused when all were accepted
        p_row = draft[Int64(b), Int64(p_stop), None]
        residual = stop < num_draft
        chunks = (vocab + self.tile.threads * self.vector - 1) // (self.tile.threads * self.vector)
        first_vector = warp * (chunks * 32) + lane
        total, before, own = self.row_sums(q_row, p_row, residual, sums, first_vector, chunks, vocab, lane, warp)
        if residual and total == 0:
            residual = total > 0
            total, before, own = self.row_sums(q_row, p_row, residual, sums, first_vector, chunks, vocab, lane, warp)
        goal = draw_below(uniform53(key, count, row, Int32(0)), total)
        if tid == 0 and total == 0:
            out_ids[b, stop] = Int32(0)  # a row without any probability
        if before <= goal and goal < before + own:
            for c in cutlass.range(chunks, unroll=1):
                vector_idx = first_vector + c * 32
                w = self.masses(q_row, p_row, residual, vector_idx, vocab)
                mine = Int64(0)
                for j in cutlass.range_constexpr(self.vector):
                    mine += w[j]
                to_here = warp_inclusive_sum(mine, lane)
                running = before + to_here - mine
                for j in cutlass.range_constexpr(self.vector):
                    if running <= goal and goal < running + w[j]:
                        out_ids[b, stop] = vector_idx * self.vector + j
                    running += w[j]
                before += cute.arch.shuffle_sync(to_here, 31)

    @cute.jit
    def masses(self, q_row: cute.Tensor, p_row: cute.Tensor, residual, vector_idx: Int32, vocab: Int32) -> cute.Tensor:
        """Integer masses of one vector of the position; zero beyond the vocabulary."""
        q = cute.make_rmem_tensor(self.vector, Float32)
        p = cute.make_rmem_tensor(self.vector, Float32)
        w = cute.make_rmem_tensor(self.vector, Int64)
        for j in cutlass.range_constexpr(self.vector):
            q[j] = Float32(0.0)
            p[j] = Float32(0.0)
        if vector_idx * self.vector < vocab:
            self.load(q_row, vector_idx, q)
            if residual:
                self.load(p_row, vector_idx, p)
        for j in cutlass.range_constexpr(self.vector):
            w[j] = Int64(cute.arch.fmax(q[j] - p[j], Float32(0.0)) * Float32(UNIT))
        return w

    @cute.jit
    def load(self, row: cute.Tensor, vector_idx: Int32, values: cute.Tensor):
        if const_expr(self.vector == 1):
            values[0] = row[vector_idx]
        else:
            cute.autovec_copy(cute.local_tile(row, (self.vector,), (vector_idx,)), values)

    @cute.jit
    def row_sums(
        self,
        q_row: cute.Tensor,
        p_row: cute.Tensor,
        residual,
        sums: cute.Tensor,
        first_vector: Int32,
        chunks: Int32,
        vocab: Int32,
        lane: Int32,
        warp: Int32,
    ):
        """(mass of the position, of all earlier warps, of this warp)."""
        mine = Int64(0)
        for c in cutlass.range(chunks, unroll=UNROLL):
            w = self.masses(q_row, p_row, residual, first_vector + c * 32, vocab)
            for j in cutlass.range_constexpr(self.vector):
                mine += w[j]
        to_here = warp_inclusive_sum(mine, lane)
        cute.arch.sync_threads()  # everybody has read the previous sums
        if lane == 31:
            sums[warp] = to_here
        cute.arch.sync_threads()
        up_to = warp_inclusive_sum(sums[lane], lane)
        own = sums[warp]
        return cute.arch.shuffle_sync(up_to, 31), cute.arch.shuffle_sync(up_to, warp) - own, own
