"""Where the rows of Q, K and V live, and how they reach shared memory on the cp.async path.

A KV cache is ``[pages, page_size, num_kv_heads, head_dim]`` with 64-bit strides; ragged and single caches are one page that holds every
token. Address arithmetic is 64-bit throughout: caches larger than 2^31 elements are ordinary.

A page id outside ``[0, pages)``, an index past the end of ``kv_indices`` or a token past the end of a ragged K is never followed: zeros
arrive instead and ``status[0]`` becomes 1. Tokens outside the visible range ``[lo, hi)`` arrive as zeros too, so that stale memory (a
partly filled last page, pages that slid out of the window) cannot reach V as 0 * NaN.

How a tile is copied: ``lanes_per_row`` neighbouring threads take one row, 16 bytes each, 128 contiguous bytes per request; a group of
``threads`` threads therefore covers ``threads / lanes_per_row`` rows a pass. Each thread keeps one page id per pass in registers and
fetches the ids of a tile one tile ahead, so the page table's latency is hidden behind the arithmetic.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Constexpr, Int32, Int64, Uint32, const_expr

from .mma import copy_async_16

NO_PAGE = -1


# ----------------------------------------------------------------------------------------------------------------------------- lengths
@cute.jit
def kv_extent(spec: Constexpr, k: cute.Tensor, kv_indptr, kv_last_page_len, request: Int32):
    """``(first, kv_len)`` of a request: its first entry in kv_indices (paged) or its first token (ragged, single), and its tokens."""
    first = Int32(0)
    length = Int32(0)
    if const_expr(spec.kv_layout == "single"):
        length = Int32(k.shape[1])
    else:
        first = kv_indptr[request]
        length = kv_indptr[request + 1] - first
        if const_expr(spec.kv_layout == "paged"):
            # A last page longer than a page would reach into the next request's pages.
            tail = cutlass.min(kv_last_page_len[request], Int32(spec.page_size))
            length = (length - 1) * spec.page_size + tail if length > 0 else Int32(0)
    return first, cutlass.max(length, Int32(0))


# --------------------------------------------------------------------------------------------------------------------------- tile copies
def lanes_per_row(*row_bytes: int) -> int:
    """Threads that share a row: 8 (128 contiguous bytes) unless a row is shorter. One number for K and V, so they share page ids."""
    chunks = min(-(-b // 16) for b in row_bytes)
    return 8 if chunks >= 8 else 4 if chunks >= 4 else 2


def passes(rows: int, threads: int, lanes: int) -> int:
    """Page ids per thread and tile."""
    return -(-rows * lanes // threads)


@cute.jit
def load_page_ids(
    spec: Constexpr,
    ids: cute.Tensor,
    kv_indices,
    first: Int32,
    token: Int32,
    lo: Int32,
    hi: Int32,
    rank: Int32,
    threads: Constexpr,
    rows: Constexpr,
    lanes: Constexpr,
):
    """Fetch ``ids [passes]``, the pages of this thread's rows of the tile at ``token``; nothing waits until :func:`check_page_ids`."""
    step = threads // lanes
    for i in cutlass.range_constexpr(cute.size(ids)):
        row = i * step + rank // lanes
        tok = token + row
        wanted = (tok >= lo) & (tok < hi)
        if const_expr(rows % step != 0):
            wanted = wanted & (row < rows)
        if const_expr(spec.kv_layout == "paged"):
            entry = first + tok // spec.page_size
            ids[i] = _load_if(kv_indices.iterator.toint() + Int64(entry) * 4, wanted & (entry < kv_indices.shape[0]))
        else:
            ids[i] = Int32(0) if wanted else Int32(NO_PAGE)


@cute.jit
def check_page_ids(
    spec: Constexpr,
    ids: cute.Tensor,
    k: cute.Tensor,
    status: cute.Tensor,
    first: Int32,
    token: Int32,
    lo: Int32,
    hi: Int32,
    rank: Int32,
    threads: Constexpr,
    rows: Constexpr,
    lanes: Constexpr,
):
    """Replace ids that lead nowhere by NO_PAGE and report them in ``status[0]``; same arguments as :func:`load_page_ids`."""
    step = threads // lanes
    lost = Boolean(False)
    for i in cutlass.range_constexpr(cute.size(ids)):
        row = i * step + rank // lanes
        tok = token + row
        if const_expr(spec.kv_layout == "paged"):
            known = (ids[i] >= 0) & (ids[i] < k.shape[0])
        else:
            known = (ids[i] >= 0) & (first + tok < k.shape[1])
        wanted = (tok >= lo) & (tok < hi)
        if const_expr(rows % step != 0):
            wanted = wanted & (row < rows)
        ids[i] = ids[i] if known else Int32(NO_PAGE)
        lost = lost | (wanted & (known == 0))
    if lost:
        status[0] = Int32(1)


