"""The plan/run wrappers on the CPU: every form of cache and metadata, every option, and what engines do with them."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import cute_infer as fi
from cute_infer.attention import decode as decode_module
from cute_infer.attention.mask_bits import packbits, segment_packbits
from tests.cases import DECODE, PREFILL, Case
from tests.checks import assert_attention_close, torch_attention
from tests.poison import Batch, make_batch, offsets, strided

LN2 = math.log(2.0)
OPTIONS = {
    "plain": {},
    "window": dict(window_left=3),
    "soft-cap": dict(logits_soft_cap=2.0),
    "rope": dict(pos_encoding_mode="ROPE_LLAMA", rope_scale=2.0, rope_theta=1e3),
    "alibi": dict(pos_encoding_mode="ALIBI"),
    "sm-scale": dict(sm_scale=0.6),
}


def arguments(case: Case) -> tuple[int, int, int, int]:
    return case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size


def planned_decode(case: Case, batch: Batch, *, kv_layout: str = "NHD", **plan):
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(kv_layout=kv_layout)
    wrapper.plan(*batch.csr, *arguments(case), q_data_type=case.q_dtype, kv_data_type=case.kv, **plan)
    return wrapper


def planned_prefill(case: Case, batch: Batch, **plan):
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(batch.qo_indptr, *batch.csr, *arguments(case), head_dim_vo=case.dv, q_data_type=case.q_dtype, kv_data_type=case.kv, **plan)
    return wrapper


def pages(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.k_pages, batch.v_pages


def expected(case: Case, batch: Batch, **options):
    """Each request alone through single_prefill (checked against four loops in test_reference.py)."""
    outs, lses = [], []
    for r in range(len(case.kv_lens)):
        out, lse = fi.single_prefill_with_kv_cache(*batch.request(r), return_lse=True, **options)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


# ------------------------------------------------------------------------------------------------------------------------------ results
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode(case):
    batch = make_batch(case)
    out, lse = planned_decode(case, batch).run(batch.q, pages(batch), return_lse=True)
    want, want_lse = expected(case, batch)
    assert out.dtype == case.q_dtype and lse.dtype == torch.float32
    assert torch.equal(out, want)
    torch.testing.assert_close(lse, want_lse)
    for r, n in enumerate(case.kv_lens):
        if n == 0:
            assert (out[r] == 0).all() and torch.isneginf(lse[r]).all()
        else:
            q, k, v = batch.request(r)
            ref = torch_attention(q.float(), k.float(), v.float())
            assert_attention_close(out[r : r + 1], ref, torch_attention(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_paged_and_ragged(case, causal):
    batch = make_batch(case)
    want, want_lse = expected(case, batch, causal=causal)
    out, lse = planned_prefill(case, batch, causal=causal).run(batch.q, pages(batch), return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    for layout in ("NHD", "HND"):
        ragged = fi.BatchPrefillWithRaggedKVCacheWrapper(kv_layout=layout)
        ragged.plan(
            batch.qo_indptr, batch.kv_indptr, *arguments(case)[:3], case.dv, causal=causal, q_data_type=case.q_dtype, kv_data_type=case.kv
        )
        k, v = (x if layout == "NHD" else x.transpose(0, 1).contiguous() for x in (batch.k, batch.v))
        out, lse = ragged.run_return_lse(batch.q, k, v)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_every_entry_point_honours_every_option(option):
    case = Case("one-row-each", (9, 4), (1, 1))
    batch = make_batch(case)
    want, want_lse = expected(case, batch, **option)
    for r in range(2):
        q, k, v = batch.request(r)
        out, lse = fi.single_decode_with_kv_cache(q[0], k, v, return_lse=True, **option)
        torch.testing.assert_close(out, want[r])
        torch.testing.assert_close(lse, want_lse[r])
    ragged = fi.BatchPrefillWithRaggedKVCacheWrapper()
    ragged.plan(batch.qo_indptr, batch.kv_indptr, *arguments(case)[:3], **option)
    results = [
        planned_decode(case, batch, **option).run(batch.q, pages(batch), return_lse=True),
        planned_prefill(case, batch, **option).run(batch.q, pages(batch), return_lse=True),
        ragged.run(batch.q, batch.k, batch.v, return_lse=True),
    ]
    for out, lse in results:
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)
    if option:
        assert not torch.equal(want, expected(case, batch)[0]) or not torch.equal(want_lse, expected(case, batch)[1])


CACHES = {
    "tuple": lambda k, v: (k, v),
    "list": lambda k, v: [k, v],
    "combined": lambda k, v: torch.stack([k, v], 1),
    "permuted": lambda k, v: torch.stack([k, v], 0).transpose(0, 1),
    "strided": lambda k, v: (strided(k), strided(v)),
}


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", CACHES.values(), ids=CACHES)
def test_cache_forms(form, kv_layout):
    case = DECODE[1]
    batch = make_batch(case)
    k, v = pages(batch) if kv_layout == "NHD" else (x.transpose(1, 2).contiguous() for x in pages(batch))
    wrapper = planned_decode(case, batch, kv_layout=kv_layout)
    want, _ = expected(case, batch)
    assert torch.equal(wrapper.run(batch.q, form(k, v)), want)
    assert torch.equal(wrapper.run(batch.q, k, v), want)  # the quick start's spelling
    assert torch.equal(wrapper.run(strided(batch.q), (k, v)), want)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_page_size_1_may_leave_out_the_page_dimension(kv_layout):
    case = DECODE[3]
    batch = make_batch(case)
    k, v = (x[:, 0] for x in pages(batch))
    wrapper = planned_decode(case, batch, kv_layout=kv_layout)
    want, _ = expected(case, batch)
    for cache in ((k, v), torch.stack([k, v], 1)):
        assert torch.equal(wrapper.run(batch.q, cache), want)


def test_several_query_tokens_per_request_are_causal():
    case = Case("q-len-3", (3, 8, 13), (3, 3, 3))
    batch = make_batch(case)
    wrapper = planned_decode(case, batch, q_len_per_req=3)
    out, lse = wrapper.run(batch.q, pages(batch), return_lse=True)
    want, want_lse = expected(case, batch, causal=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(wrapper.run(batch.q, pages(batch), q_len_per_req=3), want)


def test_block_tables_and_seq_lens():
    case = DECODE[2]
    batch = make_batch(case)
    table = torch.full((len(case.kv_lens), 6), 2**31 - 1, dtype=torch.int32)
    for r in range(len(case.kv_lens)):
        ids = batch.page_indices[batch.page_indptr[r] : batch.page_indptr[r + 1]]
        table[r, : len(ids)] = ids
    form = dict(block_tables=table, seq_lens=torch.tensor(case.kv_lens), q_data_type=case.q_dtype)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(None, None, None, *arguments(case), **form)
    want, _ = expected(case, batch)
    assert torch.equal(wrapper.run(batch.q, pages(batch)), want)
    prefill = fi.BatchPrefillWithPagedKVCacheWrapper()
    prefill.plan(offsets([1] * len(case.kv_lens)), None, None, None, *arguments(case), **form)
    assert torch.equal(prefill.run(batch.q, pages(batch)), want)


@pytest.mark.parametrize("packed", [False, True])
def test_custom_mask(packed):
    case = PREFILL[1]
    batch = make_batch(case)
    masks = [torch.rand(a, b) < 0.5 for a, b in zip(case.rows, case.kv_lens)]
    flat = torch.cat([m.flatten() for m in masks])
    given = dict(custom_mask=flat)
    if packed:
        given = dict(packed_custom_mask=segment_packbits(flat, offsets([m.numel() for m in masks]), bitorder="little")[0])
    out = planned_prefill(case, batch, causal=True, **given).run(batch.q, pages(batch))
    ragged = fi.BatchPrefillWithRaggedKVCacheWrapper()
    ragged.plan(batch.qo_indptr, batch.kv_indptr, *arguments(case)[:3], causal=True, **given)
    for r, mask in enumerate(masks):
        rows = slice(int(batch.qo_indptr[r]), int(batch.qo_indptr[r + 1]))
        alone = dict(packed_custom_mask=packbits(mask.flatten(), bitorder="little")) if packed else dict(custom_mask=mask)
        want = fi.single_prefill_with_kv_cache(*batch.request(r), **alone)
        assert torch.equal(out[rows], want)
        assert torch.equal(ragged.run(batch.q, batch.k, batch.v)[rows], want)


# ------------------------------------------------------------------------------------------------------------------------------- scales
@pytest.mark.parametrize("form", ["float", "one", "per-head", "positional"])
def test_scales(form):
    case = DECODE[8]
    batch = make_batch(case)
    per_head = {name: torch.rand(2) + 0.5 for name in ("q", "k", "v")}
    if form == "float":
        per_head = {name: torch.full((2,), float(x[0])) for name, x in per_head.items()}
        given = {f"{name}_scale": float(x[0]) for name, x in per_head.items()}
    elif form == "one":
        per_head = {name: x[:1].expand(2) for name, x in per_head.items()}
        given = {f"{name}_scale": x[0] for name, x in per_head.items()}
    else:
        given = {f"{name}_scale": x for name, x in per_head.items()}
    wrapper = planned_decode(case, batch)
    if form == "positional":
        out, lse = wrapper.run(batch.q, pages(batch), *per_head.values(), return_lse=True)
    else:
        out, lse = wrapper.run(batch.q, pages(batch), return_lse=True, **given)
    for r in range(len(case.kv_lens)):
        q, k, v = batch.request(r)
        k = k.float() * (per_head["q"] * per_head["k"])[:, None]
        ref, ref_lse = fi.single_prefill_with_kv_cache(q.float(), k, v.float() * per_head["v"][:, None], return_lse=True)
        torch.testing.assert_close(out[r : r + 1].float(), ref, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse[r : r + 1], ref_lse)


def test_sinks_join_the_denominator():
    case = DECODE[1]
    batch = make_batch(case)
    sinks = torch.randn(case.num_qo_heads)
    wrapper = planned_decode(case, batch)
    out, lse = wrapper.run(batch.q, pages(batch), return_lse=True, sinks=sinks)
    plain, plain_lse = wrapper.run(batch.q, pages(batch), return_lse=True)
    want_lse = torch.logaddexp(plain_lse * LN2, sinks) / LN2
    torch.testing.assert_close(lse, want_lse)
    torch.testing.assert_close(out.float(), plain.float() * torch.exp2(plain_lse - want_lse)[..., None], rtol=2e-3, atol=2e-3)


def test_lse_base():
    case = PREFILL[1]
    batch = make_batch(case)
    wrapper = planned_prefill(case, batch)
    _, base_2 = wrapper.run(batch.q, pages(batch), return_lse=True)
    _, natural = wrapper.run(batch.q, pages(batch), return_lse=True, lse_base="ln")
    torch.testing.assert_close(natural, base_2 * LN2)
    logits = torch.einsum("nhd,lhd->nhl", batch.request(0)[0].float(), batch.request(0)[1].float().repeat_interleave(2, 1)) / 4
    torch.testing.assert_close(natural[: case.rows[0]], logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_outputs_given_by_the_caller():
    case = DECODE[1]
    batch = make_batch(case)
    wrapper = planned_decode(case, batch, o_data_type=torch.float32)
    out, lse = torch.empty(len(case.kv_lens), 4, 16), torch.empty(len(case.kv_lens), 4)
    got = wrapper.run(batch.q, pages(batch), out=out, lse=lse)
    assert got is out and out.dtype == torch.float32
    again = wrapper.run(batch.q, pages(batch), out=out, lse=lse, return_lse=True)
    assert again[0] is out and again[1] is lse and lse.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------- what engines rely on
def test_forward_overrides_the_plan():
    """SGLang plans without options and gives them to forward()."""
    case = PREFILL[1]
    batch = make_batch(case)
    options = dict(causal=True, sm_scale=0.3, window_left=5, logits_soft_cap=4.0)
    want, want_lse = expected(case, batch, **options)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.begin_forward(batch.qo_indptr, *batch.csr, *arguments(case))
    assert torch.equal(wrapper.forward(batch.q, pages(batch), **options), want)
    out, lse = wrapper.forward_return_lse(batch.q, pages(batch), **options)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    ragged = fi.BatchPrefillWithRaggedKVCacheWrapper()
    ragged.begin_forward(batch.qo_indptr, batch.kv_indptr, *arguments(case)[:3])
    assert torch.equal(ragged.forward(batch.q, batch.k, batch.v, **options), want)
    assert torch.equal(ragged.forward_return_lse(batch.q, batch.k, batch.v, **options)[1], want_lse)
    wrapper.end_forward()

    case = DECODE[1]
    batch = make_batch(case)
    options = dict(sm_scale=0.3, window_left=2, logits_soft_cap=4.0)
    want, want_lse = expected(case, batch, **options)
    wrapper = planned_decode(case, batch)
    assert torch.equal(wrapper.forward(batch.q, pages(batch), **options), want)
    assert torch.equal(wrapper.forward_return_lse(batch.q, pages(batch), **options)[1], want_lse)


def test_window_at_run_time():
    case = DECODE[1]
    batch = make_batch(case)
    wrapper = planned_decode(case, batch)
    assert torch.equal(wrapper.run(batch.q, pages(batch), window_left=2), expected(case, batch, window_left=2)[0])
    assert torch.equal(wrapper.run(batch.q, pages(batch)), expected(case, batch)[0])


def graph_wrapper(batch_size: int, max_pages: int):
    buffers = torch.zeros(batch_size + 1).int(), torch.zeros(max_pages).int(), torch.ones(batch_size).int()
    return fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, *buffers), buffers


def test_graph_mode_reads_the_callers_buffers():
    case = DECODE[0]
    first, second = make_batch(case), make_batch(Case("later", (3,)), seed=5)
    wrapper, buffers = graph_wrapper(1, 8)
    used = lambda b: (b.page_indptr, b.page_indices[: int(b.page_indptr[-1])], b.last_page_len)  # noqa: E731
    wrapper.plan(*used(first), *arguments(case))
    assert wrapper.is_cuda_graph_enabled and wrapper._paged_kv_indices_buf is buffers[1]
    assert torch.equal(wrapper.run(first.q, pages(first)), expected(case, first)[0])
    for buffer, new in zip(buffers, used(second)):  # what an engine does before it replays a graph
        buffer[: len(new)] = new
    assert torch.equal(wrapper.run(second.q, pages(second)), expected(Case("later", (3,)), second)[0])


def test_graph_mode_of_prefill():
    case = PREFILL[1]
    batch = make_batch(case)
    mask = torch.ones(sum(a * b for a, b in zip(case.rows, case.kv_lens)), dtype=torch.bool)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(
        use_cuda_graph=True,
        qo_indptr_buf=torch.zeros(4).int(),
        paged_kv_indptr_buf=torch.zeros(4).int(),
        paged_kv_indices_buf=torch.zeros(32).int(),
        paged_kv_last_page_len_buf=torch.zeros(3).int(),
        custom_mask_buf=torch.zeros(1000, dtype=torch.uint8),
        mask_indptr_buf=torch.zeros(4).int(),
    )
    wrapper.plan(batch.qo_indptr, *batch.csr, *arguments(case), custom_mask=mask)
    longer = torch.cat([batch.q, batch.q])
    assert torch.equal(wrapper.run(longer, pages(batch))[: len(batch.q)], expected(case, batch)[0])


def test_fast_decode_plan_installed_as_sglang_does():
    case = DECODE[1]
    batch = make_batch(case)
    wrapper = planned_decode(case, batch)
    other_case = Case("other", (2, 9))
    other = make_batch(other_case)
    wrapper.begin_forward = functools.partial(fi.fast_decode_plan, wrapper)
    wrapper.begin_forward(*other.csr, *arguments(case), data_type=torch.float16, non_blocking=True)
    assert torch.equal(wrapper.forward(other.q, pages(other)), expected(other_case, other)[0])
    graph, buffers = graph_wrapper(2, 8)
    for buffer, new in zip(buffers, other.csr):
        buffer[: len(new)] = new[: len(buffer)]
    fi.fast_decode_plan(graph, *buffers, *arguments(case))
    assert torch.equal(graph.run(other.q, pages(other)), expected(other_case, other)[0])


def test_attributes_engines_read():
    case = DECODE[1]
    batch = make_batch(case)
    wrapper = planned_decode(case, batch, window_left=5, logits_soft_cap=3.0, sm_scale=0.25)
    assert (wrapper._window_left, wrapper._logits_soft_cap, wrapper._sm_scale, wrapper._causal) == (5, 3.0, 0.25, False)
    assert wrapper._plan_info is not None and wrapper._kv_layout == "NHD" and wrapper._backend == "auto"
    assert wrapper._paged_kv_indptr_buf is batch.page_indptr  # read live, not copied
    assert wrapper._cached_module.plan(*range(18))
    assert planned_decode(case, batch)._logits_soft_cap == 0.0
    prefill = planned_prefill(PREFILL[0], make_batch(PREFILL[0]), causal=True)
    assert prefill._causal is True and prefill._custom_mask_buf is None and prefill._mask_indptr_buf is None
    assert decode_module._get_range_buf(5, "cpu").tolist() == [0, 1, 2, 3, 4]
    graph, _ = graph_wrapper(3, 8)
    assert graph._fixed_batch_size == 3 and graph._use_cuda_graph


def test_workspace():
    case = DECODE[1]
    batch = make_batch(case)
    float_bytes, int_bytes = fi.BatchDecodeWithPagedKVCacheWrapper().workspace_size(*batch.csr, *arguments(case))
    assert float_bytes > 0 and int_bytes > 0
    buffer = torch.empty(float_bytes, dtype=torch.uint8)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(buffer)
    assert wrapper._float_workspace_buffer is buffer and wrapper.device == buffer.device
    wrapper.plan(*batch.csr, *arguments(case))
    wrapper.run(batch.q, pages(batch))
    wrapper.reset_workspace_buffer(torch.empty(64, dtype=torch.uint8), torch.empty(int_bytes, dtype=torch.uint8))
    assert torch.equal(wrapper.run(batch.q, pages(batch)), expected(case, batch)[0])
    prefill = fi.BatchPrefillWithPagedKVCacheWrapper().workspace_size(batch.qo_indptr, *batch.csr, *arguments(case))
    assert min(prefill) > 0


def test_repr_and_resolved_backend():
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(backend="fa2")
    assert "not planned" in repr(wrapper) and wrapper.resolved_backend == "unplanned"
    batch = make_batch(DECODE[0])
    wrapper.plan(*batch.csr, *arguments(DECODE[0]))
    assert "batch_size=1" in repr(wrapper) and "group=2" in repr(wrapper)
    wrapper.run(batch.q, pages(batch))
    assert wrapper.resolved_backend == "reference"


def test_metadata_edited_in_place_is_seen():
    case = Case("two", (8, 8))
    batch = make_batch(case)
    wrapper = planned_decode(case, batch)
    batch.last_page_len[0] = 1
    out = wrapper.run(batch.q, pages(batch))
    q, k, v = batch.request(0)
    assert torch.equal(out[0], fi.single_decode_with_kv_cache(q[0], k[:5], v[:5]))


def test_int64_metadata_is_converted():
    case = DECODE[1]
    batch = make_batch(case)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*(x.long() for x in batch.csr), *arguments(case))
    assert torch.equal(wrapper.run(batch.q, pages(batch)), expected(case, batch)[0])


def test_reference_on_request(monkeypatch):
    from cute_infer import config

    assert fi.BatchDecodeWithPagedKVCacheWrapper(backend="reference")._backend == "reference"
    monkeypatch.setenv("CUTE_INFER_BACKEND", "reference")
    config.reload_config()
    try:
        assert fi.BatchPrefillWithPagedKVCacheWrapper()._backend == "reference"
    finally:
        monkeypatch.undo()
        config.reload_config()


# --------------------------------------------------------------------------------------------------------------------------- page tables
def test_get_seq_lens_of_a_request_without_pages():
    lens = fi.get_seq_lens(torch.tensor([0, 2, 2, 5]).int(), torch.tensor([3, 16, 16]).int(), 16)
    assert lens.tolist() == [19, 0, 48] and lens.dtype == torch.int32


def test_batch_indices_positions():
    indptr = torch.tensor([0, 1, 3, 3, 6]).int()
    batch_indices, positions = fi.get_batch_indices_positions(indptr, torch.tensor([5, 5, 9, 4]).int(), 8)
    assert batch_indices.tolist() == [0, 1, 1, 3, 3, 3, -1, -1]
    assert positions.tolist() == [4, 3, 4, 1, 2, 3, 0, 0]
    given = torch.full((8,), 7).int(), torch.full((8,), 7).int()
    got = fi.get_batch_indices_positions(indptr, torch.tensor([5, 5, 9, 4]).int(), 8, *given)
    assert got[0] is given[0] and torch.equal(got[0], batch_indices) and torch.equal(got[1], positions)
    empty = fi.get_batch_indices_positions(torch.tensor([0]).int(), torch.zeros(0).int(), 2)
    assert empty[0].tolist() == [-1, -1]


def test_page_table_of_nothing():
    table = fi.from_page_table(torch.zeros(2, 0, dtype=torch.int32), page_size=4, seq_lens=torch.tensor([0, 0]))
    assert table.indptr.tolist() == [0, 0, 0] and len(table.indices) == 0


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("lengths", [[], [0], [1], [8, 0, 9], [3, 4, 17, 0, 64, 1]])
def test_packbits(lengths, bitorder):
    np = pytest.importorskip("numpy")
    x = torch.rand(sum(lengths)) < 0.5
    assert packbits(x, bitorder).tolist() == np.packbits(x.numpy(), bitorder=bitorder).tolist()
    packed, indptr = segment_packbits(x, offsets(lengths), bitorder)
    parts = [np.packbits(part.numpy(), bitorder=bitorder).tolist() for part in x.split(lengths)] if lengths else []
    assert packed.tolist() == sum(parts, []) and indptr.tolist() == offsets([len(p) for p in parts]).tolist()
