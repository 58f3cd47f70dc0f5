"""Page-table arithmetic on the device: nothing here copies to the host, so all of it may be captured in a CUDA graph.

A batch of requests addresses a paged KV cache by three int32 arrays (CSR):

    kv_indptr         [batch + 1]   request r owns entries kv_indptr[r]:kv_indptr[r+1] of kv_indices
    kv_indices        [*]           page ids, in token order; may be longer than kv_indptr[-1]
    kv_last_page_len  [batch]       tokens in the last page of each request, 1..page_size

    kv_len[r] = (pages[r] - 1) * page_size + kv_last_page_len[r]        0 for a request without pages
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch

from ..checks import check_indptr, check_positive, check_tensor
from ..errors import ConfigError, PageTableError, fail

_INTS = (torch.int32, torch.int64)


class PageTable(NamedTuple):
    """The CSR form; unpacks as ``indptr, indices, last_page_len``, the first three arguments of ``plan()``."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tokens of each request: ``(pages - 1) * page_size + last_page_len``, and 0 for a request without pages.

    Args:
        kv_indptr: ``[batch + 1]`` int32. kv_last_page_len: ``[batch]`` int32. page_size: tokens per page.

    Returns:
        ``[batch]``, the dtype and device of ``kv_indptr``.
    """
    call = "get_seq_lens()"
    check_positive(call, page_size=page_size)
    check_tensor(call, "kv_indptr", kv_indptr, {"batch_size + 1": None}, dtypes=_INTS)
    shape = {"batch_size": max(kv_indptr.shape[0] - 1, 0)}
    check_tensor(call, "kv_last_page_len", kv_last_page_len, shape, dtypes=_INTS, device=kv_indptr.device)
    pages = kv_indptr[1:] - kv_indptr[:-1]
    return torch.where(pages > 0, (pages - 1) * page_size + kv_last_page_len, 0).to(kv_indptr.dtype)


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each appended token goes: the last ``append_indptr[r+1] - append_indptr[r]`` positions of request r.

    Args:
        append_indptr: ``[batch + 1]`` offsets of each request's new tokens. seq_lens: ``[batch]`` lengths after the append.
        nnz: rows of the result; rows beyond ``append_indptr[-1]`` are padding.
        batch_indices, positions: optional ``[nnz]`` int32 results to write into.

    Returns:
        ``(batch_indices, positions)`` int32 ``[nnz]``: request of each token (-1 for padding) and its position (0 for padding).

    Raises:
        ShapeError, DTypeError, ConfigError: an argument does not fit. PageTableError: arrays on the CPU contradict each other; those on
        the GPU are not looked at.
    """
    call = "get_batch_indices_positions()"
    check_tensor(call, "append_indptr", append_indptr, {"batch_size + 1": None}, dtypes=_INTS)
    device = append_indptr.device
    check_tensor(call, "seq_lens", seq_lens, {"batch_size": max(len(append_indptr) - 1, 0)}, dtypes=_INTS)
    nnz = _row_count(call, nnz)
    if device.type == "cpu" and seq_lens.device.type == "cpu":
        check_indptr(call, "append_indptr", append_indptr)
        _check_append(call, append_indptr, seq_lens)
    for name, given in (("batch_indices", batch_indices), ("positions", positions)):
        if given is not None:
            check_tensor(call, name, given, {"nnz": nnz}, dtypes=(torch.int32,), device=device)

    token = torch.arange(nnz, dtype=append_indptr.dtype, device=device)
    if len(append_indptr) > 1:
        request = (torch.searchsorted(append_indptr, token, right=True) - 1).clamp_(0, len(append_indptr) - 2)
        real = (token >= append_indptr[0]) & (token < append_indptr[-1])
        position = seq_lens.to(device)[request] - append_indptr[request + 1] + token
        request, position = torch.where(real, request, -1), torch.where(real, position, 0)
    else:
        request, position = torch.full_like(token, -1), torch.zeros_like(token)
    return _write(batch_indices, request), _write(positions, position)


def _row_count(call: str, nnz: int) -> int:
    try:
        count = operator.index(nnz)
    except TypeError:
        count = -1
    if count < 0:
        what = f"{call}: nnz must be an int, 0 or more"
        fail(ConfigError, what, got=repr(nnz), expected="the number of appended tokens, padding included")
    return count


