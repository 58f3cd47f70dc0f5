"""One row of logits or probabilities as the threads of a cluster hold it: where elements lie, how they are read, what they weigh."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, const_expr

from .device import LOG2_E, add_exact, divide, exact_total, order_key, start_exact, whole
from .device_cluster import this_thread
from .tiles import RowSpec, RowTile

ONE = float(1 << 31)  # the mass of the most likely token
UNROLL_ELEMENTS = 8  # elements in flight per thread and pass
LOAD_BYTES = 128  # per thread on the way from memory

DTYPES = {"float32": cutlass.Float32, "float16": cutlass.Float16, "bfloat16": cutlass.BFloat16}


class RowConfig:
    """Everything about a row kernel that is known when it is compiled."""

    def __init__(self, spec: RowSpec, tile: RowTile):
        self.spec, self.tile = spec, tile
        self.dtype = DTYPES[spec.dtype]
        self.vector = spec.vector
        self.threads, self.cluster = tile.threads, tile.cluster
        self.warps = tile.threads // 32
        self.row_warps = self.warps * tile.cluster
        self.resident = tile.per_thread > 0
        self.fetches = tile.bulk and self.resident and spec.aligned  # `device_fetch`
        self.chunks = max(1, tile.per_thread // self.vector)
        self.load_unroll = max(1, min(16, LOAD_BYTES * 8 // self.dtype.width // self.vector)) if self.resident else 4
        self.unroll = max(1, UNROLL_ELEMENTS // self.vector)
        self.is_logits = spec.source == "logits"
        self.draws = spec.output == "ids"
        self.has_k, self.has_p = spec.top_k != "none", spec.top_p != "none"
        self.searches = self.has_k or self.has_p
        self.estimates = self.has_p and 0 < tile.per_thread <= 32  # `device_nucleus`: a bit per element
        self.keeps_sums = self.draws and spec.min_p == "none"  # which then knows what every warp keeps
        self.k_first = self.has_k and self.has_p and spec.k_first
        assert tile.per_thread % self.vector == 0

    def __extract_mlir_values__(self) -> list:
        """Nothing in here exists at run time: branches and loops may carry it."""
        return []

    def __new_from_mlir_values__(self, values: list) -> "RowConfig":
        return self


class Row(NamedTuple):
    """What every pass reads. values: shared memory [vector, thread, chunk]; source: the row in memory."""

    values: cute.Tensor
    source: cute.Tensor
    vocab: Int32
    chunks: Int32
    first_vector: Int32  # this lane's vector of chunk 0; chunk c is 32 * c further
    maximum: Float32
    scale: Float32  # logits: log2(e) / T.  probs: 2**31 / max


@cute.jit
def place(cfg: Constexpr, values: cute.Tensor, source: cute.Tensor) -> Row:
    """This thread's stretch of the row; warp g of the cluster owns the g-th stretch. Maximum and scale are not known yet."""
    vocab = source.shape[0]
    chunks = cfg.chunks
    if const_expr(not cfg.resident):
        stretch = cfg.row_warps * 32 * cfg.vector
        chunks = (vocab + stretch - 1) // stretch
    at = this_thread(cfg.warps, cfg.cluster)
    first = at.warp_in_row * (chunks * 32) + at.lane
    return Row(values, source, Int32(vocab), Int32(chunks), Int32(first), Float32(0.0), Float32(0.0))


@cute.jit
def loop_bound(cfg: Constexpr, row: Row):
    """Chunks per thread: a Python int when the row is resident."""
    return cfg.chunks if const_expr(cfg.resident) else row.chunks


@cute.jit
def load(cfg: Constexpr, source: cute.Tensor, vector_idx: Int32, vocab: Int32, raw: cute.Tensor):
    """One vector of the row in memory; -inf beyond the vocabulary."""
    if vector_idx * cfg.vector < vocab:
        if const_expr(cfg.vector == 1):
            raw[0] = source[vector_idx]
        else:
            cute.autovec_copy(cute.local_tile(source, (cfg.vector,), (vector_idx,)), raw)
    else:
        for j in cutlass.range_constexpr(cfg.vector):
            raw[j] = cfg.dtype(-Float32.inf)


@cute.jit
def chunk_of_memory(cfg: Constexpr, row: Row, c: Int32) -> cute.Tensor:
    """Chunk c of this thread as fp32, read from memory; -inf beyond the vocabulary, without a branch that would keep loads apart."""
    raw = cute.make_rmem_tensor(cfg.vector, cfg.dtype)
    vector_idx = row.first_vector + c * 32
    is_there = vector_idx * cfg.vector < row.vocab
    place = vector_idx if is_there else Int32(0)
    if const_expr(cfg.vector == 1):
        raw[0] = row.source[place]
    else:
        cute.autovec_copy(cute.local_tile(row.source, (cfg.vector,), (place,)), raw)
    values = cute.make_rmem_tensor(cfg.vector, Float32)
    for j in cutlass.range_constexpr(cfg.vector):
        values[j] = raw[j].to(Float32) if is_there else -Float32.inf
    return values


