"""Every tile that decode_sm90 may be given, forced on poisoned batches, and metadata that the previous kernel is still writing."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch

import cute_infer
from cute_infer.attention import tiles_decode_sm90 as t90
from cute_infer.attention.lengths import CLASSES
from cute_infer.attention.spec import AttentionSpec
from cute_infer.attention.tiles import Hints
from cute_infer.attention.tiles_decode_sm90 import DecodeSm90Tile
from cute_infer.jit import Target, get_kernel
from tests.gpu.batches import assert_close, assert_lse_close, paged_batch, queries
from tests.gpu.kernels import only

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
HOPPER = Target.parse("sm_90a")
SPLITS = 3

BATCHES = {
    "edges": [0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000, 0, 2049, 7],
    "one long": [9001],
    # more than the 256 requests that are ranked among themselves, with ties and empty ones, the longest last
    "many": [0 if i % 29 == 0 else (37 * i * i + 11) % 600 for i in range(299)] + [1500],
}


def spec_of(kv: torch.dtype) -> AttentionSpec:
    return AttentionSpec("decode", "bfloat16", str(kv).removeprefix("torch."), "bfloat16", 128, 128, 4, "paged", 16)


def chosen(kv: torch.dtype) -> list[DecodeSm90Tile]:
    """Every tile of the choice table for 1 or 8 KV heads of 128 and any class of lengths, each once."""
    hints = [Hints(batch, heads, 132, kv_lens=lens) for lens in CLASSES for heads in (1, 8) for batch in range(1, 300)]
    hints.append(Hints(1, 8, 132, batch_invariant=True))
    return list(dict.fromkeys(t90.choose(spec_of(kv), HOPPER, each) for each in hints))


def flagged(kv: torch.dtype) -> list[DecodeSm90Tile]:
    """A tile without flags, then the same tile with each set of flags that go together."""
    plain = dataclasses.replace(
        chosen(kv)[-1], early_metadata=False, evict_first=False, longest_first=False, lets_go="filled", prefetch=0
    )  # fmt: skip
    early, last, longest = {"early_metadata": True}, {"evict_first": True}, {"longest_first": True}
    together: list[dict[str, Any]] = [{}, early, last, longest, early | last, longest | last]
    together += [{"lets_go": when} for when in ("refilled", "merging", "never")]
    together += [early | {"prefetch": slots, "lets_go": when} for slots, when in ((2, "filled"), (3, "refilled"), (6, "merging"))]
    return [dataclasses.replace(plain, **flags) for flags in together]


def name_of(value: object) -> str:
    if not isinstance(value, DecodeSm90Tile):
        return str(value).removeprefix("torch.")
    flags = [field.name for field in dataclasses.fields(value) if field.type == "bool" and getattr(value, field.name)]
    sizes = f"C{value.cluster}W{value.warps}S{value.stages}T{value.tokens}H{value.heads_per_item}x{value.ctas_per_sm}"
    flags += [value.lets_go] * (value.lets_go != "filled") + [f"prefetch {value.prefetch}"] * (value.prefetch > 0)
    return "-".join([sizes, *flags])


@pytest.fixture(autouse=True)
def no_other_kernel(monkeypatch):
    only(monkeypatch, "sm90")


def force(monkeypatch: pytest.MonkeyPatch, tile: DecodeSm90Tile) -> None:
    """Every launch from here on uses ``tile``; one that splits KV makes SPLITS of it."""
    monkeypatch.setattr(t90, "choose", lambda spec, target, hints: tile)
    monkeypatch.setattr(DecodeSm90Tile, "num_splits", lambda self, spec, hints: SPLITS if self.split_kv else 1)


@functools.lru_cache(maxsize=4)
def problem(kv: torch.dtype, name: str, page_size: int = 16) -> tuple[Any, torch.Tensor]:
    lens = BATCHES[name]
    return paged_batch(lens, 8, 128, page_size, kv), queries(len(lens), 32, 128, BF16)


@functools.lru_cache(maxsize=16)
def expected(kv: torch.dtype, name: str, page_size: int = 16, **plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return decode(kv, name, page_size, backend="reference", **plan)


def decode(kv: torch.dtype, name: str, page_size: int = 16, backend: str = "auto", **plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q = problem(kv, name, page_size)
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper(backend=backend)
    wrapper.plan(
        batch.indptr, batch.indices, batch.last_page_len, 32, 8, 128, page_size, q_data_type=BF16, kv_data_type=kv, **plan
    )  # fmt: skip
    out, lse = wrapper.run(q, batch.cache, return_lse=True)
    wrapper.check()
    assert ("sm90" if backend == "auto" else backend) in str(wrapper.resolved_backend)
    return out, lse


def check(kv: torch.dtype, name: str, page_size: int = 16, **plan: Any) -> None:
    out, lse = decode(kv, name, page_size, **plan)
    ref, ref_lse = expected(kv, name, page_size, **plan)
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)
    assert torch.equal(out, decode(kv, name, page_size, **plan)[0]), "not bitwise repeatable"


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("kv, tile", [(kv, tile) for kv in (BF16, E4M3) for tile in chosen(kv)], ids=name_of)
def test_every_tile(kv, tile, name, monkeypatch):
    force(monkeypatch, tile)
    check(kv, name)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("kv", [BF16, E4M3], ids=name_of)
def test_flags_change_no_bit(kv, name, monkeypatch):
    outs = []
    for tile in flagged(kv):
        force(monkeypatch, tile)
        outs.append(decode(kv, name))
    for tile, (out, lse) in zip(flagged(kv), outs, strict=True):
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1]), name_of(tile)


@pytest.mark.parametrize("page_size, plan", [(1, {}), (8, {}), (64, {}), (16, {"window_left": 40})], ids=str)
@pytest.mark.parametrize("kv", [BF16, E4M3], ids=name_of)
def test_flags_with_other_pages_and_a_window(kv, page_size, plan, monkeypatch):
    """A gather of single tokens, several pages per slot, several slots per page; ranks by what the window leaves of a length."""
    spec = dataclasses.replace(spec_of(kv), page_size=page_size)
    sets = flagged(kv)
    for tile in (sets[i] for i in (0, 4, 5, 7, 10)):  # none; every flag at least once
        if not (tile.early_metadata and t90.gathers(spec)):
            force(monkeypatch, tile)
            check(kv, "many", page_size, **plan)


# (first entry, next request's first entry, tokens on the last page) in the page table of one request, before and after the previous kernel.
# The kernel takes any number of tokens on the last page: the writer below cannot write numbers between 0 and 128.
REWRITES = {
    "other pages": ((0, 150, 144), (0, 200, 144)),
    "more pages": ((0, 900, 144), (0, 200, 144)),
    "garbage": ((-5, 2**25, -9), (0, 200, 144)),
    "nothing": ((0, 200, 144), (0, 200, 144)),
    "no pages": ((7, 7, 16), (0, 200, 144)),
    "to no pages": ((0, 150, 144), (200, 200, 144)),
    "one token more on another page": ((128, 129, 144), (128, 129, 145)),
    "one token less to the end of a page": ((128, 129, 145), (128, 129, 144)),
    "a page more": ((128, 129, 128), (128, 130, 128)),
    "a page to no tokens": ((128, 129, 128), (128, 129, 0)),
    "no tokens to a page": ((128, 129, 0), (128, 129, 128)),
    "slots for every warp to one slot": ((0, 900, 144), (128, 130, 0)),
}


@pytest.mark.parametrize("rewrite", REWRITES)
@pytest.mark.parametrize("writer", ["late", "early", "ordinary"])
@pytest.mark.parametrize("tile", [tile for tile in chosen(BF16) if tile.early_metadata], ids=name_of)
def test_metadata_written_by_the_previous_kernel(tile, writer, rewrite):
    """A launch whose predecessor writes its page table and lengths at the very end, long after it let this one start.

    The predecessor is decode itself: the V rows of each of its KV heads are all alike and hold int32 page ids as pairs of bf16 (0 and
    normal numbers), and its K is zero, so its output is exactly those ids: [32 heads x 64 words], of which 4 neighbouring heads are equal.
    What was there before must not show, raise the status flag or be followed outside the cache. An ordinary writer is a copy.
    """
    torch.manual_seed(0)
    spec, pages = spec_of(BF16), 256
    before, after = REWRITES[rewrite]
    late = dataclasses.replace(tile, early_metadata=False, prefetch=0)
    write, read_late, read_early = (get_kernel(t90.PATH, spec, t, HOPPER).fn for t in (tile if writer == "early" else late, late, tile))

    words = torch.randint(128, pages, (8, 64), dtype=torch.int32)
    words[0, :3] = torch.tensor(after)  # the reader's kv_indptr and kv_last_page_len; its page ids start with the second KV head's words
    v_words = words.cuda().view(BF16).expand(512, 16, 8, 128).contiguous()
    written = words.cuda().repeat_interleave(4, dim=0).view(-1)
    k_zero = torch.zeros_like(v_words)
    k, v = (torch.randn(pages, 16, 8, 128, device="cuda").bfloat16() for _ in range(2))
    q = torch.randn(1, 32, 128, device="cuda").bfloat16()
    table = torch.empty_like(q)
    metadata = table.view(torch.int32).view(-1)
    old = written.clone() if rewrite == "nothing" else torch.randint(0, 128, (2048,), dtype=torch.int32, device="cuda")
    if rewrite == "garbage":
        old.random_(-(2**31), 2**31 - 1)
    old[:3] = torch.tensor(before)

    status = torch.zeros(4, dtype=torch.int32, device="cuda")
    last, ids = torch.tensor([16], dtype=torch.int32, device="cuda"), torch.arange(512, dtype=torch.int32, device="cuda")
    indptr = torch.tensor([0, 512], dtype=torch.int32, device="cuda")
    rest = (*(None,) * 7, status, 128**-0.5, 1.0, 0.0, 1.0, 1.0, math.log2(1e4), -1, 1, 132)

    def run_writer() -> None:
        if writer == "ordinary":
            metadata.copy_(written)
        else:
            write(q, k_zero, v_words, table, None, None, indptr, ids, last, *rest)

    def run_reader(kernel: Any, out: torch.Tensor) -> torch.Tensor:
        kernel(q, k, v, out, None, None, metadata[:2], metadata[256:1280], metadata[2:3], *rest)
        return out

    metadata.copy_(old)
    if rewrite != "garbage":
        stale = run_reader(read_late, torch.empty_like(q))
    run_writer()
    torch.cuda.synchronize()
    assert torch.equal(metadata, written), "the writer must write what this test is about"
    fresh = run_reader(read_late, torch.empty_like(q))
    if rewrite != "garbage":
        assert torch.equal(fresh, stale) == (rewrite == "nothing")
    if after[0] == after[1]:
        assert not fresh.any()

    out = torch.empty_like(q)
    for launch in range(20):
        out.fill_(torch.nan)
        metadata.copy_(old)
        run_writer()
        assert torch.equal(run_reader(read_early, out), fresh), f"launch {launch}"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metadata.copy_(old)
        run_writer()
        run_reader(read_early, out)
    for replay in range(30):
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, fresh), f"replay {replay}"
    assert status.tolist() == [0, 0, 0, 0]
