"""The shared memory of a row kernel: the CTA's part of the row, a pool of words that the searches divide among themselves, and sums."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, const_expr
from cutlass.memory import SmemAllocator

BINS, LOG2_BINS = 1024, 10
SAMPLE_BINS = 512  # of top-p's window
SAMPLE_WORDS = SAMPLE_BINS // 2  # two counts of 16 bits
FINE_BINS = 128  # of the window
TIED = 128  # elements per CTA in its deciding bin


class Scratch(NamedTuple):
    """row: [vector, thread, chunk]. pool: words; see :func:`part`. Sums have one entry per warp of the row, sent by every CTA."""

    row: cute.Tensor
    pool: cute.Tensor
    mail: cute.Tensor  # [2] mbarriers of the meetings
    landed: cute.Tensor  # [warps] mbarriers: the warp's stretch of the next row is here
    warp_max: cute.Tensor  # [row_warps] keys
    sums: cute.Tensor  # [row_warps] Int64: masses of whole stretches
    above: cute.Tensor  # [row_warps] Int64: masses above top-p's window
    kept: cute.Tensor  # [row_warps] Int64: kept masses
    bits: cute.Tensor  # [1] Int64: the row's random bits
    scan: cute.Tensor  # [32] partial results of the CTA's warps
    scan_mass: cute.Tensor  # [32] Int64
    answer: cute.Tensor  # [32] what a search found
    answer_mass: cute.Tensor  # [3] Int64
    count_limit: cute.Tensor  # [1]
    mass_limit: cute.Tensor  # [1] Int64
    listed: cute.Tensor  # [2 * cluster] how many elements each CTA listed; top-p: its top bin, how many in the deciding bin
    threshold: cute.Tensor  # [1] smallest key kept


def shortlist_size(cfg) -> int:
    """Elements one CTA may list for top-k: about 0.3 per thread are there when k is a quarter of the threads."""
    return cfg.threads // 2


def pool_words(cfg) -> int:
    """Words of the pool: the largest use of it."""
    levels = 3 * BINS * (3 if cfg.has_p else 1)
    shortlist = BINS + 4 * cfg.cluster * shortlist_size(cfg) if cfg.has_k else 0
    nucleus = BINS + cfg.cluster * (2 * FINE_BINS + max(SAMPLE_WORDS, 4 * TIED)) if cfg.estimates else 0
    return max(levels, shortlist, nucleus) if cfg.searches else 4


@cute.jit
def allocate(cfg: Constexpr) -> Scratch:
    smem = SmemAllocator()

    def array(dtype, size, stride=None):
        return smem.allocate_tensor(dtype, cute.make_layout(size, stride=stride), byte_alignment=128 if stride is not None else 16)

    # every warp's stretch is contiguous, as it is in memory
    shape, stride = (cfg.vector, (32, cfg.warps), cfg.chunks), (1, (cfg.vector, 32 * cfg.vector * cfg.chunks), 32 * cfg.vector)
    if const_expr(not cfg.resident):
        shape, stride = (1, (1, 1), 1), (1, (1, 1), 1)
    return Scratch(
        array(cfg.dtype, shape, stride),
        array(Uint32, pool_words(cfg)),
        array(Int64, 2),
        array(Int64, cfg.warps),
        array(Uint32, cfg.row_warps),
        array(Int64, cfg.row_warps),
        array(Int64, cfg.row_warps),
        array(Int64, cfg.row_warps),
        array(Int64, 1),
        array(Int32, 32),
        array(Int64, 32),
        array(Int32, 32),
        array(Int64, 3),
        array(Int32, 1),
        array(Int64, 1),
        array(Uint32, 2 * cfg.cluster),
        array(Uint32, 1),
    )


@cute.jit
def part(smem: Scratch, first: Constexpr, size: Constexpr) -> cute.Tensor:
    """`size` words of the pool from word `first` on."""
    return cute.make_tensor(smem.pool.iterator + first, cute.make_layout(size))


@cute.jit
def words_of(sums: cute.Tensor, count: Constexpr):
    """(low words, high words) of 64-bit integers; integer i is at 2 * i."""
    words = cute.recast_ptr(sums.iterator, dtype=Uint32)
    layout = cute.make_layout(2 * count - 1)
    return cute.make_tensor(words, layout), cute.make_tensor(words + 1, layout)


@cute.jit
def clear(cfg: Constexpr, smem: Scratch, first: Constexpr, size: Constexpr):
    """Zeros. The caller syncs."""
    tid = cute.arch.thread_idx()[0]
    for i in cutlass.range_constexpr((size + cfg.threads - 1) // cfg.threads):
        j = i * cfg.threads + tid
        if const_expr((i + 1) * cfg.threads <= size):
            smem.pool[first + j] = Uint32(0)
        elif j < size:
            smem.pool[first + j] = Uint32(0)
