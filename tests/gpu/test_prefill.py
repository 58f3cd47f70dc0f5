"""Prefill kernels against the fp32 reference on a GPU, with poisoned caches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import cute_infer
from cute_infer.attention import tiles_prefill_sm90
from tests.gpu.batches import assert_close, assert_lse_close, paged_batch, queries
from tests.gpu.kernels import FAMILIES, only, skip_if_refused

pytestmark = pytest.mark.gpu

QO = [0, 1, 17, 64, 127, 128, 129, 300, 5, 33]
KV = [7, 1, 17, 200, 128, 64, 1000, 300, 0, 500]  # longer, equal, shorter than the queries, and none at all
E4M3, E5M2, FP16, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    qo: int = 8
    kv: int = 2
    d: int = 128
    dv: int | None = None
    page: int = 16
    q: torch.dtype = BF16
    kvt: torch.dtype | None = None
    layout: str = "NHD"
    form: str = "separate"
    causal: bool = False
    plan: tuple = ()

    def __str__(self) -> str:
        changed = [getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return "-".join(str(value).replace("torch.", "") for value in changed) or "default"


OPTIONS = [
    Case(),
    Case(causal=True),
    Case(causal=True, q=FP16),
    *(Case(d=d, causal=c) for d in (64, 96, 192, 256) for c in (False, True)),
    Case(d=192, dv=128, causal=True),
    Case(d=40),
    *(Case(qo=h, kv=k, causal=True) for h, k in ((4, 4), (7, 1), (12, 4), (16, 1))),
    Case(causal=True, plan=(("window_left", 50),)),
    Case(plan=(("window_left", 20),)),
    Case(causal=True, plan=(("logits_soft_cap", 8.0),)),
    Case(causal=True, plan=(("pos_encoding_mode", "ROPE_LLAMA"),)),
    Case(causal=True, plan=(("pos_encoding_mode", "ALIBI"),)),
    Case(causal=True, plan=(("sm_scale", 0.3),)),
]
PAGED = [
    *OPTIONS,
    *(Case(page=p, causal=True) for p in (1, 2, 4, 5, 8, 32, 48, 64, 128, 256)),
    *(Case(page=p, plan=(("pos_encoding_mode", "ALIBI"),)) for p in (1, 16)),
    Case(page=4, layout="HND", plan=(("window_left", 50),)),
    Case(kvt=E4M3, causal=True),
    Case(kvt=E5M2, q=FP16),
    Case(layout="HND", causal=True),
    Case(form="combined", causal=True),
    Case(form="permuted", layout="HND"),
]


def indptr(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def paged(case, batch, q, qo_lens=QO, backend="auto", plan=None, **run):
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper(kv_layout=case.layout, backend=backend)
    wrapper.plan(
        indptr(qo_lens), batch.indptr, batch.indices, batch.last_page_len, case.qo, case.kv, case.d, case.page, head_dim_vo=case.dv,
        causal=case.causal, q_data_type=case.q, kv_data_type=case.kvt or case.q, **dict(case.plan), **(plan or {}),
    )  # fmt: skip
    out, lse = wrapper.run(q, batch.cache, return_lse=True, **run)
    wrapper.check()
    return out, lse, wrapper


def ragged(case, q, k, v, backend="auto", plan=None):
    wrapper = cute_infer.BatchPrefillWithRaggedKVCacheWrapper(backend=backend)
    wrapper.plan(
        indptr(QO), indptr(KV), case.qo, case.kv, case.d, head_dim_vo=case.dv, causal=case.causal,
        q_data_type=case.q, kv_data_type=case.kvt or case.q, **dict(case.plan), **(plan or {}),
    )  # fmt: skip
    return *wrapper.run(q, k, v, return_lse=True), wrapper


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", PAGED, ids=str)
def test_paged_against_reference(case, family, monkeypatch):
    only(monkeypatch, family)
    batch = paged_batch(KV, case.kv, case.d, case.page, case.kvt or case.q, head_dim_vo=case.dv, kv_layout=case.layout, form=case.form)
    q = queries(sum(QO), case.qo, case.d, case.q, strided=True)
    try:
        out, lse, wrapper = paged(case, batch, q)
    except cute_infer.UnsupportedConfigError as error:
        skip_if_refused(error)
    ref, ref_lse, _ = paged(case, batch, q, backend="reference")
    assert family in str(wrapper.resolved_backend)
    assert_close(out, ref, dtype=case.q)
    assert_lse_close(lse, ref_lse)
    assert torch.equal(out, paged(case, batch, q)[0]), "not bitwise repeatable"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_ragged_against_reference(case, family, monkeypatch):
    only(monkeypatch, family)
    q = queries(sum(QO), case.qo, case.d, case.q)
    k = queries(sum(KV), case.kv, case.d, case.q, strided=True, seed=2)
    v = queries(sum(KV), case.kv, case.dv or case.d, case.q, strided=True, seed=3)
    try:
        out, lse, _ = ragged(case, q, k, v)
    except cute_infer.UnsupportedConfigError as error:
        skip_if_refused(error)
    ref, ref_lse, _ = ragged(case, q, k, v, backend="reference")
    assert_close(out, ref, dtype=case.q)
    assert_lse_close(lse, ref_lse)
    k_nan, v_nan = k.clone(), v.clone()  # one request's NaN must stay its own
    k_nan[KV[0] + 1 :][: KV[2]] = v_nan[KV[0] + 1 :][: KV[2]] = torch.nan
    poisoned, _, _ = ragged(case, q, k_nan, v_nan)
    keep = torch.ones(sum(QO), dtype=torch.bool)
    keep[1 : 1 + QO[2]] = False
    assert torch.equal(poisoned[keep], out[keep])


@pytest.mark.skipif("sm90" not in FAMILIES, reason="the Hopper kernel's queue")
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("page", [1, 16])
def test_last_round_of_items_in_halves(page, d, monkeypatch):
    """152 blocks x heads of 128 rows: on 132 SMs 20 are left over and handed out as halves, some of them without rows.

    Their bits are those of a launch with other left-overs.
    """
    only(monkeypatch, "sm90")
    case, qo_lens, kv_lens = Case(page=page, d=d), [*QO, 200, 513], [*KV, 100, 700]
    batch = paged_batch(kv_lens, case.kv, d, page, BF16)
    q = queries(sum(qo_lens), case.qo, d, BF16)
    out, lse, _ = paged(case, batch, q, qo_lens)
    ref_out, ref_lse, _ = paged(case, batch, q, qo_lens, backend="reference")
    assert_close(out, ref_out, dtype=BF16)
    assert_lse_close(lse, ref_lse)
    wide = Case(qo=16, kv=4, d=d, page=page)  # 304 items: 40 left over for 132 SMs, of other heads
    again = paged_batch(kv_lens, 4, d, page, BF16)
    for ours, theirs in zip(again.cache, batch.cache, strict=True):
        ours[:, :, :2] = theirs
    wide_out, _, _ = paged(wide, again, torch.cat([q, q], 1), qo_lens)
    assert torch.equal(wide_out[:, :8], out)


@pytest.mark.skipif("sm90" not in FAMILIES, reason="options of the Hopper kernel's tile")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("changes", [{"v_warp": True}, {"cluster": 2}, {"cluster": 2, "v_warp": True}], ids=str)
def test_load_warps_and_clusters_change_no_bit(changes, causal, monkeypatch):
    """Who brings K and V into shared memory, and for how many SMs, is not what is computed."""
    only(monkeypatch, "sm90")
    choose = tiles_prefill_sm90.choose
    for case in (Case(causal=causal), Case(causal=causal, page=128), Case(causal=causal, d=256)):
        batch = paged_batch(KV, case.kv, case.d, case.page, BF16)
        q = queries(sum(QO), case.qo, case.d, BF16)
        k, v = (torch.randn(sum(KV), case.kv, case.d, device="cuda").bfloat16() for _ in range(2))
        expected = [*paged(case, batch, q)[:2], *ragged(case, q, k, v)[:2]]
        with monkeypatch.context() as patch:
            patch.setattr(tiles_prefill_sm90, "choose", lambda *args: dataclasses.replace(choose(*args), **changes))
            for _ in range(3):
                found = [*paged(case, batch, q)[:2], *ragged(case, q, k, v)[:2]]
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("case", [Case(page=8), Case(page=16), Case(page=5), Case(d=96), Case(d=80), Case(d=192, dv=128, page=32)], ids=str)
def test_heads_any_distance_apart(case, layout, family, monkeypatch):
    """The heads of a cache may lie any multiple of 16 bytes apart: no whole number of swizzled blocks, K and V one after the other."""
    only(monkeypatch, family)
    case = dataclasses.replace(case, layout=layout, causal=True)
    batch = paged_batch(KV, case.kv, case.d, case.page, BF16, head_dim_vo=case.dv, kv_layout=layout)
    q = queries(sum(QO), case.qo, case.d, BF16)
    try:
        out, lse, _ = paged(case, batch, q)
    except cute_infer.UnsupportedConfigError as error:
        skip_if_refused(error)
    k, v = batch.cache
    padding = torch.full((*k.shape[:-1], 8), torch.nan, device="cuda", dtype=BF16)
    both = torch.cat([k, padding, v, padding, padding], dim=-1)
    if layout == "HND":  # a page of a head and its padding
        both = torch.nn.functional.pad(both.flatten(2), (0, 8), value=torch.nan)[..., : both.shape[2] * both.shape[3]].unflatten(
            2, both.shape[2:]
        )
    d = k.shape[-1]
    apart = dataclasses.replace(batch, cache=(both[..., :d], both[..., d + 8 : d + 8 + v.shape[-1]]))
    again, lse_again, _ = paged(case, apart, q)
    assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_custom_mask(causal, packed, page, family, monkeypatch):
    only(monkeypatch, family)
    case = Case(causal=causal, page=page)
    batch = paged_batch(KV, case.kv, case.d, case.page, BF16)
    q = queries(sum(QO), case.qo, case.d, BF16)
    keep = torch.rand(sum(a * b for a, b in zip(QO, KV, strict=True)), device="cuda") < 0.3
    plan = dict(custom_mask=keep)
    if packed:
        sizes = indptr([a * b for a, b in zip(QO, KV, strict=True)])
        bits = cute_infer.segment_packbits(keep, sizes, bitorder="little")[0]
        plan = dict(packed_custom_mask=torch.cat([bits.new_zeros(3), bits])[3:])  # begins inside a word and ends with the allocation
    try:
        out, lse, _ = paged(case, batch, q, plan=plan)
    except cute_infer.UnsupportedConfigError as error:
        skip_if_refused(error)
    ref, ref_lse, _ = paged(case, batch, q, backend="reference", plan=plan)
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (512, 512), (100, 777), (777, 100), (2048, 2048), (3, 40_000)], ids=str)
def test_single_prefill(shape, causal, family, monkeypatch):
    only(monkeypatch, family)
    qo_len, kv_len = shape
    q = queries(qo_len, 8, 128, FP16)
    k, v = (queries(kv_len, 2, 128, FP16, seed=s) for s in (2, 3))
    out, lse = cute_infer.single_prefill_with_kv_cache(q, k, v, causal=causal, return_lse=True)
    ref, ref_lse = cute_infer.single_prefill_with_kv_cache(q, k, v, causal=causal, return_lse=True, backend="reference")
    assert_close(out, ref, dtype=FP16)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_sinks_and_extreme_logits(family, monkeypatch):
    only(monkeypatch, family)
    case = Case(causal=True)
    batch = paged_batch(KV, case.kv, case.d, case.page, BF16)
    q = queries(sum(QO), case.qo, case.d, BF16) * 30
    k_scale, v_scale = (torch.rand(2, device="cuda") + 0.5 for _ in range(2))
    run = dict(k_scale=k_scale, v_scale=v_scale, sinks=torch.randn(8, device="cuda") * 5)
    out, lse, _ = paged(case, batch, q, **run)
    ref, ref_lse, _ = paged(case, batch, q, backend="reference", **run)
    assert_close(out, ref, dtype=BF16)
    assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_of_more_than_2_to_the_31_elements(family, monkeypatch):
    only(monkeypatch, family)
    pages = 2**31 // (16 * 8 * 128) + 200
    k, v = (torch.empty(pages, 16, 8, 128, device="cuda", dtype=BF16) for _ in range(2))
    small = paged_batch(KV, 8, 128, 16, BF16, spare_pages=0)
    far = small.indices[: small.indptr[-1]] + (pages - int(small.indptr[-1]))
    for cache, values in zip((k, v), small.cache, strict=True):
        cache[-values.shape[0] :] = values
    q = queries(sum(QO), 8, 128, BF16)
    case = Case(kv=8, causal=True)
    ref, _, _ = paged(case, small, q)
    out, _, _ = paged(case, dataclasses.replace(small, cache=(k, v), indices=far), q)
    assert torch.equal(out, ref)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page", [1, 4, 16])
def test_one_graph_serves_every_batch_up_to_its_tokens(page, family, monkeypatch):
    only(monkeypatch, family)
    batch_size, max_tokens, max_pages = 5, 400, 5 * -(-640 // page)
    buffers = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (batch_size + 1, batch_size + 1, max_pages, batch_size)]
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper(
        use_cuda_graph=True, qo_indptr_buf=buffers[0], paged_kv_indptr_buf=buffers[1], paged_kv_indices_buf=buffers[2],
        paged_kv_last_page_len_buf=buffers[3],
    )  # fmt: skip
    k, v = (torch.empty(max_pages + 3, page, 2, 128, device="cuda", dtype=BF16) for _ in range(2))
    q = queries(max_tokens, 8, 128, BF16)
    first = paged_batch([80] * batch_size, 2, 128, page, BF16)
    wrapper.plan(
        indptr([80] * batch_size), first.indptr, first.indices[: int(first.indptr[-1])], first.last_page_len, 8, 2, 128, page,
        causal=True, q_data_type=BF16,
    )  # fmt: skip
    wrapper.run(q, (k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wrapper.run(q, (k, v))
    for seed in range(20):
        gen = torch.Generator().manual_seed(seed)
        qo_lens = torch.randint(0, max_tokens // batch_size + 1, (batch_size,), generator=gen).tolist()
        kv_lens = [n + int(torch.randint(0, 500, (), generator=gen)) for n in qo_lens]
        batch = paged_batch(kv_lens, 2, 128, page, BF16, seed=seed)
        used = int(batch.indptr[-1])
        for mine, theirs in zip((k, v), batch.cache, strict=True):
            mine.fill_(torch.nan)
            mine[: theirs.shape[0]] = theirs
        buffers[0].copy_(indptr(qo_lens))
        buffers[1].copy_(batch.indptr)
        buffers[2][:used] = batch.indices[:used]
        buffers[3].copy_(batch.last_page_len)
        q.normal_()
        graph.replay()
        rows = sum(qo_lens)
        ref, _, _ = paged(Case(causal=True, page=page), batch, q[:rows], qo_lens, backend="reference")
        assert_close(out[:rows], ref, dtype=BF16, what=f"replay {seed}")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_streams(family, monkeypatch):
    only(monkeypatch, family)
    inputs = [[queries(900, 8, 128, FP16, seed=10 * i + j)[:, : 8 if j == 0 else 2] for j in range(3)] for i in range(2)]
    refs = [cute_infer.single_prefill_with_kv_cache(*x, causal=True) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    outs: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[i].append(cute_infer.single_prefill_with_kv_cache(*inputs[i], causal=True))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(o, refs[i]) for o in outs[i])
