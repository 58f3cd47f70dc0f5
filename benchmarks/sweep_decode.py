"""Tiles of the Hopper decode kernel, side by side: ``python -m benchmarks.sweep_decode [section ...] --out F.json [--check] [--budget S]``

What is timed: one launch of the kernel (and the merge of its splits, where it has any) over a paged cache whose pages are scattered at
random, launches back to back in a CUDA graph. The rate is bytes of K and V per second. The tile that ``choose()`` picks is always among the
candidates; it comes first, and the other outputs are compared with its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import peers, sweep
from benchmarks.problems import DTYPES, DecodeProblem
from benchmarks.protocol import Call, num_sets
from benchmarks.sweep import Candidate, Job
from cute_infer.attention import tiles_decode_sm90 as t90
from cute_infer.attention.lengths import KvLens
from cute_infer.attention.merge import merge_partials
from cute_infer.attention.spec import AttentionSpec
from cute_infer.attention.tiles import Hints
from cute_infer.attention.tiles_decode_sm90 import DecodeSm90Tile

UNIT = "GB/s"
BACK_TO_BACK = "back to back"

# What a candidate may set beside its cluster, warps and stages: flags by word, sizes as letter and number.
FLAGS = {"early": "early_metadata", "evict": "evict_first", "longest": "longest_first"}
SIZES = {"h": "heads_per_item", "t": "tokens", "x": "ctas_per_sm", "p": "prefetch"}
LETS_GO = ("refilled", "merging", "never")

SMALL = ("8 4 3", "8 4 3 early", "8 4 2 early", "4 8 3 early", "8 4 4 early", "8 8 2 early", "8 8 3", "8 4 3 early p3 refilled")
LONG = (
    "8 8 3", "8 8 3 never", "8 8 3 early", "8 4 3 early", "8 8 2 early", "16 8 2 early", "16 4 3 early", "8 4 4 early", "8 4 6 early",
    "8 6 4 early",
)  # fmt: skip
TWO = ("8 4 2 x3", "8 4 2 early x3", "4 8 2 early", "4 8 3 early", "4 8 3", "4 4 4 early", "8 4 3 early", "8 8 2 early", "4 4 3 early")
FOUR = (
    "2 8 2", "2 8 2 early", "2 8 3 early", "2 6 2 early", "2 4 4 early", "4 4 2 early x3", "4 4 3 early", "2 8 2 never",
    "2 8 2 early p4 refilled",
)  # fmt: skip
EIGHT = ("2 8 2 early", "1 8 2 early", "1 8 3 early", "2 4 3 early", "1 8 3", "2 8 3 early", "4 4 3 early", "2 4 2 early x3")
SIXTEEN = (
    "1 8 3 evict", "1 8 3 early evict", "1 8 2 early evict", "1 4 3 early evict", "2 4 3 early evict", "1 8 3", "1 12 2 evict",
    "1 8 3 never evict", "1 8 3 merging evict",
)  # fmt: skip
LARGE = (
    "1 4 3 evict", "1 4 3 evict longest", "1 4 3 early evict", "2 4 3 evict longest", "4 4 3 evict", "4 4 3 evict longest",
    "4 4 2 evict longest x3", "1 4 2 evict x3", "8 4 3 evict longest",
)  # fmt: skip
FP8_LARGE = (
    "1 4 3 evict h2", "1 4 3 evict longest h2", "4 4 3 evict h2", "4 4 3 evict longest", "4 4 3 evict longest h2", "2 4 3 evict longest h2",
    "4 4 2 evict longest h2 t64", "4 4 2 evict longest h2 x3", "8 4 3 evict longest h2", "1 4 2 never evict h2 t64",
    "1 4 3 early p3 refilled evict h2", "4 4 3 merging evict longest h2",
)  # fmt: skip
FP8_SIXTEEN = (
    "1 4 3 evict", "1 4 3 early evict", "1 8 3 early evict", "2 4 3 early evict h2", "2 4 3 evict longest h2", "4 4 3 evict longest h2",
    "1 8 2 early evict t64", "2 4 3 early p3 refilled evict h2",
)  # fmt: skip
ONE_SHARD = ("8 4 3 s16", "8 4 3 early s16", "2 8 3 s16", "2 8 3 early s16", "4 4 3 early s16", "4 8 3 early s16", "8 8 3 s16", "16 4 3 s8")
HEADS = ("1 4 3 evict", "4 4 3 evict", "2 4 3 evict longest", "1 8 3 evict", "4 4 2 evict longest x3")
NARROW = ("1 4 3 evict", "1 4 3 evict t16", "1 4 3 evict h2", "4 4 3 evict h2", "4 4 3 evict h4", "1 4 2 evict t64", "1 8 3 evict h2")
WIDE = ("1 4 3 evict x1", "1 4 3 x1", "4 4 3 evict x1", "1 8 1 evict", "1 4 2 evict x1")
GATHERED = ("1 8 3", "1 8 3 evict", "2 4 3 evict", "2 8 3", "4 4 3 evict", "1 4 2 evict x3")

# Log-uniform from 128 to 32768 tokens, in an order that is neither sorted nor random.
MIXED = [round(128 * 256 ** ((i * 37 % 64 + 0.5) / 64)) for i in range(64)]


@dataclasses.dataclass(frozen=True)
class SweepCase:
    """One batch. ``tiles`` are candidates as :func:`parse_tile` reads them."""

    section: str
    name: str
    lens: tuple[int, ...]
    tiles: tuple[str, ...]
    kv_dtype: str = "bf16"
    kv_heads: int = 8
    group_size: int = 4
    head_dim: int = 128
    page_size: int = 16

    @property
    def bytes(self) -> int:
        return DecodeProblem.kv_bytes(list(self.lens), self.kv_heads, self.kv_dtype, self.head_dim)

    @property
    def work(self) -> float:
        return self.bytes / 1e9

    @property
    def spec(self) -> AttentionSpec:
        kv_dtype = str(DTYPES[self.kv_dtype]).removeprefix("torch.")
        return AttentionSpec(
            "decode", "bfloat16", kv_dtype, "bfloat16", self.head_dim, self.head_dim, self.group_size, "paged", self.page_size
        )  # fmt: skip

    def candidates(self) -> list[Candidate]:
        """The chosen tile, then the others, each once; those that do not fit the SM or the page are left out."""
        batch, kv_lens = len(self.lens), KvLens.of(sum(self.lens) / len(self.lens), max(self.lens))
        spec, hints = self.spec, Hints(batch, self.kv_heads, sweep.num_sms(), batch, kv_lens=kv_lens)
        reason = t90.why_not(spec, sweep.HOPPER)
        assert reason is None, reason
        chosen = t90.choose(spec, sweep.HOPPER, hints)
        found = [(chosen, chosen.num_splits(spec, hints) if chosen.split_kv else 0)]
        found += [other for text in self.tiles if (other := parse_tile(text, spec, chosen)) is not None]
        return [
            Candidate(name_of(tile, splits), t90.PATH, spec, tile, splits, chosen=i == 0)
            for i, (tile, splits) in enumerate(dict.fromkeys(found))
        ]

    def run(self, compiled: dict[Job, dict[str, Any]], check: bool) -> list[dict[str, Any]]:
        problem = DecodeProblem(
            list(self.lens), self.kv_heads * self.group_size, self.kv_heads, self.page_size, self.kv_dtype, num_sets(self.bytes),
            head_dim=self.head_dim,
        )  # fmt: skip
        candidates = self.candidates()
        makers: dict[str, Callable[[DecodeProblem], Call]] = {
            c.name: functools.partial(prepare, c) for c in candidates if "error" not in compiled[c.job]
        }
        calls = peers.prepare(makers, problem)
        timed = sweep.compare(calls, problem.num_sets, check, {BACK_TO_BACK: {"rounds": 25 if self.bytes < 2**29 else 13}})
        return [{**c.as_dict(), **compiled[c.job], **timed.get(c.name, {})} for c in candidates]


def prepare(candidate: Candidate, p: DecodeProblem) -> Call:
    """The launch of one candidate on input set i; its output is the candidate's own."""
    kernel, out = candidate.kernel(), torch.full_like(p.q, float("nan"))
    status = torch.zeros(4, dtype=torch.int32, device=p.device)
    partials: tuple[Any, Any] = (None, None)
    if candidate.splits:
        shape = (candidate.splits, *p.q.shape)
        partials = torch.empty(shape, device=p.device), torch.empty(shape[:-1], device=p.device)
    pages = (None, p.indptr, p.indices, p.last_page_len)
    absent = (None,) * 5  # mask, its indptr, sinks, K and V scales
    scalars = (p.head_dim**-0.5, 1.0, 0.0, 1.0, 1.0, math.log2(1e4), -1, max(1, candidate.splits), sweep.num_sms())

    def call(i: int) -> torch.Tensor:
        kernel(p.q, *p.kv[i], out, None, *pages, *absent, *partials, status, *scalars)
        if candidate.splits:
            merge_partials(*partials, out, None)
        return out

    return call


