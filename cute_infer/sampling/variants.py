"""The sampling kernels a server launches, for compilation ahead of time. Host-only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .tiles import CHAIN_PATH, FEW_ROWS, ROW_PATH, ChainSpec, ChainTile, RowSpec, choose

if TYPE_CHECKING:
    from ..jit import Target


def row_specs() -> Iterator[RowSpec]:
    """The calls of vLLM, SGLang and TensorRT-LLM (per-row top-k and top-p), and of the quick start (scalars)."""
    for mode in ("row", "scalar"):
        for k, p in ((mode, "none"), ("none", mode), (mode, mode)):
            both = k == p
            yield RowSpec("logits", "float32", "ids", top_k=k, top_p=p, seed="scalar", offset="scalar", k_first=both)
            yield RowSpec("probs", "float32", "ids", top_k=k, top_p=p, seed="scalar", offset="scalar", k_first=both)
        yield RowSpec("probs", "float32", "ids", min_p=mode, seed="scalar", offset="scalar")
        yield RowSpec("probs", "float32", "renorm", top_k=mode)
        yield RowSpec("probs", "float32", "renorm", top_p=mode)
        yield RowSpec("logits", "float32", "mask", top_k=mode)
        yield RowSpec("logits", "float32", "softmax", temperature=mode)
    yield RowSpec("logits", "float32", "softmax")
    yield RowSpec("logits", "float32", "ids", seed="scalar", offset="scalar")
    yield RowSpec("probs", "float32", "ids", seed="scalar", offset="scalar")


def fused_specs() -> Iterator[RowSpec]:
    """``sampling.sample``: the whole step from raw logits."""
    for dtype in ("float32", "bfloat16"):
        for k, p in (("none", "none"), ("row", "row")):
            for seed in ("scalar", "row"):
                yield RowSpec("logits", dtype, "ids", temperature="row", top_k=k, top_p=p, seed=seed, offset=seed, k_first=k == "row")
        yield RowSpec(
            "logits", dtype, "ids", "row", top_k="row", top_p="row", min_p="row", seed="row", offset="row", k_first=True, logprob=True
        )


def variants(target: Target, vocab_size: int = 128256) -> Iterator[tuple[str, Any, Any]]:
    """``(path, spec, tile)`` of the sampling kernels for 16-byte aligned rows of this vocabulary.

    The fused call comes with the tiles for few and for many rows. The rest has the latter alone, which then serves few rows too: ids do
    not depend on the tile.
    """
    few, many = (choose(target.is_hopper, vocab_size, rows) for rows in (1, FEW_ROWS + 1))
    for spec in row_specs():
        yield ROW_PATH, spec, many
    for spec in fused_specs():
        for tile in dict.fromkeys((few, many)):
            yield ROW_PATH, spec, tile
    for mode in ("scalar", "row"):
        yield CHAIN_PATH, ChainSpec(mode, mode), ChainTile()
