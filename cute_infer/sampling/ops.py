"""The torch ops: schemas, and one implementation each for CUDA (kernel), CPU (reference) and Meta (shapes).

Functional ops: they return new tensors, so torch.compile(fullgraph=True) traces through them. Random numbers: with neither ``seed`` nor
``seed_value`` the implementation asks the generator when it runs, inside a compiled graph too (the tag keeps calls from being merged).
A call that nobody traces goes to :func:`draw` or :func:`rewrite` without the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import get_config
from . import reference
from .launch import launch_chain, launch_rows
from .params import next_start

_lib = torch.library.Library("cute_infer", "FRAGMENT")
_RANDOM = "Tensor? seed, int? seed_value, Tensor? offset, int? offset_value, bool row_in_counter, Generator? generator"
_FILTER = "Tensor? temperature, float? temperature_value, Tensor? top_k, int? top_k_value, Tensor? top_p, float? top_p_value"
_SAMPLE = (
    f"sample_rows(Tensor x, bool is_probs, Tensor? indices, {_FILTER}, Tensor? min_p, float? min_p_value, bool k_first, bool logprob, "
    f"{_RANDOM}) -> (Tensor ids, Tensor valid, Tensor logprob)"
)
_CHAIN = f"chain_speculative(Tensor draft, Tensor draft_ids, Tensor target, {_RANDOM}) -> (Tensor ids, Tensor accepted, Tensor emitted)"
_lib.define(_SAMPLE, tags=(torch.Tag.nondeterministic_seeded,))
_lib.define(f"rewrite_rows(Tensor x, str output, bool is_probs, {_FILTER}) -> Tensor")
_lib.define(_CHAIN, tags=(torch.Tag.nondeterministic_seeded,))


def _start(
    device: torch.device,
    slots: int,
    seed: torch.Tensor | None,
    seed_value: int | None,
    offset: torch.Tensor | None,
    offset_value: int | None,
    row_in_counter: bool,
    generator: torch.Generator | None,
) -> dict[str, Any]:
    """Seed and offset with the generator's in place of what is missing."""
    if seed is None and seed_value is None:
        drawn, position = next_start(generator, device)
        row_in_counter = True
        if isinstance(drawn, torch.Tensor):
            seed = drawn.expand(slots)
        else:
            seed_value = drawn
        if offset is None and offset_value is None:
            offset_value = position
    return dict(seed=seed, seed_value=seed_value, offset=offset, offset_value=offset_value, row_in_counter=row_in_counter)


def _use_reference(device: torch.device) -> bool:
    return device.type != "cuda" or get_config().backend == "reference"


