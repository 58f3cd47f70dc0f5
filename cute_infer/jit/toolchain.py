"""Which compiler makes the code: versions, its CUDA flavour, its environment, its runtime library. Imports none of it.

The compiler's libraries come in flavours (cu12, cu13) that embed different ptxas versions and may be installed side by side; the newest
that the CUDA driver supports is used, or the newest at all without a driver. The flavour is part of every cache key.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
from importlib import metadata
from pathlib import Path

RUNTIME = "libcute_dsl_runtime.so"
# CUTE_DSL_* variables that decide where things are kept or logged, not what code is generated. All others are part of the key.
HARMLESS = ("ARCH", "LIBS", "CACHE_DIR", "DUMP_DIR", "KEEP", "LOG_", "PRINT_", "FILTER_STACKTRACE", "SHOW_STACKTRACE", "JIT_TIME_PROFILING",
            "DISABLE_FILE_CACHING", "NO_CACHE", "FILE_CACHING")  # fmt: skip


def version(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def flavours() -> dict[int, Path]:
    """Installed flavours by CUDA major version, with the directory of each one's runtime library."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    found: dict[int, Path] = {}
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for directory in Path(root).glob("cu*/lib"):
            if (directory / RUNTIME).exists() and (major := re.fullmatch(r"cu(\d+)", directory.parent.name)):
                found.setdefault(int(major[1]), directory)
    return found


@functools.lru_cache(maxsize=1)
def driver_cuda_major() -> int | None:
    """Newest CUDA major version the installed driver supports; None without a driver."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    return number.value // 1000 if libcuda.cuDriverGetVersion(ctypes.byref(number)) == 0 else None


@functools.lru_cache(maxsize=1)
def flavour() -> int | None:
    """CUDA major version of the flavour in use, chosen as the compiler itself chooses; None when none is installed."""
    installed = sorted(flavours())
    driver = driver_cuda_major()
    usable = [major for major in installed if driver is None or major <= driver]
    return usable[-1] if usable else None


def runtime_library() -> Path | None:
    """The shared library that every compiled kernel calls into, without importing the compiler. ``CUTE_DSL_LIBS`` wins."""
    for part in os.environ.get("CUTE_DSL_LIBS", "").split(os.pathsep):
        if part.endswith(RUNTIME):
            return Path(part)
    chosen = flavour()
    return flavours()[chosen] / RUNTIME if chosen is not None else None


@functools.lru_cache(maxsize=1)
def toolchain() -> dict[str, str | None]:
    """Everything besides source and configuration that shapes an object file; the values go into its key.

    dsl, libs, tvm_ffi  versions. ``libs`` differs from ``dsl`` when only the libraries are installed, to run prebuilt kernels.
    flavour             "cu12" or "cu13".
    host                what the host half of an object needs: plain x86-64, or this very CPU elsewhere (see compile.py).
    env                 the CUTE_DSL_* variables that may change code.
    """
    chosen = flavour()
    env = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("CUTE_DSL_") and not name[len("CUTE_DSL_") :].startswith(HARMLESS)
    }
    return {
        "dsl": version("nvidia-cutlass-dsl"),
        "libs": version(f"nvidia-cutlass-dsl-libs-cu{chosen}") if chosen else None,
        "flavour": f"cu{chosen}" if chosen else None,
        "tvm_ffi": version("apache-tvm-ffi"),
        "host": host(),
        "env": " ".join(f"{name}={value}" for name, value in env.items()),
    }


def host() -> str:
    """``"x86_64"``: objects hold baseline instructions only and run on every x86-64. Elsewhere the compiler tunes for this CPU: name it."""
    machine = platform.machine()
    if machine == "x86_64":
        return machine
    try:
        cpu = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        cpu = platform.node()
    features = sorted(set(re.findall(r"(?m)^(?:Features|CPU part)\s*:\s*(.*)$", cpu)))
    return f"{machine}-{hashlib.sha256(repr(features).encode()).hexdigest()[:16]}"
