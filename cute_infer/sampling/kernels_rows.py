"""One row of logits or probabilities in one pass over memory: threshold search, then a draw or a rewritten row.

A cluster of `tile.cluster` CTAs owns one row (sm_80: one CTA). The row is read once, 16 bytes per load, into shared memory, where every
thread reads back only what it wrote; a tile with per_thread = 0 keeps nothing and reads the row again (from L2) in every pass.
Warp g of the cluster owns the g-th stretch of the vocabulary.

    mass(x) = trunc(2**31 * exp((x - max) / T))      logits           a 32-bit integer: sums are exact, so every result is bitwise
              trunc(2**31 * x / max)                 probs            the same whatever the tile, the batch or the order of arrival

Passes (one that a spec or a row does not need is skipped)
    extremes  max (NaN propagates), smallest finite value; the row goes to shared memory
    total     sum of masses, for top-p's limit
    cut       histogram of the *thread maxima*: a bin with k of them at or above it bounds the top-k threshold from below, so the next
              pass counts tens of elements instead of the vocabulary
    level 0   counts and masses in 1024 bins; logits: linear in (max - x), which spreads any bell curve over hundreds of bins and keeps
              shared-memory atomics from colliding; probs: logarithmic (the float's own bits)
    level n   the bin where top-k or top-p is reached, split by 1024 on the exact 32-bit key, until it holds one distinct value.
              Usually one level: the fullest level-0 bin of 128256 normal logits holds about a thousand
    kept      sum of masses at or above the threshold (and the min-p floor), per warp; then one warp walks to the drawn token
              in index order. Or: the whole row is written.

Search      every CTA sums the peers' histograms through distributed shared memory and scans them itself: one cluster barrier per level.
            Histograms 1 and 2 alternate between levels, so a buffer is cleared at least one barrier after its last reader;
            histogram 0 (level 0) is kept: top_k_first looks for top-p's limit in it again.
Threshold   keep x iff count(> x) < k and mass(> x) < p * total, per distinct value: ties at the threshold are kept.

Barriers (cluster, or the CTA when it is alone)
    extremes: the warps' maxima are written      total: the warps' sums      cut, level n: the histograms      kept: the warps' sums
    last: peers have read this CTA's shared memory for the last time (arrive before the walk, wait after it)

Shared memory  row: vocab * itemsize / cluster, e.g. 64 KiB of a 128256-wide fp32 row; histograms 3 * 1024 * (count + 64-bit mass) * 4 B =
               36 KiB (12 without top-p, 0 without a search); sums 2 KiB. Two CTAs of 512 threads per SM up to a vocabulary of 131072.
Memory bound   vocab * itemsize bytes per row, once. Philox: Salmon et al. (SC'11). Radix selection: Alabi et al., JEA 17 (2012).
"""

import typing
from typing import NamedTuple

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Float64, Int32, Int64, Uint8, Uint32, const_expr
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor
from cutlass.memory import SmemAllocator

from .device import (
    KEY_NEG_INF,
    Thread,
    add_wide,
    divide,
    draw_below,
    key_value,
    order_key,
    peer_load,
    peer_load_i64,
    row_sync,
    this_thread,
    uniform53,
    warp_inclusive_sum,
)
from .tiles import RowSpec, RowTile

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
ONE = float(1 << 31)  # the mass of the most likely token
BINS, LOG2_BINS = 1024, 10
BINADES = 32  # a mass below 2**-32 of the largest is zero, so level 0 never looks further down
UNROLL_ELEMENTS = 8  # elements in flight per thread and pass
NO_COUNT = 0x7FFFFFFF
NO_MASS = 1 << 62

