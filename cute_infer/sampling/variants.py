"""The sampling kernels a server launches, for compilation ahead of time. Host-only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .tiles import CHAIN_PATH, FEW_ROWS, ROW_PATH, ChainSpec, ChainTile, RowSpec, choose

if TYPE_CHECKING:
    from ..jit import Target

DTYPES = ("float32", "bfloat16")
FILTERS = (("none", "none"), ("row", "none"), ("none", "row"), ("row", "row"))  # (top_k, top_p)


def row_specs() -> Iterator[RowSpec]:
    """Per-row parameters and scalars, as vLLM, SGLang and the quick start call them."""
    for dtype, mode in itertools.product(DTYPES, ("row", "scalar")):
        for k, p in FILTERS:
            k, p = (mode if on != "none" else "none" for on in (k, p))
            both = k != "none" and p != "none"
            yield RowSpec("logits", dtype, "ids", top_k=k, top_p=p, k_first=both, seed="scalar", offset="scalar")
            if mode == "row":
                fused = dict(temperature="row", top_k=k, top_p=p, k_first=both, seed="row", offset="row")
                yield RowSpec("logits", dtype, "ids", **fused)
                yield RowSpec("logits", dtype, "ids", **fused, min_p="row", logprob=True)
            if dtype == "float32":
                yield RowSpec("probs", dtype, "ids", top_k=k, top_p=p, k_first=both, seed="scalar", offset="scalar")
        if dtype == "float32":
            yield RowSpec("probs", dtype, "ids", min_p=mode, seed="scalar", offset="scalar")
            yield RowSpec("probs", dtype, "renorm", top_k=mode)
            yield RowSpec("probs", dtype, "renorm", top_p=mode)
        yield RowSpec("logits", dtype, "mask", top_k=mode)
        yield RowSpec("logits", dtype, "softmax", temperature=mode)
        if mode == "scalar":
            yield RowSpec("logits", dtype, "softmax")


def variants(target: Target, vocab_size: int = 128256) -> Iterator[tuple[str, Any, Any]]:
    """``(path, spec, tile)`` of every sampling kernel for 16-byte aligned rows of this vocabulary, for few and for many rows."""
    tiles = dict.fromkeys(choose(target.is_hopper, vocab_size, rows) for rows in (1, FEW_ROWS + 1))
    for spec in dict.fromkeys(row_specs()):
        for tile in tiles:
            yield ROW_PATH, spec, tile
    for mode in ("scalar", "row"):
        yield CHAIN_PATH, ChainSpec(mode, mode), ChainTile()
