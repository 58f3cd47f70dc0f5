"""The plan/run wrappers on the CPU: every form of cache and metadata, every option, and what engines do with them."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import cute_infer as fi
from cute_infer.attention import decode as decode_module
from cute_infer.attention import launch as launch_module
from cute_infer.attention import plan as plan_module
from cute_infer.attention import reference, tiles, tiles_decode_sm80
from cute_infer.attention import wrapper as wrapper_module
from cute_infer.attention.mask_bits import packbits, segment_packbits
from cute_infer.errors import ConfigError, MissingKernelError
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


# -------------------------------------------------------------------------------------------------------------------- repeated launches
class Launches:
    """Stands for a GPU: CPU tensors take the way of CUDA tensors, and the reference computes what a kernel is told to by its arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.long_ways = self.kernels = 0
        monkeypatch.setattr(plan_module, "_bind", self.bind)
        monkeypatch.setattr(wrapper_module, "run_attention", self.run_attention)

    def bind(self, spec, *_):
        def kernel(q, k, v, out, lse, *rest):
            self.kernels += 1
            metadata, (sm_scale, out_scale, soft_cap, lse_scale, rope_rcp_scale, rope_log2_theta, window_left) = rest[:9], rest[12:19]
            names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "mask", "mask_indptr", "sinks", "k_scale", "v_scale")
            reference.attention(
                spec, q, k, v, out, lse, **dict(zip(names, metadata)), sm_scale=sm_scale, out_scale=out_scale, soft_cap=soft_cap,
                lse_scale=lse_scale, rope_scale=1 / rope_rcp_scale, rope_theta=2**rope_log2_theta, window_left=window_left, status=None,
            )  # fmt: skip

        choice = tiles.Choice("stub", "stub:Stub", tiles_decode_sm80.DecodeSm80Tile(4, 16, 2))
        return plan_module.BoundKernel(kernel, choice, 1, 132)

    def run_attention(self, spec, q, k, v, out, lse, *, batch_size, workspace, backend, batch_invariant, **rest):
        self.long_ways += 1
        tensors = "qo_indptr kv_indptr kv_indices kv_last_page_len mask mask_indptr sinks k_scale v_scale"
        scalars = "sm_scale out_scale soft_cap lse_scale rope_scale rope_theta window_left"
        args = (q, k, v, out, lse, *(rest.get(name) for name in tensors.split()))
        return launch_module._launch(spec, batch_size, args, tuple(rest[name] for name in scalars.split()), workspace, batch_invariant)

    def count(self, call):
        """``(result, times the long way was taken)``; the kernel runs exactly once."""
        long_ways, kernels = self.long_ways, self.kernels
        result = call()
        assert self.kernels == kernels + 1
        return result, self.long_ways - long_ways


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


def entry_points(case: Case, batch: Batch):
    ragged = fi.BatchPrefillWithRaggedKVCacheWrapper()
    ragged.plan(batch.qo_indptr, batch.kv_indptr, *arguments(case)[:3])
    k, v = pages(batch)
    yield planned_decode(case, batch), ((k, v),), ((k * 2, v * 3),)
    yield planned_decode(case, batch), (torch.stack([k, v], 1),), (torch.stack([k * 2, v * 3], 1),)
    hnd = [x.transpose(1, 2).contiguous() for x in (k, v)]
    yield planned_decode(case, batch, kv_layout="HND"), (tuple(hnd),), ((hnd[0] * 2, hnd[1] * 3),)
    yield planned_decode(case, batch, kv_layout="HND"), (torch.stack(hnd, 1),), (torch.stack([hnd[0] * 2, hnd[1] * 3], 1),)
    yield planned_prefill(case, batch), ((k, v),), ((k * 2, v * 3),)
    yield ragged, (batch.k, batch.v), (batch.k * 2, batch.v * 3)


@pytest.mark.parametrize("entry", range(6))
def test_the_next_layer_repeats_the_launch(launches, entry):
    case = Case("one-row-each", (9, 4), (1, 1))
    batch = make_batch(case)
    wrapper, first, second = list(entry_points(case, batch))[entry]
    other_q = batch.q * 0.5
    _, ways = launches.count(lambda: wrapper.run(batch.q, *first, return_lse=True))
    assert ways == 1
    (out, lse), ways = launches.count(lambda: wrapper.run(other_q, *second, return_lse=True, k_scale=0.5, v_scale=2.0))
    assert ways == 0
    wrapper._launch = None
    (want, want_lse), ways = launches.count(lambda: wrapper.run(other_q, *second, return_lse=True, k_scale=0.5, v_scale=2.0))
    assert ways == 1 and torch.equal(out, want) and torch.equal(lse, want_lse) and out.dtype == want.dtype
    given = torch.empty_like(want)
    (got, _), ways = launches.count(lambda: wrapper.run(strided(other_q), *second, return_lse=True, k_scale=0.5, v_scale=2.0, out=given))
    assert ways == 0 and got is given and torch.equal(given, want)