def _tensor(tensor: torch.Tensor | None, value: float | int | None, slots: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """A parameter for the reference: a tensor ``[slots]``, 0-stride for a number."""
    if tensor is not None or value is None:
        return tensor
    return torch.tensor([value], dtype=dtype, device=x.device).expand(slots)


def _reference_start(start: dict[str, Any], slots: int, x: torch.Tensor) -> dict[str, Any]:
    """Seed and offset as tensors ``[slots]``."""
    return dict(
        seed=_tensor(start["seed"], start["seed_value"], slots, x, torch.int64),
        offset=_tensor(start["offset"], start["offset_value"] or 0, slots, x, torch.int64),
        row_in_counter=start["row_in_counter"],
    )


def _sample_meta(x: torch.Tensor, is_probs: bool, indices: torch.Tensor | None, *args: Any) -> tuple[torch.Tensor, ...]:
    slots = x.shape[0] if indices is None else indices.shape[0]
    logprob = args[9]
    return (
        x.new_empty(slots, dtype=torch.int32),
        x.new_empty(slots, dtype=torch.bool),
        x.new_empty(slots if logprob else 0, dtype=torch.float32),
    )


def draw(
    x: torch.Tensor,
    is_probs: bool,
    indices: torch.Tensor | None,
    temperature: torch.Tensor | None,
    temperature_value: float | None,
    top_k: torch.Tensor | None,
    top_k_value: int | None,
    top_p: torch.Tensor | None,
    top_p_value: float | None,
    min_p: torch.Tensor | None,
    min_p_value: float | None,
    k_first: bool,
    logprob: bool,
    *random: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(ids int32, valid bool or uint8, log-probability or None); the arguments of the op ``sample_rows``."""
    slots = x.shape[0] if indices is None else indices.shape[0]
    start = _start(x.device, slots, *random)
    if _use_reference(x.device):
        f32 = torch.float32
        ids, valid, logprobs = reference.sample_rows(
            x,
            is_probs,
            indices=indices,
            temperature=_tensor(temperature, temperature_value, slots, x, f32),
            top_k=_tensor(top_k, top_k_value, slots, x, torch.int64),
            top_p=_tensor(top_p, top_p_value, slots, x, f32),
            min_p=_tensor(min_p, min_p_value, slots, x, f32),
            **_reference_start(start, slots, x),
            k_first=k_first,
        )
        return ids, valid, logprobs if logprob else None
    ids = x.new_empty(slots, dtype=torch.int32)
    valid = x.new_empty(slots, dtype=torch.uint8)
    log = x.new_empty(slots, dtype=torch.float32) if logprob else None
    launch_rows(
        x,
        "ids",
        is_probs,
        ids,
        valid=valid,
        logprob=log,
        indices=indices,
        temperature=temperature,
        temperature_value=temperature_value,
        top_k=top_k,
        top_k_value=top_k_value,
        top_p=top_p,
        top_p_value=top_p_value,
        min_p=min_p,
        min_p_value=min_p_value,
        k_first=k_first,
        **start,
    )
    return ids, valid, log


def _sample(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, valid, log = draw(x, *args)
    return ids, valid.view(torch.bool), x.new_empty(0, dtype=torch.float32) if log is None else log


def _rewrite_meta(x: torch.Tensor, output: str, *args: Any) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.float32 if output == "softmax" else x.dtype)


def rewrite(
    x: torch.Tensor,
    output: str,
    is_probs: bool,
    temperature: torch.Tensor | None,
    temperature_value: float | None,
    top_k: torch.Tensor | None,
    top_k_value: int | None,
    top_p: torch.Tensor | None,
    top_p_value: float | None,
) -> torch.Tensor:
    """The op ``rewrite_rows``."""
    if _use_reference(x.device):
        rows = x.shape[0]
        return reference.rewrite_rows(
            x,
            output,
            is_probs,
            temperature=_tensor(temperature, temperature_value, rows, x, torch.float32),
            top_k=_tensor(top_k, top_k_value, rows, x, torch.int64),
            top_p=_tensor(top_p, top_p_value, rows, x, torch.float32),
        )
    out = _rewrite_meta(x, output)
    launch_rows(
        x,
        output,
        is_probs,
        out,
        temperature=temperature,
        temperature_value=temperature_value,
        top_k=top_k,
        top_k_value=top_k_value,
        top_p=top_p,
        top_p_value=top_p_value,
    )
    return out


def _chain_meta(draft: torch.Tensor, draft_ids: torch.Tensor, target: torch.Tensor, *random: Any) -> tuple[torch.Tensor, ...]:
    batch, positions = target.shape[:2]
    return tuple(target.new_empty(shape, dtype=torch.int32) for shape in ((batch, positions), (batch,), (batch,)))


def _chain(draft: torch.Tensor, draft_ids: torch.Tensor, target: torch.Tensor, *random: Any) -> tuple[torch.Tensor, ...]:
    batch = target.shape[0]
    start = _start(target.device, batch, *random)
    if _use_reference(target.device):
        return reference.chain_speculative(draft, draft_ids, target, **_reference_start(start, batch, target))
    results = _chain_meta(draft, draft_ids, target)
    launch_chain(draft, draft_ids, target, *results, **start)
    return results


for _name, _run, _meta in (
    ("sample_rows", _sample, _sample_meta),
    ("rewrite_rows", rewrite, _rewrite_meta),
    ("chain_speculative", _chain, _chain_meta),
):
    _lib.impl(_name, _run, "CUDA")
    _lib.impl(_name, _run, "CPU")
    _lib.impl(_name, _meta, "Meta")
