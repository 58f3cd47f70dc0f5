"""Sampling straight from logits. The short keywords k= and p= also return which rows were valid."""

import torch

import cute_infer

device = "cuda:0" if torch.cuda.is_available() else "cpu"

batch_size = 4
vocab_size = 32000
logits = torch.randn(batch_size, vocab_size, dtype=torch.float32, device=device)

# Top-p (nucleus): the smallest set of tokens whose probabilities add up to p.
sampled_tokens_top_p, success = cute_infer.sampling.top_p_sampling_from_logits(logits, p=0.9)
print(f"Top-P sampled tokens: {sampled_tokens_top_p}")

# Top-k: the k most probable tokens.
sampled_tokens_top_k, success = cute_infer.sampling.top_k_sampling_from_logits(logits, k=50)
print(f"Top-K sampled tokens: {sampled_tokens_top_k}")

# Top-k first, then top-p of what is left. success is False only for a row without a distribution (NaN, or all -inf).
sampled_tokens_combined, success = cute_infer.sampling.top_k_top_p_sampling_from_logits(logits, k=50, p=0.9)
print(f"Combined sampled tokens: {sampled_tokens_combined}")

# FlashInfer's spelling returns the ids alone.
sampled_tokens_flashinfer = cute_infer.sampling.top_k_top_p_sampling_from_logits(logits, top_k=50, top_p=0.9)
print(f"FlashInfer spelling: {sampled_tokens_flashinfer.shape}, all rows valid: {bool(success.all())}")
