"""A spec becomes a callable. Knows nothing about attention.

    kernel = get_kernel("cute_infer.attention.kernels.decode_sm90:DecodeSm90", spec, tile, Target.detect())
    kernel(*tensors_and_scalars)

Importing this imports no compiler: that happens on the first kernel that is not in a bundle.
"""

from __future__ import annotations

from .compile import CacheStats, CompiledKernel, cache_stats, disk_cache, forget, freeze, get_entry, get_kernel, thaw
from .inspect import KernelFacts
from .key import Request
from .sources import kernel_sources, kernel_sources_hash
from .target import Target

__all__ = [
    "CacheStats",
    "CompiledKernel",
    "KernelFacts",
    "Request",
    "Target",
    "cache_stats",
    "disk_cache",
    "forget",
    "freeze",
    "get_entry",
    "get_kernel",
    "kernel_sources",
    "kernel_sources_hash",
    "thaw",
]
