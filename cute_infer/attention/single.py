"""Attention of one request over K and V that it owns alone: what single_decode and single_prefill share."""

from __future__ import annotations

import torch

from ..checks import (
    KV_LAYOUTS,
    check_attention_dtypes,
    check_choice,
    check_heads,
    check_planned_dtype,
    check_positive,
    check_tensor,
)
from .launch import run_attention
from .options import Options, Scale, check_options, choose_backend, default_output, lse_scale, make_spec, resolve_scales
from .wrapper import make_outputs


def attend(
    call: str,
    kind: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str,
    options: Options,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    o_dtype: torch.dtype | None = None,
    mask: torch.Tensor | None = None,
    mask_indptr: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    want_lse: bool = False,
    lse_base: str = "log2",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``q`` ``[rows, num_qo_heads, head_dim_qk]`` over ``k``, ``v`` ``[tokens, num_kv_heads, head_dim]`` (NHD) or with the first two
    dimensions exchanged (HND). Returns ``(out [rows, num_qo_heads, head_dim_vo], lse [rows, num_qo_heads] or None)``."""
    backend = choose_backend(call, backend)
    check_choice(call, "kv_layout", kv_layout, KV_LAYOUTS)
    if torch.compiler.is_compiling() or not _fit(q, k, v):
        _check_shapes(call, q, k, v, kv_layout)
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    rows, num_qo_heads, head_dim = q.shape
    if head_dim == 0:
        check_positive(call, head_dim=0)
    options = check_options(call, options, head_dim)
    num_kv_heads = k.shape[1]
    group_size = check_heads(call, int(num_qo_heads), int(num_kv_heads))
    o_dtype = o_dtype or default_output(q.dtype)
    check_attention_dtypes(call, q.dtype, k.dtype, o_dtype, "cpu" if backend == "reference" else q.device.type)
    if v.dtype != k.dtype:
        check_planned_dtype(call, "v", v, k.dtype, "k.dtype")
    if sinks is not None:
        check_tensor(call, "sinks", sinks, {"num_qo_heads": num_qo_heads}, dtypes=(torch.float32,), device=q.device)

    scales = resolve_scales(call, options, head_dim, num_kv_heads, num_qo_heads, q.device, q_scale, k_scale, v_scale, q.dtype)
    out, lse = make_outputs(call, q, (rows, num_qo_heads, v.shape[2]), o_dtype, None, None, want_lse)
    spec = make_spec(
        kind,
        "single",
        q.dtype,
        k.dtype,
        o_dtype,
        int(head_dim),
        int(v.shape[2]),
        group_size,
        0,
        options.causal,
        options.window_left >= 0,
        bool(options.logits_soft_cap),
        options.pos_encoding_mode,
        mask is not None,
        sinks is not None,
        scales.k_scale is not None,
        scales.v_scale is not None,
        want_lse,
        options.fp8_fast_accumulation,
    )
    run_attention(
        spec,
        q,
        k.unsqueeze(0),
        v.unsqueeze(0),
        out,
        lse,
        batch_size=1,
        mask=mask,
        mask_indptr=mask_indptr,
        sinks=sinks,
        k_scale=scales.k_scale,
        v_scale=scales.v_scale,
        sm_scale=scales.sm_scale,
        out_scale=scales.out_scale,
        soft_cap=options.logits_soft_cap or 0.0,
        lse_scale=lse_scale(call, lse_base),
        rope_scale=options.rope_scale or 1.0,
        rope_theta=options.rope_theta or 1e4,
        window_left=options.window_left,
        backend="reference" if backend == "reference" else "auto",
    )
    return out, lse


def _fit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether :func:`_check_shapes` has nothing to say, found out with as little work as possible."""
    try:
        same = k.shape == v.shape or k.shape[:2] == v.shape[:2]
        return same and q.dim() == k.dim() == v.dim() == 3 and q.shape[2] == k.shape[2] and q.device == k.device == v.device
    except AttributeError:
        return False


def _check_shapes(call: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_layout: str) -> None:
    check_tensor(call, "q", q, {"num_tokens": None, "num_qo_heads": None, "head_dim": None})
    first, second = ("kv_len", "num_kv_heads") if kv_layout == "NHD" else ("num_kv_heads", "kv_len")
    for name, x in (("k", k), ("v", v)):
        check_tensor(call, name, x, {first: None, second: None, "head_dim": None}, device=q.device, because=f"with kv_layout={kv_layout!r}")
    check_tensor(call, "k", k, {first: None, second: None, "head_dim": q.shape[2]}, because="as q has")
    check_tensor(call, "v", v, {first: k.shape[0], second: k.shape[1], "head_dim": None}, because="as k has")
