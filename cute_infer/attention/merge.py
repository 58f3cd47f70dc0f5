"""Merge attention states: what attention over disjoint KV segments gives when the segments are taken together.

A *state* is a pair (v, s): the normalized output of one segment and the base-2 log-sum-exp of its logits. Merging is associative and
commutative up to rounding, and exact about emptiness: ``s = -inf`` marks an empty segment, whose v is never looked at.

    s = log2(sum_i 2**s_i)          v = sum_i 2**(s_i - s) * v_i

Cascade attention, split-KV decode and ring attention all end in this function. ``merge_reference`` is its torch form (CPU tensors run
it); CUDA tensors run ``kernels/merge.py``, one launch for any number of states, rows, heads and any head_dim that is a multiple of 8.

Source: Ye et al., "Cascade Inference" (2024); Milakov & Gimelshein, arXiv:1805.02867.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..alignment import aligned
from ..checks import check_tensor, check_written, describe, dtype_name
from ..errors import ShapeError, fail
from ..jit import Target, get_kernel
from .tiles_merge import PATH, VECTOR, MergeSpec, MergeTile, choose

V_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# ------------------------------------------------------------------------------------------------------ the mathematics
@torch.no_grad()
def merge_reference(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge along the first axis in fp32.

    Args:
        v: ``[states, ..., head_dim]``, any dtype.
        s: ``[states, ...]`` fp32, base 2.

    Returns:
        ``(v [..., head_dim] fp32, s [...] fp32)``.
    """
    empty = s == -torch.inf
    peak = torch.cat([s, s.new_full((1, *s.shape[1:]), -torch.inf)]).amax(0)  # the extra state lets amax see zero states
    anchor = torch.where(peak == -torch.inf, 0.0, peak)  # -inf - -inf would be NaN
    weight = torch.exp2(s - anchor)
    total = weight.sum(0)
    weighted = weight.unsqueeze(-1) * torch.where(empty.unsqueeze(-1), 0.0, v.float())
    out = weighted.sum(0) / torch.where(total == 0, 1.0, total).unsqueeze(-1)
    return out, anchor + torch.log2(total)


