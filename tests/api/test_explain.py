"""``wrapper.explain()`` and ``repr(wrapper)``: what they say, without a GPU, about GPUs that are not here."""

from __future__ import annotations

import pytest
import torch

import cute_infer as fi
from cute_infer.attention import explain as explain_module
from tests.cases import PREFILL
from tests.poison import make_batch


def decode_wrapper(batch_size: int, pages: int, *, heads: tuple[int, int] = (32, 8), **plan):
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    indptr = torch.arange(batch_size + 1, dtype=torch.int32) * pages
    last = torch.full((batch_size,), 16, dtype=torch.int32)
    plan = dict(q_data_type=torch.bfloat16) | plan
    wrapper.plan(indptr, torch.arange(batch_size * pages, dtype=torch.int32), last, *heads, 128, 16, **plan)
    return wrapper


SM_80 = """\
decode_sm80 on sm_80
  spec       decode q=bfloat16 kv=bfloat16 d=128 group=4 paged page=16
  batch      2 requests, 2 query rows, 2048 KV tokens, longest 1024
  tile       warps=4, tokens=16, stages=2, split_kv=True
  grid       208 CTAs on 108 SMs, 13 KV splits, clusters of 1; merge: a second kernel
  memory     8.4 MB of KV, 32.8 kB of q and results, 429.3 kB of workspace
  predicted  10.6 us at 2.00 TB/s, launch included"""

REFERENCE = """\
reference: torch in fp32, one request at a time
  spec       decode q=bfloat16 kv=bfloat16 d=128 group=4 paged page=16
  batch      2 requests, 2 query rows, 2048 KV tokens, longest 1024
  memory     8.4 MB of KV, 32.8 kB of q and results, 0 B of workspace"""


def test_as_text():
    wrapper = decode_wrapper(2, 64)
    assert str(wrapper.explain("sm_80")) == SM_80
    assert str(wrapper.explain()) == REFERENCE
    unknown = str(wrapper.explain("sm_80", lengths=False))
    assert "lengths on the device" in unknown and "predicted" not in unknown and "208 CTAs" in unknown


def test_bytes_and_time_of_decode():
    told = decode_wrapper(64, 512).explain("sm_90a")
    assert told.kernel == "decode_sm90" and told.num_sms == 132 and told.arch == "sm_90a"
    assert told.kv_tokens == 64 * 8192 and told.longest == 8192
    assert told.kv_bytes == 64 * 8192 * 8 * 128 * 2 * 2
    assert told.io_bytes == 64 * 32 * 128 * 2 * 2
    assert told.workspace_bytes == 0 and told.num_splits == 1
    assert told.num_ctas % told.cluster == 0 and told.num_ctas * getattr(told.tile, "heads_per_item", 1) >= 64 * 8
    seconds = (told.kv_bytes + told.io_bytes) / told.bandwidth + explain_module.LAUNCH_SECONDS
    assert told.predicted_us == pytest.approx(1e6 * seconds)
    fp8 = decode_wrapper(64, 512, kv_data_type=torch.float8_e4m3fn).explain("sm_90a")
    assert 2 * fp8.kv_bytes == told.kv_bytes and fp8.predicted_us < told.predicted_us


def test_a_window_reads_less():
    told = decode_wrapper(4, 64, window_left=99).explain("sm_90a")
    assert told.kv_tokens == 4 * 100 and told.longest == 1024


def test_workspace_of_splits_matches_what_is_allocated():
    wrapper = decode_wrapper(1, 64, heads=(8, 1))
    for target in ("sm_80", "sm_90a"):
        told = wrapper.explain(target)
        assert told.num_splits > 1 and told.tile.split_kv
        assert told.workspace_bytes == told.num_splits * 8 * (128 + 1) * 4
        invariant = decode_wrapper(1, 64, heads=(8, 1), disable_split_kv=True).explain(target)
        assert invariant.num_splits == 1 and invariant.workspace_bytes == 0 and invariant.batch_invariant


