"""One row of logits or probabilities in one pass over memory: threshold search, then a draw or a rewritten row.

A cluster of `tile.cluster` CTAs owns one row (sm_80: one CTA). The row is read once, 16 bytes per load, into shared memory, where every
thread reads back only what it wrote; a tile with per_thread = 0 keeps nothing and reads the row again (from L2) in every pass.
Warp g of the cluster owns the g-th stretch of the vocabulary.

    mass(x) = round(2**31 * exp((x - max) / T))      logits           a whole number: sums are exact, so every result is bitwise
              round(2**31 * x / max)                 probs            the same whatever the tile, the batch or the order of arrival

Threshold   keep x iff count(> x) < k and mass(> x) < p * total, per distinct value: ties at the threshold are kept.
            A small k is decided by a short list of candidates (`device_shortlist`), top-p alone by a sample and the few elements around
            the threshold (`device_nucleus`), everything else by histograms (`device_levels`).
Draw        sum of masses at or above the threshold (and the min-p floor), per warp; then one warp walks to the drawn token in index order.

Barriers (cluster, or the CTA when it is alone): what peers need is pushed into their shared memory before, and read at home after.
    start     relaxed, waited for when the row has been read: every CTA has started, so its shared memory may be written
    maximum   the warps' maxima; for a small k also the lists, and then it is the last one; for top-p alone the samples
    total     the warps' masses, where top-p is a share of the whole row; for top-p alone the window's bins
    levels    one histogram each, read by the peers
    kept      the warps' kept masses; for top-p alone the elements that decide

Shared memory  row: vocab * itemsize / cluster, e.g. 64 KiB of a 128256-wide fp32 row; the searches' pool 36 KiB (none without a search);
               sums 3 KiB. Two CTAs of 512 threads per SM up to a vocabulary of 131072.
Memory bound   vocab * itemsize bytes per row, once. Philox: Salmon et al. (SC'11).
"""

import typing

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .device import KEY_NEG_INF, draw_below, key_value, nucleus, uniform53, warp_inclusive_sum
from .device_cluster import push, push_sum, row_arrive, row_sync, row_wait, sum_of_warps, this_thread
from .device_draw import put_id, put_nothing, walk, write
from .device_levels import NO_COUNT, NO_MASS, search_levels
from .device_nucleus import search_nucleus
from .device_row import (
    Row,
    RowConfig,
    inverse_temperature,
    kept_total,
    min_p_floor,
    place,
    read_row,
    total_mass,
    with_scale,
)
from .device_shared import BINS, Scratch, allocate, clear
from .device_shortlist import filter_shortlist, find_drawn, fits, gather, listed_total, push_shortlist, shortlist
from .device_window import push_samples
from .tiles import RowSpec, RowTile


