"""Launch every kernel family once on small inputs: what compute-sanitizer is pointed at (`make gpu-sanitize`).

Outputs are not compared here (the GPU tests do that); the inputs are small because the sanitizer slows a kernel down by two orders.
"""

from __future__ import annotations

import sys

import torch

import cute_infer
from cute_infer import sampling
from cute_infer.attention import plan, tiles
from tests.gpu.batches import paged_batch, queries

BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
FAMILIES = {kind: modules for kind, modules in tiles.CANDIDATES.items()}


def only(family: str) -> None:
    tiles.CANDIDATES = {kind: tuple(m for m in modules if family in m.__name__) for kind, modules in FAMILIES.items()}
    plan._bind.cache_clear()


def decode(lens: list[int], page: int = 16, kv: torch.dtype = BF16, heads: tuple[int, int] = (8, 2), **options: object) -> None:
    batch = paged_batch(lens, heads[1], 128, page, kv)
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(batch.indptr, batch.indices, batch.last_page_len, *heads, 128, page, q_data_type=BF16, kv_data_type=kv, **options)
    wrapper.run(queries(len(lens), heads[0], 128, BF16), batch.cache, return_lse=True)


def prefill(page: int = 16, kv: torch.dtype = BF16, **options: object) -> None:
    qo_lens, kv_lens = [3, 0, 130], [40, 5, 200]
    batch = paged_batch(kv_lens, 2, 128, page, kv)
    indptr = torch.tensor([0, 3, 3, 133], dtype=torch.int32, device="cuda")
    q = queries(sum(qo_lens), 4, 128, BF16)
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper()
    args = (indptr, batch.indptr, batch.indices, batch.last_page_len, 4, 2, 128, page)
    wrapper.plan(*args, causal=True, q_data_type=BF16, kv_data_type=kv, **options)
    wrapper.run(q, batch.cache)


def attention(family: str) -> None:
    only(family)
    print(family, "decode", flush=True)
    decode([0, 1, 17, 300])
    decode([700])  # clusters of several CTAs, or split KV
    decode([50, 3], page=1)
    decode([90, 33], kv=E4M3)
    decode([900], heads=(8, 1))
    decode([100, 16] * 40)
    print(family, "prefill", flush=True)
    prefill()
    prefill(window_left=20, logits_soft_cap=10.0)
    q, k, v = (queries(150, h, 128, FP16) for h in (4, 2, 2))
    cute_infer.single_prefill_with_kv_cache(q, k, v, causal=True)
    if family == "sm90":
        q, k, v = queries(150, 4, 128, E4M3), queries(900, 2, 128, E4M3), queries(900, 2, 128, E4M3)
        for fast in (False, True):
            cute_infer.single_prefill_with_kv_cache(q, k, v, causal=True, fp8_fast_accumulation=fast)


def rest() -> None:
    only("sm80")
    print("options of the SM80 kernels", flush=True)
    decode([40, 7], pos_encoding_mode="ROPE_LLAMA")
    prefill(page=1, kv=E4M3, pos_encoding_mode="ROPE_LLAMA")
    print("merge, append, sampling", flush=True)
    v, s = torch.randn(5, 3, 4, 128, device="cuda"), torch.randn(5, 3, 4, device="cuda")
    cute_infer.merge_states(v, s)
    batch = paged_batch([40, 7], 2, 128, 16, BF16)
    positions = torch.tensor([39, 6, 0], dtype=torch.int32, device="cuda")
    requests = torch.tensor([0, 1, -1], dtype=torch.int32, device="cuda")
    new = torch.randn(3, 2, 128, device="cuda", dtype=BF16)
    cute_infer.append_paged_kv_cache(new, new, requests, positions, batch.cache, batch.indices, batch.indptr, batch.last_page_len)
    for rows, vocab in ((3, 1001), (2, 32000), (40, 32000)):
        logits = torch.randn(rows, vocab, device="cuda")
        sampling.top_k_top_p_sampling_from_logits(logits, 20, 0.9)
        sampling.top_p_renorm_probs(sampling.softmax(logits), 0.8)
    draft, target = (torch.rand(2, n, 1000, device="cuda").softmax(-1) for n in (3, 4))
    sampling.chain_speculative_sampling(draft, torch.randint(0, 1000, (2, 3), device="cuda", dtype=torch.int32), target)


def main() -> int:
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device here: nothing was run.", file=sys.stderr)
        return 1
    if torch.cuda.get_device_capability()[0] == 9:
        attention("sm90")
    attention("sm80")
    rest()
    torch.cuda.synchronize()
    print("every kernel ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
