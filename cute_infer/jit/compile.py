"""From a request to a callable: memory, then bundles, then the disk cache, then the compiler.

    get_kernel(path, spec, tile, target)
        memory     a dict keyed by the four arguments: nothing else on the hot path
        bundle     CUTE_INFER_BUNDLE, by request key
        disk       by object key; one process compiles, the others wait for its lock
        compile    unless CUTE_INFER_JIT=off or freeze()

One lock serialises everything behind the dict: two threads inside the compiler abort the process. A child of fork() starts with an empty
memory and a fresh lock, because the parent's may be held by a thread that the child does not have.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shlex
import threading
import time
from collections.abc import Callable
from typing import Any

from ..config import get_config
from ..errors import CompileError, MissingKernelError, UnsupportedConfigError, fail
from . import codegen
from .bundle import Bundle
from .cache import DiskCache, Entry
from .inspect import KernelFacts
from .key import Request, canonical_json, digest, object_key, request_inputs
from .library import start_runtime
from .sources import source_fingerprint
from .target import Target
from .toolchain import toolchain

log = logging.getLogger("cute_infer.jit")


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel that is ready to launch.

    fn       the raw positional TVM-FFI function; call it (or this object) with the kernel's arguments minus the stream. The launch goes to
             the current torch stream of the tensors' device. The first call on a device loads the machine code: warm up before capturing.
    facts    what the compiler reported.
    request  what it was compiled from.
    origin   "bundle", "disk" or "compiled".
    """

    fn: Callable[..., None]
    facts: KernelFacts
    request: Request
    origin: str

    def __call__(self, *args: Any) -> None:
        self.fn(*args)


@dataclasses.dataclass
class CacheStats:
    """What happened in this process so far."""

    kernels_in_memory: int = 0
    bundle_hits: int = 0
    disk_hits: int = 0
    compiled: int = 0
    compile_seconds: float = 0.0
    not_saved: int = 0


