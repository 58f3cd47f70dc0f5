"""Attention in fp32 torch, one request at a time, written to be believed.

Per request, for query row i (position p = kv_len - qo_len + i), key j and query head h on KV head g = h // group_size:

    s[i, j] = (rope(q[i, h], p) . rope(k[j, g], j)) * sm_scale * k_scale[g]
    s       = soft_cap * tanh(s / soft_cap)                        if soft cap
    s      += slope[h] * (j - i)                                   if ALiBi
    s       = -inf where the mask hides j from i                   causal: j > p.  window: j < p - window_left.  custom: bit is 0.
    lse[i]  = log(sum_j exp(s[i, j]) + exp(sink[h])) * log2(e) * lse_scale
    out[i]  = sum_j exp(s[i, j] - ln-lse[i]) * v[j, g] * out_scale * v_scale[g]

A custom mask replaces the causal one. A row without a visible key has out = 0 and lse = -inf (or the sink's). A page id outside the
cache reads as zeros. Only what a request owns is ever read, so garbage in the rest of the cache cannot matter.

This is the CPU implementation and the oracle of the GPU tests; it runs on CUDA tensors too (it reads metadata on the host there).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .spec import AttentionSpec

LOG2_E = math.log2(math.e)
_CHUNK = 1 << 24  # logits held at once: 64 MiB in fp32


class _Request(NamedTuple):
    """Rows of q and tokens of KV that belong together. ``kv_begin`` counts pages (paged) or tokens."""

    request: int
    qo_begin: int
    qo_len: int
    kv_begin: int
    kv_len: int


@torch.no_grad()
def attention(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    qo_indptr: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    kv_last_page_len: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    mask_indptr: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sm_scale: float,
    out_scale: float = 1.0,
    soft_cap: float = 0.0,
    lse_scale: float = 1.0,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    window_left: int = -1,
    status: torch.Tensor | None = None,
) -> None:
    """Write ``out`` ``[total_q, num_qo_heads, head_dim_vo]`` and, if given, ``lse`` ``[total_q, num_qo_heads]`` fp32, base 2 * lse_scale.

    Args:
        q: ``[total_q, num_qo_heads, head_dim_qk]``. k, v: ``[pages, page_size, num_kv_heads, head_dim]`` (one page unless paged).
        status: int32; ``status[0]`` becomes 1 when a page id was outside the cache. The rest as in ``device/args.py``.

    Source: the module's formulas; layouts and conventions are FlashInfer's.
    """
    num_kv_heads = k.shape[2]
    slopes = alibi_slopes(q.shape[1], q.device) if spec.pos_encoding == "ALIBI" else None
    mask_begins = mask_indptr.tolist() if mask_indptr is not None else None

    for r in _requests(spec, q, k, qo_indptr, kv_indptr, kv_last_page_len):
        if r.qo_len == 0:
            continue
        keys, values = _tokens(spec, k, v, r, kv_indices, status)  # [kv_len, num_kv_heads, head_dim] fp32
        if k_scale is not None and spec.q_bits > 8:
            keys = keys * k_scale.float()[None, :, None]
        if v_scale is not None:
            values = values * v_scale.float()[None, :, None]
        if spec.pos_encoding == "ROPE_LLAMA":
            keys = rope(keys, torch.arange(r.kv_len, device=q.device), rope_scale, rope_theta)
        bits = mask[mask_begins[r.request] :] if mask is not None and mask_begins is not None and spec.custom_mask else None

        rows_at_once = max(1, _CHUNK // max(1, q.shape[1] * r.kv_len))
        for begin in range(0, r.qo_len, rows_at_once):
            rows = torch.arange(begin, min(begin + rows_at_once, r.qo_len), device=q.device)
            at = slice(r.qo_begin + begin, r.qo_begin + begin + len(rows))
            queries = q[at].float()
            if k_scale is not None and spec.q_bits == 8:
                queries = queries * k_scale.float()[None, :, None]
            if spec.pos_encoding == "ROPE_LLAMA":
                queries = rope(queries, r.kv_len - r.qo_len + rows, rope_scale, rope_theta)

            scores = torch.einsum("nhgd,lhd->hgnl", queries.unflatten(1, (num_kv_heads, -1)), keys).flatten(0, 1) * sm_scale
            if spec.soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            if slopes is not None:
                scores = scores + slopes[:, None, None] * (torch.arange(r.kv_len, device=q.device) - rows[:, None])
            visible = _visible(spec, r, rows, bits, window_left)
            if visible is not None:
                scores = scores.masked_fill(~visible, -math.inf)

            result, natural_lse = _softmax_v(scores, values, sinks if spec.sinks else None)
            out[at] = (result * out_scale).to(out.dtype)
            if lse is not None:
                lse[at] = natural_lse * (LOG2_E * lse_scale)


def _requests(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    qo_indptr: torch.Tensor | None,
    kv_indptr: torch.Tensor | None,
    kv_last_page_len: torch.Tensor | None,
) -> Iterator[_Request]:
    if kv_indptr is None:  # a single request owns everything
        yield _Request(0, 0, q.shape[0], 0, k.shape[1])
        return
    kv = kv_indptr.tolist()
    qo = qo_indptr.tolist() if qo_indptr is not None and spec.kind == "prefill" else range(len(kv))  # decode: one row per request
    last = kv_last_page_len.tolist() if kv_last_page_len is not None else None
    for i in range(len(kv) - 1):
        kv_len = max(0, kv[i + 1] - kv[i])
        if last is not None and kv_len > 0:
            kv_len = (kv_len - 1) * spec.page_size + last[i]
        yield _Request(i, qo[i], qo[i + 1] - qo[i], kv[i], kv_len)


def _tokens(
    spec: AttentionSpec, k: torch.Tensor, v: torch.Tensor, r: _Request, kv_indices: torch.Tensor | None, status: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The request's keys and values in order, ``[kv_len, num_kv_heads, head_dim]`` fp32."""
    if spec.kv_layout != "paged" or kv_indices is None:
        owned = slice(r.kv_begin, r.kv_begin + r.kv_len)
        return k[0, owned].float(), v[0, owned].float()
    token = torch.arange(r.kv_len, device=k.device)
    entry = r.kv_begin + token // spec.page_size
    known = entry < len(kv_indices)
    page = torch.where(known, kv_indices[entry.clamp(max=len(kv_indices) - 1)], -1) if len(kv_indices) else torch.full_like(entry, -1)
    inside = (page >= 0) & (page < k.shape[0])
    if status is not None:
        status[0] |= (~inside).any().to(status.dtype)
    slot = token % spec.page_size
    page = torch.where(inside, page, 0).long()
    keep = inside[:, None, None]

    def read(cache: torch.Tensor) -> torch.Tensor:
        if cache.shape[0] == 0:
            return torch.zeros(r.kv_len, *cache.shape[2:], device=cache.device)
        tokens = cache.view(torch.uint8)[page, slot].view(cache.dtype) if cache.element_size() == 1 else cache[page, slot]
        return torch.where(keep, tokens.float(), 0.0)

    return read(k), read(v)


