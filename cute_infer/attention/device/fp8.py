"""fp8 -> 16 bit by integer arithmetic: sm_80 has no fp8 conversion.

Exact for every finite code, subnormals and signed zeros included. A byte is moved so that its exponent and mantissa line up with the wide
format, then one multiplication by a power of two corrects the exponent bias (an fp16 or bf16 multiplication handles subnormals exactly):

    code      wide   bits of the magnitude      bias correction
    e5m2      fp16   byte << 8                  none: the same format, cut short; infinities and NaN as they are
    e5m2      bf16   (byte & 0x7f) << 5         2^(127 - 15)
    e4m3fn    fp16   (byte & 0x7f) << 7         2^(15 - 7)
    e4m3fn    bf16   (byte & 0x7f) << 4         2^(127 - 7)

The codes above the largest finite value come out finite; adding one to the top of the magnitude carries into a bit that no finite code
reaches, and that bit, smeared over the missing exponent bits, makes them infinity or NaN.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Constexpr, Float8E5M2, Int32, Uint32, const_expr

from .mma import load_shared_2, store_shared_4


def conversion(source, wide) -> tuple[int, int, int, int, int] | None:
    """(right shift of the byte in bits 8-15, factor, carry, carried bit, smear) for one 16-bit lane; None when the byte alone will do.

    ``smear`` multiplies the carried bit, shifted down by one, into the exponent bits that the scaled value lacks.
    """
    if source is Float8E5M2:
        # exponent 31: 0x0f80 + 0x0080 = 0x1000; 2^16 in bf16 is 0x4780 and lacks 0x3800 = 7 * 0x0800
        return (3, 0x7780, 0x0080, 0x1000, 7) if wide is BFloat16 else None
    if wide is BFloat16:
        # 0x7f: 0x07f0 + 0x0010 = 0x0800; 480 in bf16 is 0x43f0 and lacks 0x3c00 = 15 * 0x0400
        return (4, 0x7B80, 0x0010, 0x0800, 15)
    # 0x7f: 0x3f80 + 0x0080 = 0x4000; 480 in fp16 is 0x5f80 and lacks 0x2000
    return (1, 0x5C00, 0x0080, 0x4000, 1)


@cute.jit
def widen_2(word: Uint32, low_bytes: Constexpr, source: Constexpr, wide: Constexpr):
    """Two fp8 codes of ``word`` (bytes 0, 1 or bytes 2, 3) as a pair of ``wide``."""
    # each byte to the top of its 16-bit lane
    x = Uint32(cute.arch.prmt(Int32(word), Int32(0), 0x1404 if low_bytes else 0x3424))
    rule = conversion(source, wide)
    if const_expr(rule is None):
        return x
    shift, factor, carry, bit, smear = rule
    magnitude = (x & Uint32(0x7F007F00)) >> Uint32(shift)
    name = "bf16x2" if const_expr(wide is BFloat16) else "f16x2"
    scaled = cute.arch.inline_ptx(
        "{ .reg .b32 f, z; mov.b32 f, " + hex(factor * 0x10001) + "; mov.b32 z, 0x80008000; fma.rn." + name + " {$w0}, {$r0}, f, z; }",
        write_only_types=[Uint32],
        read_only_args=[(x & Uint32(0x80008000)) | magnitude],
    )
    top = (magnitude + Uint32(carry * 0x10001)) & Uint32(bit * 0x10001)
    return scaled | ((top >> Uint32(1)) * Uint32(smear))


@cute.jit
def widen_rows(
    staged: Uint32,
    target: Uint32,
    pitch: Constexpr,
    rows: Constexpr,
    dim: Constexpr,
    rank: Int32,
    threads: Constexpr,
    source: Constexpr,
    wide: Constexpr,
):
    """``rows`` rows of ``dim`` fp8 codes, packed at shared address ``staged``, into 16-bit rows of ``pitch`` bytes at ``target``."""
    units = dim // 8  # 8 codes in, 16 bytes out: neighbouring threads write neighbouring 16 bytes
    total = rows * units
    for i in cutlass.range_constexpr(-(-total // threads)):
        e = i * threads + rank
        if const_expr((i + 1) * threads > total):
            if e < total:
                _widen_8(staged + Uint32(e * 8), target + Uint32(e // units * pitch + e % units * 16), source, wide)
        else:
            _widen_8(staged + Uint32(e * 8), target + Uint32(e // units * pitch + e % units * 16), source, wide)


@cute.jit
def _widen_8(staged: Uint32, target: Uint32, source: Constexpr, wide: Constexpr):
    low, high = load_shared_2(staged)
    store_shared_4(
        target,
        widen_2(low, True, source, wide),
        widen_2(low, False, source, wide),
        widen_2(high, True, source, wide),
        widen_2(high, False, source, wide),
    )
