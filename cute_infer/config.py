"""The environment variables, read here and nowhere else.

    variable                 values                meaning
    CUTE_INFER_CACHE_DIR     a directory           compiled kernels of this user (default: the platform's user cache directory)
    CUTE_INFER_BUNDLE        directories, ':'      ahead-of-time bundles, searched before the cache
    CUTE_INFER_ARCH          sm_80, sm_90a, ...    compile for this architecture instead of the device's
    CUTE_INFER_JIT           on | off              off: a kernel that is in no bundle and no cache raises MissingKernelError
    CUTE_INFER_BACKEND       auto | reference      reference: every op runs the torch reference, on the GPU too
    CUTE_INFER_PROGRESS      auto | off            off: no progress line on the terminal while a kernel compiles
    CUTE_INFER_VALIDATE      1 | 0                 0: plan() does not check metadata that lives on the GPU
    CUTE_INFER_DUMP_DIR      a directory           keep the PTX, cubin and LLVM IR of every kernel compiled

Names that start with CUTE_INFER_ and are not in this table warn: a misspelt switch that does nothing is worse than none. ``CUTE_DSL_*``
belongs to the compiler; it is respected, and what changes generated code is part of the cache key (``jit/toolchain.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from .errors import ConfigError, fail

PREFIX = "CUTE_INFER_"


@dataclasses.dataclass(frozen=True)
class Config:
    """One reading of the environment. ``None`` stands for unset where there is no other default."""

    cache_dir: Path
    bundle: tuple[Path, ...] = ()
    arch: str | None = None
    jit: bool = True
    backend: str = "auto"
    progress: str = "auto"
    validate: bool = True
    dump_dir: Path | None = None


VARIABLES = tuple(PREFIX + field.name.upper() for field in dataclasses.fields(Config))


@functools.lru_cache(maxsize=1)
def get_config() -> Config:
    """The configuration of this process; the environment is read on the first call and not again."""
    return read(os.environ)


def reload_config() -> Config:
    """Read the environment anew. For tests and for programs that set the variables after importing the package."""
    get_config.cache_clear()
    return get_config()


def read(env: Mapping[str, str]) -> Config:
    """The :class:`Config` that ``env`` describes.

    Raises:
        ConfigError: a variable has a value outside its list.
    """
    unknown = sorted(name for name in env if name.startswith(PREFIX) and name not in VARIABLES)
    if unknown:
        warnings.warn(f"unknown environment variables {', '.join(unknown)} (known: {', '.join(VARIABLES)})", stacklevel=2)

    def text(name: str) -> str | None:
        return env.get(PREFIX + name, "").strip() or None

    def one_of(name: str, *allowed: str) -> str:
        value = text(name) or allowed[0]
        if value not in allowed:
            fail(ConfigError, f"{PREFIX}{name} has an unknown value", got=repr(value), expected=" or ".join(allowed))
        return value

    def path(value: str) -> Path:
        return Path(value).expanduser().absolute()

    cache_dir, dump_dir = text("CACHE_DIR"), text("DUMP_DIR")
    return Config(
        cache_dir=path(cache_dir or platformdirs.user_cache_dir("cute_infer")),
        bundle=tuple(path(part) for part in (text("BUNDLE") or "").split(os.pathsep) if part),
        arch=text("ARCH"),
        jit=one_of("JIT", "on", "off") == "on",
        backend=one_of("BACKEND", "auto", "reference"),
        progress=one_of("PROGRESS", "auto", "off"),
        validate=one_of("VALIDATE", "1", "0") == "1",
        dump_dir=path(dump_dir) if dump_dir else None,
    )
