"""What the row kernels must do (RowSpec), in which pieces (RowTile), and why not: host only, imports no compiler."""

from __future__ import annotations

import dataclasses

ROW_PATH = "cute_infer.sampling.kernels_rows:RowKernel"
CHAIN_PATH = "cute_infer.sampling.kernels_chain:ChainKernel"
MAX_VOCAB = 262144  # 2**18: with masses below 2**31 a row's total stays below 2**49, exact in a double
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """Static facts of one row kernel: the compile key.

    source       "logits": mass = exp((x - max) / temperature). "probs": mass = x / max(x).
    output       "ids" draws a token; "softmax", "renorm" and "mask" write the whole row.
    temperature, top_k, top_p, min_p, seed, offset
                 "none" (not there), "scalar" (one argument for all rows) or "row" (a tensor with one value per row).
    k_first      top-p counts the mass that top-k has left, not the whole row's.
    indices      output row i reads input row indices[i].
    logprob      the log-probability of the chosen token is written too.
    aligned      rows start on 16-byte boundaries and vocab fills whole 16-byte vectors; otherwise loads are one element wide.
    """

    source: str
    dtype: str
    output: str
    temperature: str = "none"
    top_k: str = "none"
    top_p: str = "none"
    min_p: str = "none"
    seed: str = "none"
    offset: str = "none"
    k_first: bool = False
    indices: bool = False
    logprob: bool = False
    aligned: bool = True

    @property
    def vector(self) -> int:
        """Elements per load."""
        return 16 // BYTES[self.dtype] if self.aligned else 1


@dataclasses.dataclass(frozen=True)
class RowTile:
    """cluster CTAs of `threads` threads share one row; `per_thread` elements each stay in shared memory, 0 = every pass reads memory.

    blocks       CTAs per SM that registers are budgeted for: while one row's CTA waits for its peers, another's works.
    bulk         the next row is copied to shared memory while this one is finished (Hopper).
    """

    cluster: int
    threads: int
    per_thread: int
    blocks: int = 1
    bulk: bool = False


def hopper(cluster: int, threads: int, per_thread: int, blocks: int = 2) -> RowTile:
    return RowTile(cluster, threads, per_thread, blocks, bulk=True)


# Hopper: a row in the shared memory of a cluster.
SM90_TILES = (
    #  vocab  few rows             many rows             reason
    (8192, hopper(2, 256, 16), hopper(1, 512, 16)),  # one CTA holds it
    (16384, hopper(4, 256, 16), hopper(1, 512, 32)),  # 64 KiB: the longest row two CTAs per SM can hold
    (32768, hopper(4, 512, 16), hopper(2, 512, 32)),  # 32000
    (65536, hopper(8, 512, 16), hopper(4, 512, 32)),
    (131072, hopper(8, 512, 32), hopper(8, 512, 32)),  # 128256; 8 CTAs is the portable cluster limit
    (163840, hopper(8, 1024, 24, 1), hopper(8, 1024, 24, 1)),  # 151936: 76 KiB and more, one CTA per SM
    (262144, hopper(8, 1024, 32, 1), hopper(8, 1024, 32, 1)),  # 128 KiB, one CTA per SM
)
FEW_ROWS = 16  # 16 rows * 8 CTAs = 128 of 132 SMs

# Everything else: one CTA per row, at most 99 KiB. Short rows stay in shared memory, long ones are read from L2 in every pass.
SM80_TILES = (
    (12288, RowTile(1, 512, 24, blocks=2)),  # 48 KiB + 38 KiB
    (MAX_VOCAB, RowTile(1, 1024, 0)),
)


def why_not(spec: RowSpec, vocab: int, rows: int) -> str | None:
    """The first reason why no row kernel can do this, or None."""
    if spec.dtype not in BYTES:
        return f"dtype {spec.dtype} is not float32, float16 or bfloat16"
    if not 1 <= vocab <= MAX_VOCAB:
        return f"vocab={vocab} is not in 1..{MAX_VOCAB}"
    if rows * 8 >= 2**31:
        return f"{rows} rows exceed the grid"
    return None


def choose(is_hopper: bool, vocab: int, rows: int) -> RowTile:
    """The tile for rows of this length. Ids do not depend on it: masses are integers and tokens are drawn in index order."""
    if is_hopper:
        few, many = next(tiles for limit, *tiles in SM90_TILES if vocab <= limit)
        return few if rows <= FEW_ROWS else many
    return next(tile for limit, tile in SM80_TILES if vocab <= limit)


@dataclasses.dataclass(frozen=True)
class ChainSpec:
    """Static facts of chain speculative sampling: seed and offset are "scalar" or "row"; aligned as in :class:`RowSpec`."""

    seed: str = "scalar"
    offset: str = "scalar"
    aligned: bool = True


@dataclasses.dataclass(frozen=True)
class ChainTile:
    """One CTA per sequence. 1024 threads: 32 warp sums are one warp's scan, and one CTA needs all the loads in flight it can have."""

    threads: int = 1024
