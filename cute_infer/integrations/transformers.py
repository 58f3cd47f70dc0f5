"""Attention for Hugging Face transformers.

    from cute_infer.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(..., dtype=torch.bfloat16, attn_implementation="cute_infer", device_map="cuda")

K and V are read where transformers keeps them: a batch of one as it is, a batch of several as a paged cache of page size 1 whose page ids
name the tokens that are not padding. No copy of the cache, no unpadding of it, no host synchronisation (except to recognise sequences
packed into one row by their position ids).

``register_paged()`` serves continuous batching (``model.generate_batch``), which accepts no new names: it replaces ``"paged|eager"``.

Limits, each with an error: no gradients in training, no 4-D masks, no two-sided windows, no position bias. As with transformers' own flash
attention, what a model adds to its causal mask by a mask function (image tokens that see each other, chunked attention) is not seen here.

Tested with transformers 5.17.0 and 5.23.0.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..attention.launch import run_attention
from ..attention.options import make_spec
from ..checks import describe
from ..errors import ConfigError, UnsupportedConfigError, fail

_CALL = "cute_infer attention"


def register(name: str = "cute_infer") -> None:
    """Make ``attn_implementation=name`` available to every transformers model.

    Raises:
        ConfigError: the name contains "flash", which transformers reserves for its own.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if "flash" in name or "|" in name:
        fail(ConfigError, f"register(): transformers keeps names like {name!r} for itself", fix='use a name without "flash" and "|"')
    AttentionInterface.register(name, _attention)
    # Without its own mask function an unknown name gets no mask at all, and padding is silently attended to.
    AttentionMaskInterface.register(name, _mask)


def register_paged() -> None:
    """Let ``attn_implementation="paged|eager"``, and so continuous batching, run on cute_infer in this process.

    transformers still gathers K and V of each layer and builds a dense mask for this name (which is not read).
    """
    from transformers import AttentionInterface

    AttentionInterface.register("paged|eager", _paged_attention)


# ----------------------------------------------------------------------------------------------------- the three registered functions
def _mask(**call: Any) -> torch.Tensor | None:
    """transformers' mask function: the 2-D padding mask ``[batch, tokens so far]``, or None when every slot of K and V holds a token.

    A static cache hands over its whole buffer: without a mask its empty slots would be attended to, so there the tokens so far are spelled
    out even when none is padding.
    """
    from transformers.masking_utils import flash_attention_mask

    mask = flash_attention_mask(**call)
    if mask is None and call["kv_length"] > _tokens_so_far(call):
        mask = torch.ones(call["batch_size"], _tokens_so_far(call), dtype=torch.bool, device=call.get("device"))
    return mask


def _tokens_so_far(call: dict[str, Any]) -> int:
    """Tokens in the cache after this forward pass, counted from its first slot."""
    positions = call.get("cache_position")  # the positions of the queries, in versions that have them
    end = int(positions[-1]) + 1 if positions is not None else int(call["q_offset"]) + call["q_length"]
    return end - call.get("kv_offset", 0)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function.

    Args:
        query: ``[batch, num_qo_heads, q_len, head_dim]``. key, value: ``[batch, num_kv_heads, kv_len, head_dim]``.
        attention_mask: ``[batch, <= kv_len]``, True = a token, False = padding; None without padding.

    Returns:
        ``(out [batch, q_len, num_qo_heads, head_dim_vo], None)``; rows of padding are 0.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    _refuse(module, query, attention_mask, dropout, is_causal, sliding_window, kwargs)
    batch, num_heads, q_len, head_dim = query.shape
    options = _Options(is_causal, scaling, sliding_window, softcap, s_aux)
    rows = query.transpose(1, 2).reshape(batch * q_len, num_heads, head_dim)
    bounds = _packed_bounds(query, key, attention_mask, kwargs)
    if bounds is not None:
        out = _run("prefill", "ragged", rows, _tokens(key), _tokens(value), options, bounds[0], bounds[1])
    elif batch == 1 and attention_mask is None:
        out = _run("decode" if q_len == 1 else "prefill", "single", rows, _tokens(key), _tokens(value), options)
    else:
        out = _run_batch(rows, q_len, key, value, attention_mask, options)
    return out.view(batch, q_len, num_heads, value.shape[-1]), None


