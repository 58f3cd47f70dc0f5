"""Batch-invariant mode on a GPU, bit for bit: a request alone, among 64 in another slot, replayed from a graph, beside other neighbours."""

from __future__ import annotations

import pytest
import torch

import cute_infer
from tests.gpu.batches import PagedBatch, paged_batch, queries
from tests.gpu.kernels import FAMILIES, only, skip_if_refused

pytestmark = pytest.mark.gpu

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
HEADS = (32, 8, 128, 16)
LENGTHS = (1, 17, 1000, 5003)  # of the request that is watched
BATCH, SLOT = 64, 41


def neighbours(kv_len: int, seed: int) -> list[int]:
    """Lengths of a batch of BATCH requests with ``kv_len`` at SLOT."""
    lens = torch.randint(0, 3000, (BATCH,), generator=torch.Generator().manual_seed(seed)).tolist()
    lens[SLOT] = kv_len
    return lens


def alone(batch: PagedBatch, request: int) -> PagedBatch:
    """One request of ``batch``: the same cache and page ids, its own page table."""
    first, end = (int(x) for x in batch.indptr[request : request + 2])
    indptr = torch.tensor([0, end - first], dtype=torch.int32, device="cuda")
    last = batch.last_page_len[request : request + 1].clone()
    return PagedBatch(batch.cache, indptr, batch.indices[first:end].clone(), last, [batch.kv_lens[request]], 16, batch.kv_layout)


def decode(batch: PagedBatch, q: torch.Tensor, kv: torch.dtype, mode: dict, wrapper=None):
    wrapper = wrapper or cute_infer.BatchDecodeWithPagedKVCacheWrapper()
    q_len = len(q) // len(batch.kv_lens)
    options = dict(q_data_type=BF16, kv_data_type=kv, q_len_per_req=q_len, **mode)
    wrapper.plan(batch.indptr, batch.indices, batch.last_page_len, *HEADS, **options)
    return wrapper.run(q, batch.cache, return_lse=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", [dict(fixed_split_size=2048), dict(disable_split_kv=True)], ids=["fixed-split", "no-split"])
@pytest.mark.parametrize("kv", [BF16, E4M3], ids=["bf16", "fp8"])
@pytest.mark.parametrize("q_len", [1, 3])
def test_alone_or_in_another_slot(q_len, kv, mode, family, monkeypatch):
    only(monkeypatch, family)
    for kv_len in LENGTHS:
        batch = paged_batch(neighbours(kv_len, seed=kv_len), 8, 128, 16, kv)
        q = queries(BATCH * q_len, 32, 128, BF16)
        rows = slice(SLOT * q_len, (SLOT + 1) * q_len)
        try:
            out, lse = decode(batch, q, kv, mode)
        except cute_infer.UnsupportedConfigError as error:
            skip_if_refused(error)
        single_out, single_lse = decode(alone(batch, SLOT), q[rows].clone(), kv, mode)
        assert torch.equal(out[rows], single_out), f"kv_len={kv_len}: alone differs from slot {SLOT} of {BATCH}"
        assert torch.equal(lse[rows], single_lse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 16, 64, 300])
def test_the_same_request_everywhere_in_a_batch(batch_size, family, monkeypatch):
    """Every slot holds the same request, page for page: every row must be the one a batch of one gives."""
    only(monkeypatch, family)
    one = paged_batch([2777], 8, 128, 16, BF16)
    pages = int(one.indptr[1])
    indptr = torch.arange(batch_size + 1, dtype=torch.int32, device="cuda") * pages
    copies = one.indices[:pages].repeat(batch_size), one.last_page_len.repeat(batch_size)
    many = PagedBatch(one.cache, indptr, *copies, [2777] * batch_size, 16, "NHD")
    q = queries(1, 32, 128, BF16)
    out, lse = decode(many, q.repeat(batch_size, 1, 1), BF16, dict(fixed_split_size=2048))
    want, want_lse = decode(one, q, BF16, dict(fixed_split_size=2048))
    assert torch.equal(out, want.expand_as(out)) and torch.equal(lse, want_lse.expand_as(lse))


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_replay(family, monkeypatch):
    """A graph captured for 64 requests, replayed with other lengths: the watched request keeps the bits of an eager run alone."""
    only(monkeypatch, family)
    mode = dict(fixed_split_size=2048)
    first = paged_batch(neighbours(1, seed=99), 8, 128, 16, BF16)
    pages = BATCH * (max(3000, *LENGTHS) // 16 + 1)
    indptr, last = torch.zeros_like(first.indptr), torch.zeros_like(first.last_page_len)
    indices = torch.zeros(pages, dtype=torch.int32, device="cuda")
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper(
        use_cuda_graph=True, paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices, paged_kv_last_page_len_buffer=last
    )
    k, v = (torch.zeros(pages, 16, 8, 128, device="cuda", dtype=BF16) for _ in range(2))
    q = queries(BATCH, 32, 128, BF16).clone()
    used = int(first.indptr[-1])
    wrapper.plan(first.indptr, first.indices[:used], first.last_page_len, *HEADS, q_data_type=BF16, **mode)
    wrapper.run(q, (k, v), return_lse=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = wrapper.run(q, (k, v), return_lse=True)
    for kv_len in LENGTHS:
        batch = paged_batch(neighbours(kv_len, seed=kv_len + 1), 8, 128, 16, BF16)
        for mine, theirs in zip((k, v), batch.cache, strict=True):
            mine[: len(theirs)] = theirs
        used = int(batch.indptr[-1])
        indptr.copy_(batch.indptr)
        indices[:used] = batch.indices[:used]
        last.copy_(batch.last_page_len)
        q.normal_()
        graph.replay()
        want, want_lse = decode(alone(batch, SLOT), q[SLOT : SLOT + 1].clone(), BF16, mode)
        assert torch.equal(out[SLOT : SLOT + 1], want), f"kv_len={kv_len}: replay differs from an eager run alone"
        assert torch.equal(lse[SLOT : SLOT + 1], want_lse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window_left", [-1, 200])
def test_prefill(window_left, family, monkeypatch):
    """A request's rows, alone and between neighbours with more and with fewer rows."""
    only(monkeypatch, family)
    rows, lens = [5, 130, 1, 300, 64], [700, 1500, 33, 300, 2048]
    batch = paged_batch(lens, 8, 128, 16, BF16)
    qo_indptr = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    q = queries(sum(rows), 32, 128, BF16)
    options = dict(causal=True, window_left=window_left, q_data_type=BF16, disable_split_kv=True)
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(qo_indptr.cuda(), batch.indptr, batch.indices, batch.last_page_len, *HEADS, **options)
    out, lse = wrapper.run(q, batch.cache, return_lse=True)
    for r, n in enumerate(rows):
        one, mine = alone(batch, r), slice(int(qo_indptr[r]), int(qo_indptr[r + 1]))
        wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper()
        own = torch.tensor([0, n], dtype=torch.int32, device="cuda")
        wrapper.plan(own, one.indptr, one.indices, one.last_page_len, *HEADS, **options)
        want, want_lse = wrapper.run(q[mine].clone(), one.cache, return_lse=True)
        assert torch.equal(out[mine], want) and torch.equal(lse[mine], want_lse), f"request {r}"
