"""What code a merge of attention states needs, and how its work is cut. Host-only.

The merge moves bytes: every state is read once, the result written once. What changes from case to case is how many loads must be in
flight to hide the memory latency, which is what the tile decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..jit import Target

PATH = "cute_infer.attention.kernels.merge:MergeStates"

VECTOR = 8  # elements of a head one lane owns: 16 bytes of a 16-bit type, two 16-byte words of fp32


@dataclasses.dataclass(frozen=True)
class MergeSpec:
    """Static facts of one merge.

    v_dtype    dtype of the states ("float16", "bfloat16" or "float32").
    o_dtype    dtype of the result.
    head_dim   a multiple of 8.
    pair       two separate tensors of one state each, instead of one tensor of many states.
    masked     rows whose mask byte is 0 are left as they are (in-place merges).
    lse        the merged log-sum-exp is written.
    """

    v_dtype: str
    o_dtype: str
    head_dim: int
    pair: bool = False
    masked: bool = False
    lse: bool = True

    def __post_init__(self) -> None:
        assert self.head_dim > 0 and self.head_dim % VECTOR == 0, self.head_dim


@dataclasses.dataclass(frozen=True)
class MergeTile:
    """How one CTA cuts its work.

    batch   states whose loads are in flight together in one lane.
    ways    warps that share the states of one (row, head) and combine their results through shared memory in warp order.
    """

    batch: int
    ways: int


#   states up to  batch ways  reason
TILES = (
    (2, MergeTile(2, 1), "two states, two loads per lane: nothing left to share"),
    (4, MergeTile(4, 1), "one round of loads, hence one memory latency; 4 x 8 fp32 = 32 registers of payload"),
    (16, MergeTile(4, 4), "4 x 4 states in one round; splits exist only while rows x heads is too small to fill the device"),
    (None, MergeTile(4, 8), "32 states per round; 8 warps leave the CTA small enough for every SM to hold several"),
)


def choose(num_states: int) -> MergeTile:
    """The tile for ``num_states`` states (a pair counts as two)."""
    return next(tile for limit, tile, _ in TILES if limit is None or num_states <= limit)


def variants(
    target: Target, head_dims: Iterable[int] = (64, 128, 256), dtypes: Iterable[str] = ("float16", "bfloat16")
) -> Iterator[tuple[str, MergeSpec, MergeTile]]:
    """``(path, spec, tile)`` of every merge a server with these head dims and dtypes may launch, for compilation ahead of time.

    One source serves every target from sm_80 on, so ``target`` changes nothing here.
    """
    for head_dim in head_dims:
        for dtype in dtypes:
            for lse in (False, True):  # split-KV partials
                for _, tile, _ in TILES:
                    yield PATH, MergeSpec("float32", dtype, head_dim, lse=lse), tile
            for _, tile, _ in TILES[:2]:  # cascade levels
                yield PATH, MergeSpec(dtype, dtype, head_dim), tile
            for masked in (False, True):  # merge_state, merge_state_in_place
                yield PATH, MergeSpec(dtype, dtype, head_dim, pair=True, masked=masked), choose(2)


__all__ = ["PATH", "TILES", "VECTOR", "MergeSpec", "MergeTile", "choose", "variants"]
