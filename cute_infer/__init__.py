"""LLM serving kernels in Python, behind FlashInfer's API.

Everything public is here under FlashInfer's flat names, so ``import cute_infer as flashinfer`` serves code that uses those. Importing
this package imports nothing heavy: names are resolved on first use (which imports torch), the kernel compiler on the first kernel that
has to be compiled, and CUDA is not initialised.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from .errors import (
    CacheError,
    CompileError,
    ConfigError,
    CuteInferError,
    DeviceError,
    DTypeError,
    LayoutError,
    MissingKernelError,
    PageTableError,
    PlanError,
    ShapeError,
    UnsupportedConfigError,
    UntrustedCacheError,
    fail,
)

if TYPE_CHECKING:
    import torch
    from packaging.version import Version

    from . import jit, logits_processor, sampling, zoo
    from .attention.cascade import MultiLevelCascadeAttentionWrapper
    from .attention.decode import (
        BatchDecodeWithPagedKVCacheWrapper,
        BatchDecodeWrapper,
        CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
        fast_decode_plan,
        single_decode_with_kv_cache,
    )
    from .attention.mask_bits import packbits, segment_packbits
    from .attention.merge import merge_state, merge_state_in_place, merge_states
    from .attention.prefill import (
        BatchPrefillWithPagedKVCacheWrapper,
        BatchPrefillWithRaggedKVCacheWrapper,
        BatchPrefillWrapper,
        single_prefill_with_kv_cache,
        single_prefill_with_kv_cache_return_lse,
    )
    from .jit import freeze, thaw
    from .paged.append import append_paged_kv_cache, append_paged_mla_kv_cache
    from .paged.tables import from_page_table, get_batch_indices_positions, get_seq_lens
    from .sampling import (
        chain_speculative_sampling,
        min_p_sampling_from_probs,
        sampling_from_logits,
        sampling_from_probs,
        softmax,
        top_k,
        top_k_mask_logits,
        top_k_renorm_probs,
        top_k_sampling_from_logits,
        top_k_sampling_from_probs,
        top_k_top_p_sampling_from_logits,
        top_k_top_p_sampling_from_probs,
        top_p_renorm_probs,
        top_p_sampling_from_logits,
        top_p_sampling_from_probs,
    )

try:
    __version__ = importlib.metadata.version("cute-infer")
except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0.1.0"

# public name -> the module that defines it; a submodule stands under its own name
_HOME = {
    **dict.fromkeys(
        (
            "BatchDecodeWithPagedKVCacheWrapper",
            "BatchDecodeWrapper",
            "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
            "fast_decode_plan",
            "single_decode_with_kv_cache",
        ),
        ".attention.decode",
    ),
    **dict.fromkeys(
        (
            "BatchPrefillWithPagedKVCacheWrapper",
            "BatchPrefillWithRaggedKVCacheWrapper",
            "BatchPrefillWrapper",
            "single_prefill_with_kv_cache",
            "single_prefill_with_kv_cache_return_lse",
        ),
        ".attention.prefill",
    ),
    "MultiLevelCascadeAttentionWrapper": ".attention.cascade",
    **dict.fromkeys(("merge_state", "merge_state_in_place", "merge_states"), ".attention.merge"),
    **dict.fromkeys(("packbits", "segment_packbits"), ".attention.mask_bits"),
    **dict.fromkeys(("append_paged_kv_cache", "append_paged_mla_kv_cache"), ".paged.append"),
    **dict.fromkeys(("from_page_table", "get_batch_indices_positions", "get_seq_lens"), ".paged.tables"),
    **dict.fromkeys(
        (
            "chain_speculative_sampling",
            "min_p_sampling_from_probs",
            "sampling_from_logits",
            "sampling_from_probs",
            "softmax",
            "top_k",
            "top_k_mask_logits",
            "top_k_renorm_probs",
            "top_k_sampling_from_logits",
            "top_k_sampling_from_probs",
            "top_k_top_p_sampling_from_logits",
            "top_k_top_p_sampling_from_probs",
            "top_p_renorm_probs",
            "top_p_sampling_from_logits",
            "top_p_sampling_from_probs",
        ),
        ".sampling",
    ),
    **dict.fromkeys(("freeze", "thaw"), ".jit"),
    **{name: f".{name}" for name in ("attention", "jit", "logits_processor", "paged", "sampling", "zoo")},
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(home, __name__)
    value = module if home == f".{name}" else getattr(module, name)
    globals()[name] = value  # next time it is found without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def get_cuda_version() -> Version:
    """The CUDA version PyTorch was built with, e.g. ``Version("13.0")``; ``Version("0.0")`` for a build without CUDA.

    No toolkit is asked: none is needed.
    """
    import torch
    from packaging.version import Version

    return Version(torch.version.cuda or "0.0")


def warmup(model: str, *, page_sizes: tuple[int, ...] = (16,), kv_dtype: str | None = None, device: torch.device | None = None) -> int:
    """Compile and keep every kernel that a server of ``model`` launches on this machine's GPU; :func:`freeze` afterwards.

    Args:
        model: a name of ``cute_infer.zoo.MODELS``. page_sizes, kv_dtype (default: the model's): of the KV cache.
        device: whose architecture to compile for; default the current device (or ``CUTE_INFER_ARCH``).

    Returns:
        The number of kernels. Those that were compiled before cost a file look-up.
    """
    from .jit import Target, get_entry
    from .zoo import MODELS, variants

    if model not in MODELS:
        fail(ConfigError, f"warmup(): unknown model {model!r}", expected=" | ".join(MODELS), fix="or call your model once, then freeze()")
    requests = variants(MODELS[model], Target.detect(device), page_sizes, kv_dtype)
    for request in requests:
        get_entry(request)
    return len(requests)


__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "BatchPrefillWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "CacheError",
    "CompileError",
    "ConfigError",
    "CuteInferError",
    "DTypeError",
    "DeviceError",
    "LayoutError",
    "MissingKernelError",
    "MultiLevelCascadeAttentionWrapper",
    "PageTableError",
    "PlanError",
    "ShapeError",
    "UnsupportedConfigError",
    "UntrustedCacheError",
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "chain_speculative_sampling",
    "fast_decode_plan",
    "freeze",
    "from_page_table",
    "get_batch_indices_positions",
    "get_cuda_version",
    "get_seq_lens",
    "jit",
    "logits_processor",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "min_p_sampling_from_probs",
    "packbits",
    "sampling",
    "sampling_from_logits",
    "sampling_from_probs",
    "segment_packbits",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
    "softmax",
    "thaw",
    "top_k",
    "top_k_mask_logits",
    "top_k_renorm_probs",
    "top_k_sampling_from_logits",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_probs",
    "top_p_sampling_from_logits",
    "top_p_sampling_from_probs",
    "warmup",
    "zoo",
]
