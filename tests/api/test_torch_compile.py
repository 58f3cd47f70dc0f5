"""torch.compile(fullgraph=True) goes through every attention call without a graph break."""

from __future__ import annotations

import pytest
import torch

import cute_infer as fi
from tests.cases import DECODE, PREFILL
from tests.poison import make_batch


def decode():
    case = DECODE[1]
    batch = make_batch(case)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*batch.csr, case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    return lambda q, k, v: wrapper.run(q * 0.5, (k, v), return_lse=True), (batch.q, batch.k_pages, batch.v_pages)


def prefill():
    case = PREFILL[1]
    batch = make_batch(case)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(batch.qo_indptr, *batch.csr, case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size, causal=True)
    return lambda q, k, v: wrapper.run(q * 0.5, k, v, return_lse=True), (batch.q, batch.k_pages, batch.v_pages)


def single():
    q, k, v = torch.randn(5, 4, 16).half(), torch.randn(9, 2, 16).half(), torch.randn(9, 2, 16).half()
    return lambda q, k, v: fi.single_prefill_with_kv_cache(q * 0.5, k, v, causal=True, return_lse=True), (q, k, v)


@pytest.mark.parametrize("make", [decode, prefill, single])
def test_fullgraph(make):
    f, inputs = make()
    eager = f(*inputs)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs)
    for got, want in zip(compiled, eager):
        assert torch.equal(got, want)