@cute.jit
def _load_if(address: Int64, condition):
    """An int32 from global memory, or NO_PAGE: predicated, because a branch per pass would wait for each load in turn."""
    return cute.arch.inline_ptx(
        "{ .reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.s32 {$w0}, -1; @p ld.global.nc.s32 {$w0}, [{$r0}]; }",
        write_only_types=[Int32],
        read_only_args=[address, Int32(condition)],
    )


@cute.jit
def copy_rows(
    spec: Constexpr,
    cache: cute.Tensor,
    ids: cute.Tensor,
    destination: Uint32,
    pitch: Constexpr,
    head_dim: Constexpr,
    first: Int32,
    token: Int32,
    kv_head: Int32,
    rank: Int32,
    threads: Constexpr,
    rows: Constexpr,
    lanes: Constexpr,
):
    """Start the copy of rows ``token .. token + rows`` of K or V into ``rows`` rows of ``pitch`` bytes at ``destination``.

    ``ids`` are this thread's checked pages (same rank, threads, rows and lanes). Columns from head_dim up to the next
    multiple of 16 elements are filled with zeros.
    """
    step = threads // lanes
    width = cache.element_type.width // 8
    stride_page, stride_token, stride_head = cache.stride[0], cache.stride[1], cache.stride[2]
    base = cache.iterator.toint() + Int64(kv_head) * stride_head * width
    for i in cutlass.range_constexpr(cute.size(ids)):
        row = i * step + rank // lanes
        tok = token + row
        present = ids[i] >= 0
        page = ids[i] if present else Int32(0)
        if const_expr(spec.kv_layout == "paged"):
            offset = Int64(page) * stride_page + Int64(tok % spec.page_size) * stride_token
        else:
            offset = Int64(first + tok if present else Int32(0)) * stride_token
        target = destination + Uint32(row * pitch)
        copy_row(base + offset * width, target, present, row < rows, rank, head_dim, width, lanes, rows % step != 0)


@cute.jit
def copy_row(
    source: Int64,
    destination: Uint32,
    present,
    inside,
    rank: Int32,
    head_dim: Constexpr,
    width: Constexpr,
    lanes: Constexpr,
    guarded: Constexpr,
):
    """This thread's 16-byte chunks of one row of ``head_dim`` elements of ``width`` bytes, zero-filled when the row is not ``present``.

    ``inside`` says whether the destination row exists; it is looked at only when ``guarded`` (some threads of the last pass have none).
    """
    chunks = -(-head_dim // 16) * width  # 16-byte chunks of the padded row
    row_bytes = head_dim * width
    for b in cutlass.range_constexpr(-(-chunks // lanes)):
        chunk = b * lanes + rank % lanes
        size = Int32(16) if present else Int32(0)
        if const_expr(16 * (b + 1) * lanes > row_bytes):  # the row may end inside this block of chunks
            rest = cutlass.max(Int32(row_bytes) - chunk * 16, Int32(0))
            size = cutlass.min(size, rest)
        if const_expr(guarded or (b + 1) * lanes > chunks):
            fits = chunk < chunks
            if const_expr(guarded):
                fits = fits & inside
            if fits:
                copy_async_16(destination + Uint32(chunk * 16), source + Int64(chunk * 16), size)
        else:
            copy_async_16(destination + Uint32(chunk * 16), source + Int64(chunk * 16), size)


@cute.jit
def copy_query_rows(
    spec: Constexpr,
    q: cute.Tensor,
    destination: Uint32,
    pitch: Constexpr,
    first_token: Int32,
    first_row: Int32,
    num_rows: Int32,
    kv_head: Int32,
    rank: Int32,
    threads: Constexpr,
    rows: Constexpr,
):
    """Start the copy of ``rows`` packed query rows ``first_row ..`` of one request and KV head.

    Packed row r is query ``first_token + r // group_size`` and head ``kv_head * group_size + r % group_size``.
    Rows from ``num_rows`` on are zeros.
    """
    lanes = lanes_per_row(2 * spec.head_dim_qk)
    step = threads // lanes
    for i in cutlass.range_constexpr(passes(rows, threads, lanes)):
        row = i * step + rank // lanes
        packed = first_row + row
        present = (packed < num_rows) & (row < rows)
        packed = packed if present else Int32(0)
        token = first_token + packed // spec.group_size
        head = kv_head * spec.group_size + packed % spec.group_size
        source = q.iterator.toint() + (Int64(token) * q.stride[0] + Int64(head) * q.stride[1]) * 2
        copy_row(source, destination + Uint32(row * pitch), present, row < rows, rank, spec.head_dim_qk, 2, lanes, rows % step != 0)