class RowKernel:
    def __init__(self, spec: RowSpec, tile: RowTile):
        self.spec, self.tile = spec, tile
        self.cfg = RowConfig(spec, tile)
        assert BINS % tile.threads == 0

    def abi(self) -> tuple:
        """Stand-ins for the arguments of ``__call__``; ``launch.py`` passes exactly these.

        x           [rows, vocab] with any row stride            out        ids [slots] int32, or [slots, vocab]
        valid       [slots] uint8, logprob [slots] fp32: only with output "ids"
        indices     [slots] int32; temperature, top_p, min_p [slots] fp32, top_k [slots] int32, seed, offset [slots] int64; any stride
        *_value     the scalar forms; row_in_counter is 1 when rows must differ by their position (one seed for all), else 0
        """
        spec = self.spec
        rows, slots, vocab = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=self.cfg.vector)
        align = 16 if spec.aligned else self.cfg.dtype.width // 8

        def matrix(dtype, count):
            return make_fake_tensor(dtype, (count, vocab), (cute.sym_int64(divisibility=self.cfg.vector), 1), assumed_align=align)

        def per_slot(dtype, present=True):
            return make_fake_tensor(dtype, (slots,), (cute.sym_int64(),), assumed_align=dtype.width // 8) if present else None

        out_dtype = Float32 if spec.output == "softmax" else self.cfg.dtype
        return (
            matrix(self.cfg.dtype, rows),
            per_slot(Int32) if self.cfg.draws else matrix(out_dtype, slots),
            per_slot(Uint8, self.cfg.draws),
            per_slot(Float32, spec.logprob),
            per_slot(Int32, spec.indices),
            per_slot(Float32, spec.temperature == "row"),
            per_slot(Int32, spec.top_k == "row"),
            per_slot(Float32, spec.top_p == "row"),
            per_slot(Float32, spec.min_p == "row"),
            per_slot(Int64, spec.seed == "row"),
            per_slot(Int64, spec.offset == "row"),
            Float32(1.0),
            Int32(0),
            Float32(1.0),
            Float32(0.0),
            Int64(0),
            Int64(0),
            Int32(0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
        )

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        out: cute.Tensor,
        valid: typing.Optional[cute.Tensor],
        logprob: typing.Optional[cute.Tensor],
        indices: typing.Optional[cute.Tensor],
        temperature: typing.Optional[cute.Tensor],
        top_k: typing.Optional[cute.Tensor],
        top_p: typing.Optional[cute.Tensor],
        min_p: typing.Optional[cute.Tensor],
        seed: typing.Optional[cute.Tensor],
        offset: typing.Optional[cute.Tensor],
        temperature_value: Float32,
        top_k_value: Int32,
        top_p_value: Float32,
        min_p_value: Float32,
        seed_value: Int64,
        offset_value: Int64,
        row_in_counter: Int32,
        stream: cuda_driver.CUstream,
    ):
        tensors = (x, out, valid, logprob, indices, temperature, top_k, top_p, min_p, seed, offset)
        values = (temperature_value, top_k_value, top_p_value, min_p_value, seed_value, offset_value, row_in_counter)
        cluster = self.tile.cluster
        self.kernel(*tensors, *values).launch(
            grid=[cluster * out.shape[0], 1, 1],
            block=[self.tile.threads, 1, 1],
            cluster=[cluster, 1, 1],
            min_blocks_per_mp=self.tile.blocks_per_sm,
            preferred_smem_carveout=100,  # percent; left open, the DSL asks a driver for it when it compiles
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        out: cute.Tensor,
        valid: typing.Optional[cute.Tensor],
        logprob: typing.Optional[cute.Tensor],
        indices: typing.Optional[cute.Tensor],
        temperature: typing.Optional[cute.Tensor],
        top_k: typing.Optional[cute.Tensor],
        top_p: typing.Optional[cute.Tensor],
        min_p: typing.Optional[cute.Tensor],
        seed: typing.Optional[cute.Tensor],
        offset: typing.Optional[cute.Tensor],
        temperature_value: Float32,
        top_k_value: Int32,
        top_p_value: Float32,
        min_p_value: Float32,
        seed_value: Int64,
        offset_value: Int64,
        row_in_counter: Int32,
    ):
        cfg = self.cfg
        slot = cute.arch.block_idx()[0] // cfg.cluster
        at = this_thread(cfg.warps, cfg.cluster)
        smem = allocate(cfg)
        if const_expr(cfg.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        if const_expr(cfg.has_k or cfg.estimates):
            clear(cfg, smem, 0, BINS)
            if at.tid == 0:
                smem.count_limit[0] = Int32(0)
        row = place(cfg, smem.row, x[Int64(self.parameter(indices, slot, slot)), None])
        inverse_t = Float32(0.0)
        greedy = Boolean(False)
        if const_expr(cfg.is_logits):
            t = Float32(1.0)
            if const_expr(self.spec.temperature != "none"):
                t = self.parameter(temperature, temperature_value, slot)
                greedy = t <= Float32(0.0)
            inverse_t = inverse_temperature(cfg, t)
        k, p = Int32(NO_COUNT), Float32(1.0)
        if const_expr(cfg.has_k):
            k = self.parameter(top_k, top_k_value, slot)
            k = Int32(1) if greedy else k
        if const_expr(cfg.has_p):
            p = self.parameter(top_p, top_p_value, slot)
        thread_max = read_row(cfg, row)
        use_k = k > 0 and k < row.vocab
        use_p = p < Float32(1.0) and not greedy
        short = use_k and k <= cfg.threads // 4
        estimated = use_p and not use_k

        if const_expr(cfg.cluster > 1):
            cute.arch.cluster_wait()
        self.push_maximum(smem, thread_max)
        if const_expr(cfg.has_k):
            if short:
                push_shortlist(cfg, row, smem, thread_max, k)
        if const_expr(cfg.estimates):
            if estimated:
                push_samples(cfg, row, smem, thread_max, inverse_t)
        row_arrive(cfg.cluster)
        bits = Int64(0)
        if const_expr(cfg.draws):
            if not short or at.rank == 0:  # while the peers arrive
                bits = self.random(seed, offset, seed_value, offset_value, slot, row_in_counter)
        row_wait(cfg.cluster)
        m = self.maximum(smem)
        row = with_scale(cfg, row, m, inverse_t)
        is_valid = m - m == Float32(0.0)  # not NaN, not infinite
        if const_expr(not cfg.is_logits):
            is_valid = is_valid and m >= Float32(1e-30)  # 2**31 / m must stay finite

        floor = Float32(0.0)
        if const_expr(self.spec.min_p != "none"):
            floor = min_p_floor(cfg, row, self.parameter(min_p, min_p_value, slot))

        threshold_key = Uint32(KEY_NEG_INF)
        done = not is_valid
        if const_expr(cfg.draws):
            if not is_valid and at.warp_in_row == 0 and at.lane == 0:
                put_nothing(cfg, slot, out, valid, logprob)
        if const_expr(cfg.has_k):
            short = short and is_valid
            if short:
                short = fits(cfg, smem)
                if const_expr(cfg.draws):
                    if not short and at.rank > 0:
                        bits = self.random(seed, offset, seed_value, offset_value, slot, row_in_counter)
            if short:
                p_limit = Int64(NO_MASS)
                if const_expr(cfg.has_p and not cfg.k_first):
                    if use_p:
                        p_limit = nucleus(p, self.row_total(row, smem))
                if at.rank == 0:
                    n = gather(cfg, row, smem, k)
                    lowest = filter_shortlist(cfg, row, smem, n, k, p, use_p, p_limit, floor)
                    if const_expr(cfg.draws):
                        total = listed_total(shortlist(cfg, smem).kept, n, at)
                        target = Int64(0) if greedy else draw_below(bits, total)
                        index, mass = find_drawn(cfg, smem, n, target)
                        if index >= 0:
                            put_id(cfg, slot, index, mass, total, out, valid, logprob)
                    else:
                        self.push_threshold(smem, lowest)
                if const_expr(cfg.draws):
                    done = Boolean(True)
                else:
                    row_sync(cfg.cluster)
                    threshold_key = Uint32(smem.threshold[0])

        found = Boolean(False)
        if const_expr(cfg.estimates):
            if estimated and is_valid:
                threshold_key, found = search_nucleus(cfg, row, smem, p)
        if const_expr(cfg.searches):
            if is_valid and not short and not found and not greedy and (use_k or use_p):
                threshold_key = search_levels(cfg, row, smem, thread_max, k, p, use_k, use_p)
        threshold = key_value(threshold_key)
        if greedy and is_valid:
            threshold = m

        if const_expr(cfg.draws):
            if not done:
                self.sum_kept(row, smem, threshold, floor, found)
                total, before, own = sum_of_warps(smem.kept_low, smem.kept_high, cfg.row_warps, at)
                target = Int64(0) if greedy else draw_below(bits, total)
                if before <= target and target < before + own:
                    walk(cfg, row, slot, threshold, floor, target, before, total, out, valid, logprob)
        else:
            if const_expr(cfg.searches and cfg.spec.output == "mask"):
                if not short:
                    row_sync(cfg.cluster)  # peers may still be reading this CTA's histograms
            write(cfg, row, smem, threshold, is_valid, out[Int64(slot), None])

    @cute.jit
    def parameter(self, tensor, value, slot: Int32):
        """The row's own value when there is a tensor, else the scalar."""
        if const_expr(tensor is None):
            return value
        return tensor[slot]

    @cute.jit
    def random(self, seed, offset, seed_value: Int64, offset_value: Int64, slot: Int32, row_in_counter: Int32) -> Int64:
        """The row's 53 random bits."""
        key, counter = self.parameter(seed, seed_value, slot), self.parameter(offset, offset_value, slot)
        return uniform53(key, counter, slot * row_in_counter, Int32(0))

    @cute.jit
    def push_maximum(self, smem: Scratch, thread_max: Float32):
        """The warp's maximum, to every CTA; NaN when any element is."""
        at = this_thread(self.cfg.warps, self.cfg.cluster)
        high = thread_max
        for step in cutlass.range_constexpr(5):
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, 1 << step), nan=True)
        if at.lane < self.cfg.cluster:
            push(smem.warp_max, at.warp_in_row, high.bitcast(Uint32), at.lane, self.cfg.cluster)

    @cute.jit
    def maximum(self, smem: Scratch) -> Float32:
        """The row's maximum, after the barrier."""
        lane, warps = cute.arch.lane_idx(), self.cfg.row_warps
        high = -Float32.inf
        for i in cutlass.range_constexpr((warps + 31) // 32):
            if lane + 32 * i < warps:
                high = cute.arch.fmax(high, smem.warp_max[lane + 32 * i].bitcast(Float32), nan=True)
        for step in cutlass.range_constexpr(5):
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, 1 << step), nan=True)
        return high

    @cute.jit
    def row_total(self, row: Row, smem: Scratch) -> Int64:
        """The mass of the whole row. One barrier."""
        cfg = self.cfg
        at = this_thread(cfg.warps, cfg.cluster)
        own = cute.arch.shuffle_sync(warp_inclusive_sum(total_mass(cfg, row), at.lane), 31)
        push_sum(smem.sum_low, smem.sum_high, own, at, cfg.cluster)
        row_sync(cfg.cluster)
        total, _, _ = sum_of_warps(smem.sum_low, smem.sum_high, cfg.row_warps, at)
        return total

    @cute.jit
    def sum_kept(self, row: Row, smem: Scratch, threshold: Float32, floor: Float32, found: Boolean):
        """The warps' kept masses, to everybody, unless the search has left them there. One barrier."""
        cfg = self.cfg
        at = this_thread(cfg.warps, cfg.cluster)
        known = Boolean(False)
        if const_expr(cfg.estimates and cfg.keeps_sums):
            known = found
        if not known:
            own = cute.arch.shuffle_sync(warp_inclusive_sum(kept_total(cfg, row, threshold, floor), at.lane), 31)
            push_sum(smem.kept_low, smem.kept_high, own, at, cfg.cluster)
            row_sync(cfg.cluster)

    @cute.jit
    def push_threshold(self, smem: Scratch, lowest: Uint32):
        """The smallest key that any of CTA 0's threads keeps, to every CTA."""
        at = this_thread(self.cfg.warps, self.cfg.cluster)
        lowest = cute.arch.warp_redux_sync(lowest, "umin")
        if at.lane == 0:
            smem.scan[at.warp] = lowest.bitcast(Int32)
        cute.arch.sync_threads()
        lowest = Uint32(0xFFFFFFFF)
        if at.lane < self.cfg.warps:
            lowest = smem.scan[at.lane].bitcast(Uint32)
        lowest = cute.arch.warp_redux_sync(lowest, "umin")
        if at.warp == 0 and at.lane < self.cfg.cluster:
            push(smem.threshold, Int32(0), lowest, at.lane, self.cfg.cluster)
