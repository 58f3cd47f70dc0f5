"""Kernels as shared libraries: linked where they are compiled, loaded without the compiler.

Importing the compiler takes seconds; ``dlopen`` of a linked kernel takes a fraction of a millisecond, after a few for the runtime library,
once per process. So every object is linked right after its compilation where a linker is present.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import itertools
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..errors import CacheError, fail
from .toolchain import runtime_library

log = logging.getLogger("cute_infer.jit")

# Symbols are bound when the library is loaded: one that is missing is an exception then, not the end of the process at the first launch.
LINK_OPTIONS = ("-shared", "-nostdlib", "-Wl,-s", "-Wl,-z,now", "-Wl,-z,noexecstack")
_serial = itertools.count(1)


# ------------------------------------------------------------------------------------------------------------------ linking
def find_linker() -> list[str] | None:
    """Command that links a shared library: $CC, a system compiler, or the one in the ``ziglang`` package; None when there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def link(library: Path, objects: list[Path]) -> None:
    """Link ``objects`` into the shared library ``library``.

    Raises:
        CacheError: no linker, or it failed.
    """
    linker = find_linker()
    if linker is None:
        fail(CacheError, "a bundle needs a linker", expected="cc, gcc or clang on PATH, or $CC", fix="pip install ziglang")
    command = [*linker, *LINK_OPTIONS, "-o", str(library), *map(str, objects)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        problem = done.stderr.strip()[-2000:] if done.returncode else None
    except OSError as error:
        problem = str(error)
    if problem is not None:
        fail(CacheError, f"linking {library.name} failed", got=problem, expected=shlex.join(command[: len(linker) + len(LINK_OPTIONS)]))


def try_link(object: bytes) -> bytes | None:
    """A kernel's object as a shared library, or None where it cannot be linked; the log says so once."""
    if find_linker() is None:
        _say_once("no linker (cc, gcc, clang, $CC or `pip install ziglang`)")
        return None
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="cute_infer-") as directory:
            source, library = Path(directory) / "kernel.o", Path(directory) / "kernel.so"
            source.write_bytes(object)
            link(library, [source])
            content = library.read_bytes()
    except (CacheError, OSError) as error:
        _say_once(str(error))
        return None
    log.debug("linked %d bytes in %.1f ms", len(content), (time.perf_counter() - started) * 1e3)
    return content


@functools.lru_cache(maxsize=8)
def _say_once(reason: str) -> None:
    log.info("kernels are saved unlinked, so another process must import the compiler to load them (seconds, once): %s", reason)


# ------------------------------------------------------------------------------------------------------------------ loading
@functools.lru_cache(maxsize=1)
def preload_runtime() -> None:
    """Put the compiler's runtime library into the global scope, where the undefined symbols of linked kernels are looked up.

    Raises:
        OSError: it is not installed or does not load.
    """
    path = runtime_library()
    if path is None:
        raise OSError("the runtime library is not installed (pip install --no-deps nvidia-cutlass-dsl-libs-cu12)")
    started = time.perf_counter()
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    log.debug("loaded %s in %.1f ms, once", path, (time.perf_counter() - started) * 1e3)


@functools.lru_cache(maxsize=1)
def start_runtime() -> None:
    """Import what every load needs, once per process, so that the time of a load is that kernel's own.

    What is missing is the loader's to report: kernels that are not linked do without the runtime library.
    """
    started = time.perf_counter()
    with contextlib.suppress(ImportError, OSError):
        import tvm_ffi  # noqa: F401

        preload_runtime()
    log.debug("the kernel runtime started in %.1f ms, once", (time.perf_counter() - started) * 1e3)


def load_library(content: bytes, name: str) -> Any:
    """The TVM-FFI module in a shared library's bytes; it stays loaded until the process ends.

    The bytes go through an anonymous file: what runs is what was checked, and a full or read-only disk does not matter.
    """
    import tvm_ffi

    preload_runtime()
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        # By its function, because tvm_ffi.load_module goes by the suffix of the name and this one has none.
        module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(_unique_path(descriptor), "so")
    finally:
        os.close(descriptor)
    tvm_ffi.get_global_func("ffi.ModuleGlobalsAdd")(module)
    return module


def _unique_path(descriptor: int) -> str:
    """A path of the open file that no earlier call returned.

    The dynamic linker takes a library whose name it has seen for the one it has loaded, and descriptors are reused, so a serial number is
    spelled into the path in binary: ``./`` for 1 and ``/`` for 0, both of which lead nowhere.
    """
    return f"/proc/self/fd/{''.join('./' if bit == '1' else '/' for bit in f'{next(_serial):b}')}{descriptor}"
