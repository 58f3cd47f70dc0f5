"""The FP8 prefill kernel against the fp32 reference on the same 8-bit inputs, and its accuracy against a torch emulation of 8-bit P."""

from __future__ import annotations

import pytest
import torch

import cute_infer
from tests.gpu.batches import assert_lse_close, paged_batch, queries

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="8-bit prefill runs on Hopper only"
    ),
]

QO = [0, 1, 17, 64, 127, 128, 129, 300, 5, 33]
KV = [7, 1, 17, 200, 128, 64, 1000, 300, 0, 500]  # longer, equal, shorter than the queries, and none at all
E4M3, FP16, BF16 = torch.float8_e4m3fn, torch.float16, torch.bfloat16
HEADS, KV_HEADS = 8, 2
# P is rounded to 3 bits of mantissa: 2^-4 at worst, 2.6 % in the mean square, and independent from key to key.
MEAN_ERROR, ROW_ERROR = 0.04, 0.15

OPTIONS = {
    "full": {},
    "causal": dict(causal=True),
    "fp16 out": dict(causal=True, o_data_type=FP16),
    "window": dict(causal=True, window_left=50),
    "window full": dict(window_left=20),
    "soft cap": dict(causal=True, logits_soft_cap=8.0),
    "sm_scale": dict(causal=True, sm_scale=0.3),
    "negative sm_scale": dict(causal=True, sm_scale=-0.1),
    "fast": dict(fp8_fast_accumulation=True),
    "fast causal": dict(causal=True, fp8_fast_accumulation=True),
}
LONG = [1700, 1600, 2100, 1537]  # queries: enough for the tile of 192 keys
DIMS = [(64, 64), (128, 128), (192, 128), (256, 256)]


