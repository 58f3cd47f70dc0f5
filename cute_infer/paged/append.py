"""Append new tokens to a paged KV cache, in place: FlashInfer's ``append_paged_kv_cache`` and ``append_paged_mla_kv_cache``.

    k_cache[page, slot] = append_key[token],   v_cache[page, slot] = append_value[token]
    page = kv_indices[kv_indptr[batch_indices[token]] + positions[token] // page_size],   slot = positions[token] % page_size

A copy: it costs its bytes. An fp8 cache takes fp16 or bf16 rows (rounded to nearest even, saturated) or fp8 rows (copied).
What has no place is not written: padding rows (batch index -1), positions past the pages of the request, page ids outside the cache.
CPU tensors run ``reference.py``, CUDA tensors ``kernels.py``; nothing copies to the host, so a CUDA graph may hold the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..alignment import aligned, is_aligned
from ..checks import KV_LAYOUTS, check_choice, check_tensor, describe, dtype_name
from ..errors import ConfigError, DTypeError, ShapeError, fail
from ..jit import Target, get_kernel
from . import reference
from .cache import split_kv_cache
from .variants import FP8_DTYPES, PATH, ROW_DTYPES, AppendSpec, choose

_INTS = (torch.int32, torch.int64)
_DTYPES = tuple(getattr(torch, name) for name in ROW_DTYPES)
_FP8 = tuple(getattr(torch, name) for name in FP8_DTYPES)


class _Destination(NamedTuple):
    """Rows ``[tokens, heads, dim]`` and the cache ``[pages, page_size, heads, dim]`` they go to, with the user's names for both."""

    rows_name: str
    rows: torch.Tensor
    cache_name: str
    cache: torch.Tensor