def _visible(spec: AttentionSpec, r: _Request, rows: torch.Tensor, bits: torch.Tensor | None, window_left: int) -> torch.Tensor | None:
    """``[rows, kv_len]`` bool, True where the key takes part; None when all do."""
    kv_idx = torch.arange(r.kv_len, device=rows.device)
    position = (r.kv_len - r.qo_len + rows)[:, None]
    visible = None
    if bits is not None:
        bit = rows[:, None] * r.kv_len + kv_idx
        visible = ((bits[bit // 8].int() >> (bit % 8).int()) & 1).bool()
    elif spec.causal and spec.kind == "prefill":
        visible = kv_idx <= position
    if spec.window:
        recent = kv_idx >= position - window_left
        visible = recent if visible is None else visible & recent
    return visible


def _softmax_v(scores: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out [rows, heads, head_dim], natural lse [rows, heads])`` of ``scores [heads, rows, kv_len]``."""
    heads, rows, kv_len = scores.shape
    peak = scores.amax(-1, keepdim=True) if kv_len else scores.new_full((heads, rows, 1), -math.inf)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.float()[:, None, None])
    peak = torch.where(peak == -math.inf, 0.0, peak)  # an empty row: exp(-inf - 0) = 0
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.float()[:, None, None] - peak)
    weights = weights / torch.where(total > 0, total, 1.0)
    result = torch.einsum("hgnl,lhd->nhgd", weights.unflatten(0, (values.shape[1], -1)), values).flatten(1, 2)
    return result, (peak + torch.log(total)).squeeze(-1).transpose(0, 1)


def rope(x: torch.Tensor, position: torch.Tensor, rope_scale: float, rope_theta: float) -> torch.Tensor:
    """Rotate ``x`` ``[tokens, heads, head_dim]``: dimension d < head_dim / 2 is paired with d + head_dim / 2 (neox halves).

    angle = position * theta ** (-2 d / head_dim) / rope_scale
    """
    half = x.shape[-1] // 2
    frequency = rope_theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half) / rope_scale
    angle = position.float()[:, None] * frequency
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def alibi_slopes(num_heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """ALiBi slopes ``[num_heads]`` fp32: a geometric sequence from 2^(-8/n), n the largest power of two <= num_heads, then every
    other term of the sequence of 2 n heads.

    Source: Press et al., "Train Short, Test Long" (arXiv:2108.12409).
    """
    n = 1 << (num_heads.bit_length() - 1)
    exponents = [-8.0 * (i + 1) / n for i in range(n)] + [-4.0 * (2 * i + 1) / n for i in range(num_heads - n)]
    return torch.tensor([2.0**e for e in exponents], dtype=torch.float32, device=device)