def indptr(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def relative(out, ref):
    return float((out.float() - ref.float()).norm() / ref.float().norm())


def assert_close(out, ref):
    out, ref = out.float(), ref.float()
    assert torch.equal(out.isnan(), ref.isnan())
    rows = (out - ref).norm(dim=-1) / ref.norm(dim=-1).clamp_min(1e-3)
    assert relative(out, ref) < MEAN_ERROR and float(rows.max()) < ROW_ERROR, (relative(out, ref), float(rows.max()))


def paged(batch, q, page, dims=(128, 128), backend="auto", plan=None, qo=QO, **run):
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper(backend=backend)
    wrapper.plan(
        indptr(qo), batch.indptr, batch.indices, batch.last_page_len, HEADS, KV_HEADS, dims[0], page, head_dim_vo=dims[1],
        q_data_type=E4M3, kv_data_type=E4M3, **(plan or {}),
    )  # fmt: skip
    out, lse = wrapper.run(q, batch.cache, return_lse=True, **run)
    wrapper.check()
    return out, lse, wrapper


def ragged(q, k, v, dims=(128, 128), backend="auto", plan=None):
    wrapper = cute_infer.BatchPrefillWithRaggedKVCacheWrapper(backend=backend)
    wrapper.plan(
        indptr(QO), indptr(KV), HEADS, KV_HEADS, dims[0], head_dim_vo=dims[1],
        q_data_type=E4M3, kv_data_type=E4M3, **(plan or {}),
    )  # fmt: skip
    return wrapper.run(q, k, v, return_lse=True)


@pytest.mark.parametrize("plan", OPTIONS.values(), ids=OPTIONS)
def test_paged_against_reference(plan):
    batch = paged_batch(KV, KV_HEADS, 128, 16, E4M3)
    q = queries(sum(QO), HEADS, 128, E4M3, strided=True)
    out, lse, wrapper = paged(batch, q, 16, plan=plan)
    ref, ref_lse, _ = paged(batch, q, 16, backend="reference", plan=plan)
    assert "prefill_sm90_fp8" in str(wrapper.resolved_backend)
    assert_close(out, ref)
    assert_lse_close(lse, ref_lse)
    assert torch.equal(out, paged(batch, q, 16, plan=plan)[0]), "not bitwise repeatable"


@pytest.mark.parametrize("page", [32, 64, 128, 256])
@pytest.mark.parametrize("fast", [False, True])
def test_page_sizes(page, fast):
    batch = paged_batch(KV, KV_HEADS, 128, page, E4M3)
    q = queries(sum(QO), HEADS, 128, E4M3)
    plan = dict(causal=True, fp8_fast_accumulation=fast)
    out, lse, _ = paged(batch, q, page, plan=plan)
    ref, ref_lse, _ = paged(batch, q, page, backend="reference", plan=plan)
    assert_close(out, ref)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("plan", [{}, dict(causal=True), dict(causal=True, window_left=600), dict(logits_soft_cap=8.0)], ids=str)
@pytest.mark.parametrize("page", [16, 64])
def test_long_queries(page, plan, fast):
    """Several promotions per work item; caches longer than, equal to and shorter than the queries, poisoned behind their ends."""
    batch = paged_batch([3001, 1600, 900, 1540], KV_HEADS, 128, page, E4M3)
    q = queries(sum(LONG), HEADS, 128, E4M3)
    plan = {**plan, "fp8_fast_accumulation": fast}
    out, lse, _ = paged(batch, q, page, plan=plan, qo=LONG)
    ref, ref_lse, _ = paged(batch, q, page, backend="reference", plan=plan, qo=LONG)
    assert_close(out, ref)
    assert_lse_close(lse, ref_lse)
    assert torch.equal(out, paged(batch, q, page, plan=plan, qo=LONG)[0]), "not bitwise repeatable"


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_ragged_against_reference(dims, causal, fast):
    q = queries(sum(QO), HEADS, dims[0], E4M3)
    k = queries(sum(KV), KV_HEADS, dims[0], E4M3, strided=True, seed=2)
    v = queries(sum(KV), KV_HEADS, dims[1], E4M3, strided=True, seed=3)
    out, lse = ragged(q, k, v, dims, plan=dict(causal=causal, fp8_fast_accumulation=fast))
    ref, ref_lse = ragged(q, k, v, dims, backend="reference", plan=dict(causal=causal))
    assert_close(out, ref)
    assert_lse_close(lse, ref_lse)
    for x in (k, v):  # one request's NaN must stay its own
        x.view(torch.uint8)[KV[0] + 1 :][: KV[2]] = 0x7F
    poisoned, _ = ragged(q, k, v, dims, plan=dict(causal=causal, fp8_fast_accumulation=fast))
    keep = torch.ones(sum(QO), dtype=torch.bool)
    keep[1 : 1 + QO[2]] = False
    assert torch.equal(poisoned[keep], out[keep])


@pytest.mark.parametrize("q_heads", [1, KV_HEADS, HEADS])
def test_scales_and_sinks(q_heads):
    batch = paged_batch(KV, KV_HEADS, 128, 16, E4M3)
    q = queries(sum(QO), HEADS, 128, E4M3)
    gen = torch.Generator("cuda").manual_seed(7)
    scale = lambda n: torch.rand(n, device="cuda", generator=gen) + 0.5  # noqa: E731
    run = dict(q_scale=scale(q_heads), k_scale=scale(KV_HEADS), v_scale=scale(KV_HEADS), sinks=3 * scale(HEADS))
    out, lse, _ = paged(batch, q, 16, plan=dict(causal=True), **run)
    ref, ref_lse, _ = paged(batch, q, 16, backend="reference", plan=dict(causal=True), **run)
    assert_close(out, ref)
    assert_lse_close(lse, ref_lse)
    floats = dict(q_scale=0.7, k_scale=1.3, v_scale=2.0)
    out, _, _ = paged(batch, q, 16, **floats)
    ref, _, _ = paged(batch, q, 16, backend="reference", **floats)
    assert_close(out, ref)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (512, 512), (100, 777), (777, 100), (3, 40_000), (16, 4096)], ids=str)
def test_single_prefill(shape, causal):
    """Short queries over long keys also take the packed-heads and split-KV variants."""
    q = queries(shape[0], HEADS, 128, E4M3)
    k, v = (queries(shape[1], KV_HEADS, 128, E4M3, seed=s) for s in (2, 3))
    args = dict(causal=causal, return_lse=True)
    out, lse = cute_infer.single_prefill_with_kv_cache(q, k, v, **args)
    ref, ref_lse = cute_infer.single_prefill_with_kv_cache(q, k, v, backend="reference", **args)
    assert out.dtype == BF16
    assert_close(out, ref)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("scale", ["positional", "keywords"])
