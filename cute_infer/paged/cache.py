"""The spellings of a paged KV cache, brought to one: K and V as ``[pages, page_size, num_kv_heads, head_dim]`` views, never a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import check_tensor, describe
from ..errors import DTypeError, ShapeError, fail

_FIX = "pass (k_cache, v_cache), or one tensor [num_pages, 2, ...] with K at index 0 and V at index 1"


def split_kv_cache(call: str, paged_kv_cache: torch.Tensor | Sequence[torch.Tensor], kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(k, v)`` views ``[pages, page_size, num_kv_heads, head_dim]`` of a cache in any accepted form.

    NHD: ``[pages, page_size, heads, dim]``; HND: ``[pages, heads, page_size, dim]``. A pair (tuple or list) of these, or one tensor with
    K and V stacked at dimension 1. With page_size 1 the page dimension may be left out. Strides are free.
    """
    if isinstance(paged_kv_cache, torch.Tensor):
        cache = paged_kv_cache
        if cache.dim() not in (4, 5) or cache.shape[1] != 2:
            fail(
                ShapeError,
                f"{call}: a paged KV cache in one tensor must have 2 (K and V) at dimension 1",
                got=describe("paged_kv_cache", cache),
                expected="[num_pages, 2, page_size, num_kv_heads, head_dim] (NHD), [num_pages, 2, num_kv_heads, page_size, head_dim] (HND)",
                fix=_FIX,
            )
        pair: Sequence[torch.Tensor] = (cache[:, 0], cache[:, 1])
    elif isinstance(paged_kv_cache, (tuple, list)) and len(paged_kv_cache) == 2:
        pair = paged_kv_cache
    else:
        fail(DTypeError, f"{call}: paged_kv_cache must be a tensor or a pair of tensors", got=type(paged_kv_cache).__name__, fix=_FIX)
    return _pages("k_cache", call, pair[0], kv_layout), _pages("v_cache", call, pair[1], kv_layout)


def _pages(name: str, call: str, cache: torch.Tensor, kv_layout: str) -> torch.Tensor:
    check_tensor(call, name, cache, fix=_FIX)
    if cache.dim() == 3:  # page_size 1: [pages, heads, dim] in both layouts
        return cache.unsqueeze(1)
    if cache.dim() != 4:
        fail(
            ShapeError,
            f"{call}: {name} has {cache.dim()} dimensions, expected 4",
            got=describe(name, cache),
            expected=f"{name} [num_pages, page_size, num_kv_heads, head_dim] (NHD) or [num_pages, num_kv_heads, page_size, head_dim] (HND)",
            fix=_FIX,
        )
    return cache if kv_layout == "NHD" else cache.transpose(1, 2)


def unpack_run_arguments(
    call: str, paged_kv_cache: torch.Tensor | Sequence[torch.Tensor], args: tuple, kv_layout: str
) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """``(k, v, remaining positional arguments)`` of run(): a 4-D tensor followed by another is K followed by V.

    That is ``run(q, k_pages, v_pages)``. Nothing else looks like it: a cache in one tensor is never followed by a tensor of its rank.
    """
    if args and isinstance(paged_kv_cache, torch.Tensor) and isinstance(args[0], torch.Tensor):
        v = args[0]
        if paged_kv_cache.dim() in (3, 4) and v.dim() == paged_kv_cache.dim():
            paged_kv_cache, args = (paged_kv_cache, v), args[1:]
    return *split_kv_cache(call, paged_kv_cache, kv_layout), args