# ----------------------------------------------------------------------------------------------------- public functions
def merge_state(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over two disjoint KV segments, as if they had been one.

        s = log2(2**s_a + 2**s_b)          v = 2**(s_a - s) * v_a + 2**(s_b - s) * v_b

    Args:
        v_a, v_b: ``[seq_len, num_heads, head_dim]`` fp16 | bf16 | fp32, one dtype. Normalized outputs of the segments.
        s_a, s_b: ``[seq_len, num_heads]`` fp32. Log-sum-exp of the logits, **base 2**; ``-inf`` marks an empty segment.

    Returns:
        ``(v, s)`` with the shapes and dtypes of ``v_a`` and ``s_a``. Two empty segments give ``v = 0``, ``s = -inf``.

    Raises:
        ShapeError: shapes differ, or head_dim is not a multiple of 8. DTypeError: ``s_*`` is not fp32, or ``v_b`` has another dtype.

    Source: FlashInfer ``merge_state``; Ye et al., "Cascade Inference" (2024).
    """
    _check_pair("merge_state()", ("v_a", v_a), ("s_a", s_a), ("v_b", v_b), ("s_b", s_b))
    return torch.ops.cute_infer.merge_state(v_a, s_a, v_b, s_b)


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """:func:`merge_state` that overwrites ``v`` and ``s``.

    Args:
        v, v_other: ``[seq_len, num_heads, head_dim]`` fp16 | bf16 | fp32, one dtype.
        s, s_other: ``[seq_len, num_heads]`` fp32, **base 2**. Another dtype is refused: converting ``s`` would write the result to a
            temporary and lose it, which is what FlashInfer does without a word.
        mask: ``[seq_len]`` bool (or uint8); rows where it is False keep their ``v`` and ``s``. For CUDA graphs of a fixed size.

    Raises:
        ShapeError: shapes differ, or head_dim is not a multiple of 8. DTypeError: ``s`` or ``s_other`` is not fp32, mask is not bool.
    """
    call = "merge_state_in_place()"
    _check_pair(call, ("v", v), ("s", s), ("v_other", v_other), ("s_other", s_other))
    if mask is not None:
        check_tensor(call, "mask", mask, {"seq_len": v.shape[0]}, dtypes=(torch.bool, torch.uint8), device=v.device)
    check_written(call, "v", v)
    check_written(call, "s", s)
    torch.ops.cute_infer.merge_state_(v, s, v_other, s_other, mask)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over any number of disjoint KV segments, as if they had been one.

        s[n, h] = log2(sum_i 2**s[n, i, h])          v[n, h] = sum_i 2**(s[n, i, h] - s[n, h]) * v[n, i, h]

    Args:
        v: ``[seq_len, num_states, num_heads, head_dim]`` fp16 | bf16 | fp32, any strides.
        s: ``[seq_len, num_states, num_heads]`` fp32. Log-sum-exp of the logits, **base 2**; ``-inf`` marks an empty segment.

    Returns:
        ``(v [seq_len, num_heads, head_dim], s [seq_len, num_heads])`` in the dtypes of the arguments.
        Rows without any non-empty segment give ``v = 0``, ``s = -inf``.

    Raises:
        ShapeError: shapes disagree, or head_dim is not a multiple of 8. DTypeError: ``s`` is not fp32.

    Source: FlashInfer ``merge_states``; Ye et al., "Cascade Inference" (2024).
    """
    call = "merge_states()"
    shape = {"seq_len": None, "num_states": None, "num_heads": None}
    check_tensor(call, "v", v, {**shape, "head_dim": None}, dtypes=V_DTYPES)
    check_tensor(call, "s", s, dict(zip(shape, v.shape)), dtypes=(torch.float32,), device=v.device, fix=_float_fix(s))
    _check_head_dim(call, "v", v)
    return torch.ops.cute_infer.merge_states(v, s)


def merge_partials(
    out_partial: torch.Tensor, lse_partial: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None, lse_scale: float = 1.0
) -> None:
    """Merge the partial results of a split-KV kernel into ``out`` (and ``lse``), in split order. Arguments are not checked.

    Args:
        out_partial: ``[num_splits, rows, num_heads, head_dim]``, normalized; fp32, or the dtype of any other states.
        lse_partial: ``[num_splits, rows, num_heads]`` fp32, **base 2**; ``-inf`` marks a split without tokens.
        out: ``[rows, num_heads, head_dim]`` fp16 | bf16 | fp32, written.
        lse: ``[rows, num_heads]`` fp32 or None; receives the merged base-2 LSE times ``lse_scale`` (ln 2 gives natural logarithms).
    """
    if out.is_cuda:
        _launch(out_partial, lse_partial, None, None, None, out, lse, lse_scale)
    else:
        merged, merged_lse = merge_reference(out_partial, lse_partial)
        out.copy_(merged)
        if lse is not None:
            lse.copy_(merged_lse * lse_scale)


def merge_into(v: torch.Tensor, s: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """:func:`merge_partials` as a torch op, for states of any dtype. Arguments are not checked.

    Args:
        v: ``[states, rows, num_heads, head_dim]``. s: ``[states, rows, num_heads]`` fp32, **base 2**.
        out: ``[rows, num_heads, head_dim]``, written. lse: ``[rows, num_heads]`` fp32 or None; receives the merged base-2 LSE.
    """
    torch.ops.cute_infer.merge_into(v, s, out, lse)


def load_partials_kernel(device: torch.device, o_dtype: torch.dtype, head_dim: int, lse: bool, num_splits: int) -> None:
    """Compile or load now the kernel that :func:`merge_partials` will launch, so that no launch (or graph capture) has to."""
    _kernel(device, MergeSpec("float32", dtype_name(o_dtype), head_dim, lse=lse), choose(num_splits))


# --------------------------------------------------------------------------------------------------------------- checks
def _float_fix(s: Any) -> str | None:
    if isinstance(s, torch.Tensor) and s.dtype != torch.float32:
        return "keep the log-sum-exp in fp32 from the call that makes it; .float() on a 16-bit one restores the dtype, not the precision"
    return None


def _check_pair(call: str, *named: tuple[str, Any]) -> None:
    (v_name, v), (s_name, s), (v_other_name, v_other), (s_other_name, s_other) = named
    check_tensor(call, v_name, v, {"seq_len": None, "num_heads": None, "head_dim": None}, dtypes=V_DTYPES)
    rows, heads, head_dim = v.shape
    same = f"as {v_name} {list(v.shape)} has"
    fp32 = (torch.float32,)
    check_tensor(call, s_name, s, {"seq_len": rows, "num_heads": heads}, dtypes=fp32, device=v.device, because=same, fix=_float_fix(s))
    shape = {"seq_len": rows, "num_heads": heads, "head_dim": head_dim}
    check_tensor(call, v_other_name, v_other, shape, dtypes=(v.dtype,), device=v.device, because=same)
    shape.pop("head_dim")
    check_tensor(call, s_other_name, s_other, shape, dtypes=fp32, device=v.device, because=same, fix=_float_fix(s_other))
    _check_head_dim(call, v_name, v)


def _check_head_dim(call: str, name: str, v: torch.Tensor) -> None:
    head_dim = v.shape[-1]
    if head_dim == 0 or head_dim % VECTOR:
        fail(
            ShapeError,
            f"{call}: head_dim={head_dim} is not a multiple of {VECTOR}",
            got=describe(name, v),
            expected=f"{name} [..., head_dim], head_dim % {VECTOR} == 0",
            fix="pad the last axis with zeros and slice the result",
        )


# --------------------------------------------------------------------------------------------------------------- launch
@functools.lru_cache(maxsize=1024)
def _kernel(device: torch.device, spec: MergeSpec, tile: MergeTile) -> Callable[..., Any]:
    return get_kernel(PATH, spec, tile, Target.detect(device)).fn


@functools.lru_cache(maxsize=1024)
def _kernel_for(
    device: torch.device, v_dtype: torch.dtype, o_dtype: torch.dtype, head_dim: int, states: int, pair: bool, masked: bool, lse: bool
) -> Callable[..., Any]:
    spec = MergeSpec(dtype_name(v_dtype), dtype_name(o_dtype), head_dim, pair=pair, masked=masked, lse=lse)
    return _kernel(device, spec, choose(states))


def _launch(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor | None,
    s_other: torch.Tensor | None,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    lse_scale: float = 1.0,
) -> None:
    """Run the kernel on v ``[states, rows, heads, head_dim]`` (and v_other ``[1, ...]``); out may be v[0] and lse may be s[0]."""
    states, pair = v.shape[0], v_other is not None
    if out.numel() == 0:
        return  # a grid of zero CTAs is an error
    if states == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    kernel = _kernel_for(out.device, v.dtype, out.dtype, out.shape[-1], 2 if pair else states, pair, mask is not None, lse is not None)
    result = aligned(out)  # a copy keeps what a mask leaves alone
    kernel(aligned(v), s, None if v_other is None else aligned(v_other), s_other, mask, result, lse, lse_scale)
    if result is not out:
        out.copy_(result)


# ------------------------------------------------------------------------------------------------------------ torch ops
_lib = torch.library.Library("cute_infer", "FRAGMENT")
_lib.define("merge_state(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> (Tensor, Tensor)")
_lib.define("merge_state_(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, Tensor? mask) -> ()")
_lib.define("merge_states(Tensor v, Tensor s) -> (Tensor, Tensor)")
_lib.define("merge_into(Tensor v, Tensor s, Tensor(a!) out, Tensor(b!)? lse) -> ()")


def _new_state(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised results for states without a states axis, compact whatever the strides of the arguments."""
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), torch.empty(s.shape, dtype=s.dtype, device=s.device)


def _merge_state_cuda(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _new_state(v_a, s_a)
    _launch(v_a[None], s_a[None], v_b[None], s_b[None], None, out, lse)
    return out, lse


def _merge_state_cpu(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = merge_reference(torch.stack([v_a, v_b]), torch.stack([s_a, s_b]))
    return out.to(v_a.dtype), lse


def _merge_state_meta(v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _new_state(v_a, s_a)


def _merge_in_place_cuda(v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None) -> None:
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    _launch(v[None], s[None], v_other[None], s_other[None], mask, v, s)


@torch.no_grad()
def _merge_in_place_cpu(v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None) -> None:
    out, lse = _merge_state_cpu(v, s, v_other, s_other)
    if mask is not None:
        keep = ~mask.bool()[:, None]
        out, lse = torch.where(keep[..., None], v, out), torch.where(keep, s, lse)
    v.copy_(out)
    s.copy_(lse)


def _merge_in_place_meta(v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Everything is written in place: no shapes to report."""


def _merge_states_cuda(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _merge_states_meta(v, s)
    _launch(v.transpose(0, 1), s.transpose(0, 1), None, None, None, out, lse)
    return out, lse


def _merge_states_cpu(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = merge_reference(v.transpose(0, 1), s.transpose(0, 1))
    return out.to(v.dtype), lse


def _merge_states_meta(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, _, heads, head_dim = v.shape
    return v.new_empty((rows, heads, head_dim)), s.new_empty((rows, heads))


def _merge_into_meta(v: torch.Tensor, s: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Everything is written in place: no shapes to report."""


for _name, _cuda, _cpu, _meta in (
    ("merge_state", _merge_state_cuda, _merge_state_cpu, _merge_state_meta),
    ("merge_state_", _merge_in_place_cuda, _merge_in_place_cpu, _merge_in_place_meta),
    ("merge_states", _merge_states_cuda, _merge_states_cpu, _merge_states_meta),
    ("merge_into", merge_partials, merge_partials, _merge_into_meta),
):
    _lib.impl(_name, _cuda, "CUDA")
    _lib.impl(_name, _cpu, "CPU")
    _lib.impl(_name, _meta, "Meta")

__all__ = ["load_partials_kernel", "merge_into", "merge_partials", "merge_reference", "merge_state", "merge_state_in_place", "merge_states"]
