"""Rewrite rows: softmax, top-k and top-p renormalization, top-k masking, and plain top-k."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_tensor
from ..errors import DTypeError, ShapeError, fail
from . import ops as _ops
from .params import FLOATS, Param, check_rows, is_traced, per_row


def _rewrite(
    call: str, name: str, x: torch.Tensor, output: str, *, temperature: Param = None, top_k: Param = None, top_p: Param = None
) -> torch.Tensor:
    check_rows(call, name, x)
    rows = x.shape[0]
    filters: tuple[Any, ...] = (
        *per_row(temperature, torch.float32, rows, x, None, call, "temperature"),
        *per_row(top_k, torch.int32, rows, x, None, call, "top_k"),
        *per_row(top_p, torch.float32, rows, x, None, call, "top_p"),
    )
    run = torch.ops.cute_infer.rewrite_rows if is_traced(x) else _ops.rewrite
    return run(x, output, name == "probs", *filters)


def softmax(logits: torch.Tensor, temperature: Param = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """softmax(logits / temperature) in fp32.

    Args:
        logits: ``[rows, vocab]`` fp32 | fp16 | bf16. temperature: a number, ``[rows]``, or None; <= 0 shares 1 among the largest logits.
        enable_pdl: accepted, without effect.

    Returns:
        ``[rows, vocab]`` fp32. A row of -inf gives zeros, a row with NaN gives NaN.
    """
    return _rewrite("softmax()", "logits", logits, "softmax", temperature=temperature)


def top_p_renorm_probs(probs: torch.Tensor, top_p: Param, is_deterministic: bool = False) -> torch.Tensor:
    """The fewest largest probabilities that hold ``top_p`` of the mass, over their sum; the others zero. Equal values stay together.

    Args:
        probs: ``[rows, vocab]`` fp32 | fp16 | bf16. top_p: a number or ``[rows]``. is_deterministic: accepted; it always is.
    """
    return _rewrite("top_p_renorm_probs()", "probs", probs, "renorm", top_p=top_p)


def top_k_renorm_probs(probs: torch.Tensor, top_k: Param, is_deterministic: bool = False) -> torch.Tensor:
    """The ``top_k`` largest probabilities over their sum; the others zero. Values equal to the k-th stay.

    Args:
        probs: ``[rows, vocab]`` fp32 | fp16 | bf16. top_k: a number or ``[rows]``. is_deterministic: accepted; it always is.
    """
    return _rewrite("top_k_renorm_probs()", "probs", probs, "renorm", top_k=top_k)


def top_k_mask_logits(logits: torch.Tensor, top_k: Param) -> torch.Tensor:
    """Logits below the ``top_k``-th largest become -inf. Values equal to it stay.

    Args:
        logits: ``[rows, vocab]`` fp32 | fp16 | bf16. top_k: a number or ``[rows]``.
    """
    return _rewrite("top_k_mask_logits()", "logits", logits, "mask", top_k=top_k)


def top_k(
    input: torch.Tensor,
    k: int,
    sorted: bool = False,
    deterministic: bool = False,
    tie_break: object = None,
    dsa_graph_safe: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of every row and where they are: ``(values [rows, k], indices [rows, k] int64)``, through torch.

    Args:
        input: ``[rows, length]`` fp32 | fp16 | bf16. sorted: largest first.
        deterministic: among equal values the smallest index wins (a stable sort instead of a selection); so does any tie_break that
            is set: FlashInfer's enumeration member or its name, SMALL or LARGE (the largest index wins).
        dsa_graph_safe: accepted; no call waits for the device.
    """
    check_tensor("top_k()", "input", input, {"rows": None, "length": None}, dtypes=FLOATS)
    if not isinstance(k, int):
        fail(DTypeError, "top_k(): k must be an int", got=repr(k)[:80])
    if not 0 < k <= input.shape[1]:
        fail(ShapeError, f"top_k(): k={k} is not in 1..{input.shape[1]}", fix="shorten k or the request")
    rule = str(getattr(tie_break, "name", tie_break or "NONE")).upper()
    if rule not in ("NONE", "SMALL", "LARGE"):
        fail(ShapeError, f"top_k(): unknown tie_break {tie_break!r}", expected="NONE | SMALL | LARGE")
    if rule == "NONE" and not deterministic:
        return torch.topk(input, k, dim=-1, sorted=sorted)
    if rule == "LARGE":
        values, order = input.flip(-1).sort(dim=-1, descending=True, stable=True)
        order = input.shape[1] - 1 - order
    else:
        values, order = input.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].contiguous(), order[:, :k].contiguous()
