"""From tensors to kernel launches: specs, tiles, alignment. CUDA only; the arguments were checked by the public functions."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..alignment import is_aligned
from ..checks import dtype_name
from ..errors import CompileError, UnsupportedConfigError, fail
from ..jit import Target, get_kernel
from .occupancy import resident_clusters
from .tiles import CHAIN_PATH, FEW_ROWS, ROW_PATH, ChainSpec, ChainTile, RowSpec, choose, why_not

log = logging.getLogger("cute_infer.sampling")

Scalar = float | int | None


@functools.lru_cache(maxsize=4096)
def _row_kernel(device: torch.device, vocab: int, rows: int, spec_fields: tuple[Any, ...]) -> tuple[Callable[..., Any], int]:
    """The kernel, and how many clusters of it serve the rows."""
    spec = RowSpec(*spec_fields)
    target = Target.detect(device)
    reason = why_not(spec, vocab, rows)
    if reason is not None:
        fail(UnsupportedConfigError, f"no sampling kernel on {target.arch}: {reason}", got=str(spec), fix="pass fewer or shorter rows")
    tile, any_rows = (choose(target.is_hopper, vocab, n) for n in (rows, FEW_ROWS + 1))
    try:
        kernel = get_kernel(ROW_PATH, spec, tile, target)
    except CompileError as error:  # frozen, or the compiler is absent: bundles hold the tile for many rows, which computes the same
        if tile == any_rows:
            raise
        log.warning("no sampling kernel for %d rows, using the one for many: %s", rows, error)
        tile = any_rows
        kernel = get_kernel(ROW_PATH, spec, tile, target)
    clusters = rows
    if tile.bulk:  # each cluster takes row after row, so that one can be copied while another is finished
        clusters = min(rows, resident_clusters(device, tile.cluster, tile.threads, kernel.facts.smem_bytes, tile.blocks))
    return kernel.fn, clusters


@functools.lru_cache(maxsize=64)
def _chain_kernel(device: torch.device, spec: ChainSpec) -> Callable[..., Any]:
    return get_kernel(CHAIN_PATH, spec, ChainTile(), Target.detect(device)).fn


def _mode(tensor: torch.Tensor | None, value: Scalar, off: bool) -> str:
    """The words "row", "scalar", or "none" for a parameter that is absent or a number that changes nothing."""
    if tensor is not None:
        return "row"
    return "none" if value is None or off else "scalar"


def launch_rows(
    x: torch.Tensor,
    output: str,
    is_probs: bool,
    out: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    logprob: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    temperature_value: Scalar = None,
    top_k_value: Scalar = None,
    top_p_value: Scalar = None,
    min_p_value: Scalar = None,
    seed_value: int | None = None,
    offset_value: int | None = None,
    row_in_counter: bool = False,
    k_first: bool = False,
) -> None:
    """Run the row kernel; writes ``out`` (and ``valid``, ``logprob``)."""
    slots, vocab = out.shape[0], x.shape[1]
    if slots == 0:
        return  # a grid of zero CTAs is an error
    if x.stride(1) != 1:
        x = x.contiguous()
    draws = output == "ids"
    vector = 16 // x.element_size()
    aligned = vocab % vector == 0 and x.stride(0) % vector == 0 and x.data_ptr() % 16 == 0 and (draws or is_aligned(out))
    k_mode = _mode(top_k, top_k_value, top_k_value is not None and not 0 < top_k_value < vocab)
    p_mode = _mode(top_p, top_p_value, top_p_value is not None and top_p_value >= 1)
    spec = (
        "probs" if is_probs else "logits",
        dtype_name(x.dtype),
        output,
        _mode(temperature, temperature_value, temperature_value == 1),
        k_mode,
        p_mode,
        _mode(min_p, min_p_value, min_p_value is not None and min_p_value <= 0),
        _mode(seed, 0, False) if draws else "none",
        _mode(offset, 0, False) if draws else "none",
        k_first and k_mode != "none" and p_mode != "none",
        indices is not None,
        logprob is not None,
        aligned,
    )
    kernel, clusters = _row_kernel(x.device, vocab, slots, spec)
    kernel(
        x,
        out,
        valid,
        logprob,
        indices,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        offset,
        1.0 if temperature_value is None else temperature_value,
        0 if top_k_value is None else min(top_k_value, vocab),
        1.0 if top_p_value is None else top_p_value,
        0.0 if min_p_value is None else min_p_value,
        seed_value or 0,
        offset_value or 0,
        int(row_in_counter),
        clusters,
    )


def launch_chain(
    draft: torch.Tensor,
    draft_ids: torch.Tensor,
    target: torch.Tensor,
    out_ids: torch.Tensor,
    accepted: torch.Tensor,
    emitted: torch.Tensor,
    *,
    seed: torch.Tensor | None,
    offset: torch.Tensor | None,
    seed_value: int | None,
    offset_value: int | None,
    row_in_counter: bool,
) -> None:
    """Run the speculative kernel on fp32 probabilities and int32 ids."""
    if target.shape[0] == 0:
        return
    draft, target = (t if t.stride(-1) == 1 else t.contiguous() for t in (draft, target))
    draft_ids = draft_ids if draft_ids.stride(-1) == 1 else draft_ids.contiguous()
    aligned = target.shape[2] % 4 == 0 and is_aligned(target) and is_aligned(draft)
    spec = ChainSpec(_mode(seed, 0, False), _mode(offset, 0, False), aligned)
    kernel = _chain_kernel(target.device, spec)
    kernel(draft, draft_ids, target, out_ids, accepted, emitted, seed, offset, seed_value or 0, offset_value or 0, int(row_in_counter))
