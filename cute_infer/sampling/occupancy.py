"""How many clusters of CTAs a GPU runs at once: asked of the driver, because a cluster lies in one group of SMs and groups differ.

The number decides nothing but speed: a launch of that many clusters gives each as many rows as the others.
"""

from __future__ import annotations

import ctypes
import functools

import torch

# A kernel that does nothing: the driver counts shared memory and threads.
PROBE = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry probe()\n{\n\tret;\n}\n\0"
MAX_DYNAMIC_SHARED_SIZE, CLUSTER_DIMENSION = 8, 4  # CUfunction_attribute, CUlaunchAttributeID
SM_BYTES, RESERVED_BYTES = 233472, 1024  # shared memory of an SM, and what the system takes of it per CTA


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.lru_cache(maxsize=64)
def resident_clusters(device: torch.device, cluster: int, threads: int, smem_bytes: int, blocks: int) -> int:
    """Clusters of `cluster` CTAs that run at once on a Hopper GPU, with at most `blocks` CTAs per SM."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    smem_bytes = max(smem_bytes, SM_BYTES // (blocks + 1) - RESERVED_BYTES + 16)  # so that no more than `blocks` fit
    guess = max(1, blocks * num_sms // cluster)
    if cluster == 1:
        return guess
    try:
        with torch.cuda.device(device):
            return _ask_driver(cluster, threads, smem_bytes) or guess
    except (OSError, AttributeError):
        return guess


def _ask_driver(cluster: int, threads: int, smem_bytes: int) -> int:
    driver = ctypes.CDLL("libcuda.so.1")
    module, function, count = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    if driver.cuModuleLoadData(ctypes.byref(module), PROBE):
        return 0
    try:
        attribute = _Attribute(CLUSTER_DIMENSION, 0, (cluster, 1, 1))
        config = _Config((cluster, 1, 1), (threads, 1, 1), smem_bytes, None, ctypes.pointer(attribute), 1)
        failed = (
            driver.cuModuleGetFunction(ctypes.byref(function), module, b"probe")
            or driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE, smem_bytes)
            or driver.cuOccupancyMaxActiveClusters(ctypes.byref(count), function, ctypes.byref(config))
        )
        return 0 if failed else count.value
    finally:
        driver.cuModuleUnload(module)
