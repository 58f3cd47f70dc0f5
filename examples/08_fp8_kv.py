"""An 8-bit KV cache under a 16-bit query: half the memory, half the bytes to read."""

import torch

import cute_infer

device = "cuda:0" if torch.cuda.is_available() else "cpu"

kv_len = 2048
num_qo_heads = 32
num_kv_heads = 32
head_dim = 128

q = torch.randn(num_qo_heads, head_dim, dtype=torch.float16, device=device)

# torch.randn cannot draw float8 numbers: draw float16 and convert.
k_fp8 = torch.randn(kv_len, num_kv_heads, head_dim, dtype=torch.float16, device=device).to(torch.float8_e4m3fn)
v_fp8 = torch.randn(kv_len, num_kv_heads, head_dim, dtype=torch.float16, device=device).to(torch.float8_e4m3fn)

output = cute_infer.single_decode_with_kv_cache(q, k_fp8, v_fp8)

print(f"FP8 attention output: {output.shape}")
