"""A generation loop: prefill the prompt, then decode token by token over slices of one preallocated cache."""

import torch

import cute_infer

device = "cuda:0" if torch.cuda.is_available() else "cpu"


def generate_tokens(prompt_tokens, max_new_tokens=20):
    """Random projections stand in for a model; the attention calls and the cache handling are the real ones."""
    vocab_size, num_heads, head_dim = 32000, 32, 128

    def project(*shape):
        return torch.randn(*shape, num_heads, head_dim, dtype=torch.float16, device=device)

    prompt_len = len(prompt_tokens)
    k_cache = torch.zeros(prompt_len + max_new_tokens, num_heads, head_dim, dtype=torch.float16, device=device)
    v_cache = torch.zeros_like(k_cache)
    k_cache[:prompt_len] = project(prompt_len)
    v_cache[:prompt_len] = project(prompt_len)
    cute_infer.single_prefill_with_kv_cache(project(prompt_len), k_cache[:prompt_len], v_cache[:prompt_len], causal=True)
    print(f"Prefill completed for {prompt_len} tokens")

    generated_tokens = []
    current_pos = prompt_len
    for step in range(max_new_tokens):
        k_cache[current_pos] = project()
        v_cache[current_pos] = project()
        current_pos += 1

        # The slice is one token longer every step: same kernel, nothing is recompiled.
        cute_infer.single_decode_with_kv_cache(project(), k_cache[:current_pos], v_cache[:current_pos])

        logits = torch.randn(vocab_size, device=device)
        next_token = torch.argmax(logits).item()
        generated_tokens.append(next_token)
        print(f"Step {step + 1}: Generated token {next_token}")
    return generated_tokens


generated = generate_tokens([1, 2, 3, 4, 5], max_new_tokens=5)
print(f"\nGenerated tokens: {generated}")
