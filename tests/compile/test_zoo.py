"""The model presets: host-only, so that a machine without the compiler can name what a bundle must hold."""

from __future__ import annotations

import sys

import pytest

from cute_infer import zoo
from cute_infer.jit import Request, Target, key

TARGETS = [Target.parse(arch) for arch in ("sm_80", "sm_86", "sm_90a")]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.capability[0]}.{target.capability[1]}")
@pytest.mark.parametrize("name", zoo.MODELS)
def test_variants(name: str, target: Target):
    requests = zoo.variants(zoo.MODELS[name], target)
    assert requests == zoo.variants(zoo.MODELS[name], target)
    assert len({key.request_key(request) for request in requests}) == len(requests)
    kernels = {request.name.partition("_sm")[0] for request in requests}
    assert {"decode", "prefill", "merge", "paged_kernels", "sampling_kernels_rows"} <= kernels
    for request in requests:
        assert request.arch == target.arch and Request.from_data(request.to_data()) == request


def test_options_change_the_attention_kernels():
    model, target = zoo.MODELS["llama3-8b"], TARGETS[-1]
    pages = {r.spec.page_size for r in zoo.variants(model, target, page_sizes=(16, 64)) if r.name.startswith("decode")}
    dtypes = {r.spec.kv_dtype for r in zoo.variants(model, target, kv_dtype="float8_e4m3fn") if r.name.startswith("decode")}
    assert pages == {16, 64} and dtypes == {"float8_e4m3fn"}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_group_sizes_are_whole(name: str):
    model = zoo.MODELS[name]
    assert model.num_qo_heads % model.num_kv_heads == 0


def test_no_compiler_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cutlass", None)
    assert zoo.variants(zoo.MODELS["mixtral-8x7b"], TARGETS[0])
