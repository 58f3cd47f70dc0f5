"""The reference against attention written as four nested loops, over every option; and what must hold whatever the numbers are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cute_infer as fi
from cute_infer.attention import reference
from cute_infer.attention.mask_bits import segment_packbits
from cute_infer.attention.options import make_spec
from tests.cases import DECODE, PREFILL, Case
from tests.checks import assert_attention_close, torch_attention
from tests.poison import INT_MAX, Batch, make_batch, offsets, strided

SLOPES = {4: [2**-2, 2**-4, 2**-6, 2**-8], 6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]}

OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_left=3),
    "causal-window-0": dict(causal=True, window_left=0),
    "soft-cap": dict(soft_cap=2.0),
    "sm-scale": dict(sm_scale=0.7),
    "rope": dict(rope=(1.0, 1e4)),
    "rope-scaled-causal": dict(rope=(4.0, 5e5), causal=True),
    "alibi": dict(alibi=True),
    "alibi-soft-cap-causal": dict(alibi=True, soft_cap=3.0, causal=True),
    "mask": dict(mask=True),
    "mask-beats-causal": dict(mask=True, causal=True),
    "mask-window": dict(mask=True, window_left=2),
    "sinks": dict(sinks=True),
    "sinks-causal": dict(sinks=True, causal=True),
    "scales": dict(k_scale=True, v_scale=True, out_scale=0.5),
    "everything": dict(causal=True, window_left=4, soft_cap=5.0, rope=(2.0, 1e3), sinks=True, k_scale=True, v_scale=True, out_scale=3.0),
}


def rotate(x, position, rope):
    """One vector, the pairs (d, d + D/2) turned by position * theta^(-2d/D) / scale."""
    if rope is None:
        return x
    scale, theta = rope
    half = len(x) // 2
    y = list(x)
    for d in range(half):
        a = position * theta ** (-2 * d / len(x)) / scale
        y[d] = x[d] * math.cos(a) - x[d + half] * math.sin(a)
        y[d + half] = x[d + half] * math.cos(a) + x[d] * math.sin(a)
    return y


def naive(q, k, v, *, sm_scale=None, causal=False, window_left=-1, soft_cap=0.0, rope=None, alibi=False, mask=None, sinks=None,
          k_scale=None, v_scale=None, out_scale=1.0, decode=False):  # fmt: skip
    """Attention of one request in Python floats: q [n, Hq, D], k and v [L, Hkv, D] -> out, natural lse."""
    n, heads, dim = q.shape
    length, group = k.shape[0], heads // k.shape[1]
    out, lse = torch.zeros(n, heads, v.shape[2], dtype=torch.float64), torch.full((n, heads), -math.inf, dtype=torch.float64)
    for i, h in itertools.product(range(n), range(heads)):
        g, position, weights = h // group, length - n + i, {}
        for j in range(length):
            hidden = not mask[i][j] if mask is not None else causal and not decode and j > position
            if hidden or (window_left >= 0 and j < position - window_left):
                continue
            a, b = rotate(q[i, h].double().tolist(), position, rope), rotate(k[j, g].double().tolist(), j, rope)
            s = sum(x * y for x, y in zip(a, b)) * (sm_scale or dim**-0.5) * (k_scale[g] if k_scale is not None else 1)
            s = soft_cap * math.tanh(s / soft_cap) if soft_cap else s
            weights[j] = math.exp(s + (SLOPES[heads][h] * (j - i) if alibi else 0))
        total = sum(weights.values()) + (math.exp(sinks[h]) if sinks is not None else 0)
        if total:
            lse[i, h] = math.log(total)
            row = sum((w / total * v[j, g].double() for j, w in weights.items()), torch.zeros(v.shape[2], dtype=torch.float64))
            out[i, h] = row * out_scale * (v_scale[g] if v_scale is not None else 1)
    return out, lse


def run_reference(case: Case, batch: Batch, layout: str, option: dict, *, noncontiguous: bool = False, out_dtype=torch.float32):
    """The batch through ``reference.attention`` and, request by request, through :func:`naive`."""
    gen = torch.Generator().manual_seed(1)
    option = dict(option)
    sinks = torch.randn(case.num_qo_heads, generator=gen) if option.pop("sinks", False) else None
    k_scale = torch.rand(case.num_kv_heads, generator=gen) + 0.5 if option.pop("k_scale", False) else None
    v_scale = torch.rand(case.num_kv_heads, generator=gen) + 0.5 if option.pop("v_scale", False) else None
    sizes = [a * b for a, b in zip(case.rows, case.kv_lens)]
    bits = torch.rand(sum(sizes), generator=gen) < 0.5 if option.pop("mask", False) else None
    rope, alibi, soft_cap = option.get("rope"), option.get("alibi", False), option.get("soft_cap", 0.0)

    spec = make_spec(
        "decode" if case.qo_lens is None else "prefill", layout, case.q_dtype, case.kv, out_dtype, case.head_dim, case.dv,
        case.num_qo_heads // case.num_kv_heads, case.page_size if layout == "paged" else 0, option.get("causal", False),
        option.get("window_left", -1) >= 0, bool(soft_cap), "ROPE_LLAMA" if rope else "ALIBI" if alibi else "NONE",
        bits is not None, sinks is not None, k_scale is not None, v_scale is not None, True,
    )  # fmt: skip
    k, v = (batch.k_pages, batch.v_pages) if layout == "paged" else (batch.k.unsqueeze(0), batch.v.unsqueeze(0))
    q = batch.q
    if noncontiguous:
        q, k, v = strided(q), strided(k), strided(v)
    out = torch.full((len(q), case.num_qo_heads, case.dv), torch.nan, dtype=out_dtype)
    lse = torch.full(out.shape[:2], torch.nan)
    mask, mask_indptr = segment_packbits(bits, offsets(sizes), bitorder="little") if bits is not None else (None, None)
    metadata = {}
    if layout == "paged":
        metadata = dict(kv_indptr=batch.page_indptr, kv_indices=batch.page_indices, kv_last_page_len=batch.last_page_len)
    elif layout == "ragged":
        metadata = dict(kv_indptr=batch.kv_indptr)
    if layout != "single" and case.qo_lens is not None:
        metadata["qo_indptr"] = batch.qo_indptr
    reference.attention(
        spec, q, k, v, out, lse, **metadata, mask=mask, mask_indptr=mask_indptr, sinks=sinks, k_scale=k_scale, v_scale=v_scale,
        sm_scale=option.get("sm_scale", case.head_dim**-0.5), out_scale=option.get("out_scale", 1.0), soft_cap=soft_cap,
        rope_scale=rope[0] if rope else 1.0, rope_theta=rope[1] if rope else 1e4, window_left=option.get("window_left", -1),
    )  # fmt: skip

    expected, begin = [], 0
    for r, (n, length) in enumerate(zip(case.rows, case.kv_lens)):
        m = bits[begin : begin + sizes[r]].view(n, length).tolist() if bits is not None else None
        begin += sizes[r]
        lists = dict(sinks=sinks.tolist() if sinks is not None else None)
        lists |= {name: x.tolist() if x is not None else None for name, x in (("k_scale", k_scale), ("v_scale", v_scale))}
        expected.append(naive(*batch.request(r), mask=m, decode=case.qo_lens is None, **lists, **option))
    return (out, lse), tuple(torch.cat(x) for x in zip(*expected))


@pytest.mark.parametrize("layout", ["paged", "ragged"])
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", [PREFILL[1], DECODE[2]], ids=["prefill", "decode"])
def test_every_option(case, option, layout):
    (out, lse), (want, natural_lse) = run_reference(case, make_batch(case), layout, option)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double() * math.log(2), natural_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*DECODE, *PREFILL], ids=lambda c: f"{'prefill' if c.qo_lens else 'decode'}-{c}")
def test_every_shape(case):
    option = OPTIONS["causal"] if case.qo_lens else {}
    (out, lse), (want, natural_lse) = run_reference(case, make_batch(case), "paged", option, noncontiguous=True)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double() * math.log(2), natural_lse, rtol=1e-5, atol=1e-5)


def test_single_owns_everything():
    case = PREFILL[0]
    (out, _), (want, _) = run_reference(case, make_batch(case), "single", OPTIONS["mask"])
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_alibi_of_heads_that_are_no_power_of_two():
    case = Case("six-heads", (5, 9), (2, 3), num_qo_heads=6, num_kv_heads=3)
    (out, lse), (want, natural_lse) = run_reference(case, make_batch(case), "paged", OPTIONS["alibi"])
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double() * math.log(2), natural_lse, rtol=1e-5, atol=1e-5)


def test_rows_in_chunks_equal_rows_at_once(monkeypatch):
    case = PREFILL[1]
    whole, _ = run_reference(case, make_batch(case), "paged", OPTIONS["everything"])
    monkeypatch.setattr(reference, "_CHUNK", 1)
    chunked, _ = run_reference(case, make_batch(case), "paged", OPTIONS["everything"])
    for a, b in zip(whole, chunked):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [INT_MAX, -7])
def test_a_page_outside_the_cache_reads_as_zeros_and_is_reported(bad):
    case = Case("two-pages", (8, 8))
    batch = make_batch(case)
    spec = make_spec("decode", "paged", case.q_dtype, case.kv, torch.float32, 16, 16, 2, 4, False, False, False, "NONE", *[False] * 4, True)
    indices = batch.page_indices.clone()
    indices[1] = bad

    def attend(k_pages, v_pages, indices):
        out, lse, status = torch.empty(2, 4, 16), torch.empty(2, 4), torch.zeros(4, dtype=torch.int32)
        reference.attention(
            spec, batch.q, k_pages, v_pages, out, lse, kv_indptr=batch.page_indptr, kv_indices=indices,
            kv_last_page_len=batch.last_page_len, sm_scale=0.25, status=status,
        )  # fmt: skip
        return out, lse, int(status[0])

    zeroed = [x.clone() for x in (batch.k_pages, batch.v_pages)]
    for pages in zeroed:
        pages[batch.page_indices[1]] = 0
    want = attend(*zeroed, batch.page_indices)
    got = attend(batch.k_pages, batch.v_pages, indices)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert (want[2], got[2]) == (0, 1)
    short = attend(batch.k_pages, batch.v_pages, batch.page_indices[:3])  # an index past the end of indices
    assert short[0].isfinite().all() and short[2] == 1


def test_error_budget_catches_a_wrong_result():
    case = PREFILL[0]
    batch = make_batch(case)
    (out, _), _ = run_reference(case, batch, "paged", OPTIONS["causal"])
    same = torch_attention(*batch.request(0), causal=True)
    half = out.half()
    assert_attention_close(half, out, same)
    assert_attention_close(half, out)
    for spoil in (lambda x: x.mul_(1.01), lambda x: x[3, 1, 2].fill_(math.nan), lambda x: x[0].fill_(math.inf)):
        wrong = half.clone()
        spoil(wrong)
        with pytest.raises(AssertionError, match=r"out\[|NaN|inf"):
            assert_attention_close(wrong, out, same)


# ------------------------------------------------------------------------------------------------------------------------ properties
lengths = st.lists(st.integers(0, 11), min_size=1, max_size=4)


def plan_and_run(case: Case, q, csr, pages, **options):
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper()
    qo_indptr = offsets(case.rows)
    wrapper.plan(qo_indptr, *csr, case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size, **options)
    return wrapper.run(q, pages, return_lse=True)


@settings(max_examples=20, deadline=None)
@given(kv_lens=lengths, seed=st.integers(0, 99), causal=st.booleans())
def test_permuting_requests_permutes_results(kv_lens, seed, causal):
    case = Case("any", tuple(kv_lens), tuple((n + 1) // 2 for n in kv_lens))
    batch = make_batch(case, seed=seed)
    pages = (batch.k_pages, batch.v_pages)
    out, lse = plan_and_run(case, batch.q, batch.csr, pages, causal=causal)
    order = torch.randperm(len(kv_lens), generator=torch.Generator().manual_seed(seed)).tolist()
    moved = Case("moved", tuple(kv_lens[r] for r in order), tuple(case.rows[r] for r in order))
    rows = [torch.arange(batch.qo_indptr[r], batch.qo_indptr[r + 1]) for r in order]
    ids = [batch.page_indices[batch.page_indptr[r] : batch.page_indptr[r + 1]] for r in order]
    csr = offsets([len(x) for x in ids]), torch.cat(ids), batch.last_page_len[order]
    out2, lse2 = plan_and_run(moved, batch.q[torch.cat(rows)], csr, pages, causal=causal)
    assert torch.equal(out2, out[torch.cat(rows)]) and torch.equal(lse2, lse[torch.cat(rows)])


@settings(max_examples=20, deadline=None)
@given(kv_lens=lengths, seed=st.integers(0, 99))
def test_shuffling_the_cache_with_its_table_changes_nothing(kv_lens, seed):
    case = Case("any", tuple(kv_lens), tuple((n + 1) // 2 for n in kv_lens))
    batch = make_batch(case, seed=seed)
    out, lse = plan_and_run(case, batch.q, batch.csr, (batch.k_pages, batch.v_pages))
    order = torch.randperm(len(batch.k_pages), generator=torch.Generator().manual_seed(seed))
    new_id = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    used = int(batch.page_indptr[-1])
    csr = batch.page_indptr, new_id[batch.page_indices[:used].long()].to(torch.int32), batch.last_page_len
    out2, lse2 = plan_and_run(case, batch.q, csr, (batch.k_pages[order], batch.v_pages[order]))
    assert torch.equal(out, out2) and torch.equal(lse, lse2)


@settings(max_examples=20, deadline=None)
@given(kv_len=st.integers(2, 30), data=st.data(), soft_cap=st.sampled_from([None, 4.0]))
def test_splitting_kv_and_merging_equals_no_split(kv_len, data, soft_cap):
    cut = data.draw(st.integers(0, kv_len))
    gen = torch.Generator().manual_seed(kv_len)
    q, k, v = (torch.randn(n, h, 16, generator=gen) for n, h in ((3, 4), (kv_len, 2), (kv_len, 2)))
    attend = lambda s: fi.single_prefill_with_kv_cache(q, k[s], v[s], logits_soft_cap=soft_cap, return_lse=True)  # noqa: E731
    whole, lse = attend(slice(None))
    merged, merged_lse = fi.merge_state(*attend(slice(0, cut)), *attend(slice(cut, None)))
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-5, atol=1e-5)
