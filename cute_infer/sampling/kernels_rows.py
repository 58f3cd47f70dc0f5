"""One row of logits or probabilities in one pass over memory: threshold search, then a draw or a rewritten row.

A cluster of `tile.cluster` CTAs owns one row (sm_80: one CTA). The row is read once, into shared memory, where every thread reads back only
its own elements; a tile with per_thread = 0 keeps nothing and reads the row again (from L2) in every pass. Warp g of the cluster owns the
g-th stretch of the vocabulary. On Hopper a launch has as many clusters as run at once. Each takes row after row, and the next row is copied
(`device_fetch`) as soon as this one has been read for the last time: while the cluster still meets and draws.

    mass(x) = round(2**31 * exp((x - max) / T))      logits           a whole number: sums are exact, so every result is bitwise
              round(2**31 * x / max)                 probs            the same whatever the tile, the batch or the order of arrival

Threshold   keep x iff count(> x) < k and mass(> x) < p * total, per distinct value: ties at the threshold are kept.
            A small k is decided by a short list of candidates (`device_shortlist`), top-p alone by a sample and the few elements around
            the threshold (`device_nucleus`), everything else by histograms (`device_levels`).
Draw        sum of masses at or above the threshold (and the min-p floor), per warp; then one warp walks to the drawn token in index order.

Meetings (`device_cluster`): what peers need is sent into their shared memory and counted there; no thread waits for memory.
    maximum   the warps' maxima and the random bits; for a small k also the lists, and then it is the last one; for top-p alone the samples
    total     the warps' masses, where top-p is a share of the whole row; for top-p alone the window's bins
    kept      the warps' kept masses; for top-p alone the elements that decide
    Between rows one barrier of the cluster, arrived at when a thread is done with a row, waited for when the next one is here: from then on
    what was sent for the old row may be overwritten. The levels' histograms, which peers read, have barriers of their own.

Shared memory  row: vocab * itemsize / cluster, e.g. 64 KiB of a 128256-wide fp32 row; the searches' pool 36 KiB (none without a search);
               sums and mail 4 KiB. Two CTAs of 512 threads and 64 registers per SM: while one meets, the other computes.
Memory bound   vocab * itemsize bytes per row, once. Philox: Salmon et al. (SC'11).
"""

