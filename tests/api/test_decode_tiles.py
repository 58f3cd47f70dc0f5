"""Which decode tile a batch gets, by what the host knows of its KV lengths; without a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cute_infer as fi
from cute_infer import zoo
from cute_infer.attention import plan
from cute_infer.attention import tiles_decode_sm90 as t90
from cute_infer.attention.lengths import CLASSES, EVEN, LONG, MIXED, SHORT, UNEVEN, UNKNOWN, KvLens
from cute_infer.attention.spec import AttentionSpec
from cute_infer.attention.tiles import Hints, pick
from cute_infer.errors import CompileError, MissingKernelError
from cute_infer.jit import Target

HOPPER = Target.parse("sm_90a")
LLAMA = AttentionSpec("decode", "bfloat16", "bfloat16", "bfloat16", 128, 128, 4, "paged", 16)
FP8 = dataclasses.replace(LLAMA, kv_dtype="float8_e4m3fn")
SHAPE = (32, 8, 128, 16)


@pytest.mark.parametrize(
    "mean, longest, expected",
    [
        (1, 1, (SHORT, EVEN)),
        (1024, 1536, (SHORT, EVEN)),
        (100, 1537, (SHORT, UNEVEN)),
        (100, 4096, (SHORT, MIXED)),
        (1025, 1537, (4096, EVEN)),
        (4096, 6145, (4096, UNEVEN)),
        (8192, 32767, (16384, UNEVEN)),
        (8192, 32768, (16384, MIXED)),
        (16385, 16385, (LONG, EVEN)),
        (10**6, 10**6, (LONG, EVEN)),
    ],
)
def test_classes(mean, longest, expected):
    assert KvLens.of(mean, longest) == expected and KvLens.of(mean, longest) in CLASSES


def test_a_bound_says_only_that_all_are_short():
    assert KvLens.at_most(SHORT) == (SHORT, EVEN) and KvLens.at_most(SHORT + 1) == UNKNOWN


@pytest.mark.parametrize("model", ["llama3-8b", "llama2-7b", "llama3-70b-tp8", "qwen2.5-7b", "gemma2-9b", "gpt-oss-20b"])
def test_the_zoo_has_every_tile_that_can_be_chosen(model):
    heads = zoo.MODELS[model].num_kv_heads
    built = {(r.spec, r.tile) for r in zoo.variants(zoo.MODELS[model], HOPPER)}
    for spec in {spec for spec, _ in built if getattr(spec, "kind", "") == "decode"}:
        for batch in (*range(1, 140), *range(140, 1025, 13)):
            for lens in (UNKNOWN,) if spec.lse else CLASSES:  # half of a cascade falls back to the tile for any lengths
                tile = pick(spec, HOPPER, Hints(batch, heads, zoo.NUM_SMS["sm_90a"], batch, kv_lens=lens)).tile
                assert (spec, tile) in built, f"{batch} requests, lengths {lens}: {tile}"


@pytest.mark.parametrize("spec", [LLAMA, FP8], ids=["bf16", "fp8"])
def test_growing_lengths_need_few_kernels(spec):
    for batch in (1, 2, 4, 8, 16, 24, 64, 256):
        tiles = {t90.choose(spec, HOPPER, Hints(batch, 8, 132, batch, kv_lens=lens)) for lens in CLASSES}
        assert len(tiles) <= 4, batch


@pytest.mark.parametrize("changes", [{}, {"page_size": 1}, {"kv_layout": "ragged", "page_size": 0}, {"kv_dtype": "float8_e5m2"}], ids=str)
def test_flags_that_need_each_other(changes):
    """What the kernel asserts about its flags, and that a prefetching successor is let go late."""
    spec, tiles = dataclasses.replace(LLAMA, **changes), set()
    for batch in range(1, 300):
        tiles |= {t90.choose(spec, HOPPER, Hints(batch, 8, 132, batch, kv_lens=lens)) for lens in CLASSES}
    early = {tile for tile in tiles if tile.early_metadata}
    assert bool(early) == (spec.kv_layout == "paged" and not t90.gathers(spec))
    assert not any(tile.longest_first or tile.lets_go == "never" for tile in early)
    assert {tile.lets_go for tile in tiles if tile.prefetch} == ({"refilled"} if early else set())
    assert all(tile.early_metadata and tile.prefetch <= t90.id_steps(spec, tile) for tile in tiles if tile.prefetch)
    assert {tile.lets_go for tile in tiles} >= {"filled", "merging", "never"}


def test_lengths_change_the_tile_but_not_of_a_batch_invariant_launch():
    hints = [Hints(64, 8, 132, 64, kv_lens=lens) for lens in (KvLens(4096, EVEN), KvLens(16384, MIXED), UNKNOWN)]
    assert len({pick(LLAMA, HOPPER, each) for each in hints}) == 3
    assert len({pick(LLAMA, HOPPER, each._replace(batch_invariant=True)) for each in hints}) == 1


def table(lens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pages = torch.tensor([-(-n // 16) for n in lens])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), pages.cumsum(0, dtype=torch.int32)])
    last = torch.tensor([(n - 1) % 16 + 1 for n in lens], dtype=torch.int32)
    return indptr, torch.arange(int(pages.sum()), dtype=torch.int32), last


@pytest.mark.parametrize(
    "lens, options, expected",
    [
        ([64] * 8, {}, (SHORT, EVEN)),
        ([2048] * 64, {}, (4096, EVEN)),
        ([512] * 63 + [32768], {}, (SHORT, MIXED)),
        ([20000, 40000], {}, (LONG, EVEN)),
        ([20000, 40000], {"window_left": 1023}, (SHORT, EVEN)),
        ([20000, 200], {"window_left": 4000}, (4096, EVEN)),
    ],
    ids=str,
)
def test_what_plan_knows_of_metadata_on_the_cpu(lens, options, expected):
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*table(lens), *SHAPE, **options)
    assert wrapper._plan_info.kv_lens == expected


def test_what_engines_tell_fast_decode_plan():
    indptr, indices, last = table([2048] * 4)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    fi.fast_decode_plan(wrapper, indptr, indices, last, *SHAPE, global_override_indptr_cpu=indptr)
    assert wrapper._plan_info.kv_lens == (4096, EVEN)


def test_a_graph_wrapper_knows_the_size_of_its_buffers_only():
    indptr, indices, last = table([2048] * 4)
    for size, expected in ((len(indices), UNKNOWN), (SHORT // 16, (SHORT, EVEN))):
        wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=torch.zeros(5, dtype=torch.int32),
            paged_kv_indices_buffer=torch.zeros(size, dtype=torch.int32),
            paged_kv_last_page_len_buffer=torch.zeros(4, dtype=torch.int32),
        )
        small = table([256] * 4)
        wrapper.plan(*small, *SHAPE)
        assert wrapper._plan_info.kv_lens == expected


def test_the_width_of_block_tables_is_a_bound():
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    known = wrapper._known_lengths
    indptr, indices, last = table([4096] * 4)
    assert known(fi.paged.PageTable(indptr, indices, last), None, 16, SHORT // 16, -1) == (SHORT, EVEN)
    assert known(fi.paged.PageTable(indptr, indices, last), None, 16, SHORT // 16 + 1, -1) == UNKNOWN
    assert known(fi.paged.PageTable(indptr, indices, last), None, 16, None, SHORT - 1) == (SHORT, EVEN)


def test_explain_says_when_lengths_mattered():
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*table([2048] * 64), *SHAPE)
    told = wrapper.explain("sm_90a")
    assert told.kv_lens == (4096, EVEN) and "(for lengths: even, mean <= 4096)" in str(told)
    assert wrapper.explain("sm_80").kv_lens == UNKNOWN
    wrapper.plan(*table([2048] * 4), *SHAPE)
    assert wrapper.explain("sm_90a").kv_lens == UNKNOWN and "for lengths" not in str(wrapper.explain("sm_90a"))


def test_without_the_kernel_for_a_class_the_one_for_any_lengths_serves(monkeypatch, caplog):
    device, seen = torch.device("cuda", 0), []
    monkeypatch.setattr(plan, "num_sms", lambda _: 132)
    monkeypatch.setattr(plan, "target_of", lambda _: HOPPER)
    general = pick(LLAMA, HOPPER, Hints(64, 8, 132, 64)).tile

    class Kernel:
        fn = None

    def get_kernel(path, spec, tile, target):
        seen.append(tile)
        if tile != general:
            raise MissingKernelError("frozen")
        return Kernel

    monkeypatch.setattr(plan, "get_kernel", get_kernel)
    plan._bind.cache_clear()
    try:
        assert plan.bind(LLAMA, device, 64, 8, 64, kv_lens=KvLens(4096, EVEN)).choice.tile == general
        assert len(seen) == 2 and "even" in caplog.text
        for error in (MissingKernelError("frozen"), CompileError("a bug")):
            seen.clear()

            def refuse(*request, error=error):
                seen.append(request)
                raise error

            monkeypatch.setattr(plan, "get_kernel", refuse)
            plan._bind.cache_clear()
            with pytest.raises(type(error)):
                plan.bind(LLAMA, device, 64, 8, 64, kv_lens=KvLens(4096, EVEN))
            assert len(seen) == (2 if type(error) is MissingKernelError else 1)  # a bug in a kernel is not hidden by another kernel
    finally:
        plan._bind.cache_clear()