def parse_tile(text: str, spec: AttentionSpec, chosen: DecodeSm90Tile) -> tuple[DecodeSm90Tile, int] | None:
    """(tile, splits), or None when it does not fit: ``"4 8 3 early t64"`` is cluster 4, 8 warps, 3 stages, and what FLAGS and SIZES name.

    ``s16`` makes 16 splits. Without x, CTAs of 4 warps share an SM by two where shared memory allows.
    """
    words = text.split()
    cluster, warps, stages = map(int, words[:3])
    flags = {field: word in words for word, field in FLAGS.items()}
    lets_go = next((word for word in words if word in LETS_GO), "filled")
    sizes = {word[0]: int(word[1:]) for word in words[3:] if word not in (*FLAGS, *LETS_GO)}
    splits = sizes.pop("s", 0)
    tile = DecodeSm90Tile(cluster, warps, stages, chosen.tokens, chosen.head_tiles, split_kv=splits > 0, lets_go=lets_go, **flags)
    fields: dict[str, Any] = {SIZES[letter]: value for letter, value in sizes.items()}
    tile = dataclasses.replace(tile, **fields)
    if "x" not in sizes:
        pair = dataclasses.replace(tile, ctas_per_sm=2)
        tile = pair if warps <= 4 and fits(spec, pair) else tile
    return (tile, splits) if fits(spec, tile) else None


