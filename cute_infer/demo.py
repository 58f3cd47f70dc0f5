"""The quick start's complete demo, on whatever is here: the first CUDA device, or the CPU through the reference backend.

python -m cute_infer demo        or        from cute_infer.demo import main; main()
"""

from __future__ import annotations

import torch

import cute_infer

from .config import get_config

WIDTH = 60


def backend_line(device: torch.device) -> str:
    """One line that says which of the two implementations is about to run, and on what."""
    if device.type == "cpu":
        found = "not used" if torch.cuda.is_available() else "none found"
        return f"Backend: PyTorch reference on the CPU (CUDA device: {found})"
    major, minor = torch.cuda.get_device_capability(device)
    code = "PyTorch reference" if get_config().backend == "reference" else "CuTe DSL kernels"
    return f"Backend: {code} on {torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def default_device() -> torch.device:
    """``cuda:0`` when PyTorch sees a GPU, else ``cpu``."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def main(device: torch.device | str | None = None) -> None:
    """Run decode, prefill, RoPE decode and sampling once each and print the quick start's lines."""
    device = default_device() if device is None else torch.device(device)

    def randn(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    def show(output: object) -> None:
        assert isinstance(output, torch.Tensor) and output.isfinite().all()
        print(f"   Output shape: {output.shape}")

    print("=" * WIDTH)
    print("cute_infer Complete Demo")
    print("=" * WIDTH)
    print(backend_line(device))

    print("\n1. Single Decode Attention")
    q, k, v = randn(32, 128), randn(2048, 32, 128), randn(2048, 32, 128)
    output = cute_infer.single_decode_with_kv_cache(q, k, v)
    show(output)

    print("\n2. Single Prefill Attention")
    q, k, v = randn(512, 32, 128), randn(512, 32, 128), randn(512, 32, 128)
    output = cute_infer.single_prefill_with_kv_cache(q, k, v, causal=True)
    show(output)

    print("\n3. Attention with RoPE")
    q, k, v = randn(32, 128), randn(2048, 32, 128), randn(2048, 32, 128)
    output = cute_infer.single_decode_with_kv_cache(q, k, v, pos_encoding_mode="ROPE_LLAMA")
    show(output)

    print("\n4. Sampling")
    logits = randn(4, 32000, dtype=torch.float32)
    sampled_tokens, _ = cute_infer.sampling.top_p_sampling_from_logits(logits, p=0.9)
    print(f"   Sampled tokens: {sampled_tokens}")

    print("\n" + "=" * WIDTH)
    print("Demo completed successfully!")
    print("=" * WIDTH)


if __name__ == "__main__":
    main()
