"""Rotary position embedding inside the attention kernel: q and k are stored unrotated."""

import torch

import cute_infer

device = "cuda:0" if torch.cuda.is_available() else "cpu"

kv_len = 2048
num_qo_heads = 32
num_kv_heads = 32
head_dim = 128

k = torch.randn(kv_len, num_kv_heads, head_dim, dtype=torch.float16, device=device)
v = torch.randn(kv_len, num_kv_heads, head_dim, dtype=torch.float16, device=device)
q = torch.randn(num_qo_heads, head_dim, dtype=torch.float16, device=device)

output_with_rope = cute_infer.single_decode_with_kv_cache(q, k, v, pos_encoding_mode="ROPE_LLAMA")

print(f"Output with RoPE: {output_with_rope.shape}")
