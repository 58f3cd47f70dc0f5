"""Batch-invariant mode: the kernel, its tile and its splits are chosen without looking at the batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cute_infer as fi
from cute_infer.attention import plan
from cute_infer.attention.spec import AttentionSpec
from cute_infer.attention.tiles import Choice, Hints, pick
from cute_infer.jit import Target
from tests.cases import DECODE, PREFILL
from tests.poison import make_batch

LLAMA = AttentionSpec("decode", "bfloat16", "bfloat16", "bfloat16", 128, 128, 4, "paged", 16)
SPECS = {
    "decode": LLAMA,
    "decode-fp8": dataclasses.replace(LLAMA, kv_dtype="float8_e4m3fn"),
    "decode-rope": dataclasses.replace(LLAMA, pos_encoding="ROPE_LLAMA"),
    "decode-group-64-d256": dataclasses.replace(LLAMA, group_size=64, head_dim_qk=256, head_dim_vo=256),
    "prefill": dataclasses.replace(LLAMA, kind="prefill", causal=True),
    "prefill-group-7": dataclasses.replace(LLAMA, kind="prefill", causal=True, group_size=7),
    "prefill-page-1": dataclasses.replace(LLAMA, kind="prefill", causal=True, page_size=1),
    "ragged": dataclasses.replace(LLAMA, kind="prefill", kv_layout="ragged", page_size=0),
}
TARGETS = {"sm_80": (Target.parse("sm_80"), 108), "sm_90a": (Target.parse("sm_90a"), 132)}
BATCHES = [1, 2, 3, 4, 7, 8, 16, 17, 32, 64, 100, 128, 256, 500, 1024, 5000]


def choices(spec: AttentionSpec, target: Target, sms: int, num_kv_heads: int, invariant: bool) -> set[Choice]:
    rows = (1,) if spec.kind == "decode" else (1, 2, 5, 64, 700, 9000)
    return {pick(spec, target, Hints(b, num_kv_heads, sms, b * n, invariant)) for b in BATCHES for n in rows}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 32])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_one_choice_for_every_batch(spec, num_kv_heads, target):
    (choice,) = choices(spec, *TARGETS[target], num_kv_heads, invariant=True)
    # partials in memory would need a workspace that grows with the batch
    assert not choice.tile.split_kv and choice.num_splits == 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_the_mode_changes_something(kind, target):
    """Without it the choice follows the batch, so the test above can fail."""
    assert len(choices(SPECS[kind], *TARGETS[target], 8, invariant=False)) > 1


@pytest.mark.parametrize("spec", ["decode", "prefill"])
def test_bind_looks_the_kernel_up_once(spec, monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "_bind", lambda *key: seen.append(key))
    for batch_size in BATCHES:
        plan.bind(SPECS[spec], torch.device("cuda", 0), batch_size, 8, 3 * batch_size, True)
    assert len(set(seen)) == 1 and seen[0][-1] is True
    plan.bind(SPECS[spec], torch.device("cuda", 0), 64, 8, 64)
    assert seen[-1][-1] is False and seen[-1] != seen[0]


OPTIONS = [
    ({}, False),
    (dict(fixed_split_size=-1), False),
    (dict(fixed_split_size=None, disable_split_kv=False), False),
    (dict(fixed_split_size=2048), True),
    (dict(disable_split_kv=True), True),
    (dict(fixed_split_size=-1, disable_split_kv=True), True),
]


@pytest.mark.parametrize("options, invariant", OPTIONS)
def test_what_plan_takes_for_a_request(options, invariant):
    case, prefill = DECODE[1], PREFILL[1]
    batch, prefill_batch = make_batch(case), make_batch(prefill)
    shape = (case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    decode = fi.BatchDecodeWithPagedKVCacheWrapper()
    decode.plan(*batch.csr, *shape, **options)
    fast = fi.BatchDecodeWithPagedKVCacheWrapper()
    fi.fast_decode_plan(fast, *batch.csr, *shape, **options)
    shape = (prefill.num_qo_heads, prefill.num_kv_heads, prefill.head_dim, prefill.page_size)
    paged = fi.BatchPrefillWithPagedKVCacheWrapper()
    paged.plan(prefill_batch.qo_indptr, *prefill_batch.csr, *shape, **options)
    ragged = fi.BatchPrefillWithRaggedKVCacheWrapper()
    ragged.plan(prefill_batch.qo_indptr, prefill_batch.kv_indptr, *shape[:3], **options)
    for wrapper in (decode, fast, paged, ragged):
        assert wrapper._plan_info.batch_invariant is invariant
        assert wrapper.explain().batch_invariant is invariant
    told = {decode.explain("sm_90a").tile for _ in range(2)}
    assert len(told) == 1 and (("(batch-invariant)" in str(decode.explain("sm_90a"))) is invariant)
