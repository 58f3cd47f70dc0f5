"""Registers of the Hopper prefill kernel: accumulator views, masks and the online softmax.

A wgmma m64nN accumulator gives a thread of the warp group two rows, ``16*warp + lane/4`` and that plus 8, and in each the columns
``8*j + 2*(lane%4) + {0, 1}``. Four neighbouring lanes share a row.

Source: Milakov & Gimelshein, arXiv:1805.02867; Shah et al., FlashAttention-3, arXiv:2407.08608.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float32, Int32, Uint32, const_expr

# O keeps its reference maximum until some row maximum of the warp has grown by more than this (base 2): P then stays below 2^8, far inside
# fp16 and bf16, the sum is fp32, and the final division cancels the reference. Deterministic: the vote depends on the scores alone.
RESCALE_THRESHOLD = 8.0
# Independent chains per row reduction: only two consumer warps share a scheduler, one chain would wait for its own latency.
CHAINS = 2
BITS = 32


def rows_cols(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator ((2, 2, N/8), M, K) as (rows, columns) = ((2, M), (2, N/8, K)); no data moves."""
    shape, stride = acc.layout.shape, acc.layout.stride
    layout = cute.make_layout(
        ((shape[0][1], shape[1]), (shape[0][0], shape[0][2], shape[2])),
        stride=((stride[0][1], stride[1]), (stride[0][0], stride[0][2], stride[2])),
    )
    return cute.make_tensor(acc.iterator, layout)


