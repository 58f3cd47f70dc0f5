"""One request, a whole prompt: causal attention of all its tokens at once."""

import torch

import cute_infer

device = "cuda:0" if torch.cuda.is_available() else "cpu"

qo_len = 512  # prompt tokens
kv_len = 512  # keys they may see; larger than qo_len when a prefix is already cached
num_qo_heads = 32
num_kv_heads = 32
head_dim = 128

q = torch.randn(qo_len, num_qo_heads, head_dim, dtype=torch.float16, device=device)
k = torch.randn(kv_len, num_kv_heads, head_dim, dtype=torch.float16, device=device)
v = torch.randn(kv_len, num_kv_heads, head_dim, dtype=torch.float16, device=device)

output = cute_infer.single_prefill_with_kv_cache(q, k, v, causal=True)

print(f"Query shape: {q.shape}")
print(f"Output shape: {output.shape}")
