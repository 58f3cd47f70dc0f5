"""16-bit queries over 8-bit K and V on Hopper, against the fp32 reference on the same inputs, with poisoned caches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import cute_infer
from tests.gpu.batches import assert_close, assert_lse_close, paged_batch, queries

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the kernel is Hopper's"),
]

E4M3, E5M2, FP16, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16
HEADS, KV_HEADS = 8, 2
QO = [0, 1, 17, 64, 127, 128, 129, 300, 5, 33, 16, 15]
KV = [7, 1, 17, 200, 128, 64, 1000, 300, 0, 500, 17, 15]  # longer, equal, shorter than the queries, none at all, a page and one more
DIMS = [(64, 64), (128, 128), (192, 128), (256, 256)]
OPTIONS = {
    "full": {},
    "causal": dict(causal=True),
    "window": dict(causal=True, window_left=50),
    "window full": dict(window_left=20),
    "soft cap": dict(causal=True, logits_soft_cap=8.0),
    "sm_scale": dict(causal=True, sm_scale=0.3),
    "negative sm_scale": dict(causal=True, sm_scale=-0.1),
    "bf16 out of fp16": dict(causal=True, q_data_type=FP16, o_data_type=BF16),
}


def indptr(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def paged(batch, q, page, kv_dtype=E4M3, dims=(128, 128), backend="auto", plan=None, qo=QO, layout="NHD", **run):
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper(kv_layout=layout, backend=backend)
    wrapper.plan(
        indptr(qo), batch.indptr, batch.indices, batch.last_page_len, HEADS, KV_HEADS, dims[0], page, head_dim_vo=dims[1],
        **{"q_data_type": q.dtype, "kv_data_type": kv_dtype, **(plan or {})},
    )  # fmt: skip
    out, lse = wrapper.run(q, batch.cache, return_lse=True, **run)
    wrapper.check()
    return out, lse, wrapper


def check_paged(batch, q, page, **options):
    out, lse, wrapper = paged(batch, q, page, **options)
    ref, ref_lse, _ = paged(batch, q, page, backend="reference", **options)
    assert "prefill_sm90_kv8" in str(wrapper.resolved_backend)
    assert_close(out, ref, dtype=out.dtype)
    assert_lse_close(lse, ref_lse)
    assert torch.equal(out, paged(batch, q, page, **options)[0]), "not bitwise repeatable"
    return out


@pytest.mark.parametrize(("q_dtype", "kv_dtype"), itertools.product((FP16, BF16), (E4M3, E5M2)), ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_dtypes_and_head_dims(dims, q_dtype, kv_dtype):
    batch = paged_batch(KV, KV_HEADS, dims[0], 16, kv_dtype, head_dim_vo=dims[1])
    q = queries(sum(QO), HEADS, dims[0], q_dtype, strided=True)
    check_paged(batch, q, 16, kv_dtype=kv_dtype, dims=dims, plan=dict(causal=True))


@pytest.mark.parametrize("plan", OPTIONS.values(), ids=OPTIONS)
def test_options(plan):
    batch = paged_batch(KV, KV_HEADS, 128, 16, E4M3)
    check_paged(batch, queries(sum(QO), HEADS, 128, plan.get("q_data_type", BF16)), 16, plan=plan)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [1, 2, 5, 8, 32, 48, 64, 128, 256])
def test_page_sizes(page, layout):
    batch = paged_batch(KV, KV_HEADS, 128, page, E4M3, kv_layout=layout)
    check_paged(batch, queries(sum(QO), HEADS, 128, BF16), page, layout=layout, plan=dict(causal=True))


@pytest.mark.parametrize(("form", "layout"), [("combined", "NHD"), ("permuted", "HND")])
def test_cache_forms(form, layout):
    batch = paged_batch(KV, KV_HEADS, 128, 16, E4M3, kv_layout=layout, form=form)
    check_paged(batch, queries(sum(QO), HEADS, 128, BF16), 16, layout=layout)


@pytest.mark.parametrize("plan", [{}, dict(causal=True), dict(causal=True, window_left=600)], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_long_queries(dims, plan):
    """More items than CTAs: the rings and both buffers of Q run on across work items."""
    qo = [1700, 1600, 2100, 1537]
    batch = paged_batch([3001, 1600, 900, 1540], KV_HEADS, dims[0], 16, E4M3, head_dim_vo=dims[1])
    check_paged(batch, queries(sum(qo), HEADS, dims[0], BF16), 16, dims=dims, qo=qo, plan=plan)


@pytest.mark.parametrize(("qo", "kv"), [([1, 7, 16, 3, 20, 5], [1, 900, 333, 128, 64, 257]), ([19], [3000]), ([1], [1])], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_dtype", [FP16, BF16], ids=str)
def test_packed_heads_and_split_kv(qo, kv, causal, q_dtype):
    batch = paged_batch(kv, KV_HEADS, 128, 16, E4M3)
    check_paged(batch, queries(sum(qo), HEADS, 128, q_dtype), 16, qo=qo, plan=dict(causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_ragged_against_reference(dims, causal):
    q = queries(sum(QO), HEADS, dims[0], BF16)
    k = queries(sum(KV), KV_HEADS, dims[0], E4M3, strided=True, seed=2)
    v = queries(sum(KV), KV_HEADS, dims[1], E4M3, strided=True, seed=3)

    def run(backend="auto"):
        wrapper = cute_infer.BatchPrefillWithRaggedKVCacheWrapper(backend=backend)
        wrapper.plan(
            indptr(QO), indptr(KV), HEADS, KV_HEADS, dims[0], head_dim_vo=dims[1], causal=causal, q_data_type=BF16, kv_data_type=E4M3
        )
        return wrapper.run(q, k, v, return_lse=True)

    out, lse = run()
    ref, ref_lse = run("reference")
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)
    for x in (k, v):  # one request's NaN must stay its own
        x.view(torch.uint8)[KV[0] + 1 :][: KV[2]] = 0x7F
    keep = torch.ones(sum(QO), dtype=torch.bool)
    keep[1 : 1 + QO[2]] = False
    assert torch.equal(run()[0][keep], out[keep])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (512, 512), (100, 777), (777, 100), (2300, 2400), (3, 40_000)], ids=str)
def test_single_prefill(shape, causal):
    q = queries(shape[0], HEADS, 128, BF16)
    k, v = (queries(shape[1], KV_HEADS, 128, E4M3, seed=s) for s in (2, 3))
    args = dict(causal=causal, return_lse=True)
    out, lse = cute_infer.single_prefill_with_kv_cache(q, k, v, **args)
    ref, ref_lse = cute_infer.single_prefill_with_kv_cache(q, k, v, backend="reference", **args)
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("q_dtype", [FP16, BF16], ids=str)
def test_scales_and_sinks(q_dtype):
    batch = paged_batch(KV, KV_HEADS, 128, 16, E4M3)
    q = queries(sum(QO), HEADS, 128, q_dtype)
    gen = torch.Generator("cuda").manual_seed(7)
    scale = lambda n: torch.rand(n, device="cuda", generator=gen) + 0.5  # noqa: E731
    check_paged(batch, q, 16, plan=dict(causal=True), k_scale=scale(KV_HEADS), v_scale=scale(KV_HEADS), sinks=3 * scale(HEADS))
    check_paged(batch, q, 16, k_scale=1.3, v_scale=2.0)


def test_bf16_queries_of_any_magnitude():
    """fp16 alone would overflow, or lose everything; rows of very different size share a tile."""
    q, k, v = queries(300, HEADS, 128, BF16), *(queries(500, KV_HEADS, 128, E4M3, seed=s) for s in (2, 3))
    q = (q.float() * torch.logspace(-30, 30, 300, base=10, device="cuda")[:, None, None]).bfloat16()
    for sm_scale in (1e-30, 1e-3, 1e20):
        near = (q.float().abs().amax((1, 2)) * sm_scale - 1.0).abs() < 5  # logits that are neither equal nor a single key
        out, lse = cute_infer.single_prefill_with_kv_cache(q, k, v, sm_scale=sm_scale, return_lse=True)
        ref, ref_lse = cute_infer.single_prefill_with_kv_cache(q, k, v, sm_scale=sm_scale, return_lse=True, backend="reference")
        assert near.any()
        assert_close(out[near], ref[near], dtype=BF16)
        assert_lse_close(lse[near], ref_lse[near])


def test_a_page_that_does_not_exist():
    batch = paged_batch(KV, KV_HEADS, 128, 16, E4M3)
    batch.indices[3] = 10**9
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(
        indptr(QO), batch.indptr, batch.indices, batch.last_page_len, HEADS, KV_HEADS, 128, 16, q_data_type=BF16, kv_data_type=E4M3
    )
    assert not wrapper.run(queries(sum(QO), HEADS, 128, BF16), batch.cache).isnan().any()
    with pytest.raises(cute_infer.errors.PageTableError):
        wrapper.check()


@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2], ids=str)
def test_every_code_is_exact(kv_dtype):
    """One key: the output is its V, bit by bit; the log-sum-exp of a unit query is one element of K."""
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").view(kv_dtype).view(1, 2, 128)
    out = cute_infer.single_prefill_with_kv_cache(torch.zeros(1, 2, 128, device="cuda", dtype=FP16), torch.zeros_like(codes), codes)
    assert torch.equal(out.float().nan_to_num(nan=7.5e4), codes.float().nan_to_num(nan=7.5e4))
    finite = torch.where(codes.float().isfinite(), codes.float(), 0.0)
    for dtype in (FP16, BF16):
        unit = torch.eye(128, device="cuda", dtype=dtype)[:, None].expand(128, 2, 128).contiguous()
        k = finite.to(kv_dtype)
        _, lse = cute_infer.single_prefill_with_kv_cache(unit, k, k, sm_scale=1.0, return_lse=True)
        torch.testing.assert_close(lse, finite[0].T * math.log2(math.e), rtol=1e-6, atol=0.0)


def test_graph_replay_with_other_lengths():
    page, rows, names = 16, 1400, ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
    cache = tuple(queries(300 * page, KV_HEADS, 128, E4M3, seed=s).unflatten(0, (300, page)) for s in (2, 3))  # any page may be used
    q = queries(rows, HEADS, 128, BF16)
    plan = dict(causal=True, q_data_type=BF16, kv_data_type=E4M3)

    def metadata(qo, kv):
        pages = [-(-n // page) for n in kv]
        ids = torch.randperm(300, generator=torch.Generator().manual_seed(sum(kv)))[: sum(pages)]
        last = torch.tensor([(n - 1) % page + 1 if n else 0 for n in kv], dtype=torch.int32, device="cuda")
        return indptr(qo), indptr(pages), ids.int().cuda(), last, HEADS, KV_HEADS, 128, page

    room = (*indptr([0] * 3)[None].repeat(2, 1), torch.zeros(300, dtype=torch.int32, device="cuda"), indptr([0, 0]))
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper(use_cuda_graph=True, **dict(zip(names, room, strict=True)))
    wrapper.plan(*metadata([300, 200, 900], [3000, 200, 1000]), **plan)
    wrapper.run(q, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wrapper.run(q, cache)
    for lengths in (([300, 200, 900], [3000, 200, 1000]), ([1, 800, 50], [900, 800, 2500]), ([0, 1400, 0], [17, 1400, 0])):
        args = metadata(*lengths)
        wrapper.plan(*args, **plan)
        graph.replay()
        reference = cute_infer.BatchPrefillWithPagedKVCacheWrapper(backend="reference")
        reference.plan(*args, **plan)
        used = sum(lengths[0])
        assert_close(out[:used], reference.run(q[:used], cache), dtype=BF16)
