"""Threads of a cluster: where one stands, how all of them meet, and how a word reaches another CTA's shared memory.

A load from a peer's shared memory takes about a microsecond under load, a store nothing: what a peer needs is pushed before the barrier and
read at home after it. ``peer_load`` remains for the multi-level search, which few rows need.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from .device import warp_inclusive_sum


class Thread(NamedTuple):
    """Where this thread stands: in the CTA, its CTA in the cluster, its warp in the row."""

    tid: Int32
    lane: Int32
    warp: Int32
    rank: Int32
    warp_in_row: Int32


@cute.jit
def this_thread(warps: cutlass.Constexpr, cluster: cutlass.Constexpr) -> Thread:
    """The calling thread, in a CTA of `warps` warps."""
    tid = cute.arch.thread_idx()[0]
    rank = Int32(0)
    if const_expr(cluster > 1):
        rank = cute.arch.block_idx_in_cluster()
    warp = tid >> 5
    return Thread(tid, tid & 31, warp, rank, rank * warps + warp)


@cute.jit
def row_sync(cluster: cutlass.Constexpr):
    """Every thread working on this row has arrived, and what it wrote to shared memory is visible to all of them."""
    row_arrive(cluster)
    row_wait(cluster)


@cute.jit
def row_arrive(cluster: cutlass.Constexpr):
    """First half of :func:`row_sync`: what this thread has written so far will be visible."""
    if const_expr(cluster > 1):
        cute.arch.cluster_arrive()


@cute.jit
def row_wait(cluster: cutlass.Constexpr):
    """Second half of :func:`row_sync`."""
    if const_expr(cluster == 1):
        cute.arch.sync_threads()
    else:
        cute.arch.cluster_wait()


@cute.jit
def push(tensor: cute.Tensor, index: Int32, value: Uint32, rank: Int32, cluster: cutlass.Constexpr):
    """tensor[index] = value (a 32-bit word) in the shared memory of CTA `rank`; plain shared memory when the cluster is one CTA."""
    if const_expr(cluster == 1):
        tensor[index] = value
    else:
        cute.arch.inline_ptx(
            "{ .reg .u32 remote; mapa.shared::cluster.u32 remote, {$r0}, {$r1}; st.shared::cluster.b32 [remote], {$r2}; }",
            read_only_args=[Uint32((tensor.iterator + index).toint()), Uint32(rank), value],
        )


@cute.jit
def push_sum(low: cute.Tensor, high: cute.Tensor, value: Int64, at: Thread, cluster: cutlass.Constexpr):
    """The warp's sum, word by word, to every CTA of the cluster: lane r writes to CTA r."""
    if at.lane < cluster:
        push(low, at.warp_in_row, Uint32(value), at.lane, cluster)
        push(high, at.warp_in_row, Uint32(value >> Int64(32)), at.lane, cluster)


@cute.jit
def word64(low: cute.Tensor, high: cute.Tensor, index: Int32) -> Int64:
    """A 64-bit integer kept as two arrays of words. (A tensor that has been through a branch forgets that its words are unsigned.)"""
    return Int64(Uint32(low[index])) | (Int64(Uint32(high[index])) << Int64(32))


@cute.jit
def sum_of_warps(low: cute.Tensor, high: cute.Tensor, row_warps: cutlass.Constexpr, at: Thread):
    """(sum over the row's warps, sum over the earlier warps, this warp's) of what :func:`push_sum` left, after the barrier."""
    per = (row_warps + 31) // 32
    sums = cute.make_rmem_tensor(per, Int64)
    lane_sum, own = Int64(0), Int64(0)
    for i in cutlass.range_constexpr(per):
        g = at.lane * per + i
        sums[i] = Int64(0)
        if g < row_warps:
            sums[i] = word64(low, high, g)
        lane_sum += sums[i]
    to_here = warp_inclusive_sum(lane_sum, at.lane)
    total = cute.arch.shuffle_sync(to_here, 31)
    before = to_here - lane_sum
    for i in cutlass.range_constexpr(per):
        g = at.lane * per + i
        if g < at.warp_in_row:
            before += sums[i]
        if g == at.warp_in_row:
            own = sums[i]
    # lane (warp_in_row // per) has added exactly its own sums that precede this warp
    owner = at.warp_in_row // per
    return total, cute.arch.shuffle_sync(before, owner), cute.arch.shuffle_sync(own, owner)


@cute.jit
def peer_u32(address: Uint32, rank: Int32) -> Uint32:
    """32-bit word at this CTA's shared-memory address, read from CTA `rank` of the cluster."""
    return cute.arch.inline_ptx(
        "{ .reg .u32 remote; mapa.shared::cluster.u32 remote, {$r0}, {$r1}; ld.shared::cluster.b32 {$w0}, [remote]; }",
        write_only_types=[Uint32],
        read_only_args=[address, Uint32(rank)],
    )


@cute.jit
def peer_load(tensor: cute.Tensor, index: Int32, rank: Int32, cluster: cutlass.Constexpr) -> Uint32:
    """tensor[index] (Uint32) as CTA `rank` sees it; plain shared memory when the cluster is one CTA."""
    value = Uint32(0)
    if const_expr(cluster == 1):
        value = Uint32(tensor[index])
    else:
        value = peer_u32(Uint32((tensor.iterator + index).toint()), rank)
    return value


@cute.jit
def peer_load_i64(low: cute.Tensor, high: cute.Tensor, index: Int32, rank: Int32, cluster: cutlass.Constexpr) -> Int64:
    """64-bit integer kept as two arrays of 32-bit words, as CTA `rank` sees it."""
    return Int64(peer_load(low, index, rank, cluster)) | (Int64(peer_load(high, index, rank, cluster)) << Int64(32))
