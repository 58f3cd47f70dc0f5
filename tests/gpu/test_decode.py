"""Decode kernels against the fp32 reference on a GPU, with poisoned caches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cute_infer
from cute_infer.attention import plan
from tests.gpu.batches import assert_close, assert_lse_close, paged_batch, queries
from tests.gpu.kernels import FAMILIES, only, skip_if_refused

pytestmark = pytest.mark.gpu

EDGES = [0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000, 0, 2049, 7]
E4M3, E5M2, FP16, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    qo: int = 32
    kv: int = 8
    d: int = 128
    dv: int | None = None
    page: int = 16
    q: torch.dtype = BF16
    kvt: torch.dtype | None = None
    layout: str = "NHD"
    form: str = "separate"
    strided: bool = False
    plan: tuple = ()
    run: tuple = ()

    def __str__(self) -> str:
        changed = [getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return "-".join(str(value).replace("torch.", "") for value in changed) or "default"


CASES = [
    Case(),
    Case(q=FP16),
    Case(kvt=E4M3),
    Case(q=FP16, kvt=E4M3),
    Case(kvt=E5M2),
    Case(kvt=E4M3, d=64),
    Case(kvt=E4M3, d=256),
    *(Case(page=p) for p in (1, 2, 4, 5, 8, 32, 64, 128)),
    Case(page=1, kvt=E4M3),
    Case(page=64, kvt=E4M3),
    *(Case(d=d) for d in (40, 64, 80, 96, 112, 192, 256)),
    Case(d=192, dv=128),
    *(Case(qo=h, kv=k) for h, k in ((8, 8), (12, 4), (28, 4), (64, 8), (40, 8), (48, 2), (33, 3), (71, 1), (64, 1))),
    Case(layout="HND"),
    Case(form="combined"),
    Case(form="combined", layout="HND"),
    Case(form="permuted", kvt=E4M3),
    Case(strided=True),
    Case(plan=(("window_left", 40),)),
    Case(plan=(("logits_soft_cap", 8.0),)),
    Case(plan=(("pos_encoding_mode", "ROPE_LLAMA"),)),
    Case(plan=(("pos_encoding_mode", "ROPE_LLAMA"), ("rope_scale", 2.0), ("rope_theta", 5e5)), kvt=E4M3),
    Case(plan=(("pos_encoding_mode", "ALIBI"),), qo=24, kv=8),
    Case(plan=(("sm_scale", 0.3),), run=(("q_scale", 0.5), ("k_scale", 0.7), ("v_scale", 1.5))),
    Case(plan=(("window_left", 100), ("logits_soft_cap", 20.0)), kvt=E4M3, run=(("k_scale", 0.7), ("v_scale", 2.0))),
]


def decode(case: Case, batch, q, backend="auto", run=None):
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper(kv_layout=case.layout, backend=backend)
    wrapper.plan(
        batch.indptr, batch.indices, batch.last_page_len, case.qo, case.kv, case.d, case.page,
        q_data_type=case.q, kv_data_type=case.kvt or case.q, **dict(case.plan),
    )  # fmt: skip
    out, lse = wrapper.run(q, batch.cache, return_lse=True, **dict(case.run), **(run or {}))
    wrapper.check()
    return out, lse, wrapper


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case, family, monkeypatch):
    only(monkeypatch, family)
    batch = paged_batch(EDGES, case.kv, case.d, case.page, case.kvt or case.q, head_dim_vo=case.dv, kv_layout=case.layout, form=case.form)
    q = queries(len(EDGES), case.qo, case.d, case.q, strided=case.strided)
    try:
        out, lse, wrapper = decode(case, batch, q)
    except cute_infer.UnsupportedConfigError as error:
        skip_if_refused(error)
    ref, ref_lse, _ = decode(case, batch, q, backend="reference")
    assert family in str(wrapper.resolved_backend)
    assert_close(out, ref, dtype=case.q)
    assert_lse_close(lse, ref_lse)
    again, _, _ = decode(case, batch, q)
    assert torch.equal(out, again), "not bitwise repeatable"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 40, 200])
def test_batch_sizes(batch_size, family, monkeypatch):
    """Every split and cluster size that the number of requests selects."""
    only(monkeypatch, family)
    lens = [(37 * i * i + 11) % 3000 for i in range(batch_size)]
    batch = paged_batch(lens, 8, 128, 16, BF16)
    q = queries(batch_size, 32, 128, BF16)
    out, lse, _ = decode(Case(), batch, q)
    ref, ref_lse, _ = decode(Case(), batch, q, backend="reference")
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_long_request(family, monkeypatch):
    only(monkeypatch, family)
    batch = paged_batch([40_001], 1, 128, 16, BF16)
    q = queries(1, 8, 128, BF16)
    case = Case(qo=8, kv=1)
    out, lse, _ = decode(case, batch, q)
    ref, ref_lse, _ = decode(case, batch, q, backend="reference")
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("family", FAMILIES)
def test_device_scales_and_sinks(family, monkeypatch):
    only(monkeypatch, family)
    case = Case(kvt=E4M3)
    batch = paged_batch(EDGES, 8, 128, 16, E4M3)
    q = queries(len(EDGES), 32, 128, BF16)
    run = dict(
        k_scale=torch.rand(8, device="cuda") + 0.5,
        v_scale=torch.rand(8, device="cuda") + 0.5,
        sinks=torch.randn(32, device="cuda"),
    )
    out, lse, _ = decode(case, batch, q, run=run)
    ref, ref_lse, _ = decode(case, batch, q, backend="reference", run=run)
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("q_len", [2, 5, 16])
def test_several_query_tokens_per_request(q_len, family, monkeypatch):
    only(monkeypatch, family)
    lens = [max(n, q_len) for n in EDGES]
    batch = paged_batch(lens, 8, 128, 16, BF16)
    q = queries(len(lens) * q_len, 32, 128, BF16)
    case = Case(plan=(("q_len_per_req", q_len),))
    out, lse, _ = decode(case, batch, q)
    ref, ref_lse, _ = decode(case, batch, q, backend="reference")
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_decode_never_recompiles_for_a_new_length(family, monkeypatch):
    from cute_infer import jit

    only(monkeypatch, family)
    k, v = (torch.randn(600, 8, 128, device="cuda").half() for _ in range(2))
    q = queries(1, 32, 128, FP16)[0]
    k[500:] = v[500:] = torch.nan
    cute_infer.single_decode_with_kv_cache(q, k[:5], v[:5], return_lse=True)
    jit.freeze()
    try:
        for n in (1, 5, 6, 7, 64, 65, 255, 500):
            out, lse = cute_infer.single_decode_with_kv_cache(q, k[:n], v[:n], return_lse=True)
            kk, vv = (x[:n].float().repeat_interleave(4, 1) for x in (k, v))
            logits = torch.einsum("hd,nhd->hn", q.float(), kk) / 128**0.5
            assert_close(out, torch.einsum("hn,nhd->hd", logits.softmax(-1), vv), dtype=FP16)
            assert_lse_close(lse, logits.logsumexp(-1) / 0.6931471805599453)
    finally:
        jit.thaw()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kvt", [BF16, E4M3])
def test_cache_of_more_than_2_to_the_31_elements(family, kvt, monkeypatch):
    only(monkeypatch, family)
    pages = 2**31 // (16 * 8 * 128) + 70
    k, v = (torch.empty(pages, 16, 8, 128, device="cuda", dtype=kvt) for _ in range(2))
    lens = [200, 333]
    small = paged_batch(lens, 8, 128, 16, kvt, spare_pages=0)
    far = small.indices[: small.indptr[-1]] + (pages - int(small.indptr[-1]))
    for cache, values in zip((k, v), small.cache, strict=True):
        cache[-values.shape[0] :] = values
    q = queries(2, 32, 128, BF16)
    case = Case(kvt=kvt)
    ref, _, _ = decode(case, small, q)
    out, _, _ = decode(case, dataclasses.replace(small, cache=(k, v), indices=far), q)
    assert torch.equal(out, ref)


@pytest.mark.parametrize("family", FAMILIES)
def test_page_id_outside_the_cache_is_reported_not_fatal(family, monkeypatch):
    only(monkeypatch, family)
    batch = paged_batch([100, 100], 8, 128, 16, BF16)
    q = queries(2, 32, 128, BF16)
    good, _, _ = decode(Case(), batch, q)
    bad_indices = batch.indices.clone()
    bad_indices[2], bad_indices[3] = 2**31 - 1, -7
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(batch.indptr, bad_indices, batch.last_page_len, 32, 8, 128, 16, q_data_type=BF16, validate=False)
    out = wrapper.run(q, batch.cache)
    torch.cuda.synchronize()
    assert torch.equal(out[1], good[1]), "a bad page id of one request changed another"
    with pytest.raises(cute_infer.PageTableError):
        wrapper.check()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan_inside", [False, True])
def test_one_graph_serves_every_batch(family, plan_inside, monkeypatch):
    only(monkeypatch, family)
    batch_size, max_pages = 6, 6 * 40
    indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device="cuda")
    indices = torch.zeros(max_pages, dtype=torch.int32, device="cuda")
    last = torch.ones(batch_size, dtype=torch.int32, device="cuda")
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper(
        use_cuda_graph=True, paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices, paged_kv_last_page_len_buffer=last
    )
    k, v = (torch.empty(max_pages + 3, 16, 8, 128, device="cuda", dtype=BF16) for _ in range(2))
    q = queries(batch_size, 32, 128, BF16)
    q.copy_(q)
    first = paged_batch([64] * batch_size, 8, 128, 16, BF16)
    args = (32, 8, 128, 16)
    wrapper.plan(first.indptr, first.indices[: int(first.indptr[-1])], first.last_page_len, *args, q_data_type=BF16)
    wrapper.run(q, (k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if plan_inside:
            wrapper.plan(indptr, indices, last, *args, q_data_type=BF16)
        out = wrapper.run(q, (k, v))
    for seed in range(50):
        lens = torch.randint(0, 600, (batch_size,), generator=torch.Generator().manual_seed(seed)).tolist()
        batch = paged_batch(lens, 8, 128, 16, BF16, seed=seed)
        used = int(batch.indptr[-1])
        for mine, theirs in zip((k, v), batch.cache, strict=True):
            mine.fill_(torch.nan)
            mine[: theirs.shape[0]] = theirs
        indptr.copy_(batch.indptr)
        indices[:used] = batch.indices[:used]
        last.copy_(batch.last_page_len)
        q.normal_()
        graph.replay()
        ref, _, _ = decode(Case(), batch, q, backend="reference")
        assert_close(out, ref, dtype=BF16, what=f"replay {seed}")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_streams(family, monkeypatch):
    only(monkeypatch, family)
    batches = [paged_batch([700 * (i + 1)], 1, 128, 16, BF16, seed=i) for i in range(2)]
    qs = [queries(1, 8, 128, BF16, seed=i) for i in range(2)]
    case = Case(qo=8, kv=1)
    refs = [decode(case, b, q)[0] for b, q in zip(batches, qs, strict=True)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outs: list[list[torch.Tensor]] = [[], []]
    for _ in range(30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[i].append(decode(case, batches[i], qs[i])[0])
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(o, refs[i]) for o in outs[i])


def test_plan_and_run_never_synchronise():
    batch = paged_batch([100, 2000, 5], 8, 128, 16, BF16)
    q = queries(3, 32, 128, BF16)
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper()
    step = lambda: (  # noqa: E731
        wrapper.plan(batch.indptr, batch.indices, batch.last_page_len, 32, 8, 128, 16, q_data_type=BF16, validate=False),
        wrapper.run(q, batch.cache),
    )
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unsupported_names_every_kernel_and_the_reference():
    batch = paged_batch([100], 1, 36, 16, FP16)
    q = queries(1, 1, 36, FP16)
    with pytest.raises(cute_infer.UnsupportedConfigError, match="decode_sm80(.|\n)*reference"):
        decode(Case(qo=1, kv=1, d=36, q=FP16), batch, q)
    assert plan.num_sms(q.device) > 0
