"""Capture a decode step once, replay it without Python: run() neither compiles nor synchronizes."""

import torch

import cute_infer

if not torch.cuda.is_available():
    print("CUDA graphs need a GPU; nothing to do here.")
    raise SystemExit

device = "cuda:0"
q = torch.randn(32, 128, dtype=torch.float16, device=device)
k = torch.randn(2048, 32, 128, dtype=torch.float16, device=device)
v = torch.randn(2048, 32, 128, dtype=torch.float16, device=device)

# The first call compiles the kernel or loads it from the cache; that cannot happen inside a capture.
for _ in range(3):
    output = cute_infer.single_decode_with_kv_cache(q, k, v)

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    output = cute_infer.single_decode_with_kv_cache(q, k, v)

# A replay reads what the captured tensors hold now.
q.copy_(torch.randn_like(q))
graph.replay()
torch.testing.assert_close(output, cute_infer.single_decode_with_kv_cache(q, k, v))

print("CUDAGraph captured and replayed successfully!")