def test_flashinfers_spelling_of_scales(scale):
    """scale_q per query head, scale_k and scale_v per KV head, after v."""
    q, k, v = queries(sum(QO), HEADS, 128, E4M3), *(queries(sum(KV), KV_HEADS, 128, E4M3, seed=s) for s in (2, 3))
    gen = torch.Generator("cuda").manual_seed(7)
    scales = [torch.rand(n, device="cuda", generator=gen) + 0.5 for n in (HEADS, KV_HEADS, KV_HEADS)]
    outs = []
    for backend in ("auto", "reference"):
        wrapper = cute_infer.BatchPrefillWithRaggedKVCacheWrapper(backend=backend)
        wrapper.plan(indptr(QO), indptr(KV), HEADS, KV_HEADS, 128, causal=True, q_data_type=E4M3, kv_data_type=E4M3, o_data_type=FP16)
        named = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
        outs.append(wrapper.run(q, k, v, *scales) if scale == "positional" else wrapper.run(q, k, v, **named))
    assert outs[0].dtype == FP16
    assert_close(*outs)


@pytest.mark.parametrize("fast", [False, True])
def test_graph_replay_with_other_lengths(fast):
    page, rows, names = 16, 1400, ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
    cache = tuple(queries(300 * page, KV_HEADS, 128, E4M3, seed=s).unflatten(0, (300, page)) for s in (2, 3))  # any page may be used
    q = queries(rows, HEADS, 128, E4M3)
    plan = dict(causal=True, q_data_type=E4M3, kv_data_type=E4M3, fp8_fast_accumulation=fast)

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
        assert_close(out[:used], reference.run(q[:used], cache))


def inputs(name, tokens):
    """q, k, v ``[tokens, HEADS, 128]`` fp32: with 2048 queries enough work that the keys are not split, with 256 they are."""
    gen = torch.Generator("cuda").manual_seed(11)
    normal = lambda: torch.randn(tokens, HEADS, 128, device="cuda", generator=gen)  # noqa: E731
    if name == "normal":
        return normal(), normal(), normal()
    if name == "outliers":
        rare = lambda: torch.rand(tokens, HEADS, 128, device="cuda", generator=gen) < 0.001  # noqa: E731
        return tuple(normal() + 10 * normal() * rare() for _ in range(3))
    return normal(), normal(), normal().abs()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("tokens", [1024, 16384])
@pytest.mark.parametrize("queries_of", [256, 2048])
@pytest.mark.parametrize("name", ["normal", "outliers", "positive v"])
def test_accuracy_beside_an_eight_bit_reference_in_torch(name, tokens, queries_of, fast):
    """Per-head scales; the reference has exact products and P in e4m3 under a shift of 2^8, the kernel also wgmma's short accumulator.

    For a sum of one sign that accumulator loses about 4e-4 in 32 keys: until the next promotion, or to the end in the fast mode.
    """
    if queries_of > tokens:
        pytest.skip("more queries than keys")
    original = inputs(name, tokens)
    scales = [x.abs().amax((0, 2)) / 448 for x in original]
    q, k, v = ((x / s[None, :, None]).to(E4M3) for x, s in zip(original, scales, strict=True))
    q = q[:queries_of]
    exact, emulated = [], []
    for h in range(HEADS):
        qd, kd, vd = (x[:, h].double() * s[h] for x, s in zip((q, k, v), scales, strict=True))
        scores = qd @ kd.T * 128**-0.5
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        exact.append(p @ vd / p.sum(-1, keepdim=True))
        emulated.append((p * 256).float().to(E4M3).double() / 256 @ vd / p.sum(-1, keepdim=True))
    exact, emulated = torch.stack(exact, 1), torch.stack(emulated, 1)
    out = cute_infer.single_prefill_with_kv_cache(q, k, v, *scales, fp8_fast_accumulation=fast)
    drift = (5e-4 * tokens / 32 if fast else 0.007) if name == "positive v" else 0.0
    assert relative(out, exact) <= 1.1 * relative(emulated, exact) + 2**-9 + drift, (relative(out, exact), relative(emulated, exact))


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((torch.float8_e5m2, E4M3), "float8_e5m2, whose two bits"),
        ((E4M3, torch.float8_e5m2), "k and v are float8_e5m2: wgmma"),
    ],
    ids=str,
)
def test_refused_dtypes(dtypes, message):
    q, k, v = (queries(64, 4, 128, BF16).to(dtypes[i > 0]) for i in range(3))
    with pytest.raises(cute_infer.errors.UnsupportedConfigError, match=message):
        cute_infer.single_prefill_with_kv_cache(q, k, v)
