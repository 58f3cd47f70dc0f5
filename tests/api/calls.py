"""One small valid call of every attention function, each argument of which a test may replace."""

from __future__ import annotations

import torch

import cute_infer as fi

ARGS = (4, 2, 16, 4)  # num_qo_heads, num_kv_heads, head_dim, page_size


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).half()


def decode_plan(*csr: torch.Tensor, args: tuple = ARGS, **options) -> fi.BatchDecodeWithPagedKVCacheWrapper:
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*(csr or (ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 4))), *args, **options)
    return wrapper


def decode_run(q=None, k=None, v=None, wrapper=None, **options):
    wrapper = wrapper or decode_plan()
    return wrapper.run(
        half(2, 4, 16) if q is None else q, (half(4, 4, 2, 16) if k is None else k, half(4, 4, 2, 16) if v is None else v), **options
    )


def prefill_plan(qo=(0, 2, 5), **options) -> fi.BatchPrefillWithPagedKVCacheWrapper:
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(ints(*qo), ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 4), *ARGS, **options)
    return wrapper


def ragged_plan(qo=(0, 2, 5), kv=(0, 9, 13), **options) -> fi.BatchPrefillWithRaggedKVCacheWrapper:
    wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper()
    wrapper.plan(ints(*qo), ints(*kv), 4, 2, 16, **options)
    return wrapper


def single(q=None, k=None, v=None, **options):
    return fi.single_decode_with_kv_cache(
        half(4, 16) if q is None else q, half(9, 2, 16) if k is None else k, half(9, 2, 16) if v is None else v, **options
    )


def prefill(q=None, k=None, v=None, **options):
    return fi.single_prefill_with_kv_cache(
        half(5, 4, 16) if q is None else q, half(9, 2, 16) if k is None else k, half(9, 2, 16) if v is None else v, **options
    )


def graph(batch_size=2, pages=4):
    return fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        None, torch.zeros(batch_size + 1).int(), torch.zeros(pages).int(), torch.zeros(batch_size).int()
    )


def graph_prefill(**plan):
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(
        use_cuda_graph=True, qo_indptr_buf=ints(0, 0, 0), paged_kv_indptr_buf=ints(0, 0, 0), paged_kv_indices_buf=torch.zeros(8).int(),
        paged_kv_last_page_len_buf=ints(0, 0),
    )  # fmt: skip
    wrapper.plan(ints(0, 2, 5), ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 4), *ARGS, **plan)
    return wrapper