# ----------------------------------------------------------------------------------------------------- public functions
def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write the keys and values of new tokens into their pages.

    Args:
        append_key, append_value: ``[nnz, num_kv_heads, head_dim]`` fp16 | bf16, or the cache's dtype. Any strides; head_dim % 8 == 0.
        batch_indices: ``[nnz]`` int32, the request of each token; -1 marks padding, which is skipped.
        positions: ``[nnz]`` int32, the position of each token in its request.
        paged_kv_cache: fp16 | bf16 | fp8, one tensor ``[num_pages, 2, ...]`` or a pair ``(k_cache, v_cache)``; see ``kv_layout``. Written.
        kv_indices: ``[*]`` int32 page ids. kv_indptr: ``[batch_size + 1]`` int32. Both describe the requests *after* the append.
        kv_last_page_len: ``[batch_size]`` int32, accepted for FlashInfer's signature; positions say it all.
        kv_layout: ``"NHD"``: pages ``[page_size, num_kv_heads, head_dim]``; ``"HND"``: ``[num_kv_heads, page_size, head_dim]``.

    :func:`get_batch_indices_positions` makes ``batch_indices`` and ``positions``. Two rows for one slot: which one stays is undefined.

    Raises:
        ShapeError, DTypeError, DeviceError, LayoutError: arguments that contradict each other.

    Source: FlashInfer ``append_paged_kv_cache`` (whose kernel writes out of range for padding rows).
    """
    call = "append_paged_kv_cache()"
    check_choice(call, "kv_layout", kv_layout, KV_LAYOUTS)
    k_cache, v_cache = split_kv_cache(call, paged_kv_cache, kv_layout)
    destinations = [
        _Destination("append_key", append_key, "k_cache", k_cache),
        _Destination("append_value", append_value, "v_cache", v_cache),
    ]
    _append(call, destinations, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: torch.Tensor | None,
    kpe_cache: torch.Tensor | None,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    """Write the compressed KV and the rotary keys of new tokens into their pages (multi-head latent attention).

    Args:
        append_ckv: ``[nnz, head_dim_ckv]``, append_kpe: ``[nnz, head_dim_kpe]``; fp16 | bf16, or the dtype of their cache.
        ckv_cache: ``[num_pages, page_size, head_dim_ckv]``, kpe_cache: ``[num_pages, page_size, head_dim_kpe]``; fp16 | bf16 | fp8, any
            strides (slices of one 576-wide buffer are welcome). Written; a cache that is None is left out.
        Others as in :func:`append_paged_kv_cache`.

    Raises:
        ShapeError, DTypeError, DeviceError: arguments that contradict each other. ConfigError: both caches are None.

    Source: FlashInfer ``append_paged_mla_kv_cache``.
    """
    call = "append_paged_mla_kv_cache()"
    destinations = []
    for rows_name, rows, cache_name, cache in (
        ("append_ckv", append_ckv, "ckv_cache", ckv_cache),
        ("append_kpe", append_kpe, "kpe_cache", kpe_cache),
    ):
        if cache is not None:
            check_tensor(call, rows_name, rows, {"nnz": None, "head_dim": None})
            check_tensor(call, cache_name, cache, {"num_pages": None, "page_size": None, "head_dim": rows.shape[1]})
            destinations.append(_Destination(rows_name, rows.unsqueeze(1), cache_name, cache.unsqueeze(2)))
    if not destinations:
        fail(ConfigError, f"{call}: ckv_cache and kpe_cache are both None", fix="pass at least one cache")
    _append(call, destinations, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)


# --------------------------------------------------------------------------------------------------------------- checks
def _append(
    call: str,
    destinations: list[_Destination],
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    """Check everything, then append: one launch where the destinations share their dtypes, else one each."""
    first = destinations[0]
    check_tensor(call, first.rows_name, first.rows, {"nnz": None, "num_kv_heads": None, "head_dim": None})
    for d in destinations:
        _check_destination(call, d, first)
    nnz, device = first.rows.shape[0], first.cache.device
    offsets = _index_array(call, "kv_indptr", kv_indptr, None, device)
    _index_array(call, "kv_last_page_len", kv_last_page_len, len(offsets) - 1, device)
    where = (
        _index_array(call, "batch_indices", batch_indices, nnz, device),
        _index_array(call, "positions", positions, nnz, device),
    )
    table = (_index_array(call, "kv_indices", kv_indices, None, device), offsets)
    dtypes = {(d.rows.dtype, d.cache.dtype) for d in destinations}
    groups = [destinations] if len(dtypes) == 1 else [[d] for d in destinations]
    for group in groups:
        a, b = group[0], group[1] if len(group) == 2 else None
        torch.ops.cute_infer.append_paged_(a.rows, b and b.rows, *where, a.cache, b and b.cache, *table)


def _check_destination(call: str, d: _Destination, first: _Destination) -> None:
    pages = {"num_pages": first.cache.shape[0], "page_size": first.cache.shape[1], "num_kv_heads": None, "head_dim": None}
    check_tensor(call, d.cache_name, d.cache, pages, dtypes=_DTYPES, device=first.cache.device)
    shape = {"nnz": first.rows.shape[0], "num_kv_heads": None, "head_dim": None}
    check_tensor(call, d.rows_name, d.rows, shape, because=f"as {first.rows_name} has")
    shape |= {"num_kv_heads": d.cache.shape[2], "head_dim": d.cache.shape[3]}
    because = f"as {d.cache_name} has"
    check_tensor(call, d.rows_name, d.rows, shape, dtypes=_DTYPES, device=first.cache.device, because=because)
    if d.rows.dtype in _FP8 and d.rows.dtype != d.cache.dtype:
        fail(
            DTypeError,
            f"{call}: {d.rows_name} is {dtype_name(d.rows.dtype)} but {d.cache_name} is {dtype_name(d.cache.dtype)}",
            got=describe(d.rows_name, d.rows),
            expected=f"float16 | bfloat16 | {dtype_name(d.cache.dtype)}",
            fix="append the rows before they are quantised, or quantise them to the cache's dtype",
        )
    if d.cache.shape[3] % 8:
        fail(
            ShapeError,
            f"{call}: head_dim={d.cache.shape[3]} is not a multiple of 8",
            got=describe(d.cache_name, d.cache),
            expected="head_dim % 8 == 0",
            fix="pad the head dimension of the cache",
        )


def _index_array(call: str, name: str, array: torch.Tensor, length: int | None, device: torch.device) -> torch.Tensor:
    check_tensor(call, name, array, {"length": length}, dtypes=_INTS, device=device)
    return array.to(torch.int32).contiguous()


# --------------------------------------------------------------------------------------------------------------- launch
@functools.lru_cache(maxsize=256)
def _kernel(device: torch.device, row_dtype: torch.dtype, cache_dtype: torch.dtype, second: bool, rows_of_16: bool) -> Callable[..., Any]:
    spec = AppendSpec(dtype_name(row_dtype), dtype_name(cache_dtype), second)
    target = Target.detect(device)
    return get_kernel(PATH, spec, choose(spec, target, rows_of_16), target).fn


def _launch(
    first: torch.Tensor,
    second: torch.Tensor | None,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    first_cache: torch.Tensor,
    second_cache: torch.Tensor | None,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
) -> None:
    if first.numel() == 0 or first_cache.numel() == 0 or kv_indices.numel() == 0 or len(kv_indptr) < 2:
        return  # nothing has a place
    caches = [c for c in (first_cache, second_cache) if c is not None]
    needed = min(16, 8 * caches[0].element_size())  # bytes of the narrowest vector: 8 elements
    for cache in caches:
        if not is_aligned(cache, needed):
            fail(
                ShapeError,
                f"append: vectors of {needed} bytes of the cache do not start on {needed}-byte boundaries",
                got=f"strides {list(cache.stride())}, address % {needed} = {cache.data_ptr() % needed}",
                expected=f"a contiguous last axis, and every other stride and the address a multiple of {needed} bytes",
                fix="allocate the cache with an aligned row, or slice it on aligned boundaries",
            )
    wide = all(is_aligned(c) and c.shape[3] % 16 == 0 for c in caches)
    needed = 16 if wide else min(16, 8 * first.element_size())
    first = aligned(first, needed)
    second = None if second is None else aligned(second, needed)
    kernel = _kernel(first_cache.device, first.dtype, first_cache.dtype, second is not None, wide)
    kernel(first, second, batch_indices, positions, first_cache, second_cache, kv_indices, kv_indptr)


# ------------------------------------------------------------------------------------------------------------- torch op
def _append_reference(
    first: torch.Tensor,
    second: torch.Tensor | None,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    first_cache: torch.Tensor,
    second_cache: torch.Tensor | None,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
) -> None:
    reference.append_rows(first, first_cache, batch_indices, positions, kv_indices, kv_indptr)
    if second is not None and second_cache is not None:
        reference.append_rows(second, second_cache, batch_indices, positions, kv_indices, kv_indptr)


def _append_meta(*_: Any) -> None:
    """Everything is written in place: no shapes to report."""


_lib = torch.library.Library("cute_infer", "FRAGMENT")
_lib.define(
    "append_paged_(Tensor first, Tensor? second, Tensor batch_indices, Tensor positions, Tensor(a!) first_cache, "
    "Tensor(b!)? second_cache, Tensor kv_indices, Tensor kv_indptr) -> ()"
)
_lib.impl("append_paged_", _launch, "CUDA")
_lib.impl("append_paged_", _append_reference, "CPU")
_lib.impl("append_paged_", _append_meta, "Meta")

__all__ = ["append_paged_kv_cache", "append_paged_mla_kv_cache"]
