"""The shared memory of a row kernel: the CTA's part of the row, a pool of words that the searches divide among themselves, and sums."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, const_expr
from cutlass.memory import SmemAllocator

BINS, LOG2_BINS = 1024, 10
FINE_BINS = 128  # of top-p's window
LISTED, TIED = 2048, 128  # elements per CTA in the window, in its deciding bin


class Scratch(NamedTuple):
    """row: [vector, thread, chunk]. pool: words; see :func:`part`. Sums have one entry per warp of the row, pushed by every CTA."""

    row: cute.Tensor
    pool: cute.Tensor
    warp_max: cute.Tensor  # [row_warps] bits of fp32
    sum_low: cute.Tensor  # [row_warps] first sums of a row
    sum_high: cute.Tensor
    kept_low: cute.Tensor  # [row_warps] kept masses
    kept_high: cute.Tensor
    scan: cute.Tensor  # [32] partial sums of the CTA's warps
    scan_mass: cute.Tensor  # [32] Int64
    answer: cute.Tensor  # [32] what a search found
    answer_mass: cute.Tensor  # [3] Int64
    count_limit: cute.Tensor  # [1]
    mass_limit: cute.Tensor  # [1] Int64
    listed: cute.Tensor  # [3 * cluster] how many elements each CTA listed; top-p: its top bin, listed, in the deciding bin
    threshold: cute.Tensor  # [1] smallest key kept


def shortlist_size(cfg) -> int:
    """Elements one CTA may list for top-k: about 0.3 per thread are there when k is a quarter of the threads."""
    return cfg.threads // 2


def pool_words(cfg) -> int:
    """Words of the pool: the largest use of it."""
    levels = 3 * BINS * (3 if cfg.has_p else 1)
    shortlist = BINS + 4 * cfg.cluster * shortlist_size(cfg) if cfg.has_k else 0
    nucleus = BINS + LISTED + cfg.cluster * (BINS // 2 + 2 * FINE_BINS) if cfg.estimates else 0
    return max(levels, shortlist, nucleus) if cfg.searches else 4


@cute.jit
def allocate(cfg: Constexpr) -> Scratch:
    smem = SmemAllocator()

    def array(dtype, size):
        return smem.allocate_tensor(dtype, cute.make_layout(size), byte_alignment=16)

    row_shape = (cfg.vector, cfg.threads, cfg.chunks) if const_expr(cfg.resident) else (1, 1, 1)
    return Scratch(
        array(cfg.dtype, row_shape),
        array(Uint32, pool_words(cfg)),
        array(Uint32, cfg.row_warps),
        array(Uint32, cfg.row_warps),
        array(Uint32, cfg.row_warps),
        array(Uint32, cfg.row_warps),
        array(Uint32, cfg.row_warps),
        array(Int32, 32),
        array(Int64, 32),
        array(Int32, 32),
        array(Int64, 3),
        array(Int32, 1),
        array(Int64, 1),
        array(Uint32, 3 * cfg.cluster),
        array(Uint32, 1),
    )


@cute.jit
def part(smem: Scratch, first: Constexpr, size: Constexpr) -> cute.Tensor:
    """`size` words of the pool from word `first` on."""
    return cute.make_tensor(smem.pool.iterator + first, cute.make_layout(size))


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
