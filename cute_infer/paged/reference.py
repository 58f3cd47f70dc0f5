"""Appending to a paged cache in torch: what the kernel does, in the words of its docstring."""

from __future__ import annotations

import torch

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def find_slots(
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    num_pages: int,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(token, page, slot)`` of every row that has a place: int64 row numbers and where each one goes.

        page = kv_indices[kv_indptr[batch_indices] + positions // page_size]          slot = positions % page_size

    Left out: batch indices that are negative or not a request, negative positions, positions past the request's last page, entries past
    the end of ``kv_indices``, pages outside the cache.
    """
    request, position = batch_indices.long(), positions.long()
    found = (request >= 0) & (request < len(kv_indptr) - 1) & (position >= 0)
    token = found.nonzero().squeeze(1)
    request, position = request[token], position[token]
    indptr = kv_indptr.long()
    entry = indptr[request] + position // page_size
    found = (indptr[request] >= 0) & (entry < indptr[request + 1]) & (entry < len(kv_indices))
    token, position, page = token[found], position[found], kv_indices[entry[found]].long()
    found = (page >= 0) & (page < num_pages)
    return token[found], page[found], position[found] % page_size


def convert(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``rows`` in ``dtype``, rounded to nearest even; fp8 saturates (also infinities) and keeps NaN."""
    if rows.dtype == dtype:
        return rows
    largest = FP8_MAX.get(dtype)
    return rows.to(dtype) if largest is None else rows.float().clamp(-largest, largest).to(dtype)


def append_rows(
    rows: torch.Tensor,
    cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
) -> None:
    """``cache[page, slot] = convert(rows[token])`` for every row that has a place.

    Args:
        rows: ``[tokens, heads, dim]``. cache: ``[pages, page_size, heads, dim]``, any strides, written.
    """
    token, page, slot = find_slots(batch_indices, positions, kv_indices, kv_indptr, cache.shape[0], cache.shape[1])
    bits = torch.uint8 if cache.element_size() == 1 else torch.int16  # torch indexes fp8 on few devices, its bits everywhere
    cache.view(bits)[page, slot] = convert(rows[token], cache.dtype).contiguous().view(bits)


__all__ = ["append_rows", "convert", "find_slots"]
