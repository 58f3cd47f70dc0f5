"""Draw one token per row. FlashInfer's names and parameter order; every function is one kernel launch.

Common arguments
    indices       ``[n]`` int32 | int64: output i draws from row indices[i]; ids then have its dtype, else int32.
    deterministic accepted for compatibility: results are always bitwise deterministic.
    generator     where random numbers come from without ``seed``; on CUDA its offset moves on, and no call waits for the device.
    check_nan     raise ValueError when the input holds NaN (reads the input back; for debugging).
    seed, offset  the random stream's key and counter: an int, or an int64 tensor of one value or one per row (graph-safe). Per-row seeds
                  are honoured: the same (seed, offset) draws the same token alone, in any batch, in any slot. One seed for all rows gives
                  every row its own stream. The ids are not FlashInfer's for the same seed.
    return_valid  also return ``valid`` ``[n]`` bool: False for rows with NaN or +inf, all -inf or all zero; their id is 0.
    k=, p=        short for top_k=, top_p= and return_valid=True.

Filters keep whole groups of equal values. top_k: off if < 1 or >= vocab. top_p: >= 1 is off, <= 0 keeps the most likely.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import LayoutError, fail
from . import ops as _ops
from .params import Param, check_generator, check_indices, check_rows, is_traced, per_row, random_start
from .spelling import short_spelling

ORDERS = ("top_k_first", "joint")
Seed = int | torch.Tensor | None
Ids = torch.Tensor | tuple[torch.Tensor, ...]


def _draw(
    call: str,
    x: torch.Tensor,
    is_probs: bool,
    indices: torch.Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: Seed,
    offset: Seed,
    return_valid: bool,
    *,
    temperature: Param = None,
    top_k: Param = None,
    top_p: Param = None,
    min_p: Param = None,
    k_first: bool = False,
    return_logprob: bool = False,
) -> Ids:
    """Check everything once and call the op."""
    check_rows(call, "probs" if is_probs else "logits", x, check_nan)
    slots = check_indices(call, indices, x)
    check_generator(call, generator, x)
    f32 = torch.float32
    filters: tuple[Any, ...] = (
        *per_row(temperature, f32, slots, x, indices, call, "temperature"),
        *per_row(top_k, torch.int32, slots, x, indices, call, "top_k"),
        *per_row(top_p, f32, slots, x, indices, call, "top_p"),
        *per_row(min_p, f32, slots, x, indices, call, "min_p"),
    )
    seed_rows, seed_value, seed_per_row = random_start(call, seed, "seed", slots, x.device)
    offset_rows, offset_value, _ = random_start(call, offset, "offset", slots, x.device)
    rows = None if indices is None else indices.to(torch.int32)
    random = (seed_rows, seed_value, offset_rows, offset_value, not seed_per_row, generator)
    run = torch.ops.cute_infer.sample_rows if is_traced(x) else _ops.draw
    ids, valid, logprob = run(x, is_probs, rows, *filters, k_first, return_logprob, *random)
    if indices is not None and indices.dtype != ids.dtype:
        ids = ids.to(indices.dtype)
    results = (ids, valid.view(torch.bool)) if return_valid else (ids,)
    if return_logprob:
        results = (*results, logprob)
    return results if len(results) > 1 else ids


def _is_k_first(filter_apply_order: str) -> bool:
    if filter_apply_order not in ORDERS:
        fail(LayoutError, f"Invalid filter_apply_order: {filter_apply_order}", expected=" | ".join(map(repr, ORDERS)))
    return filter_apply_order == "top_k_first"


def sample(
    logits: torch.Tensor,
    temperature: Param = None,
    top_k: Param = None,
    top_p: Param = None,
    min_p: Param = None,
    *,
    filter_apply_order: str = "top_k_first",
    indices: torch.Tensor | None = None,
    seed: Seed = None,
    offset: Seed = None,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    return_valid: bool = False,
    return_logprob: bool = False,
) -> Ids:
    """The whole sampling step from raw logits in one launch: temperature, then top-k, top-p and min-p, then the draw.

        p = softmax(logits / temperature); keep the top_k most likely; of these the fewest that hold top_p of their mass;
        of these the ones with p >= min_p * max(p); draw.

    Args:
        logits: ``[rows, vocab]`` fp32 | fp16 | bf16, any row stride, vocab <= 262144.
        temperature, top_k, top_p, min_p: a number, a tensor ``[rows]``, or None (off). temperature <= 0 takes the first largest logit.
        filter_apply_order: "top_k_first", or "joint": top_p is a share of the whole row's mass.
        return_logprob: also return the natural log-probability of the token under the distribution it was drawn from, fp32.

    Returns:
        ids ``[rows]``, or a tuple (ids, valid if asked, log-probabilities if asked). The other arguments: see the module.

    A token less likely than 2**-31 times the most likely one is never drawn.
    """
    k_first = _is_k_first(filter_apply_order)
    filters: dict[str, Any] = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, k_first=k_first)
    common = (indices, generator, check_nan, seed, offset, return_valid)
    return _draw("sample()", logits, False, *common, **filters, return_logprob=return_logprob)


def sampling_from_logits(
    logits: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """Draw from softmax(logits)."""
    return _draw("sampling_from_logits()", logits, False, indices, generator, check_nan, seed, offset, return_valid)


def sampling_from_probs(
    probs: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """Draw from probs, which need not sum to one."""
    return _draw("sampling_from_probs()", probs, True, indices, generator, check_nan, seed, offset, return_valid)


@short_spelling
def top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_p: Param,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """Draw from the fewest most likely tokens that hold ``top_p`` of the mass."""
    call = "top_p_sampling_from_probs()"
    return _draw(call, probs, True, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p)


@short_spelling
def top_k_sampling_from_probs(
    probs: torch.Tensor,
    top_k: Param,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """Draw from the ``top_k`` most likely tokens."""
    call = "top_k_sampling_from_probs()"
    return _draw(call, probs, True, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k)


def min_p_sampling_from_probs(
    probs: torch.Tensor,
    min_p: Param,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """Draw from the tokens at least ``min_p`` times as likely as the most likely one."""
    call = "min_p_sampling_from_probs()"
    return _draw(call, probs, True, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p)


@short_spelling
def top_k_top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_k: Param,
    top_p: Param,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """Draw from softmax(logits) after both filters: "top_k_first" (top_p of what top_k leaves) or "joint" (both on the whole row)."""
    k_first = _is_k_first(filter_apply_order)
    call = "top_k_top_p_sampling_from_logits()"
    return _draw(call, logits, False, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k, top_p=top_p, k_first=k_first)


@short_spelling
def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: Param,
    top_p: Param,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """:func:`top_k_top_p_sampling_from_logits` from probabilities."""
    k_first = _is_k_first(filter_apply_order)
    call = "top_k_top_p_sampling_from_probs()"
    return _draw(call, probs, True, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k, top_p=top_p, k_first=k_first)


@short_spelling
def top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_p: Param,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """:func:`top_p_sampling_from_probs` of softmax(logits), without the softmax pass."""
    call = "top_p_sampling_from_logits()"
    return _draw(call, logits, False, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p)


@short_spelling
def top_k_sampling_from_logits(
    logits: torch.Tensor,
    top_k: Param,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed = None,
    offset: Seed = None,
    return_valid: bool = False,
) -> Ids:
    """:func:`top_k_sampling_from_probs` of softmax(logits), without the softmax pass."""
    call = "top_k_sampling_from_logits()"
    return _draw(call, logits, False, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k)
