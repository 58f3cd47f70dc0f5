"""Page-table arithmetic on the device: nothing here copies to the host, so all of it may be captured in a CUDA graph.

A batch of requests addresses a paged KV cache by three int32 arrays (CSR):

    kv_indptr         [batch + 1]   request r owns entries kv_indptr[r]:kv_indptr[r+1] of kv_indices
    kv_indices        [*]           page ids, in token order; may be longer than kv_indptr[-1]
    kv_last_page_len  [batch]       tokens in the last page of each request, 1..page_size

    kv_len[r] = (pages[r] - 1) * page_size + kv_last_page_len[r]        0 for a request without pages
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..checks import check_positive, check_tensor
from ..errors import ConfigError, fail

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
    check_positive("get_seq_lens()", page_size=page_size)
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
    """
    call = "get_batch_indices_positions()"
    check_tensor(call, "append_indptr", append_indptr, {"batch_size + 1": None}, dtypes=_INTS)
    device = append_indptr.device
    check_tensor(call, "seq_lens", seq_lens, {"batch_size": len(append_indptr) - 1}, dtypes=_INTS)
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
    """
    call = "from_page_table()"
    check_positive(call, page_size=page_size)
    check_tensor(call, "page_table", page_table, {"batch_size": None, "max_pages": None}, dtypes=_INTS)
    if (seq_lens is None) == (num_pages_per_seq is None):
        fail(ConfigError, f"{call}: give either seq_lens or num_pages_per_seq", fix="seq_lens is exact, num_pages_per_seq means full pages")
    batch_size, max_pages = page_table.shape
    device = page_table.device
    if seq_lens is not None:
        check_tensor(call, "seq_lens", seq_lens, {"batch_size": batch_size}, dtypes=_INTS)
        lengths = seq_lens.to(device=device, dtype=torch.int32)
        pages = (lengths + page_size - 1) // page_size
        last_page_len = (lengths - 1) % page_size + 1
    else:
        assert num_pages_per_seq is not None
        check_tensor(call, "num_pages_per_seq", num_pages_per_seq, {"batch_size": batch_size}, dtypes=_INTS)
        pages = num_pages_per_seq.to(device=device, dtype=torch.int32)
        last_page_len = torch.full_like(pages, page_size)
    indptr = torch.nn.functional.pad(torch.cumsum(pages, 0, dtype=torch.int32), (1, 0))
    if page_table.numel() == 0:
        return PageTable(indptr, page_table.new_zeros(0, dtype=torch.int32), last_page_len)
    entry = torch.arange(batch_size * max_pages, dtype=torch.int32, device=device)
    request = torch.searchsorted(indptr[1:], entry, right=True).clamp_(max=batch_size - 1)
    column = (entry - indptr[request]).clamp_(0, max_pages - 1)
    return PageTable(indptr, page_table[request, column].to(torch.int32), last_page_len)


__all__ = ["PageTable", "from_page_table", "get_batch_indices_positions", "get_seq_lens"]
