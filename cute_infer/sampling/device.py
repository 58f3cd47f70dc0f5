"""Device functions of the sampling kernels: ordered keys, Philox, warp scans, distributed shared memory.

Nothing here knows about top-k or top-p. The torch twins of ``order_key``, ``uniform53`` and the mass arithmetic are in ``reference.py``.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, Uint32, Uint64, const_expr

KEY_NEG_INF = 0x007FFFFF  # order_key(-inf): no smaller key belongs to a number


@cute.jit
def divide(a: Float32, b: Float32) -> Float32:
    """a / b with one Newton step, rounded as IEEE division in all but rare cases, without its slow-path call. For normal b and a / b."""
    r = cute.arch.rcp_approx(b)
    q = a * r
    return q + r * (a - q * b)


@cute.jit
def order_key(x: Float32) -> Uint32:
    """Unsigned key with the order of the floats: negative numbers are complemented, the others get the sign bit set."""
    bits = x.bitcast(Uint32)
    sign = (bits.bitcast(Int32) >> Int32(31)).bitcast(Uint32)
    return bits ^ (sign | Uint32(0x80000000))


@cute.jit
def key_value(key: Uint32) -> Float32:
    """Inverse of :func:`order_key`."""
    flip = ((key >> Uint32(31)) - Uint32(1)) | Uint32(0x80000000)
    return (key ^ flip).bitcast(Float32)


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
def uniform53(seed: Int64, offset: Int64, row: Int32, draw: Int32) -> Int64:
    """53 random bits: Philox-4x32-10 (Salmon et al., SC'11) with key = seed and counter = (offset low, offset high, row, draw)."""
    c0, c1 = Uint32(offset), Uint32(offset >> Int64(32))
    c2, c3 = Uint32(row), Uint32(draw)
    k0, k1 = Uint32(seed), Uint32(seed >> Int64(32))
    for _ in cutlass.range_constexpr(10):
        p0 = Uint64(c0) * Uint64(0xD2511F53)
        p1 = Uint64(c2) * Uint64(0xCD9E8D57)
        c0, c1, c2, c3 = Uint32(p1 >> Uint64(32)) ^ c1 ^ k0, Uint32(p1), Uint32(p0 >> Uint64(32)) ^ c3 ^ k1, Uint32(p0)
        k0 = k0 + Uint32(0x9E3779B9)
        k1 = k1 + Uint32(0xBB67AE85)
    return (Int64(c0) << Int64(21)) | Int64(c1 >> Uint32(11))


@cute.jit
def draw_below(bits53: Int64, total: Int64) -> Int64:
    """floor(bits53 / 2**53 * total), in 0 .. total - 1. One correctly rounded double product, so torch gets the same integer."""
    u = Int64(Float64(bits53) * Float64(2.0**-53) * Float64(total))
    return u if u < total else total - Int64(1)


@cute.jit
def warp_inclusive_sum(value, lane: Int32):
    """Sum of this lane's value and those of all lower lanes (Int32 or Int64)."""
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, 1 << step, mask_and_clamp=0)
        if lane >= (1 << step):
            value = value + below
    return value


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
        value = tensor[index]
    else:
        value = peer_u32(Uint32((tensor.iterator + index).toint()), rank)
    return value


@cute.jit
def peer_load_i64(low: cute.Tensor, high: cute.Tensor, index: Int32, rank: Int32, cluster: cutlass.Constexpr) -> Int64:
    """64-bit integer kept as two arrays of 32-bit words, as CTA `rank` sees it."""
    return Int64(peer_load(low, index, rank, cluster)) | (Int64(peer_load(high, index, rank, cluster)) << Int64(32))


@cute.jit
def row_sync(cluster: cutlass.Constexpr):
    """Every thread working on this row has arrived, and what it wrote to shared memory is visible to all of them."""
    if const_expr(cluster == 1):
        cute.arch.sync_threads()
    else:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


@cute.jit
def add_wide(low: cute.Tensor, high: cute.Tensor, index: Int32, value: Uint32):
    """Atomic 64-bit add out of two native 32-bit ones (a 64-bit shared atomic is a compare-and-swap loop): the carry is rare."""
    old = cute.arch.atomic_add(low.iterator + index, value, sem="relaxed", scope="cta")
    if old + value < old:
        cute.arch.atomic_add(high.iterator + index, Uint32(1), sem="relaxed", scope="cta")