DTYPES = {"float32": cutlass.Float32, "float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}


class Row(NamedTuple):
    """What every pass reads. values: shared memory [vector, thread, chunk]; source: the row in memory."""

    values: cute.Tensor
    source: cute.Tensor
    vocab: Int32
    chunks: Int32
    first_vector: Int32
    maximum: Float32
    scale: Float32  # logits: log2(e) / T.  probs: 2**31 / max
    bin_scale: Float32  # logits: level-0 bins per unit of logit
    bin_shift: Uint32  # probs: key bits below a level-0 bin


class Scratch(NamedTuple):
    """Shared memory. The CTA's part of the row; histograms [3 * BINS]; one word per warp for each sum; the search's state."""

    row: cute.Tensor
    count: cute.Tensor
    mass_low: cute.Tensor
    mass_high: cute.Tensor
    warp_max: cute.Tensor
    warp_min: cute.Tensor
    total_low: cute.Tensor
    total_high: cute.Tensor
    kept_low: cute.Tensor
    kept_high: cute.Tensor
    scan_count: cute.Tensor
    scan_mass: cute.Tensor
    answer: cute.Tensor
    answer_mass: cute.Tensor
    count_limit: cute.Tensor
    mass_limit: cute.Tensor


class RowKernel:
    def __init__(self, spec: RowSpec, tile: RowTile):
        self.spec, self.tile = spec, tile
        self.dtype = DTYPES[spec.dtype]
        self.vector = spec.vector
        self.warps = tile.threads // 32
        self.row_warps = self.warps * tile.cluster
        self.resident = tile.per_thread > 0
        self.static_chunks = max(1, tile.per_thread // self.vector)
        self.load_unroll = max(1, 32 // self.vector)  # 128 (fp32) bytes per thread on the way to memory
        self.unroll = max(1, UNROLL_ELEMENTS // self.vector)
        self.is_logits = spec.source == "logits"
        self.draws = spec.output == "ids"
        self.has_k, self.has_p = spec.top_k != "none", spec.top_p != "none"
        self.searches = self.has_k or self.has_p
        self.bins_per_thread = BINS // tile.threads
        assert self.bins_per_thread * tile.threads == BINS
        assert tile.per_thread % self.vector == 0

    def abi(self) -> tuple:
        """Stand-ins for the arguments of ``__call__``; ``launch.py`` passes exactly these.

        x           [rows, vocab] with any row stride            out        ids [slots] int32, or [slots, vocab]
        valid       [slots] uint8, logprob [slots] fp32: only with output "ids"
        indices     [slots] int32; temperature, top_p, min_p [slots] fp32, top_k [slots] int32, seed, offset [slots] int64; any stride
        *_value     the scalar forms; row_in_counter is 1 when rows must differ by their position (one seed for all), else 0
        """
        spec = self.spec
        rows, slots, vocab = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=self.vector)
        align = 16 if spec.aligned else self.dtype.width // 8

        def matrix(dtype, count):
            return make_fake_tensor(dtype, (count, vocab), (cute.sym_int64(divisibility=self.vector), 1), assumed_align=align)

        def per_slot(dtype, present=True):
            return make_fake_tensor(dtype, (slots,), (cute.sym_int64(),), assumed_align=dtype.width // 8) if present else None

        out_dtype = Float32 if spec.output == "softmax" else self.dtype
        return (
            matrix(self.dtype, rows),
            per_slot(Int32) if self.draws else matrix(out_dtype, slots),
            per_slot(Uint8, self.draws),
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
        slot = cute.arch.block_idx()[0] // self.tile.cluster
        smem = self.allocate()
        if const_expr(self.searches):
            self.clear(smem, Int32(0))
            self.clear(smem, Int32(1))
        row, thread_max, minimum = self.read_row(self.source_row(x, indices, slot), smem)
        m = row.maximum
        is_valid = m - m == Float32(0.0)  # not NaN, not infinite
        if const_expr(not self.is_logits):
            is_valid = is_valid and m >= Float32(1e-30)  # 2**31 / m must stay finite
        inverse_t = Float32(LOG2_E)
        greedy = Boolean(False)
        if const_expr(self.spec.temperature != "none"):
            t = self.parameter(temperature, temperature_value, slot)
            greedy = t <= Float32(0.0)
            if not greedy:
                inverse_t = divide(Float32(LOG2_E), t)
        row = self.with_scales(row, minimum, inverse_t)

        threshold_key = Uint32(KEY_NEG_INF)
        if const_expr(self.searches):
            k = Int32(NO_COUNT)
            p = Float32(1.0)
            if const_expr(self.has_k):
                k = self.parameter(top_k, top_k_value, slot)
            if const_expr(self.has_p):
                p = self.parameter(top_p, top_p_value, slot)
            if is_valid and minimum < m and not greedy:
                threshold_key = self.search(row, smem, thread_max, k, p)
        threshold = key_value(threshold_key)
        if greedy and is_valid:
            threshold = m

        if const_expr(self.draws):
            floor = self.min_p_floor(row, min_p, min_p_value, slot)
            total, before, own = self.kept_total(row, smem, threshold, floor)
            if const_expr(self.tile.cluster > 1):
                cute.arch.cluster_arrive()  # this CTA has read its peers for the last time
            seed_here, offset_here = self.parameter(seed, seed_value, slot), self.parameter(offset, offset_value, slot)
            target = draw_below(uniform53(seed_here, offset_here, slot * row_in_counter, Int32(0)), total)
            target = Int64(0) if greedy else target
            if is_valid and before <= target and target < before + own:
                self.walk(row, slot, threshold, floor, target, before, total, out, valid, logprob)
            at = self.thread()
            if not is_valid and at.warp_in_row == 0 and at.lane == 0:
                out[slot] = Int32(0)
                valid[slot] = Uint8(0)
                if const_expr(self.spec.logprob):
                    logprob[slot] = -Float32.inf
            if const_expr(self.tile.cluster > 1):
                cute.arch.cluster_wait()  # peers may still be reading this CTA's shared memory
        else:
            self.write(row, smem, threshold, greedy, is_valid, out[Int64(slot), None])

    # ---- memory ---------------------------------------------------------------------------------------------------------------------

    @cute.jit
    def allocate(self) -> Scratch:
        smem = SmemAllocator()
        bins = 3 * BINS if const_expr(self.searches) else 1
        mass_bins = bins if const_expr(self.has_p) else 1

        def array(dtype, size):
            return smem.allocate_tensor(dtype, cute.make_layout(size), byte_alignment=16)

        row_shape = (self.vector, self.tile.threads, self.static_chunks) if const_expr(self.resident) else (1, 1, 1)
        return Scratch(
            array(self.dtype, row_shape),
            array(Uint32, bins),
            array(Uint32, mass_bins),
            array(Uint32, mass_bins),
            array(Uint32, 32),
            array(Uint32, 32),
            array(Uint32, 32),
            array(Uint32, 32),
            array(Uint32, 32),
            array(Uint32, 32),
            array(Int32, 32),
            array(Int64, 32),
            array(Int32, 4),
            array(Int64, 3),
            array(Int32, 1),
            array(Int64, 1),
        )

    @cute.jit
    def parameter(self, tensor, value, slot: Int32):
        """The row's own value when there is a tensor, else the scalar."""
        if const_expr(tensor is None):
            return value
        return tensor[slot]

    @cute.jit
    def thread(self) -> Thread:
        return this_thread(self.warps, self.tile.cluster)

    @cute.jit
    def source_row(self, x: cute.Tensor, indices, slot: Int32) -> cute.Tensor:
        return x[Int64(self.parameter(indices, slot, slot)), None]

    @cute.jit
    def place(self, row: Row, source: cute.Tensor) -> Row:
        """row with its source, its length and this thread's stretch of it."""
        vocab = source.shape[0]
        chunks = self.static_chunks
        if const_expr(not self.resident):
            stretch = self.row_warps * 32 * self.vector
            chunks = (vocab + stretch - 1) // stretch
        at = self.thread()
        return row._replace(
            source=source, vocab=Int32(vocab), chunks=Int32(chunks), first_vector=at.warp_in_row * (chunks * 32) + at.lane
        )

    @cute.jit
    def load(self, source: cute.Tensor, vector_idx: Int32, vocab: Int32, raw: cute.Tensor):
        """One vector of the row; -inf beyond the vocabulary."""
        if vector_idx * self.vector < vocab:
            if const_expr(self.vector == 1):
                raw[0] = source[vector_idx]
            else:
                cute.autovec_copy(cute.local_tile(source, (self.vector,), (vector_idx,)), raw)
        else:
            for j in cutlass.range_constexpr(self.vector):
                raw[j] = self.dtype(-Float32.inf)

    @cute.jit
    def chunk(self, row: Row, c: Int32) -> cute.Tensor:
        """Chunk c of this thread as fp32, from shared memory or from memory again."""
        raw = cute.make_rmem_tensor(self.vector, self.dtype)
        if const_expr(self.resident):
            cute.autovec_copy(row.values[None, self.thread().tid, c], raw)
        else:
            self.load(row.source, row.first_vector + c * 32, row.vocab, raw)
        values = cute.make_rmem_tensor(self.vector, Float32)
        for j in cutlass.range_constexpr(self.vector):
            values[j] = raw[j].to(Float32)
        return values

    @cute.jit
    def loop_bound(self, row: Row):
        return self.static_chunks if const_expr(self.resident) else row.chunks

    # ---- extremes -------------------------------------------------------------------------------------------------------------------

    @cute.jit
    def read_row(self, source: cute.Tensor, smem: Scratch):
        """(row, this thread's maximum, the row's smallest value that matters); row.maximum is NaN when any element is."""
        at = self.thread()
        none, zero = Int32(0), Float32(0.0)
        row = self.place(Row(smem.row, source, none, none, none, zero, zero, zero, Uint32(0)), source)
        high, low = -Float32.inf, Float32.inf
        lowest = -Float32.inf if const_expr(self.is_logits) else Float32(0.0)
        for c in cutlass.range(self.loop_bound(row), unroll=self.load_unroll):
            raw = cute.make_rmem_tensor(self.vector, self.dtype)
            self.load(source, row.first_vector + c * 32, row.vocab, raw)
            if const_expr(self.resident):
                cute.autovec_copy(raw, row.values[None, at.tid, c])  # each thread reads back only what it wrote: no barrier
            for j in cutlass.range_constexpr(self.vector):
                value = raw[j].to(Float32)
                high = cute.arch.fmax(high, value, nan=True)
                low = cute.arch.fmin(low, value if value > lowest else Float32.inf)
        thread_max = high

        for step in cutlass.range_constexpr(5):
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, 1 << step), nan=True)
            low = cute.arch.fmin(low, cute.arch.shuffle_sync_bfly(low, 1 << step))
        if at.lane == 0:
            smem.warp_max[at.warp] = high.bitcast(Uint32)
            smem.warp_min[at.warp] = low.bitcast(Uint32)
        row_sync(self.tile.cluster)
        high, low = -Float32.inf, Float32.inf
        for i in cutlass.range_constexpr((self.row_warps + 31) // 32):
            g = at.lane + 32 * i
            if g < self.row_warps:
                w, r = g % self.warps, g // self.warps
                high = cute.arch.fmax(high, peer_load(smem.warp_max, w, r, self.tile.cluster).bitcast(Float32), nan=True)
                low = cute.arch.fmin(low, peer_load(smem.warp_min, w, r, self.tile.cluster).bitcast(Float32))
        for step in cutlass.range_constexpr(5):
            high = cute.arch.fmax(high, cute.arch.shuffle_sync_bfly(high, 1 << step), nan=True)
            low = cute.arch.fmin(low, cute.arch.shuffle_sync_bfly(low, 1 << step))
        return row._replace(maximum=high), thread_max, low

    @cute.jit
    def with_scales(self, row: Row, minimum: Float32, inverse_t: Float32) -> Row:
        """The factors of the mass and of the level-0 bins."""
        if const_expr(self.is_logits):
            # 2**-32 of the largest mass is BINADES / inverse_t below the maximum; a narrower row gets narrower bins.
            span = cute.arch.fmin(row.maximum - minimum, divide(Float32(BINADES), inverse_t))
            span = cute.arch.fmax(span, Float32(1e-30))
            return row._replace(scale=inverse_t, bin_scale=divide(Float32(BINS), span))
        span = order_key(row.maximum) - order_key(minimum)
        shift = self.bin_shift(span)
        widest = Uint32(23 + 5 - LOG2_BINS)  # 2**23 keys per binade, BINADES = 2**5
        return row._replace(scale=divide(Float32(ONE), row.maximum), bin_shift=shift if shift < widest else widest)

    # ---- elements -------------------------------------------------------------------------------------------------------------------

    @cute.jit
    def real_mass(self, row: Row, x: Float32) -> Float32:
        """2**31 * exp((x - max) / T), or 2**31 * x / max."""
        if const_expr(self.is_logits):
            return cute.arch.exp2((x - row.maximum) * row.scale + Float32(31.0))
        return cute.arch.fmax(x * row.scale, Float32(0.0))

    @cute.jit
    def mass(self, row: Row, x: Float32) -> Uint32:
        return Uint32(self.real_mass(row, x))

    @cute.jit
    def counts(self, x: Float32):
        """False for padding, -inf logits and zero probabilities: they are in no distribution."""
        return x > -Float32.inf if const_expr(self.is_logits) else x > Float32(0.0)

    @cute.jit
    def coarse_bin(self, row: Row, x: Float32) -> Int32:
        """Level-0 bin of x, 0 for the maximum; never increases with x. Everything far below shares the last bin."""
        if const_expr(self.is_logits):
            return Int32(cute.arch.fmin((row.maximum - x) * row.bin_scale, Float32(BINS - 1)))
        distance = (order_key(row.maximum) - order_key(x)) >> row.bin_shift
        return Int32(distance) if distance < Uint32(BINS) else Int32(BINS - 1)

    @cute.jit
    def bin_shift(self, span: Uint32) -> Uint32:
        """Smallest s with (span >> s) < BINS."""
        length = Int32(32) - Int32(cute.arch.clz(span))
        return Uint32(length - LOG2_BINS) if length > LOG2_BINS else Uint32(0)

    # ---- threshold search -----------------------------------------------------------------------------------------------------------

    @cute.jit
    def search(self, row: Row, smem: Scratch, thread_max: Float32, k: Int32, p: Float32) -> Uint32:
        """Smallest key that top-k and top-p keep. Every value it branches on is the same in the whole cluster."""
        use_k = k > 0 and k < row.vocab
        use_p = p < Float32(1.0)
        p_limit = Int64(NO_MASS)
        smallest = Uint32(0)  # masses up to this cannot be needed to reach p_limit
        last_bin = Int32(BINS - 1)
        after_k = Boolean(False)  # top-p's limit is a share of what top-k leaves, known once that is
        if const_expr(self.has_k and self.has_p and self.spec.k_first):
            after_k = use_k and use_p
        if const_expr(self.has_p):
            if use_p and not after_k:
                total = self.total_mass(row, smem)
                p_limit = self.nucleus(p, total)
                # vocab * smallest <= total - p_limit, so the masses above `smallest` still reach p_limit. Rounded down generously.
                slack = Float32(total - p_limit) * cute.arch.rcp_approx(Float32(row.vocab)) * Float32(0.999)
                smallest = Uint32(slack)
        if const_expr(self.has_k):
            if use_k:
                last_bin = self.cut(row, smem, thread_max, k)
        key = Uint32(KEY_NEG_INF)
        if use_k or use_p:
            self.set_limits(smem, k if use_k else Int32(NO_COUNT), p_limit)
            self.tally_coarse(row, smem, last_bin, smallest, use_k, use_p)
            row_sync(self.tile.cluster)
            rounds = Int32(1)  # two when top-p looks again in what top-k has left
            if after_k:
                rounds = Int32(2)
            buffer = Int32(1)
            while rounds > 0:
                found = self.find(smem, Int32(0), True)
                if found >= 0:
                    low, buffer = self.refine(row, smem, found, use_p, buffer)
                    key = low if low > key else key
                rounds = rounds - 1
                if const_expr(self.has_k and self.has_p and self.spec.k_first):
                    if rounds > 0:
                        reached = smem.answer_mass[2]  # fewer than k tokens: top-k keeps them all
                        if found >= 0:
                            reached = smem.answer_mass[0] + smem.answer_mass[1]
                        self.set_limits(smem, Int32(NO_COUNT), self.nucleus(p, reached))
        return key

    @cute.jit
    def nucleus(self, p: Float32, total: Int64) -> Int64:
        """Smallest integer >= p * total, at least 1: a value is kept iff the mass above it is less."""
        exact = Float64(p) * Float64(total)
        limit = Int64(exact)
        if Float64(limit) < exact:
            limit = limit + Int64(1)
        return limit if limit > Int64(1) else Int64(1)

    @cute.jit
    def total_mass(self, row: Row, smem: Scratch) -> Int64:
        mine = Int64(0)
        for c in cutlass.range(self.loop_bound(row), unroll=self.unroll):
            x = self.chunk(row, c)
            for j in cutlass.range_constexpr(self.vector):
                mine += Int64(self.mass(row, x[j]))
        total, _, _ = self.row_prefix(mine, smem.total_low, smem.total_high)
        return total

    @cute.jit
    def cut(self, row: Row, smem: Scratch, thread_max: Float32, k: Int32) -> Int32:
        """A level-0 bin that top-k's threshold cannot lie below: k thread maxima are in it or above. The last bin if there are fewer."""
        if self.counts(thread_max):
            cute.arch.atomic_add(smem.count.iterator + (BINS + self.coarse_bin(row, thread_max)), Uint32(1), sem="relaxed", scope="cta")
        self.set_limits(smem, k, Int64(NO_MASS))
        row_sync(self.tile.cluster)
        found = self.find(smem, Int32(1), True)
        return found if found >= 0 else Int32(BINS - 1)

    @cute.jit
    def clear(self, smem: Scratch, buffer: Int32):
        at = self.thread()
        for j in cutlass.range_constexpr(self.bins_per_thread):
            i = buffer * BINS + j * self.tile.threads + at.tid
            smem.count[i] = Uint32(0)
            if const_expr(self.has_p):
                smem.mass_low[i] = Uint32(0)
                smem.mass_high[i] = Uint32(0)

    @cute.jit
    def tally_coarse(self, row: Row, smem: Scratch, last_bin: Int32, smallest: Uint32, use_k, use_p):
        """Level 0, into histogram 0. Counts only if top-k asks, masses only if top-p does."""
        for c in cutlass.range(self.loop_bound(row), unroll=self.unroll):
            x = self.chunk(row, c)
            for j in cutlass.range_constexpr(self.vector):
                b = self.coarse_bin(row, x[j])
                if b <= last_bin and self.counts(x[j]):
                    if const_expr(self.has_k):
                        if use_k:
                            cute.arch.atomic_add(smem.count.iterator + b, Uint32(1), sem="relaxed", scope="cta")
                    if const_expr(self.has_p):
                        if use_p:
                            w = self.mass(row, x[j])
                            if w > smallest:
                                add_wide(smem.mass_low, smem.mass_high, b, w)

    @cute.jit
    def tally_keys(self, row: Row, smem: Scratch, low: Uint32, high: Uint32, shift: Uint32, buffer: Int32, use_p):
        """Level >= 1: elements with low <= key <= high, bins of 2**shift keys from high down."""
        for c in cutlass.range(self.loop_bound(row), unroll=self.unroll):
            x = self.chunk(row, c)
            for j in cutlass.range_constexpr(self.vector):
                distance = high - order_key(x[j])
                if distance <= high - low and self.counts(x[j]):
                    i = buffer * BINS + Int32(distance >> shift)
                    cute.arch.atomic_add(smem.count.iterator + i, Uint32(1), sem="relaxed", scope="cta")
                    if const_expr(self.has_p):
                        if use_p:
                            add_wide(smem.mass_low, smem.mass_high, i, self.mass(row, x[j]))

    @cute.jit
    def set_limits(self, smem: Scratch, k_limit: Int32, p_limit: Int64):
        """What the next `find` looks for; in shared memory, where it costs no registers."""
        if self.thread().tid == 0:
            smem.count_limit[0] = k_limit
            smem.mass_limit[0] = p_limit

    @cute.jit
    def find(self, smem: Scratch, buffer: Int32, from_top: cutlass.Constexpr) -> Int32:
        """First bin, from the top, at which the running count or the running mass reaches its limit; -1 if none does.

        The running sums start at zero (from_top) or at what lies above the bin found last. All threads call this after the barrier that
        completes the histogram. Also left in shared memory: answer = (bin, count above, count), answer_mass = (mass above, mass,
        mass of the whole histogram).
        """
        cute.arch.sync_threads()  # everybody has read the previous answer
        at = self.thread()
        per, cluster = self.bins_per_thread, self.tile.cluster
        count, mass = Int32(0), Int64(0)
        if const_expr(not from_top):
            count = smem.answer[1]
            mass = smem.answer_mass[0]
        counts = cute.make_rmem_tensor(per, Int32)
        masses = cute.make_rmem_tensor(per, Int64)
        first = buffer * BINS + at.tid * per
        for j in cutlass.range_constexpr(per):
            counts[j] = Int32(0)
            masses[j] = Int64(0)
        for step in cutlass.range(cluster, unroll=4):
            peer = (at.rank + step) % cluster  # every CTA starts with another peer
            for j in cutlass.range_constexpr(per):
                counts[j] = counts[j] + Int32(peer_load(smem.count, first + j, peer, cluster))
        if const_expr(self.has_p):
            for step in cutlass.range(cluster, unroll=2):
                peer = (at.rank + step) % cluster
                for j in cutlass.range_constexpr(per):
                    masses[j] = masses[j] + peer_load_i64(smem.mass_low, smem.mass_high, first + j, peer, cluster)
        my_count, my_mass = Int32(0), Int64(0)
        for j in cutlass.range_constexpr(per):
            my_count += counts[j]
            my_mass += masses[j]
        count_to = warp_inclusive_sum(my_count, at.lane)
        mass_to = Int64(0)
        if const_expr(self.has_p):
            mass_to = warp_inclusive_sum(my_mass, at.lane)
        if at.lane == 31:
            smem.scan_count[at.warp] = count_to
            smem.scan_mass[at.warp] = mass_to
        count += count_to - my_count
        mass += mass_to - my_mass
        if at.tid == 0:
            smem.answer[0] = Int32(-1)
        cute.arch.sync_threads()
        for w in cutlass.range(at.warp, unroll=4):
            count += smem.scan_count[w]
            if const_expr(self.has_p):
                mass += smem.scan_mass[w]
        k_limit, p_limit = smem.count_limit[0], smem.mass_limit[0]
        for j in cutlass.range_constexpr(per):
            before = count >= k_limit or mass >= p_limit
            after = count + counts[j] >= k_limit or mass + masses[j] >= p_limit
            if after and not before:  # true in exactly one bin, because the sums never fall
                smem.answer[0] = at.tid * per + j
                smem.answer[1] = count
                smem.answer[2] = counts[j]
                smem.answer_mass[0] = mass
                smem.answer_mass[1] = masses[j]
            count += counts[j]
            mass += masses[j]
        if at.tid == self.tile.threads - 1:
            smem.answer_mass[2] = mass
        cute.arch.sync_threads()
        return smem.answer[0]

    @cute.jit
    def coarse_range(self, row: Row, b: Int32):
        """(lowest, highest) key of level-0 bin b."""
        top = order_key(row.maximum)
        if const_expr(self.is_logits):
            lane = self.thread().lane
            low = self.lowest_key(row, lane, b)
            high = top
            if b > 0:
                high = self.lowest_key(row, lane, b - 1) - Uint32(1)
            return low, high
        high = top - (Uint32(b) << row.bin_shift)
        low = high - ((Uint32(1) << row.bin_shift) - Uint32(1))
        return low if b < BINS - 1 else Uint32(KEY_NEG_INF), high

    @cute.jit
    def lowest_key(self, row: Row, lane: Int32, b: Int32) -> Uint32:
        """Smallest key whose level-0 bin is <= b: the rounding of coarse_bin is inverted exactly, 32 probes of a warp at a time."""
        low, high = Uint32(KEY_NEG_INF), order_key(row.maximum)
        for _ in cutlass.range(7, unroll=1):  # 32 bits, 5 per round
            step = ((high - low) >> Uint32(5)) + Uint32(1)
            probe = low + Uint32(lane) * step
            probe = probe if probe < high else high
            ballot = cute.arch.vote_ballot_sync(self.coarse_bin(row, key_value(probe)) <= b)
            first = Uint32(cute.arch.popc((ballot & -ballot) - Int32(1)))  # first lane that holds; 32 if none
            reach = low + first * step
            if first > 0:
                low = low + (first - Uint32(1)) * step + Uint32(1)
            if first < 32 and reach < high:
                high = reach
            low = low if low < high else high
        return high

    @cute.jit
    def refine(self, row: Row, smem: Scratch, coarse: Int32, use_p, buffer: Int32):
        """Split the bin until one distinct value (or one element) is left. Returns (threshold key, buffer for the next level)."""
        low, high = self.coarse_range(row, coarse)
        while low < high and smem.answer[2] != 1:
            shift = self.bin_shift(high - low)
            self.clear(smem, buffer)
            cute.arch.sync_threads()
            self.tally_keys(row, smem, low, high, shift, buffer, use_p)
            row_sync(self.tile.cluster)
            part = self.find(smem, buffer, False)
            buffer = Int32(3) - buffer
            if part >= 0:
                high = high - (Uint32(part) << shift)
                span = (Uint32(1) << shift) - Uint32(1)
                if high - low > span:
                    low = high - span
            else:
                high = low  # cannot happen: the bin was chosen because it reaches a limit
        return low, buffer

    # ---- sums over the row ------------------------------------------------------------------------------------------------------------

    @cute.jit
    def row_prefix(self, mine: Int64, low: cute.Tensor, high: cute.Tensor):
        """(sum over the row, sum over all earlier warps, this warp's sum) of one integer per thread. One barrier."""
        at = self.thread()
        own = warp_inclusive_sum(mine, at.lane)
        if at.lane == 31:
            low[at.warp] = Uint32(own)
            high[at.warp] = Uint32(own >> Int64(32))
        own = cute.arch.shuffle_sync(own, 31)
        row_sync(self.tile.cluster)
        per = (self.row_warps + 31) // 32
        sums = cute.make_rmem_tensor(per, Int64)
        lane_sum = Int64(0)
        for i in cutlass.range_constexpr(per):
            g = at.lane * per + i
            sums[i] = Int64(0)
            if g < self.row_warps:
                sums[i] = peer_load_i64(low, high, g % self.warps, g // self.warps, self.tile.cluster)
            lane_sum += sums[i]
        to_here = warp_inclusive_sum(lane_sum, at.lane)
        total = cute.arch.shuffle_sync(to_here, 31)
        before = to_here - lane_sum
        for i in cutlass.range_constexpr(per):
            if at.lane * per + i < at.warp_in_row:
                before += sums[i]
        # lane (warp_in_row // per) has added exactly its own sums that precede this warp
        return total, cute.arch.shuffle_sync(before, at.warp_in_row // per), own

    # ---- results ------------------------------------------------------------------------------------------------------------------------

    @cute.jit
    def min_p_floor(self, row: Row, min_p, min_p_value: Float32, slot: Int32) -> Float32:
        """Smallest real mass that min-p keeps (logits) or smallest probability (probs)."""
        if const_expr(self.spec.min_p == "none"):
            return Float32(0.0)
        fraction = cute.arch.fmin(self.parameter(min_p, min_p_value, slot), Float32(1.0))
        return fraction * (Float32(ONE) if const_expr(self.is_logits) else row.maximum)

    @cute.jit
    def kept_mass(self, row: Row, x: Float32, threshold: Float32, floor: Float32) -> Uint32:
        real = self.real_mass(row, x)
        keep = x >= threshold
        if const_expr(self.spec.min_p != "none"):
            keep = keep and (real if const_expr(self.is_logits) else x) >= floor
        return Uint32(real) if keep else Uint32(0)

    @cute.jit
    def kept_total(self, row: Row, smem: Scratch, threshold: Float32, floor: Float32):
        """(kept mass of the row, of all earlier warps, of this warp)."""
        mine = Int64(0)
        for c in cutlass.range(self.loop_bound(row), unroll=self.unroll):
            x = self.chunk(row, c)
            for j in cutlass.range_constexpr(self.vector):
                mine += Int64(self.kept_mass(row, x[j], threshold, floor))
        return self.row_prefix(mine, smem.kept_low, smem.kept_high)

    @cute.jit
    def walk(
        self,
        row: Row,
        slot: Int32,
        threshold: Float32,
        floor: Float32,
        target: Int64,
        before: Int64,
        total: Int64,
        out: cute.Tensor,
        valid: cute.Tensor,
        logprob: typing.Optional[cute.Tensor],
    ):
        """The warp whose stretch holds `target` finds the token: inverse CDF in index order."""
        lane = self.thread().lane
        for c in cutlass.range(self.loop_bound(row), unroll=1):
            x = self.chunk(row, c)
            vector_idx = row.first_vector + c * 32
            lane_mass = Int64(0)
            for j in cutlass.range_constexpr(self.vector):
                lane_mass += Int64(self.kept_mass(row, x[j], threshold, floor))
            to_here = warp_inclusive_sum(lane_mass, lane)
            running = before + to_here - lane_mass
            for j in cutlass.range_constexpr(self.vector):
                w = self.kept_mass(row, x[j], threshold, floor)
                if running <= target and target < running + Int64(w):
                    out[slot] = vector_idx * self.vector + j
                    valid[slot] = Uint8(1)
                    if const_expr(self.spec.logprob):
                        logprob[slot] = Float32(LN_2) * (cute.math.log2(Float32(w)) - cute.math.log2(Float32(total)))
                running += Int64(w)
            before += cute.arch.shuffle_sync(to_here, 31)

    @cute.jit
    def write(self, row: Row, smem: Scratch, threshold: Float32, greedy, is_valid, out: cute.Tensor):
        """The whole row: kept logits or -inf ("mask"), kept masses over their sum ("softmax", "renorm")."""
        share, filler = Float32(0.0), Float32(0.0)
        if const_expr(self.spec.output != "mask"):
            mine = Float32(0.0)
            for c in cutlass.range(self.loop_bound(row), unroll=self.unroll):
                x = self.chunk(row, c)
                for j in cutlass.range_constexpr(self.vector):
                    mine += self.real_mass(row, x[j]) if x[j] >= threshold else Float32(0.0)
            # thread sums of at most 64 * 2**31 become integers in units of 2**-40 of the largest mass: the rest of the sum is exact
            total, _, _ = self.row_prefix(Int64(mine * Float32(512.0)), smem.kept_low, smem.kept_high)
            share = divide(Float32(512.0), Float32(total))
            if row.maximum != row.maximum:
                filler = row.maximum  # NaN in, NaN out; an all -inf or all-zero row becomes zeros
        if const_expr(self.tile.cluster > 1):
            cute.arch.cluster_arrive()
        for c in cutlass.range(self.loop_bound(row), unroll=self.unroll):
            x = self.chunk(row, c)
            y = cute.make_rmem_tensor(self.vector, out.element_type)
            for j in cutlass.range_constexpr(self.vector):
                keep = x[j] >= threshold
                value = x[j]
                if const_expr(self.spec.output == "mask"):
                    value = x[j] if keep or not is_valid else -Float32.inf
                else:
                    value = self.real_mass(row, x[j]) * share if keep else Float32(0.0)
                    value = value if is_valid else filler
                y[j] = value.to(out.element_type)
            vector_idx = row.first_vector + c * 32
            if vector_idx * self.vector < row.vocab:
                if const_expr(self.vector == 1):
                    out[vector_idx] = y[0]
                else:
                    cute.autovec_copy(y, cute.local_tile(out, (self.vector,), (vector_idx,)))
        if const_expr(self.tile.cluster > 1):
            cute.arch.cluster_wait()