class _State:
    """All mutable state of a process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.memory: dict[tuple[str, Any, Any, Target], CompiledKernel] = {}
        self.stats = CacheStats()
        self.frozen = False


_state = _State()


def get_kernel(path: str, spec: Any, tile: Any, target: Target) -> CompiledKernel:
    """The kernel class at ``path`` ("package.module:Class"), built for ``spec`` and ``tile``, as a callable for ``target``.

    Args:
        spec, tile: frozen dataclasses of None, bool, int, float, str and tuples: the two constructor arguments, and the cache key.

    Raises:
        CompileError: the compiler refused.
        MissingKernelError: nothing prebuilt matches, and ``CUTE_INFER_JIT=off``, :func:`freeze` is in force or there is no compiler.
        UnsupportedConfigError: the kernel needs more shared memory than the device has.
        UntrustedCacheError: the cache could have been written by another user.
    """
    kernel = _state.memory.get((path, spec, tile, target))
    return kernel if kernel is not None else _load(Request(path, spec, tile, target.arch), target)


def get_entry(request: Request) -> Entry:
    """The object file of ``request`` from the disk cache, compiled first if need be. For bundles and for filling the cache."""
    with _state.lock:
        return _find_or_build(request, request_inputs(request))[0]


def freeze() -> None:
    """From now on a kernel that would have to be compiled raises MissingKernelError. For servers: call it after warm-up."""
    _state.frozen = True


def thaw() -> None:
    """Undo :func:`freeze`."""
    _state.frozen = False


def cache_stats() -> CacheStats:
    """Counters of this process."""
    with _state.lock:
        return dataclasses.replace(_state.stats, kernels_in_memory=len(_state.memory))


def forget() -> None:
    """Drop every kernel from memory (not from disk), the counters and :func:`freeze`. For tests."""
    global _state
    _state = _State()
    _bundle.cache_clear()


def disk_cache() -> DiskCache:
    """The disk cache of the current configuration."""
    return _disk_cache(get_config().cache_dir)


_disk_cache = functools.lru_cache(maxsize=8)(DiskCache)
_bundle = functools.lru_cache(maxsize=8)(Bundle)


def _load(request: Request, target: Target) -> CompiledKernel:
    slot = (request.path, request.spec, request.tile, target)
    start_runtime()
    with _state.lock:
        for directory in get_config().bundle:
            _bundle(directory).open(request.arch)
        started = time.perf_counter()
        kernel = _state.memory.get(slot)  # another thread may have been faster
        if kernel is None:
            kernel = _from_bundle(request) or _from_disk_or_compiler(request, request_inputs(request))
            if kernel.facts.smem_bytes > target.smem_limit:
                fail(
                    UnsupportedConfigError,
                    f"{request.name} needs more shared memory than this device has: {request.spec}",
                    got=f"{kernel.facts.smem_bytes} bytes with {request.tile}",
                    expected=f"at most {target.smem_limit} bytes (compute capability {target.capability[0]}.{target.capability[1]})",
                    fix="choose a smaller tile",
                )
            _state.memory[slot] = kernel
            elapsed = (time.perf_counter() - started) * 1e3
            log.debug("loaded %s for %s: origin %s, %.1f ms: %s", request.name, request.arch, kernel.origin, elapsed, request.spec)
        return kernel


def _from_bundle(request: Request) -> CompiledKernel | None:
    for directory in get_config().bundle:
        found = _bundle(directory).load(request)
        if found is not None:
            _state.stats.bundle_hits += 1
            return CompiledKernel(*found, request, "bundle")
    return None


def _from_disk_or_compiler(request: Request, inputs: dict[str, Any]) -> CompiledKernel:
    entry, origin = _find_or_build(request, inputs)
    try:
        function = codegen.load(entry)
    except Exception as error:
        if origin == "compiled":
            fail(CompileError, f"the compiled object of {request.name} does not load", got=f"{type(error).__name__}: {error}")
        disk_cache().quarantine(entry.key, f"does not load ({error})")
        entry, origin = _find_or_build(request, inputs)
        function = codegen.load(entry)
    return CompiledKernel(function, entry.facts, request, origin)


def _find_or_build(request: Request, inputs: dict[str, Any]) -> tuple[Entry, str]:
    cache = disk_cache()
    key = object_key(digest(inputs), toolchain())
    entry = cache.load(key)
    if entry is None:
        _refuse_to_compile(request)
        with cache.lock(key):
            entry = cache.load(key)  # another process may have been faster
            if entry is None:
                return _build(request, inputs, cache), "compiled"
    _state.stats.disk_hits += 1
    return entry, "disk"


def _build(request: Request, inputs: dict[str, Any], cache: DiskCache) -> Entry:
    started = time.perf_counter()
    entry = codegen.build(request, inputs, toolchain())
    _state.stats.compiled += 1
    _state.stats.compile_seconds += time.perf_counter() - started
    if source_fingerprint(request.modules) != inputs["sources"]:
        log.warning("kernel sources changed while this process runs: %s is used but not saved", request.name)
        _state.stats.not_saved += 1
    elif not cache.publish(entry):
        _state.stats.not_saved += 1
    return entry


def _refuse_to_compile(request: Request) -> None:
    if not get_config().jit:
        fail(
            MissingKernelError,
            f"CUTE_INFER_JIT=off, and no bundle or cache holds {request.name} for {request.arch}: {request.spec}",
            got=f"bundles {', '.join(map(str, get_config().bundle)) or 'none'}; cache {disk_cache().root}",
            fix=f"build it where the compiler is installed: {compile_command(request)}",
        )
    if _state.frozen:
        fail(
            MissingKernelError,
            f"frozen: {request.name} for {request.arch} would have to be compiled: {request.spec}",
            fix=f"warm it up before cute_infer.jit.freeze(), or build it ahead of time: {compile_command(request)}",
        )


def compile_command(request: Request) -> str:
    """The shell command that compiles exactly ``request`` into the disk cache."""
    return f"cute-infer compile --variant {shlex.quote(canonical_json(request.to_data()))}"


def _after_fork() -> None:
    frozen = _state.frozen
    forget()
    _state.frozen = frozen


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
