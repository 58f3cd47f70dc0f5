"""Names for kernels: canonical JSON of what was asked for, hashed. No pickle anywhere.

Two keys, because a machine that only runs prebuilt kernels has no compiler to ask for its version:

    request_key  what was asked for: class path, spec, tile, architecture, fingerprint of the kernel sources    bundles are searched by it
    object_key   how it was made: request_key, toolchain versions and flavour, code-changing environment        disk entries are named by it

The GPU's name and SM count are in neither: kernels compiled without a GPU must match on any device of the architecture.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import math
from typing import Any

from .sources import source_fingerprint

FORMAT = 1  # of the object and of the sidecar: raise it when their meaning changes


# ------------------------------------------------------------------------------------------------------------------ canonical values
def encode(value: Any) -> Any:
    """A frozen dataclass of plain values as JSON data. The class name is part of it, so equal fields of two classes stay apart.

    Raises:
        TypeError: a value that has no canonical form (anything but None, bool, int, float, str, tuple, frozen dataclass).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise TypeError(f"{cls.__qualname__} is not a frozen dataclass, so it cannot name a kernel")
        fields = {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": f"{cls.__module__}:{cls.__qualname__}", "fields": fields}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if type(value) is float and not math.isfinite(value):
        raise TypeError(f"{value} cannot name a kernel")
    if value is None or type(value) in (bool, int, float, str):
        return value
    allowed = "None, bool, int, float, str, tuple or a frozen dataclass"
    raise TypeError(f"{type(value).__qualname__} {value!r} cannot name a kernel: use {allowed}")


def decode(data: Any) -> Any:
    """The inverse of :func:`encode`."""
    if isinstance(data, dict):
        module, _, name = data["class"].partition(":")
        cls = getattr(importlib.import_module(module), name)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise TypeError(f"{data['class']} is not a dataclass")
        return cls(**{key: decode(item) for key, item in data["fields"].items()})
    return tuple(decode(item) for item in data) if isinstance(data, list) else data


def canonical_json(data: Any) -> str:
    """One text per value: sorted names, no spaces, ASCII; ``1``, ``1.0`` and ``true`` differ."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: Any) -> str:
    """SHA-256 of :func:`canonical_json`, in hex."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------------ keys
@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the compiler: ``path`` is ``"package.module:Class"``, ``spec`` and ``tile`` are its two constructor arguments."""

    path: str
    spec: Any
    tile: Any
    arch: str

    @property
    def name(self) -> str:
        """Short name for people: the module's last word, ``decode_sm90``; with its package where that says little, ``paged_kernels``."""
        *packages, module = self.path.partition(":")[0].split(".")
        return f"{packages[-1]}_{module}" if module.startswith("kernels") and packages else module

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that define the kernel, its spec and its tile."""
        values = (value for value in (self.spec, self.tile) if dataclasses.is_dataclass(value))
        return (self.path.partition(":")[0], *(type(value).__module__ for value in values))

    def to_data(self) -> dict[str, Any]:
        """JSON data that :meth:`from_data` reads back."""
        return {"path": self.path, "spec": encode(self.spec), "tile": encode(self.tile), "arch": self.arch}

    @staticmethod
    def from_data(data: dict[str, Any]) -> Request:
        """The request that ``data`` describes."""
        return Request(data["path"], decode(data["spec"]), decode(data["tile"]), data["arch"])


def request_inputs(request: Request, sources: str | None = None) -> dict[str, Any]:
    """What :func:`request_key` hashes. ``sources`` is the fingerprint of ``request.modules`` if the caller has it."""
    return {"format": FORMAT, **request.to_data(), "sources": sources or _cached_fingerprint(request.modules)}


def request_key(request: Request) -> str:
    """The name under which bundles hold the kernel."""
    return digest(request_inputs(request))


def object_key(request_key: str, toolchain: dict[str, str | None]) -> str:
    """The name of the kernel's entry on disk."""
    return digest({"request": request_key, "toolchain": toolchain})


# Sources are read once: a process runs the code it imported, whatever happens to the files later (compile.py checks before it publishes).
_cached_fingerprint = functools.lru_cache(maxsize=None)(source_fingerprint)