@pytest.mark.parametrize("causal", [False, True])
def test_prefill(causal):
    qo_lens, kv_lens = (3, 5, 4), (10, 5, 2)  # the last has more rows than keys
    rows = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    keys = torch.tensor([0, 10, 15, 17], dtype=torch.int32)
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper()
    wrapper.plan(rows, keys, 8, 2, 128, causal=causal)
    pairs = 0
    for m, n in zip(qo_lens, kv_lens):
        visible = torch.ones(m, n).tril(n - m) if causal else torch.ones(m, n)
        pairs += int(visible.sum())
    for target, kernel in (("sm_90a", "prefill_sm90"), ("sm_80", "prefill_sm80")):
        told = wrapper.explain(target)
        assert told.kernel == kernel and told.total_q == 12 and told.num_ctas > 0
        assert told.flops == 2 * 8 * (128 + 128) * pairs
        assert told.kv_bytes == 17 * 2 * 256 * 2


def test_long_prefill_is_bound_by_the_tensor_cores():
    rows = torch.tensor([0, 8192], dtype=torch.int32)
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper()
    wrapper.plan(rows, rows, 32, 8, 128)
    told = wrapper.explain("sm_90a")
    assert told.flops == 4 * 8192**2 * 32 * 128
    assert told.predicted_us == pytest.approx(1e6 * (told.flops / 989e12 + explain_module.LAUNCH_SECONDS))
    assert told.num_ctas == told.num_sms  # persistent


def test_eight_bit_products_take_half_the_time():
    rows = torch.tensor([0, 8192], dtype=torch.int32)
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper()
    wrapper.plan(rows, rows, 32, 8, 128, q_data_type=torch.float8_e4m3fn, kv_data_type=torch.float8_e4m3fn)
    told = wrapper.explain("sm_90a")
    assert told.kernel == "prefill_sm90_fp8" and told.flops == 4 * 8192**2 * 32 * 128
    assert told.predicted_us == pytest.approx(1e6 * (told.flops / (2 * 989e12) + explain_module.LAUNCH_SECONDS))


def test_paged_prefill_and_several_rows_per_request():
    case = PREFILL[1]
    batch = make_batch(case)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(batch.qo_indptr, *batch.csr, case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size, head_dim_vo=case.dv)
    told = wrapper.explain()
    assert (told.kv_tokens, told.longest, told.total_q) == (sum(case.kv_lens), max(case.kv_lens), sum(case.rows))
    told = decode_wrapper(3, 2, q_len_per_req=4).explain("sm_90a")
    assert told.spec.kind == "prefill" and told.total_q == 12 and told.kv_tokens == 96


def test_the_spec_is_that_of_the_last_run():
    wrapper = decode_wrapper(2, 1)
    q, cache = torch.zeros(2, 32, 128).bfloat16(), torch.zeros(2, 2, 16, 8, 128).bfloat16()
    assert not wrapper.explain().spec.lse
    wrapper.run(q, cache, return_lse=True)
    assert wrapper.explain().spec.lse and wrapper.explain().io_bytes == 2 * 32 * (128 * 2 * 2 + 4)


def test_errors():
    with pytest.raises(fi.PlanError, match="explain"):
        fi.BatchDecodeWithPagedKVCacheWrapper().explain()
    with pytest.raises(fi.DeviceError):
        decode_wrapper(1, 1).explain("hopper")
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    one = torch.tensor([0, 1], dtype=torch.int32)
    wrapper.plan(one, one[:1], one[1:], 1, 1, 36, 16)
    with pytest.raises(fi.UnsupportedConfigError):
        wrapper.explain("sm_80")
    assert wrapper.explain().kernel == "reference"


def test_repr(monkeypatch):
    wrapper = decode_wrapper(2, 64)
    assert repr(wrapper) == (
        "BatchDecodeWithPagedKVCacheWrapper(reference, batch_size=2, decode q=bfloat16 kv=bfloat16 d=128 group=4 paged page=16, "
        "NHD on any device)"
    )
    monkeypatch.setattr(wrapper, "explain", lambda lengths: decode_wrapper(2, 64).explain("sm_80", lengths=lengths))
    assert "(decode_sm80, warps=4, tokens=16, stages=2, split_kv=True, 208 CTAs on 108 SMs, 13 KV splits, batch_size=2," in repr(wrapper)

    def refuse(lengths):
        raise fi.UnsupportedConfigError("no")

    monkeypatch.setattr(wrapper, "explain", refuse)
    assert "no kernel" in repr(wrapper) and "not planned" in repr(fi.BatchPrefillWithRaggedKVCacheWrapper())


@pytest.mark.parametrize("n, text", [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (7 * 10**9, "7.00 GB")])
def test_byte_counts(n, text):
    assert explain_module._bytes(n) == text
