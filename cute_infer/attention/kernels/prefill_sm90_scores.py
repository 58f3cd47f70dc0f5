"""What happens to the scores of a Hopper prefill tile besides scale, soft cap and the masks that are intervals: ALiBi and custom masks.

A thread of a consumer group holds, of two rows 8 apart, the columns ``8 j + 2 (lane % 4) + {0, 1}``; four neighbouring lanes share a row.

Custom masks are bits: key j of query i of a request is bit ``i * kv_len + j`` of the bytes from ``mask_indptr[request]`` on, lowest bit
first. A tile needs ``tile_kv`` bits of a row, in general not from a word boundary on: the t-th lane of a row fetches the two words around
its 32 bits and shifts them together; then each lane gets the others' by shuffles. The loads are issued before the products of the tile and
arrive under them.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

from .prefill_sm90_softmax import rows_cols

LANES_PER_ROW = 4
WORD = 32  # bits
SEGMENTS_OF_4 = 0x1C1F  # shfl: clamp 31, segments of 4 lanes


@cute.jit
def add_alibi(acc_s: cute.Tensor, scale: Float32, slopes: cute.Tensor, distance: cute.Tensor):
    """Scores -> base-2 logits with ALiBi: ``scores * scale + slopes[r] * (distance[r] + column)``, slopes in base-2 units.

    ``distance[r]`` is that of the thread's first column to the row's query.
    """
    s = rows_cols(acc_s)
    for r in cutlass.range_constexpr(2):
        base = slopes[r] * Float32(distance[r])
        for c in cutlass.range_constexpr(cute.size(s, mode=[1])):
            s[r, c] = s[r, c] * scale + (base + slopes[r] * Float32(8 * (c // 2) + c % 2))


@cute.jit
def fetch_mask(words: cute.Tensor, row_bits: cute.Tensor, end: Int64, start: Int32, lane: Int32):
    """Issue the loads of this lane's share of the mask of both rows: ``words[2 r + {0, 1}]``.

    row_bits   address of each row's first bit, in bits.    end   address past the mask, in bytes: bits from there on are zero.
    Nothing past the mask is read. Up to three bytes before it may be, where it does not begin at a word: they belong to the allocation it
    is a part of, because allocations begin at multiples of 16 bytes and more.
    """
    for r in cutlass.range_constexpr(2):
        address = (row_bits[r] + Int64(start + lane % LANES_PER_ROW * WORD)) >> Int64(5) << Int64(2)
        words[2 * r], words[2 * r + 1] = _load_two(address, end - address)


@cute.jit
def hide_masked(acc_s: cute.Tensor, words: cute.Tensor, row_bits: cute.Tensor, lane: Int32):
    """Scores whose bit is 0 become -inf; ``words`` of :func:`fetch_mask`."""
    s = rows_cols(acc_s)
    columns = cute.size(s, mode=[1])
    for r in cutlass.range_constexpr(2):
        share = _funnel_shift(words[2 * r], words[2 * r + 1], Uint32(Int32(row_bits[r]) & (WORD - 1)))
        for w in cutlass.range_constexpr(columns // 8):  # 8 of this lane's columns are spread over 32 keys
            bits = cute.arch.shuffle_sync(share, w, mask_and_clamp=SEGMENTS_OF_4) >> Uint32(lane % LANES_PER_ROW * 2)
            for i in cutlass.range_constexpr(8):
                c = 8 * w + i
                keep = (bits & Uint32(1 << (8 * (i // 2) + i % 2))) != Uint32(0)
                s[r, c] = s[r, c] if keep else -Float32.inf


@cute.jit
def _load_two(address: Int64, left: Int64):
    """Two words from global memory of which ``left`` bytes exist, zeros for the others. The end of the mask is read byte by byte."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; .reg .b32 b; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0; setp.ge.s64 p, {$r1}, 8; "
        "@p ld.global.nc.u32 {$w0}, [{$r0}]; @p ld.global.nc.u32 {$w1}, [{$r0}+4]; @p bra loaded; " + _LAST_BYTES + "loaded: }",
        write_only_types=[Uint32, Uint32],
        read_only_args=[address, left],
    )


_LAST_BYTES = "".join(
    f"setp.gt.s64 p, {{$r1}}, {i}; mov.b32 b, 0; @p ld.global.nc.u8 b, [{{$r0}}+{i}]; shl.b32 b, b, {8 * (i % 4)}; "
    f"or.b32 {{$w{i // 4}}}, {{$w{i // 4}}}, b; "
    for i in range(8)
)


@cute.jit
def _funnel_shift(low: Uint32, high: Uint32, shift: Uint32):
    """Bits [shift, shift + 32) of high:low, shift below 32."""
    return cute.arch.inline_ptx("shf.r.wrap.b32 {$w0}, {$r0}, {$r1}, {$r2};", write_only_types=[Uint32], read_only_args=[low, high, shift])
