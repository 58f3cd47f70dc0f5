"""Threads of a cluster: where one stands, how they meet, and how a word reaches another CTA's shared memory.

Meeting. A barrier of the cluster makes every thread wait until its own writes are visible to the whole GPU, which takes microseconds when
memory is busy. So CTAs meet by mail: whoever needs a word gets it sent into its shared memory, an mbarrier there counts the bytes, and a
thread that sees the mbarrier complete sees the words. Each CTA announces to each how much it sends; meetings use two mbarriers in turn, so
a CTA that is one meeting ahead does not touch the one that another still waits for (two ahead is impossible: it needs that one's mail).

``row_sync`` and ``peer_load`` remain for the multi-level search, which reads its peers' histograms.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Constexpr, Int32, Int64, Uint32, const_expr

from .device import warp_sum64


class Thread(NamedTuple):
    """Where this thread stands: in the CTA, its CTA in the cluster, its warp in the row."""

    tid: Int32
    lane: Int32
    warp: Int32
    rank: Int32
    warp_in_row: Int32


@cute.jit
def this_thread(warps: Constexpr, cluster: Constexpr) -> Thread:
    """The calling thread, in a CTA of `warps` warps."""
    tid = cute.arch.thread_idx()[0]
    rank = Int32(0)
    if const_expr(cluster > 1):
        rank = cute.arch.block_idx_in_cluster()
    warp = tid >> 5
    return Thread(tid, tid & 31, warp, rank, rank * warps + warp)


# ---- barriers -------------------------------------------------------------------------------------------------------------------------


@cute.jit
def row_sync(cluster: Constexpr):
    """Every thread working on this row has arrived, and what it wrote to shared memory is visible to all of them."""
    if const_expr(cluster > 1):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


@cute.jit
def leave_row(cluster: Constexpr):
    """This thread has read all that it wants of what others sent it for the previous row."""
    if const_expr(cluster > 1):
        cute.arch.cluster_arrive_relaxed()


@cute.jit
def enter_row(cluster: Constexpr):
    """Every thread has left the previous row (and started, before the first): what it was sent may be overwritten."""
    if const_expr(cluster > 1):
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


# ---- mail -----------------------------------------------------------------------------------------------------------------------------


class Mail(NamedTuple):
    """The next meeting. boxes: two mbarriers, one arrival per CTA. met: how many meetings there were."""

    boxes: cute.Tensor
    met: Int32


@cute.jit
def box(mail: Mail) -> Uint32:
    """Address of the meeting's mbarrier."""
    return Uint32((mail.boxes.iterator + (mail.met & 1)).toint())


@cute.jit
def send(mail: Mail, tensor: cute.Tensor, index: Int32, value: Uint32, rank: Int32, cluster: Constexpr):
    """tensor[index] = value (a 32-bit word) in the shared memory of CTA `rank`, there to be read after the meeting."""
    if const_expr(cluster == 1):
        tensor[index] = value
    else:
        cute.arch.inline_ptx(
            "{ .reg .u32 a, b; mapa.shared::cluster.u32 a, {$r0}, {$r2}; mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [a], {$r3}, [b]; }",
            read_only_args=[Uint32((tensor.iterator + index).toint()), box(mail), Uint32(rank), value],
        )


@cute.jit
def send64(mail: Mail, tensor: cute.Tensor, index: Int32, value: Int64, rank: Int32, cluster: Constexpr):
    """:func:`send` for a 64-bit integer."""
    if const_expr(cluster == 1):
        tensor[index] = value
    else:
        cute.arch.inline_ptx(
            "{ .reg .u32 a, b; mapa.shared::cluster.u32 a, {$r0}, {$r2}; mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [a], {$r3}, [b]; }",
            read_only_args=[Uint32((tensor.iterator + index).toint()), box(mail), Uint32(rank), value],
        )


@cute.jit
def sync_for_copies(cluster: Constexpr):
    """A barrier of the CTA after which bulk copies see what was written to shared memory before it."""
    if const_expr(cluster > 1):
        cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_threads()