@torch.compiler.disable  # the cache update writes views of the cache, which functionalization would copy whole
def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cache: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of continuous batching: all requests in one row, K and V after ``cache.update`` ragged like the queries.

    Args:
        query: ``[1, num_qo_heads, sum of q_len, head_dim]``. kwargs: cu_seq_lens_q, and cu_seq_lens_k per layer type.
    """
    if cache is None:
        fail(
            ConfigError,
            f'{_CALL}: "paged|eager" was called without a paged cache',
            expected="a call from continuous batching (model.generate_batch)",
            fix='use register() and attn_implementation="cute_infer" for an ordinary forward',
        )
    k, v = _update_paged(cache, key, value, module.layer_idx, kwargs)
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    options = _Options(True, scaling, sliding_window, softcap, sinks)
    kv_indptr = kwargs["cu_seq_lens_k"]
    if isinstance(kv_indptr, dict):  # in versions whose cache does not pick the layer's own
        kv_indptr = kv_indptr["full_attention" if sliding_window is None else "sliding_attention"]
    qo_indptr, kv_indptr = kwargs["cu_seq_lens_q"].to(torch.int32), kv_indptr.to(torch.int32)
    out = _run("prefill", "ragged", query[0].transpose(0, 1), k, v, options, qo_indptr, kv_indptr)
    return out.unsqueeze(0), None


def _update_paged(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer: Any, call: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write new tokens ``[1, heads, tokens, dim]`` to the cache; those to attend to as ``[1, tokens, heads, dim]``."""
    if _takes_kwargs(type(cache).update):
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=call)
        return _tokens(key), _tokens(value)
    # Up to transformers 5.17 the two index tensors come one by one and the result has no batch dimension.
    key, value = cache.update(key, value, layer, read_index=call["read_index"], write_index=call["write_index"])
    return key.unsqueeze(0), value.unsqueeze(0)


@functools.lru_cache(maxsize=8)
def _takes_kwargs(update: Callable[..., Any]) -> bool:
    return "kwargs" in inspect.signature(update).parameters


# -------------------------------------------------------------------------------------------------------------------------- refusals
def _refuse(
    module: torch.nn.Module,
    query: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> None:
    reason = fix = None
    if dropout > 0 or (module.training and torch.is_grad_enabled() and query.requires_grad):
        reason, fix = "inference only: there is no backward pass and no dropout", 'model.eval(), or train with attn_implementation="sdpa"'
    elif mask is not None and mask.dim() != 2:
        reason, fix = f"a mask of {mask.dim()} dimensions is not supported", "pass the 2-D padding mask [batch, kv_len]"
    elif sliding_window is not None and not is_causal:
        reason, fix = "a window to both sides is not supported", 'use attn_implementation="sdpa" for this model'
    elif kwargs.get("position_bias") is not None:
        reason, fix = "position_bias is not supported", 'use attn_implementation="sdpa" for this model'
    if reason is not None:
        fail(UnsupportedConfigError, f"{_CALL}: {reason}", got=describe("query", query), fix=fix)


# --------------------------------------------------------------------------------------------------------------------------- one call
class _Options(NamedTuple):
    """A layer's options in transformers' words: ``sliding_window`` counts the query's own token, ``sinks`` may have any float dtype."""

    causal: bool
    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def _run(
    kind: str,
    kv_layout: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: _Options,
    qo_indptr: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    kv_last_page_len: torch.Tensor | None = None,
) -> torch.Tensor:
    """``q`` ``[rows, num_qo_heads, head_dim]`` over 4-D ``k``, ``v``. Rows that belong to no request, or see no key, give 0."""
    window = -1 if options.sliding_window is None else options.sliding_window - 1
    sinks = None if options.sinks is None else options.sinks.detach().float()
    spec = make_spec(
        kind,
        kv_layout,
        q.dtype,
        k.dtype,
        q.dtype,
        q.shape[2],
        v.shape[3],
        q.shape[1] // k.shape[2],
        1 if kv_layout == "paged" else 0,
        options.causal,
        window >= 0,
        bool(options.softcap),
        "NONE",
        False,
        sinks is not None,
        False,
        False,
        False,
    )
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[3])
    run_attention(
        spec,
        q,
        k,
        v,
        out,
        None,
        batch_size=1 if kv_indptr is None else len(kv_indptr) - 1,
        qo_indptr=qo_indptr if kind == "prefill" else None,
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
        kv_last_page_len=kv_last_page_len,
        sinks=sinks,
        sm_scale=options.scaling if options.scaling is not None else q.shape[2] ** -0.5,
        soft_cap=options.softcap or 0.0,
        window_left=window,
    )
    return out


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """``[1, heads, tokens, dim]`` as ``[1, tokens, heads, dim]``, without a copy."""
    return x.transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------ several requests at once