def as_a_operand(p: cute.Tensor) -> cute.Tensor:
    """View 16-bit P, laid out like the accumulator it came from, as the A operand ((2, 2, 2), M, N/16) of a k16 wgmma; no data moves."""
    shape, stride = p.layout.shape, p.layout.stride
    layout = cute.make_layout(
        ((2, 2, 2), shape[1], shape[0][2] // 2),
        stride=((stride[0][0], stride[0][1], stride[0][2]), stride[1], 2 * stride[0][2]),
    )
    return cute.make_tensor(p.iterator, layout)


@cute.jit
def convert_pairs(src: cute.Tensor, dst: cute.Tensor):
    """fp32 -> 16 bits, two at a time. A plain ``.to()`` converts one by one when the count is no power of two, and that spills."""
    words = cute.recast_tensor(dst, Uint32)
    op = "cvt.rn.bf16x2.f32" if dst.element_type is BFloat16 else "cvt.rn.f16x2.f32"
    for i in cutlass.range_constexpr(cute.size(words)):
        words[i] = cute.arch.inline_ptx(
            op + " {$w0}, {$r0}, {$r1};", write_only_types=[Uint32], read_only_args=[src[2 * i + 1], src[2 * i]]
        )


@cute.jit
def cap_scores(acc_s: cute.Tensor, pre_scale: Float32):
    """Soft cap: scores become tanh(q.k * sm_scale / cap); the factor cap joins the softmax scale."""
    for i in cutlass.range_constexpr(cute.size(acc_s)):
        acc_s[i] = cute.math.tanh(acc_s[i] * pre_scale, fastmath=True)


@cute.jit
def mask_scores(
    acc_s: cute.Tensor,
    key_end: Int32,
    diagonal: Int32,
    oldest: Int32,
    gap: cutlass.Constexpr,
    causal: cutlass.Constexpr,
    window: cutlass.Constexpr,
):
    """Hide keys: -inf replaces a score, whatever it was (NaN from stale bytes included).

    All limits are columns of this tile, already less the thread's first column. Columns at or past ``key_end`` do not exist; past
    ``diagonal`` (first row) they lie in the future; before ``oldest`` (first row) they left the window. The second row's query is ``gap``
    further.
    """
    s = rows_cols(acc_s)
    columns = cute.size(s, mode=[1])
    for r in cutlass.range_constexpr(2):
        end = key_end
        if const_expr(causal):
            end = cutlass.min(key_end, diagonal + gap * r)
        # A bit per score: ptxas moves seven of them into predicates at once, where every comparison is an instruction.
        for word in cutlass.range_constexpr(0, columns, BITS):
            seen = ~_bits_from(_columns_before(end) - word)
            if const_expr(window):
                seen = seen & _bits_from(_columns_before(oldest + gap * r) - word)
            for c in cutlass.range_constexpr(word, min(word + BITS, columns)):
                s[r, c] = s[r, c] if (seen & Uint32(1 << (c - word))) != Uint32(0) else -Float32.inf


@cute.jit
def _columns_before(limit: Int32) -> Int32:
    """How many of a thread's columns 0, 1, 8, 9, 16, ... lie before ``limit``; not positive if none does."""
    return (limit >> 3) * 2 + cutlass.min(limit & 7, 2)


@cute.jit
def _bits_from(first: Int32) -> Uint32:
    """A word with the bits from ``first`` on: all where it is negative, none past the word (shl.b32 clamps)."""
    return cute.arch.inline_ptx("shl.b32 {$w0}, -1, {$r0};", write_only_types=[Uint32], read_only_args=[cutlass.max(first, 0)])


@cute.jit
def online_softmax(
    acc_s: cute.Tensor,
    row_max: cute.Tensor,
    row_sum: cute.Tensor,
    correction: cute.Tensor,
    scale_log2: Float32,
    first: cutlass.Constexpr,
) -> Boolean:
    """Scores -> exp2(scores * scale_log2 - reference), in place; advances the running maximum and sum of both rows.

    Returns a warp-uniform flag: O must be multiplied by ``correction`` (always False for the ``first`` tile, O is still zero).
    ``row_sum`` is this lane's share; the four lanes of a row are added once, at the end. A row that saw no key keeps -inf and sum 0.
    """
    s = rows_cols(acc_s)
    columns = cute.size(s, mode=[1])
    new_max = cute.make_rmem_tensor(2, Float32)
    for r in cutlass.range_constexpr(2):
        part = cute.make_rmem_tensor(CHAINS, Float32)
        for c in cutlass.range_constexpr(columns):
            part[c % CHAINS] = s[r, c] if const_expr(c < CHAINS) else cute.arch.fmax(part[c % CHAINS], s[r, c])
        top = part[0]
        for j in cutlass.range_constexpr(1, CHAINS):
            top = cute.arch.fmax(top, part[j])
        top = cute.arch.warp_reduction(top, cute.arch.fmax, threads_in_group=4)
        new_max[r] = cute.arch.fmax(top, row_max[r])
    grew = Boolean(False)
    if const_expr(first):
        for r in cutlass.range_constexpr(2):
            row_max[r] = new_max[r]
    else:
        # -inf - -inf is NaN: fmax drops it, and NaN > threshold is False. From -inf to a number is +inf: rescaled, as it must be.
        growth = cute.arch.fmax((new_max[0] - row_max[0]) * scale_log2, (new_max[1] - row_max[1]) * scale_log2)
        grew = cute.arch.vote_ballot_sync(growth > Float32(RESCALE_THRESHOLD)) != 0
        if grew:
            for r in cutlass.range_constexpr(2):
                reference = new_max[r] * scale_log2 if new_max[r] != -Float32.inf else Float32(0.0)
                correction[r] = cute.arch.exp2(row_max[r] * scale_log2 - reference)
                row_max[r] = new_max[r]
                row_sum[r] = row_sum[r] * correction[r]
    for r in cutlass.range_constexpr(2):
        bias = -(row_max[r] * scale_log2) if row_max[r] != -Float32.inf else Float32(0.0)
        part = cute.make_rmem_tensor(CHAINS, Float32)
        for c in cutlass.range_constexpr(columns):
            p = cute.arch.exp2(s[r, c] * scale_log2 + bias)
            s[r, c] = p
            part[c % CHAINS] = p if const_expr(c < CHAINS) else part[c % CHAINS] + p
        total = part[0]
        for j in cutlass.range_constexpr(1, CHAINS):
            total = total + part[j]
        row_sum[r] = row_sum[r] + total
    return grew


@cute.jit
def scale_rows(acc_o: cute.Tensor, factor: cute.Tensor):
    """O[row, :] *= factor[row]."""
    o = rows_cols(acc_o)
    for r in cutlass.range_constexpr(2):
        for c in cutlass.range_constexpr(cute.size(o, mode=[1])):
            o[r, c] = o[r, c] * factor[r]
