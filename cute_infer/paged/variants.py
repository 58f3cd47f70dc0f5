"""What code an append to a paged cache needs, and how its work is cut. Host-only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..jit import Target

PATH = "cute_infer.paged.kernels:AppendRows"

FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
ROW_DTYPES = ("float16", "bfloat16", *FP8_DTYPES)  # dtypes of the rows to append; fp8 rows are copied as they are


@dataclasses.dataclass(frozen=True)
class AppendSpec:
    """Static facts of one append.

    row_dtype     dtype of the rows to append.
    cache_dtype   dtype of the cache; equal dtypes copy bits, a wider row is rounded to nearest even and saturated.
    second        a second cache is written by the same launch (V beside K, k_pe beside the compressed KV).
    """

    row_dtype: str
    cache_dtype: str
    second: bool = True

    def __post_init__(self) -> None:
        assert self.row_dtype in ROW_DTYPES and self.cache_dtype in ROW_DTYPES, self
        assert self.row_dtype == self.cache_dtype or self.row_dtype not in FP8_DTYPES, self


@dataclasses.dataclass(frozen=True)
class AppendTile:
    """How one lane moves data.

    vector         elements a lane moves at once: 8 (16 bytes of a 16-bit cache), or 16 for an fp8 cache whose rows allow it.
    hardware_fp8   round to fp8 with ``cvt.rn.satfinite`` (sm_89 and later) instead of integer arithmetic.
    """

    vector: int
    hardware_fp8: bool


def choose(spec: AppendSpec, target: Target, rows_of_16: bool) -> AppendTile:
    """The tile for ``spec``; ``rows_of_16`` says that every fp8 row is a multiple of 16 elements and starts on a 16-byte boundary."""
    converts = spec.cache_dtype in FP8_DTYPES and spec.row_dtype != spec.cache_dtype
    capability = int("".join(c for c in target.arch if c.isdigit()))
    vector = 16 if spec.cache_dtype in FP8_DTYPES and rows_of_16 else 8
    return AppendTile(vector, converts and capability >= 89)


def variants(target: Target) -> Iterator[tuple[str, AppendSpec, AppendTile]]:
    """``(path, spec, tile)`` of every append kernel for head dims that are a multiple of 16, for compilation ahead of time."""
    for row_dtype in ("float16", "bfloat16"):
        for cache_dtype in (row_dtype, *FP8_DTYPES):
            yield from _both(AppendSpec(row_dtype, cache_dtype), target)
    for dtype in FP8_DTYPES:
        yield from _both(AppendSpec(dtype, dtype), target)


def _both(spec: AppendSpec, target: Target) -> Iterator[tuple[str, AppendSpec, AppendTile]]:
    for second in (True, False):
        spec = dataclasses.replace(spec, second=second)
        yield PATH, spec, choose(spec, target, rows_of_16=True)


__all__ = ["FP8_DTYPES", "PATH", "ROW_DTYPES", "AppendSpec", "AppendTile", "choose", "variants"]