def _run_batch(
    rows: torch.Tensor, q_len: int, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: _Options
) -> torch.Tensor:
    """A dense batch, each token of its K and V a page of its own; padding is left out by page table and row order."""
    k, v, stride = _as_pages(key, value)
    if mask is None:
        table = _dense_table(key.shape[0], q_len, key.shape[2], stride, key.device)
    else:
        table = _masked_table(mask, q_len, stride)
    if q_len == 1:
        return _run("decode", "paged", rows, k, v, options, *table[1:])
    if table.order is None:
        return _run("prefill", "paged", rows, k, v, options, *table[1:])
    out = _run("prefill", "paged", rows.index_select(0, table.order), k, v, options, *table[1:])
    return torch.empty_like(out).index_copy_(0, table.order, out)


class _Table(NamedTuple):
    """order: rows of the queries that are tokens, request by request, then padding; None when there is none. The rest is CSR."""

    order: torch.Tensor | None
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor


def _as_pages(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """K and V ``[batch, heads, tokens, dim]`` as ``[pages, 1, heads, dim]`` views in which token t of request b is page ``b * stride + t``.

    That needs a batch stride that is a multiple of the token stride, which holds for transformers' caches and projections; else a copy.
    """
    batch, _, tokens, _ = key.shape
    strides = {x.stride(0) // x.stride(2) if x.stride(2) and x.stride(0) % x.stride(2) == 0 else -1 for x in (key, value)}
    if len(strides) > 1 or -1 in strides or key.stride(3) != 1 or value.stride(3) != 1:
        key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
        strides = {tokens}
    stride = strides.pop()
    pages = (batch - 1) * stride + tokens
    k, v = (
        x.as_strided((pages, 1, x.shape[1], x.shape[3]), (x.stride(2), x.stride(2), x.stride(1), 1), x.storage_offset())
        for x in (key, value)
    )
    return k, v, stride


def _page_ids(batch: int, tokens: int, stride: int, device: torch.device) -> torch.Tensor:
    firsts = torch.arange(batch, dtype=torch.int32, device=device) * stride
    return (firsts[:, None] + torch.arange(tokens, dtype=torch.int32, device=device)).flatten()


def _dense_table(batch: int, q_len: int, tokens: int, stride: int, device: torch.device) -> _Table:
    requests = torch.arange(batch + 1, dtype=torch.int32, device=device)
    last = torch.ones(batch, dtype=torch.int32, device=device)
    return _Table(None, requests * q_len, requests * tokens, _page_ids(batch, tokens, stride, device), last)


def _masked_table(mask: torch.Tensor, q_len: int, stride: int) -> _Table:
    """The table of a padded batch, remembered on the mask: every layer of a forward pass gets the same one."""
    known = getattr(mask, "_cute_infer_table", None)
    if known is not None and known[0] == (q_len, stride):
        return known[1]
    valid = mask.bool()
    batch, tokens = valid.shape
    q_valid = valid[:, -q_len:] if q_len > 1 else torch.ones_like(valid[:, :1])
    order = torch.argsort(~q_valid.flatten(), stable=True)
    kept = torch.argsort(~valid.flatten(), stable=True)
    table = _Table(
        order,
        _offsets(q_valid),
        _offsets(valid),
        _page_ids(batch, tokens, stride, mask.device)[kept],
        torch.ones(batch, dtype=torch.int32, device=mask.device),
    )
    mask._cute_infer_table = ((q_len, stride), table)  # type: ignore[attr-defined]
    return table


def _offsets(valid: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)


# ------------------------------------------------------------------------------------------------- several sequences in one row
def _packed_bounds(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(qo_indptr, kv_indptr)`` when one row holds several sequences: told by cu_seq_lens_*, or by position ids that start over."""
    given = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if given[0] is not None and given[1] is not None:
        return given[0].to(torch.int32), given[1].to(torch.int32)
    positions = kwargs.get("position_ids")
    alone = query.shape[0] == 1 and mask is None and query.shape[2] == key.shape[2] > 1
    if not alone or positions is None or positions.dim() != 2 or positions.shape != (1, query.shape[2]):
        return None
    if not hasattr(positions, "_cute_infer_bounds"):  # the host has to know the number of sequences; once per forward pass
        starts = (positions[0].diff() != 1).nonzero().flatten() + 1
        ends = starts.new_tensor([0]), starts, starts.new_tensor([query.shape[2]])
        positions._cute_infer_bounds = torch.cat(ends).to(torch.int32) if len(starts) else None
    bounds = positions._cute_infer_bounds
    return None if bounds is None else (bounds, bounds)


__all__ = ["register", "register_paged"]
