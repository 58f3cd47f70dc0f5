"""Ahead-of-time bundles: one shared library per architecture and a manifest, made without a GPU and run without the compiler.

    <bundle>/manifest.json             request key -> architecture, symbol, facts; SHA-256 of each library; versions that made them
             cute_infer_sm_90a.so

A machine that runs bundles needs torch, apache-tvm-ffi and the compiler's runtime library (``pip install --no-deps
nvidia-cutlass-dsl-libs-cu12``), not the compiler. A kernel matches only the very sources it was built from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CacheError, fail
from . import trust
from .cache import Entry
from .inspect import KernelFacts
from .key import Request, digest, request_inputs
from .library import link, preload_runtime
from .sources import fingerprint_of, kernel_sources_hash, source_modules
from .toolchain import runtime_library, toolchain

log = logging.getLogger("cute_infer.jit")

MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest: raise it when its meaning changes


class Bundle:
    """A bundle directory opened for reading.

    Raises:
        CacheError: no manifest, a damaged one, or one of another format.
        UntrustedCacheError: another user could have written it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.realpath(directory))
        self._libraries: dict[str, Any] = {}
        self._fingerprints: dict[tuple[str, ...], str | None] = {}
        self._explained = False
        try:
            (text,) = trust.read_files(self.directory, (MANIFEST,))
            self.manifest = json.loads(text)
            found = self.manifest["format"]
        except (OSError, ValueError, KeyError) as error:
            fail(CacheError, f"{directory} is not a kernel bundle", got=repr(error), fix="build one with `cute-infer compile --out`")
        if found != FORMAT:
            fail(CacheError, f"{directory} has another bundle format", got=found, expected=FORMAT, fix="build it again with this version")
        self.unusable = self._why_unusable()
        if self.unusable:
            log.warning("bundle %s is ignored: %s", directory, self.unusable)

    def _why_unusable(self) -> str | None:
        if runtime_library() is None:
            return "the runtime library is not installed (pip install --no-deps nvidia-cutlass-dsl-libs-cu12)"
        made, here = self.manifest["toolchain"]["dsl"], toolchain()["libs"]
        if here is None:  # copied here by hand, or named by CUTE_DSL_LIBS: nothing says which version it is
            log.warning(
                "bundle %s was built with nvidia-cutlass-dsl %s; the version of the runtime library here is not known", self.directory, made
            )
        elif made.split(".")[:2] != here.split(".")[:2]:
            return f"it was built with nvidia-cutlass-dsl {made} and the runtime library here is {here}"
        return None

    def load(self, request: Request) -> tuple[Any, KernelFacts] | None:
        """The function and facts of a kernel of an architecture that is open, or None when the bundle lacks it."""
        if self.unusable:
            return None
        fingerprint = self._fingerprint(request.modules)
        kernel = self.manifest["kernels"].get(digest(request_inputs(request, fingerprint))) if fingerprint else None
        if kernel is None:
            self._explain_miss()
            return None
        return self._libraries[kernel["arch"]][kernel["symbol"]], KernelFacts.from_data(kernel["facts"])

    def _fingerprint(self, modules: tuple[str, ...]) -> str | None:
        """Of the sources as they are here. The bundle knows which modules to read, and where it does not it has no kernel of theirs."""
        if modules not in self._fingerprints:
            closure = self.manifest["modules"].get(" ".join(modules))
            self._fingerprints[modules] = fingerprint_of(closure) if closure else None
        return self._fingerprints[modules]

    def _explain_miss(self) -> None:
        """Say once when changed sources may be why a kernel is missing. Not before one is: reading all sources takes 20 ms."""
        if not self._explained and self.manifest["sources"] != kernel_sources_hash():
            log.warning("bundle %s was built from other kernel sources: kernels that changed since are not in it", self.directory)
        self._explained = True

    def open(self, arch: str) -> None:
        """Load the library for ``arch`` unless it is loaded or there is none. Not left to the first kernel, whose time it is not.

        Raises:
            CacheError: the library was altered.
            UntrustedCacheError: another user could have written it.
        """
        library = self.manifest["libraries"].get(arch)
        if library is None or arch in self._libraries or self.unusable:
            return
        import tvm_ffi

        started = time.perf_counter()
        (content,) = trust.read_files(self.directory, (library["file"],))
        file = self.directory / library["file"]
        found = hashlib.sha256(content).hexdigest()
        if found != library["sha256"]:
            fail(CacheError, f"{file} was altered", got=found, expected=library["sha256"], fix="build it again")
        preload_runtime()
        self._libraries[arch] = tvm_ffi.load_module(str(file))
        log.debug("opened %s, %d bytes, in %.1f ms, once", file, len(content), (time.perf_counter() - started) * 1e3)


def write_bundle(directory: Path, entries: Iterable[Entry]) -> dict[str, Any]:
    """Link ``entries`` into one library per architecture under ``directory`` and write the manifest; returns it.

    An existing bundle there is replaced, manifest last, so that a reader never sees a manifest without its libraries.

    Raises:
        CacheError: no linker, or it failed.
    """
    entries = list(entries)
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    libraries = {}
    for arch in sorted({entry.request["arch"] for entry in entries}):
        file = f"cute_infer_{arch}.so"
        with tempfile.TemporaryDirectory(dir=directory, prefix=".link-") as scratch:
            objects = []
            for entry in entries:
                if entry.request["arch"] == arch:
                    objects.append(Path(scratch) / f"{entry.symbol}.o")
                    objects[-1].write_bytes(entry.object)
            linked = Path(scratch) / file
            link(linked, objects)
            linked.chmod(0o644)
            libraries[arch] = {"file": file, "bytes": linked.stat().st_size, "sha256": hashlib.sha256(linked.read_bytes()).hexdigest()}
            os.replace(linked, directory / file)
    manifest = {
        "format": FORMAT,
        "sources": kernel_sources_hash(),
        "toolchain": toolchain(),
        "libraries": libraries,
        "kernels": {
            digest(entry.request): {
                "arch": entry.request["arch"],
                "symbol": entry.symbol,
                "facts": entry.facts.to_data(),
                "request": entry.request,
            }
            for entry in entries
        },
        "modules": {
            " ".join(modules): sorted(source_modules(modules))
            for modules in {Request.from_data(entry.request).modules for entry in entries}
        },
    }
    temporary = directory / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.chmod(0o644)
    os.replace(temporary, directory / MANIFEST)
    return manifest