def _check_append(call: str, append_indptr: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """No request is shorter than what was just appended to it (CPU tensors)."""
    new = append_indptr[1:] - append_indptr[:-1]
    short = (seq_lens < new).nonzero()
    if short.numel():
        r = int(short[0])
        fail(
            PageTableError,
            f"{call}: request {r} appends {int(new[r])} tokens but seq_lens[{r}] = {int(seq_lens[r])}",
            expected="seq_lens with the appended tokens",
            fix="add the appended tokens to the lengths first",
        )


def _write(result: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.int32) if result is None else result.copy_(values)


def from_page_table(
    page_table: torch.Tensor,
    *,
    page_size: int,
    seq_lens: torch.Tensor | None = None,
    num_pages_per_seq: torch.Tensor | None = None,
) -> PageTable:
    """The CSR form of a padded page table.

    Args:
        page_table: ``[batch, max_pages]`` page ids; entries beyond a request's pages are ignored.
        page_size: tokens per page.
        seq_lens: ``[batch]`` tokens of each request; or
        num_pages_per_seq: ``[batch]`` pages of each request, all of them full.

    Returns:
        :class:`PageTable` int32 on the table's device. ``indices`` has ``batch * max_pages`` entries whatever the lengths, which is
        what makes this free of host synchronisation.

    Raises:
        ShapeError, DTypeError, ConfigError: an argument does not fit. PageTableError: lengths on the CPU that the table cannot hold;
        those on the GPU are not looked at.
    """
    call = "from_page_table()"
    if (seq_lens is None) == (num_pages_per_seq is None):
        fail(ConfigError, f"{call}: give either seq_lens or num_pages_per_seq", fix="seq_lens is exact, num_pages_per_seq means full pages")
    return csr_of(call, "page_table", page_table, page_size, seq_lens, num_pages_per_seq)


def csr_of(
    call: str,
    name: str,
    page_table: torch.Tensor,
    page_size: int,
    seq_lens: torch.Tensor | None,
    num_pages_per_seq: torch.Tensor | None = None,
) -> PageTable:
    """:func:`from_page_table` on behalf of ``call``, whose argument ``name`` the table is."""
    check_positive(call, page_size=page_size)
    check_tensor(call, name, page_table, {"batch_size": None, "max_pages": None}, dtypes=_INTS)
    batch_size, max_pages = page_table.shape
    device = page_table.device
    if seq_lens is not None:
        check_tensor(call, "seq_lens", seq_lens, {"batch_size": batch_size}, dtypes=_INTS)
        _check_pages(call, name, "seq_lens", seq_lens, page_size, max_pages)
        lengths = seq_lens.to(device=device, dtype=torch.int32)
        pages = (lengths + page_size - 1) // page_size
        last_page_len = (lengths - 1) % page_size + 1
    else:
        assert num_pages_per_seq is not None
        check_tensor(call, "num_pages_per_seq", num_pages_per_seq, {"batch_size": batch_size}, dtypes=_INTS)
        _check_pages(call, name, "num_pages_per_seq", num_pages_per_seq, 1, max_pages)
        pages = num_pages_per_seq.to(device=device, dtype=torch.int32)
        last_page_len = torch.full_like(pages, page_size)
    indptr = torch.nn.functional.pad(torch.cumsum(pages, 0, dtype=torch.int32), (1, 0))
    if page_table.numel() == 0:
        return PageTable(indptr, page_table.new_zeros(0, dtype=torch.int32), last_page_len)
    entry = torch.arange(batch_size * max_pages, dtype=torch.int32, device=device)
    request = torch.searchsorted(indptr[1:], entry, right=True).clamp_(max=batch_size - 1)
    column = (entry - indptr[request]).clamp_(0, max_pages - 1)
    return PageTable(indptr, page_table[request, column].to(torch.int32), last_page_len)


def _check_pages(call: str, table: str, name: str, counts: torch.Tensor, per_page: int, max_pages: int) -> None:
    """``counts`` on the CPU: none is negative, and none needs more pages than a row of the table has."""
    if counts.device.type != "cpu" or counts.numel() == 0:
        return
    smallest, largest = (int(x) for x in counts.aminmax())
    if smallest < 0:
        fail(PageTableError, f"{call}: {name} holds {smallest}", expected=f"0 <= {name}")
    pages = (largest + per_page - 1) // per_page
    if pages > max_pages:
        fail(
            PageTableError,
            f"{call}: a request needs {pages} pages but {table} has {max_pages} columns",
            expected=f"{name} <= {max_pages * per_page}",
            fix=f"pass a wider {table}, or check {name} and page_size",
        )


__all__ = ["PageTable", "csr_of", "from_page_table", "get_batch_indices_positions", "get_seq_lens"]