def fits(spec: AttentionSpec, tile: DecodeSm90Tile) -> bool:
    """Whether its CTAs have the shared memory, its slots match the pages, and early metadata comes by TMA."""
    pages = t90.gathers(spec) or spec.page_size % tile.tokens == 0 or tile.tokens % spec.page_size == 0
    room = min(t90.SHARED_MEMORY_PER_CTA, t90.SHARED_MEMORY_PER_SM // tile.ctas_per_sm - 1024)
    return pages and not (tile.early_metadata and t90.gathers(spec)) and t90.smem_bytes(spec, tile) <= room


def name_of(tile: DecodeSm90Tile, splits: int) -> str:
    sizes = f"C{tile.cluster} W{tile.warps} S{tile.stages} T{tile.tokens} H{tile.heads_per_item} x{tile.ctas_per_sm}"
    flags = [word for word, field in FLAGS.items() if getattr(tile, field)]
    flags += [tile.lets_go] if tile.lets_go != "filled" else []
    flags += [f"p{tile.prefetch}"] if tile.prefetch else []
    return " ".join([sizes, *flags, *([f"{splits} splits"] if splits else [])])


def cases() -> Iterator[SweepCase]:
    def same(
        section: str, batch: int, length: int, tiles: tuple[str, ...], kv_dtype: str = "bf16", what: str = "", **shape: int
    ) -> SweepCase:
        name = f"{kv_dtype} {batch} x {length}{f' {what}' if what else ''}"
        return SweepCase(section, name, (length,) * batch, tiles, kv_dtype, **shape)

    for batch, lengths, tiles in (
        (1, (512, 2048, 8192), SMALL), (1, (32768,), LONG), (2, (2048, 8192), TWO), (3, (2048,), FOUR), (4, (512, 2048, 8192), FOUR),
        (8, (2048, 8192), EIGHT), (16, (512, 2048, 8192), SIXTEEN),
    ):  # fmt: skip
        for length in lengths:
            yield same("small", batch, length, tiles)
    for batch, lengths, tiles in ((1, (2048, 8192), SMALL), (4, (2048,), FOUR), (16, (2048, 8192), FP8_SIXTEEN)):
        for length in lengths:
            yield same("fp8 small", batch, length, tiles, "fp8")
    for section, kv_dtype, tiles in (("large", "bf16", LARGE), ("fp8 large", "fp8", FP8_LARGE)):
        for batch, length in ((64, 512), (64, 2048), (64, 8192), (256, 512), (256, 8192)):
            yield same(section, batch, length, tiles, kv_dtype)
        for what, lens in (
            ("24 mixed", MIXED[:24]), ("64 mixed", MIXED), ("64 mixed, longest first", sorted(MIXED, reverse=True)),
            ("256 mixed", MIXED * 4),
        ):  # fmt: skip
            yield SweepCase(section, f"{kv_dtype} {what}", tuple(lens), tiles, kv_dtype)
    yield same("split", 1, 131072, ONE_SHARD, what="8/1 heads", kv_heads=1, group_size=8)
    for page_size, tiles in ((1, GATHERED), (64, HEADS)):
        for batch in (16, 64):
            yield same("pages", batch, 8192, tiles, what=f"pages of {page_size}", page_size=page_size)
    for kv_heads, group_size in ((8, 8), (32, 1), (8, 5), (4, 7)):
        yield same("heads", 64, 8192, HEADS, what=f"{kv_heads * group_size}/{kv_heads} heads", kv_heads=kv_heads, group_size=group_size)
    for head_dim, tiles in ((64, NARROW), (96, HEADS), (256, WIDE)):
        yield same("dims", 64, 8192, tiles, what=f"head_dim {head_dim}", head_dim=head_dim)
    yield same("dims", 64, 8192, NARROW, "fp8", what="head_dim 64", head_dim=64)


if __name__ == "__main__":
    sys.exit(sweep.main(__doc__, cases, UNIT, BACK_TO_BACK))