@cute.jit
def send_words(
    mail: Mail, tensor: cute.Tensor, index: Int32, source: cute.Tensor, words: Constexpr, at: Thread, warps: Constexpr, cluster: Constexpr
):
    """tensor[index : index + words] = source in every CTA, one bulk copy each; all threads call this, after :func:`sync_for_copies`.

    Source stays as it is until the next row.
    """
    if const_expr(cluster == 1):
        for i in cutlass.range(at.tid, words, 32 * warps, unroll=1):
            tensor[index + i] = source[i]
    else:
        if at.warp == 0 and at.lane < cluster:
            cute.arch.inline_ptx(
                "{ .reg .u32 a, b; mapa.shared::cluster.u32 a, {$r0}, {$r2}; mapa.shared::cluster.u32 b, {$r1}, {$r2}; "
                "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [a], [{$r3}], {$r4}, [b]; }",
                read_only_args=[
                    Uint32((tensor.iterator + index).toint()),
                    box(mail),
                    Uint32(at.lane),
                    Uint32(source.iterator.toint()),
                    Uint32(4 * words),
                ],
            )


@cute.jit
def announce(mail: Mail, size: Int32, at: Thread, cluster: Constexpr):
    """This CTA sends `size` bytes to CTA `lane` for the meeting. Warp 0 calls this, once."""
    if const_expr(cluster > 1):
        if at.warp == 0 and at.lane < cluster:
            cute.arch.inline_ptx(
                "{ .reg .u32 b; mapa.shared::cluster.u32 b, {$r0}, {$r1}; "
                "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [b], {$r2}; }",
                read_only_args=[box(mail), Uint32(at.lane), Uint32(size)],
            )


@cute.jit
def meet(mail: Mail, cluster: Constexpr) -> Int32:
    """Wait until everything that was sent for this meeting is here. Returns how many there were. No barrier of this CTA, unless alone."""
    if const_expr(cluster == 1):
        cute.arch.sync_threads()
    else:
        cute.arch.mbarrier_wait(mail.boxes.iterator + (mail.met & 1), (mail.met >> 1) & 1)
    return mail.met + 1


# ---- sums -----------------------------------------------------------------------------------------------------------------------------


@cute.jit
def send_sum(mail: Mail, tensor: cute.Tensor, value: Int64, at: Thread, cluster: Constexpr):
    """The sum of the warp's values, to every CTA of the cluster: lane r sends to CTA r."""
    own = warp_sum64(value)
    if at.lane < cluster:
        send64(mail, tensor, at.warp_in_row, own, at.lane, cluster)


@cute.jit
def share_sum(mail: Mail, tensor: cute.Tensor, value: Int64, at: Thread, warps: Constexpr, cluster: Constexpr) -> Int32:
    """A meeting for :func:`send_sum` alone."""
    send_sum(mail, tensor, value, at, cluster)
    announce(mail, Int32(8 * warps), at, cluster)
    return meet(mail, cluster)


@cute.jit
def total_of(sums: cute.Tensor, row_warps: Constexpr, at: Thread) -> Int64:
    """The sum over the row's warps."""
    mine = Int64(0)
    for i in cutlass.range_constexpr((row_warps + 31) // 32):
        g = at.lane + 32 * i
        if g < row_warps:
            mine += sums[g]
    return warp_sum64(mine)


@cute.jit
def total_before(sums: cute.Tensor, row_warps: Constexpr, at: Thread) -> Int64:
    """The sum over the row's earlier warps."""
    mine = Int64(0)
    for i in cutlass.range_constexpr((row_warps + 31) // 32):
        g = at.lane + 32 * i
        if g < at.warp_in_row:
            mine += sums[g]
    return warp_sum64(mine)


# ---- reading a peer -------------------------------------------------------------------------------------------------------------------


@cute.jit
def peer_u32(address: Uint32, rank: Int32) -> Uint32:
    """32-bit word at this CTA's shared-memory address, read from CTA `rank` of the cluster."""
    return cute.arch.inline_ptx(
        "{ .reg .u32 remote; mapa.shared::cluster.u32 remote, {$r0}, {$r1}; ld.shared::cluster.b32 {$w0}, [remote]; }",
        write_only_types=[Uint32],
        read_only_args=[address, Uint32(rank)],
    )


@cute.jit
def peer_load(tensor: cute.Tensor, index: Int32, rank: Int32, cluster: Constexpr) -> Uint32:
    """tensor[index] (Uint32) as CTA `rank` sees it; plain shared memory when the cluster is one CTA."""
    value = Uint32(0)
    if const_expr(cluster == 1):
        value = Uint32(tensor[index])
    else:
        value = peer_u32(Uint32((tensor.iterator + index).toint()), rank)
    return value


@cute.jit
def peer_load_i64(low: cute.Tensor, high: cute.Tensor, index: Int32, rank: Int32, cluster: Constexpr) -> Int64:
    """64-bit integer kept as two arrays of 32-bit words, as CTA `rank` sees it."""
    return Int64(peer_load(low, index, rank, cluster)) | (Int64(peer_load(high, index, rank, cluster)) << Int64(32))
