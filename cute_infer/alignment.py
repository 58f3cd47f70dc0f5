"""Rows on 16-byte boundaries: what the vector loads of every kernel ask of a tensor."""

from __future__ import annotations

import torch


def is_aligned(t: torch.Tensor, nbytes: int = 16) -> bool:
    """The last axis is contiguous, and every vector of it starts on an ``nbytes`` boundary."""
    strides = t.stride()
    if strides[-1] != 1 or t.data_ptr() % nbytes:
        return False
    size = t.element_size()
    return all(stride * size % nbytes == 0 for stride in strides[:-1])


def aligned(t: torch.Tensor, nbytes: int = 16) -> torch.Tensor:
    """``t`` itself, or a compact copy when its rows do not start on ``nbytes`` boundaries."""
    return t if is_aligned(t, nbytes) else t.clone(memory_format=torch.contiguous_format)


__all__ = ["aligned", "is_aligned"]
