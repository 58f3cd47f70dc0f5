"""A row on its way from memory to shared memory, while the cluster still works on the row before.

Every warp copies its own stretch, contiguous on both sides, by one bulk copy that its own mbarrier counts. The stretch is free once
the warp itself has read it for the last time: no other thread ever does.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Float32, Int32, Int64, Uint32

from .device_cluster import this_thread
from .device_row import Row, chunk
from .device_shared import Scratch


@cute.jit
def vectors_of_warp(cfg: Constexpr, vocab: Int32) -> Int32:
    """How many vectors of this warp's stretch there are in the row."""
    at = this_thread(cfg.warps, cfg.cluster)
    left = vocab // cfg.vector - at.warp_in_row * (32 * cfg.chunks)
    left = left if left < 32 * cfg.chunks else Int32(32 * cfg.chunks)
    return left if left > 0 else Int32(0)


@cute.jit
def prepare(cfg: Constexpr, smem: Scratch, vocab: Int32):
    """Once, before the first copy: this warp's mbarrier, and -inf where no row has elements."""
    at = this_thread(cfg.warps, cfg.cluster)
    if at.lane == 0:
        cute.arch.mbarrier_init(smem.landed.iterator + at.warp, 1)
    cute.arch.mbarrier_init_fence()
    count = vectors_of_warp(cfg, vocab)
    if count < 32 * cfg.chunks:
        nothing = cute.make_rmem_tensor(cfg.vector, cfg.dtype)
        nothing.fill(cfg.dtype(-Float32.inf))
        for c in cutlass.range(cfg.chunks, unroll=1):
            if c * 32 + at.lane >= count:
                cute.autovec_copy(nothing, smem.row[None, at.tid, c])


@cute.jit
def fetch(cfg: Constexpr, smem: Scratch, source: cute.Tensor):
    """Start to copy this warp's stretch of `source` over the previous row's."""
    at = this_thread(cfg.warps, cfg.cluster)
    count = vectors_of_warp(cfg, Int32(source.shape[0]))
    cute.arch.sync_warp()
    if at.lane == 0 and count > 0:
        landed = smem.landed.iterator + at.warp
        stretch = 32 * cfg.chunks * cfg.vector
        cute.arch.mbarrier_arrive_and_expect_tx(landed, count * 16)
        cute.arch.inline_ptx(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{$r0}], [{$r1}], {$r2}, [{$r3}];",
            read_only_args=[
                Uint32((smem.row.iterator + at.warp * stretch).toint()),
                Int64((source.iterator + at.warp_in_row * stretch).toint()),
                Uint32(count * 16),
                Uint32(landed.toint()),
            ],
        )


@cute.jit
def fetched_maximum(cfg: Constexpr, smem: Scratch, row: Row, lap: Int32) -> Float32:
    """Wait for the copy. Returns this thread's maximum, NaN when any element is."""
    at = this_thread(cfg.warps, cfg.cluster)
    if vectors_of_warp(cfg, row.vocab) > 0:
        cute.arch.mbarrier_wait(smem.landed.iterator + at.warp, lap)
    high = -Float32.inf
    for c in cutlass.range(cfg.chunks, unroll=2 * cfg.unroll):
        x = chunk(cfg, row, c)
        for j in cutlass.range_constexpr(cfg.vector):
            high = cute.arch.fmax(high, x[j], nan=True)
    return high
