"""The quick start, call by call: what is right runs as written, what is wrong is refused by name."""

from __future__ import annotations

import pytest
import torch

import cute_infer as flashinfer
from tests.checks import assert_attention_close, torch_attention

device = "cpu"


def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=device)


def test_example_1_single_decode():
    k, v, q = randn(2048, 32, 128), randn(2048, 32, 128), randn(32, 128)
    output = flashinfer.single_decode_with_kv_cache(q, k, v)
    printed = [
        f"Input query shape: {q.shape}",
        f"KV cache shape: {k.shape}",
        f"Output shape: {output.shape}",
        f"Output dtype: {output.dtype}",
    ]
    assert printed == [
        "Input query shape: torch.Size([32, 128])",
        "KV cache shape: torch.Size([2048, 32, 128])",
        "Output shape: torch.Size([32, 128])",
        "Output dtype: torch.float16",
    ]
    ref = torch_attention(q[None].float(), k.float(), v.float())[0]
    assert_attention_close(output, ref, torch_attention(q[None], k, v)[0])
    torch.testing.assert_close(output.float(), ref, rtol=1e-2, atol=1e-3)  # the tolerance the guide names


def test_example_2_single_prefill():
    q, k, v = (randn(128, 4, 128) for _ in range(3))
    output = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
    ref = torch_attention(q.float(), k.float(), v.float(), causal=True)
    assert_attention_close(output, ref, torch_attention(q, k, v, causal=True))


def test_example_3_rope():
    k, v, q = randn(100, 4, 128), randn(100, 4, 128), randn(4, 128)
    output = flashinfer.single_decode_with_kv_cache(q, k, v, pos_encoding_mode="ROPE_LLAMA")
    assert output.shape == (4, 128)
    assert not torch.allclose(output, flashinfer.single_decode_with_kv_cache(q, k, v), atol=1e-3)


def batch_decode(num_pages: int, pages_of_seq, last_page_len):
    batch_size, num_qo_heads, num_kv_heads, head_dim, page_size = 8, 4, 4, 16, 16
    seq_lens = torch.tensor([128, 256, 512, 1024, 1500, 2000, 2048, 1800], device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace_buffer=torch.empty(1024 * 1024, dtype=torch.uint8, device=device), kv_layout="NHD"
    )
    queries = randn(batch_size, num_qo_heads, head_dim)
    paged_k = randn(num_pages, page_size, num_kv_heads, head_dim)
    paged_v = randn(num_pages, page_size, num_kv_heads, head_dim)
    indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
    indptr[1:] = torch.cumsum(pages_of_seq(seq_lens, page_size), dim=0)
    wrapper.plan(
        indptr=indptr,
        indices=torch.arange(num_pages, dtype=torch.int32, device=device),
        last_page_len=last_page_len(seq_lens, page_size),
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
    )
    return queries, paged_k, paged_v, indptr, seq_lens, wrapper.run(queries, paged_k, paged_v)


def full_pages(seq_lens, page_size):
    return torch.full((len(seq_lens),), page_size, dtype=torch.int32, device=device)


def test_example_4_as_written_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match="indptr ends at 578 pages while indices has 256") as caught:
        batch_decode(256, lambda n, page: n // page, full_pages)
    assert isinstance(caught.value, flashinfer.PageTableError)
    assert "(n + page_size - 1) // page_size" in str(caught.value)


def test_example_4_corrected():
    queries, k, v, indptr, seq_lens, output = batch_decode(
        580, lambda n, page: (n + page - 1) // page, lambda n, page: ((n - 1) % page + 1).to(torch.int32)
    )
    assert output.shape == queries.shape
    for r, n in enumerate(seq_lens.tolist()):
        keys, values = (x[indptr[r] : indptr[r + 1]].flatten(0, 1)[:n] for x in (k, v))
        ref = torch_attention(queries[r : r + 1].float(), keys.float(), values.float())[0]
        assert_attention_close(output[r], ref, torch_attention(queries[r : r + 1], keys, values)[0])


def test_example_5_generation_loop():
    k_cache, v_cache = torch.zeros(10, 32, 128).half(), torch.zeros(10, 32, 128).half()
    k_cache[:5], v_cache[:5] = randn(5, 32, 128), randn(5, 32, 128)
    assert flashinfer.single_prefill_with_kv_cache(randn(5, 32, 128), k_cache[:5], v_cache[:5], causal=True).shape == (5, 32, 128)
    for n in range(6, 11):
        k_cache[n - 1], v_cache[n - 1] = randn(32, 128), randn(32, 128)
        q = randn(32, 128)
        out = flashinfer.single_decode_with_kv_cache(q, k_cache[:n], v_cache[:n])
        ref = torch_attention(q[None].float(), k_cache[:n].float(), v_cache[:n].float())[0]
        assert_attention_close(out, ref, torch_attention(q[None], k_cache[:n], v_cache[:n])[0])


def test_example_6_page_table():
    page_table = torch.arange(32, dtype=torch.int32).view(4, 8)
    pages = torch.tensor([8, 6, 7, 8], dtype=torch.int32)
    indptr, indices, last_page_len = flashinfer.from_page_table(page_table, page_size=16, num_pages_per_seq=pages)
    assert indptr.tolist() == [0, 8, 14, 21, 29]
    assert indices[:29].tolist() == [*range(8), *range(8, 14), *range(16, 23), *range(24, 32)]
    assert last_page_len.tolist() == [16] * 4


def test_example_8_fp8_kv():
    k, v = (randn(300, 4, 128).to(torch.float8_e4m3fn) for _ in range(2))
    q = randn(4, 128)
    output = flashinfer.single_decode_with_kv_cache(q, k, v)
    assert output.dtype == torch.float16
    assert_attention_close(
        output, torch_attention(q[None].float(), k.float(), v.float())[0], torch_attention(q[None], k.half(), v.half())[0]
    )


def test_batching_advice_and_its_wrapper_name():
    wrapper = flashinfer.BatchDecodeWrapper()
    k, v, q = randn(6, 16, 2, 16), randn(6, 16, 2, 16), randn(2, 4, 16)
    for last in (3, 16):  # one wrapper, planned again per batch
        wrapper.plan(torch.tensor([0, 2, 6]).int(), torch.arange(6).int(), torch.tensor([last, 1]).int(), 4, 2, 16, 16)
        out = wrapper.run(q, k, v)
        single = flashinfer.single_decode_with_kv_cache(q[0], k[:2].flatten(0, 1)[: 16 + last], v[:2].flatten(0, 1)[: 16 + last])
        assert_attention_close(out[0], single.float())
    assert str(flashinfer.get_cuda_version()).count(".") == 1
