"""One request, one new token: attention of a single query over a contiguous KV cache."""

import torch

import cute_infer

device = "cuda:0" if torch.cuda.is_available() else "cpu"

kv_len = 2048  # tokens already in the KV cache
num_qo_heads = 32
num_kv_heads = 32  # fewer than num_qo_heads for grouped-query attention; any divisor works
head_dim = 128

k = torch.randn(kv_len, num_kv_heads, head_dim, dtype=torch.float16, device=device)
v = torch.randn(kv_len, num_kv_heads, head_dim, dtype=torch.float16, device=device)
q = torch.randn(num_qo_heads, head_dim, dtype=torch.float16, device=device)

output = cute_infer.single_decode_with_kv_cache(q, k, v)

print(f"Input query shape: {q.shape}")
print(f"KV cache shape: {k.shape}")
print(f"Output shape: {output.shape}")
print(f"Output dtype: {output.dtype}")
