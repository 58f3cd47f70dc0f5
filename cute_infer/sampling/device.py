"""Device functions of the sampling kernels that know nothing of rows: ordered keys, whole numbers, Philox, warp scans.

The torch twins of ``whole``, ``uniform53`` and ``draw_below`` are in ``reference.py``.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, Uint32, Uint64

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
KEY_NEG_INF = 0x007FFFFF  # order_key(-inf): no smaller key belongs to a number
WHOLE = float(1 << 23)  # floats from here to twice this are the whole numbers
GROUP, LOG2_GROUP = 8, 3  # lanes that compare one candidate with all the others
SUM_START = float(1 << 38)  # larger than any summand; sums stay below 2**40, so low stays below 2**24


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


@cute.jit
def whole(x: Float32) -> Float32:
    """A whole number near x, for 0 <= x <= 2**31; never falls when x rises. Two additions: conversions run at an eighth of their rate."""
    return (x + Float32(WHOLE)) - Float32(WHOLE)


@cute.jit
def start_exact():
    """The empty sum of :func:`add_exact`."""
    return Float32(SUM_START), Float32(0.0)


@cute.jit
def add_exact(high: Float32, low: Float32, x: Float32):
    """(high, low) + x without rounding, for at most 256 whole x up to 2**31: what high rounds off is whole, and low keeps it."""
    total = high + x
    return total, low + (x - (total - high))


@cute.jit
def exact_total(high: Float32, low: Float32) -> Int64:
    """The sum as an integer."""
    return Int64(high - Float32(SUM_START)) + Int64(low)


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
def nucleus(p: Float32, total: Int64) -> Int64:
    """Smallest integer >= p * total, at least 1: a value is kept iff the mass above it is less."""
    exact = Float64(p) * Float64(total)
    limit = Int64(exact)
    if Float64(limit) < exact:
        limit = limit + Int64(1)
    return limit if limit > Int64(1) else Int64(1)


@cute.jit
def warp_inclusive_sum(value, lane: Int32):
    """Sum of this lane's value and those of all lower lanes (Int32 or Int64)."""
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(value, 1 << step, mask_and_clamp=0)
        if lane >= (1 << step):
            value = value + below
    return value


@cute.jit
def warp_sum64(value: Int64) -> Int64:
    """Sum over the warp, in all lanes, of integers from 0 to 2**54: two 32-bit reductions instead of ten shuffles."""
    low = cute.arch.warp_redux_sync(Uint32(value) & Uint32((1 << 27) - 1), "add")
    high = cute.arch.warp_redux_sync(Uint32(value >> Int64(27)), "add")
    return Int64(Uint32(low)) + (Int64(Uint32(high)) << Int64(27))


@cute.jit
def group_sum(value):
    """Sum over GROUP neighbouring lanes, in all of them (Int32 or Int64)."""
    for step in cutlass.range_constexpr(LOG2_GROUP):
        value = value + cute.arch.shuffle_sync_bfly(value, 1 << step)
    return value


@cute.jit
def add_wide(low: cute.Tensor, high: cute.Tensor, index: Int32, value: Uint32):
    """Atomic 64-bit add out of two native 32-bit ones (a 64-bit shared atomic is a compare-and-swap loop): the carry is rare."""
    old = Uint32(cute.arch.atomic_add(low.iterator + index, value, sem="relaxed", scope="cta"))
    if old + value < old:
        cute.arch.atomic_add(high.iterator + index, Uint32(1), sem="relaxed", scope="cta")