CHANGES = {
    "sm_scale": lambda w, b: setattr(w, "_sm_scale", 0.3),
    "soft cap": lambda w, b: setattr(w, "_logits_soft_cap", 1.5),
    "lengths": lambda w, b: setattr(w, "_paged_kv_last_page_len_buf", torch.ones_like(b.last_page_len)),
    "plan": lambda w, b: w.plan(*b.csr, 4, 2, 16, 4, sm_scale=0.4),
    "workspace": lambda w, b: w.reset_workspace_buffer(torch.empty(64, dtype=torch.uint8), None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_run_reads_is_never_stale(launches, change):
    """Engines assign to a wrapper's attributes; a launch kept from before must not hide it."""
    case = Case("two", (9, 4), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4)
    batch = make_batch(case)
    wrapper, fresh = planned_decode(case, batch), planned_decode(case, batch)
    before = wrapper.run(batch.q, pages(batch))
    CHANGES[change](wrapper, batch)
    CHANGES[change](fresh, batch)
    out, ways = launches.count(lambda: wrapper.run(batch.q, pages(batch)))
    assert ways == 1 and torch.equal(out, fresh.run(batch.q, pages(batch)))
    assert change == "workspace" or not torch.equal(out, before)


RUNS = {
    "lse": dict(return_lse=True),
    "ln": dict(return_lse=True, lse_base="ln"),
    "window": dict(window_left=2),
    "sinks": dict(sinks=torch.linspace(-1, 1, 4)),
    "tensor scale": dict(k_scale=torch.tensor(0.5)),
    "negative scale": dict(q_scale=-1.0),
    "no scale": dict(q_scale=0.0),
    "integer scale": dict(v_scale=2),
    "float scale": dict(v_scale=2.0),
    "plain": {},
}


def test_runs_that_differ_do_not_share_a_launch(launches):
    case = Case("two", (9, 4), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4)
    batch = make_batch(case)
    fresh = lambda: planned_decode(case, batch)  # noqa: E731
    want = {name: fresh().run(batch.q, pages(batch), **options) for name, options in RUNS.items()}
    wrapper = fresh()
    for first in RUNS:
        for second in RUNS:
            wrapper.run(batch.q, pages(batch), **RUNS[first])
            got = wrapper.run(batch.q, pages(batch), **RUNS[second])
            for a, b in zip(got, want[second], strict=True):
                assert torch.equal(a, b), (first, second)


def test_a_kept_launch_hides_no_error(launches):
    case = Case("two", (9, 4), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4)
    batch = make_batch(case)
    wrapper = planned_decode(case, batch)
    k, v = pages(batch)
    wrapper.run(batch.q, (k, v))
    wrong = [
        (batch.q[:1], (k, v), {}, fi.ShapeError),
        (batch.q.float(), (k, v), {}, fi.DTypeError),
        (batch.q, (k[:, :3], v[:, :3]), {}, fi.ShapeError),
        (batch.q, (k, v.float()), {}, fi.DTypeError),
        (None, (k, v), {}, fi.DTypeError),
        (batch.q, (k, v, v), {}, fi.DTypeError),
        (batch.q, (k, v), dict(out=torch.empty(1, 4, 16).half()), fi.ShapeError),
        (batch.q, (k, v), dict(out=torch.empty(2, 4, 16)), fi.DTypeError),
        (batch.q, (k, v), dict(out=[]), fi.DTypeError),
        (batch.q, (k, v), dict(sinks=torch.zeros(3)), fi.ShapeError),
        (batch.q, (k, v), dict(lse_base="2"), fi.LayoutError),
        (batch.q, (k, v), dict(return_lse=True, lse_base="2"), fi.LayoutError),
    ]
    for q, cache, options, error in wrong:
        with pytest.raises(error):
            wrapper.run(q, cache, **options)


@pytest.mark.parametrize(
    "change", [{"sm_scale": torch.tensor([1.0, 2.0])}, {"window_left": 1.5}, {"num_kv_heads": 3}, {"logits_soft_cap": float("nan")}]
)
def test_a_second_plan_is_checked_like_the_first(change):
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    table = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    arguments = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "sm_scale": 0.5}
    wrapper.plan(*table, **arguments)
    with pytest.raises(ConfigError):
        wrapper.plan(*table, **{**arguments, **change})
    wrapper.plan(*table, **arguments)


def test_a_kernel_that_did_not_load_is_tried_again(monkeypatch):
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    table = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    loads = []

    def load(*_):
        loads.append(1)
        if len(loads) < 3:
            raise MissingKernelError("not now")

    monkeypatch.setattr(wrapper, "_compile_ahead", load)
    for _ in range(2):
        with pytest.raises(MissingKernelError):
            wrapper.plan(*table, 4, 2, 64, 16)
    wrapper.plan(*table, 4, 2, 64, 16)
    wrapper.plan(*table, 4, 2, 64, 16)  # loaded: not again
    assert len(loads) == 3
    wrapper.plan(*table, 4, 2, 128, 16)
    assert len(loads) == 4