@cute.jit
def chunk(cfg: Constexpr, row: Row, c: Int32) -> cute.Tensor:
    """Chunk c of this thread as fp32, from shared memory or from memory again."""
    if const_expr(not cfg.resident):
        return chunk_of_memory(cfg, row, c)
    raw = cute.make_rmem_tensor(cfg.vector, cfg.dtype)
    cute.autovec_copy(row.values[None, cute.arch.thread_idx()[0], c], raw)
    values = cute.make_rmem_tensor(cfg.vector, Float32)
    for j in cutlass.range_constexpr(cfg.vector):
        values[j] = raw[j].to(Float32)
    return values


@cute.jit
def read_row(cfg: Constexpr, row: Row) -> Float32:
    """The row goes to shared memory. Returns this thread's maximum, NaN when any element is. No barrier: threads read back their own."""
    high = -Float32.inf
    for c in cutlass.range(loop_bound(cfg, row), unroll=cfg.load_unroll):
        raw = cute.make_rmem_tensor(cfg.vector, cfg.dtype)
        load(cfg, row.source, row.first_vector + c * 32, row.vocab, raw)
        if const_expr(cfg.resident):
            cute.autovec_copy(raw, row.values[None, cute.arch.thread_idx()[0], c])
        for j in cutlass.range_constexpr(cfg.vector):
            high = cute.arch.fmax(high, raw[j].to(Float32), nan=True)
    return high


@cute.jit
def with_scale(cfg: Constexpr, row: Row, maximum: Float32, inverse_t: Float32) -> Row:
    """The row's maximum and the factor of its masses; inverse_t is log2(e) / T."""
    scale = inverse_t if const_expr(cfg.is_logits) else divide(Float32(ONE), maximum)
    return row._replace(maximum=maximum, scale=scale)


@cute.jit
def inverse_temperature(cfg: Constexpr, t: Float32) -> Float32:
    """log2(e) / T; a temperature that is not positive counts as 1 (the row is greedy)."""
    inverse_t = Float32(LOG2_E)
    if t > Float32(0.0):
        inverse_t = divide(Float32(LOG2_E), t)
    return inverse_t


@cute.jit
def real_mass(cfg: Constexpr, row: Row, x: Float32) -> Float32:
    """2**31 * exp((x - max) / T), or 2**31 * x / max."""
    if const_expr(cfg.is_logits):
        return cute.arch.exp2((x - row.maximum) * row.scale) * Float32(ONE)
    return cute.arch.fmax(x * row.scale, Float32(0.0))


@cute.jit
def mass(cfg: Constexpr, row: Row, x: Float32) -> Float32:
    """real_mass as a whole number."""
    return whole(real_mass(cfg, row, x))


@cute.jit
def counts(cfg: Constexpr, x: Float32):
    """False for padding, -inf logits, zero probabilities and NaN: they are in no distribution."""
    return x > -Float32.inf if const_expr(cfg.is_logits) else x > Float32(0.0)


@cute.jit
def position(cfg: Constexpr, x: Float32) -> Float32:
    """A number that never falls when x rises, in which the large elements of any row are spread out: x, or the logarithm's stand-in."""
    return x if const_expr(cfg.is_logits) else Float32(order_key(x))


@cute.jit
def total_mass(cfg: Constexpr, row: Row) -> Int64:
    """Sum of this thread's masses."""
    high, low = start_exact()
    for c in cutlass.range(loop_bound(cfg, row), unroll=cfg.unroll):
        x = chunk(cfg, row, c)
        for j in cutlass.range_constexpr(cfg.vector):
            high, low = add_exact(high, low, mass(cfg, row, x[j]))
    return exact_total(high, low)


@cute.jit
def kept_mass(cfg: Constexpr, row: Row, x: Float32, threshold: Float32, floor: Float32) -> Float32:
    """The mass of x, or 0 when it lies below the threshold or the min-p floor."""
    real = real_mass(cfg, row, x)
    keep = x >= threshold
    if const_expr(cfg.spec.min_p != "none"):
        keep = keep and passes_floor(cfg, x, real, floor)
    return whole(real) if keep else Float32(0.0)


@cute.jit
def passes_floor(cfg: Constexpr, x: Float32, real: Float32, floor: Float32):
    """Whether min-p keeps x."""
    return (real if const_expr(cfg.is_logits) else x) >= floor


@cute.jit
def min_p_floor(cfg: Constexpr, row: Row, fraction: Float32) -> Float32:
    """Smallest real mass that min-p keeps (logits) or smallest probability (probs)."""
    return cute.arch.fmin(fraction, Float32(1.0)) * (Float32(ONE) if const_expr(cfg.is_logits) else row.maximum)


@cute.jit
def kept_total(cfg: Constexpr, row: Row, threshold: Float32, floor: Float32) -> Int64:
    """Sum of this thread's kept masses."""
    high, low = start_exact()
    for c in cutlass.range(loop_bound(cfg, row), unroll=cfg.unroll):
        x = chunk(cfg, row, c)
        for j in cutlass.range_constexpr(cfg.vector):
            high, low = add_exact(high, low, kept_mass(cfg, row, x[j], threshold, floor))
    return exact_total(high, low)