import typing
from typing import NamedTuple

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from .device import KEY_NEG_INF, draw_below, key_value, nucleus, order_key, uniform53
from .device_cluster import (
    Mail,
    announce,
    enter_row,
    leave_row,
    meet,
    row_sync,
    send,
    send64,
    send_sum,
    share_sum,
    this_thread,
    total_before,
    total_of,
)
from .device_draw import put_id, put_nothing, walk, write
from .device_fetch import fetch, fetched_maximum, prepare
from .device_levels import NO_COUNT, NO_MASS, search_levels
from .device_nucleus import search_nucleus
from .device_row import (
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
from .device_shortlist import filter_shortlist, find_drawn, fits, gather, listed_total, send_shortlist, shortlist
from .device_window import send_samples
from .tiles import RowSpec, RowTile


class Values(NamedTuple):
    """Of one row: tensors with one value per slot (or None), or the numbers for all."""

    temperature: typing.Any
    top_k: typing.Any
    top_p: typing.Any
    min_p: typing.Any
    seed: typing.Any
    offset: typing.Any


class Arguments(NamedTuple):
    """The arguments of a launch; `abi` says what they are."""

    x: cute.Tensor
    out: cute.Tensor
    valid: typing.Any
    logprob: typing.Any
    indices: typing.Any
    per_row: Values
    values: Values
    row_in_counter: Int32


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
        clusters    how many to launch, at most one per slot: each serves every clusters-th slot
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
            Int32(1),
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
        clusters: Int32,
        stream: cuda_driver.CUstream,
    ):
        tensors = (x, out, valid, logprob, indices, temperature, top_k, top_p, min_p, seed, offset)
        values = (temperature_value, top_k_value, top_p_value, min_p_value, seed_value, offset_value, row_in_counter)
        cluster = self.tile.cluster
        self.kernel(*tensors, *values).launch(
            grid=[cluster * clusters, 1, 1],
            block=[self.tile.threads, 1, 1],
            cluster=[cluster, 1, 1],
            min_blocks_per_mp=self.tile.blocks,
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
        args = Arguments(
            x, out, valid, logprob, indices,
            Values(temperature, top_k, top_p, min_p, seed, offset),
            Values(temperature_value, top_k_value, top_p_value, min_p_value, seed_value, offset_value),
            row_in_counter,
        )
        clusters = cute.arch.grid_dim()[0] // cfg.cluster
        first = cute.arch.block_idx()[0] // cfg.cluster
        smem = allocate(cfg)
        if const_expr(cfg.cluster > 1):
            if cute.arch.thread_idx()[0] == 0:
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(smem.mail.iterator + i, cfg.cluster)
            cute.arch.mbarrier_init_fence()
        if const_expr(cfg.fetches):
            prepare(cfg, smem, Int32(x.shape[1]))
            fetch(cfg, smem, self.source(args, first))
        met, lap = Int32(0), Int32(0)
        for slot in cutlass.range(first, out.shape[0], clusters, unroll=1):
            met = self.serve(args, smem, met, lap, slot)
            lap = lap ^ 1

    @cute.jit
    def serve(self, args: Arguments, smem: Scratch, met: Int32, lap: Int32, slot: Int32) -> Int32:
        """One row, and the copy of the next one as soon as there is room. Returns `met`."""
        cfg = self.cfg
        at = this_thread(cfg.warps, cfg.cluster)
        out, valid, logprob = args.out, args.valid, args.logprob
        leave_row(cfg.cluster)
        row = place(cfg, smem.row, self.source(args, slot))
        inverse_t = Float32(0.0)
        greedy = Boolean(False)
        if const_expr(cfg.is_logits):
            t = Float32(1.0)
            if const_expr(self.spec.temperature != "none"):
                t = parameter(args.per_row.temperature, args.values.temperature, slot)
                greedy = t <= Float32(0.0)
            inverse_t = inverse_temperature(cfg, t)
        k, p = Int32(NO_COUNT), Float32(1.0)
        if const_expr(cfg.has_k):
            k = parameter(args.per_row.top_k, args.values.top_k, slot)
            k = Int32(1) if greedy else k
        if const_expr(cfg.has_p):
            p = parameter(args.per_row.top_p, args.values.top_p, slot)
        use_k = k > 0 and k < row.vocab
        use_p = p < Float32(1.0) and not greedy
        short = use_k and k <= cfg.threads // 4
        estimated = Boolean(False)
        if const_expr(cfg.estimates):
            estimated = use_p and not use_k
        if const_expr(cfg.fetches):
            thread_max = fetched_maximum(cfg, smem, row, lap)
        else:
            thread_max = read_row(cfg, row)
        enter_row(cfg.cluster)
        if const_expr(cfg.searches):
            clear(cfg, smem, 0, BINS)
            if at.tid == 0:
                smem.count_limit[0] = Int32(0)

        mail = Mail(smem.mail, met)
        self.send_maximum(smem, mail, thread_max)
        size = Int32(4 * cfg.warps)
        if const_expr(cfg.draws):
            size = size + (Int32(8) if at.rank == 0 else Int32(0))
            if at.warp_in_row == cfg.warps - 1 and at.lane < cfg.cluster:  # one warp for all: ten rounds of Philox
                send64(mail, smem.bits, Int32(0), self.random(args, slot), at.lane, cfg.cluster)
        if const_expr(cfg.has_k):
            if short:
                send_shortlist(cfg, row, smem, mail, size, thread_max, k)
        if const_expr(cfg.estimates):
            if estimated:
                send_samples(cfg, row, smem, mail, size, thread_max, inverse_t)
        if not short and not estimated:
            announce(mail, size, at, cfg.cluster)
        met = meet(mail, cfg.cluster)
        m = self.maximum(smem)
        row = with_scale(cfg, row, m, inverse_t)
        is_valid = m - m == Float32(0.0)  # not NaN, not infinite
        if const_expr(not cfg.is_logits):
            is_valid = is_valid and m >= Float32(1e-30)  # 2**31 / m must stay finite

        floor = Float32(0.0)
        if const_expr(self.spec.min_p != "none"):
            floor = min_p_floor(cfg, row, parameter(args.per_row.min_p, args.values.min_p, slot))

        threshold_key = Uint32(KEY_NEG_INF)
        done = not is_valid
        if const_expr(cfg.draws):
            if not is_valid and at.warp_in_row == 0 and at.lane == 0:
                put_nothing(cfg, slot, out, valid, logprob)
        if const_expr(cfg.has_k):
            short = short and is_valid
            if short:
                short = fits(cfg, smem)
            if short:
                p_limit = Int64(NO_MASS)
                if const_expr(cfg.has_p and not cfg.k_first):
                    if use_p:
                        met = share_sum(Mail(smem.mail, met), smem.sums, total_mass(cfg, row), at, cfg.warps, cfg.cluster)
                        p_limit = nucleus(p, total_of(smem.sums, cfg.row_warps, at))
                if const_expr(cfg.draws):
                    self.fetch_next(args, smem, slot)
                    done = Boolean(True)
                if at.rank == 0:
                    n = gather(cfg, row, smem, k)
                    lowest = filter_shortlist(cfg, row, smem, n, k, p, use_p, p_limit, floor)
                    if const_expr(cfg.draws):
                        total = listed_total(shortlist(cfg, smem).kept, n, at)
                        target = Int64(0) if greedy else draw_below(smem.bits[0], total)
                        index, mass = find_drawn(cfg, smem, n, target)
                        if index >= 0:
                            put_id(cfg, slot, index, mass, total, out, valid, logprob)
                    else:
                        self.send_threshold(smem, Mail(smem.mail, met), lowest)
                if const_expr(not cfg.draws):
                    announce(Mail(smem.mail, met), Int32(4) if at.rank == 0 else Int32(0), at, cfg.cluster)
                    met = meet(Mail(smem.mail, met), cfg.cluster)
                    threshold_key = Uint32(smem.threshold[0])

        found = Boolean(False)
        if const_expr(cfg.estimates):
            if estimated and is_valid:
                threshold_key, found, met = search_nucleus(cfg, row, smem, met, p)
            if estimated and not is_valid:
                row_sync(cfg.cluster)  # a CTA that leaves takes its sample along, and copies of it may be under way
        if const_expr(cfg.searches):
            if is_valid and not short and not found and not greedy and (use_k or use_p):
                threshold_key, met = search_levels(cfg, row, smem, met, k, p, use_k, use_p)
        threshold = key_value(threshold_key)
        if greedy and is_valid:
            threshold = m

        if const_expr(cfg.draws):
            known = found and cfg.keeps_sums
            if not done and not known:
                mail = Mail(smem.mail, met)
                send_sum(mail, smem.kept, kept_total(cfg, row, threshold, floor), at, cfg.cluster)
                announce(mail, Int32(8 * cfg.warps), at, cfg.cluster)
            if not (short and is_valid):
                self.fetch_next(args, smem, slot)
            if not done:
                if not known:
                    met = meet(Mail(smem.mail, met), cfg.cluster)
                total = total_of(smem.kept, cfg.row_warps, at)
                before = total_before(smem.kept, cfg.row_warps, at)
                target = Int64(0) if greedy else draw_below(smem.bits[0], total)
                if before <= target and target < before + smem.kept[at.warp_in_row]:
                    walk(cfg, row, slot, threshold, floor, target, before, total, out, valid, logprob)
        else:
            if const_expr(cfg.searches and cfg.spec.output == "mask"):
                if not short:
                    row_sync(cfg.cluster)  # peers may still be reading this CTA's histograms
            met = write(cfg, row, smem, met, threshold, is_valid, out[Int64(slot), None])
            self.fetch_next(args, smem, slot)
        return met

    @cute.jit
    def source(self, args: Arguments, slot: Int32) -> cute.Tensor:
        """The row that slot reads."""
        return args.x[Int64(parameter(args.indices, slot, slot)), None]

    @cute.jit
    def fetch_next(self, args: Arguments, smem: Scratch, slot: Int32):
        """This warp will not read its stretch of the row again: the next row's may come, if there is one."""
        if const_expr(self.cfg.fetches):
            next_slot = slot + cute.arch.grid_dim()[0] // self.cfg.cluster
            if next_slot < args.out.shape[0]:
                fetch(self.cfg, smem, self.source(args, next_slot))

    @cute.jit
    def random(self, args: Arguments, slot: Int32) -> Int64:
        """The row's 53 random bits."""
        key, counter = parameter(args.per_row.seed, args.values.seed, slot), parameter(args.per_row.offset, args.values.offset, slot)
        return uniform53(key, counter, slot * args.row_in_counter, Int32(0))

    @cute.jit
    def send_maximum(self, smem: Scratch, mail: Mail, thread_max: Float32):
        """The key of the warp's maximum, to every CTA; NaN, which has the largest, when any element is."""
        at = this_thread(self.cfg.warps, self.cfg.cluster)
        high = Uint32(cute.arch.warp_redux_sync(order_key(thread_max), "umax"))
        if at.lane < self.cfg.cluster:
            send(mail, smem.warp_max, at.warp_in_row, high, at.lane, self.cfg.cluster)

    @cute.jit
    def maximum(self, smem: Scratch) -> Float32:
        """The row's maximum, after the meeting."""
        lane, warps = cute.arch.lane_idx(), self.cfg.row_warps
        high = Uint32(0)
        for i in cutlass.range_constexpr((warps + 31) // 32):
            if lane + 32 * i < warps:
                of_warp = Uint32(smem.warp_max[lane + 32 * i])
                high = of_warp if of_warp > high else high
        return key_value(Uint32(cute.arch.warp_redux_sync(high, "umax")))

    @cute.jit
    def send_threshold(self, smem: Scratch, mail: Mail, lowest: Uint32):
        """The smallest key that any of CTA 0's threads keeps, to every CTA."""
        at = this_thread(self.cfg.warps, self.cfg.cluster)
        lowest = Uint32(cute.arch.warp_redux_sync(lowest, "umin"))
        if at.lane == 0:
            smem.scan[at.warp] = lowest.bitcast(Int32)
        cute.arch.sync_threads()
        lowest = Uint32(0xFFFFFFFF)
        if at.lane < self.cfg.warps:
            lowest = smem.scan[at.lane].bitcast(Uint32)
        lowest = Uint32(cute.arch.warp_redux_sync(lowest, "umin"))
        if at.warp == 0 and at.lane < self.cfg.cluster:
            send(mail, smem.threshold, Int32(0), lowest, at.lane, self.cfg.cluster)


@cute.jit
def parameter(tensor, value, slot: Int32):
    """The row's own value when there is a tensor, else the scalar."""
    if const_expr(tensor is None):
        return value
    return tensor[slot]
