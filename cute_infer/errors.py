"""Every error this library raises on purpose, and the one place that words them.

    CuteInferError
     +- ConfigError (ValueError)              a request we understand and refuse
     |   +- ShapeError
     |   +- DTypeError (also TypeError)
     |   +- DeviceError
     |   +- PageTableError                    indptr / indices / last_page_len that contradict each other
     |   +- LayoutError (also KeyError)       an unknown layout or mode name
     |   +- UnsupportedConfigError            no kernel for it; every kernel's reason is in the message
     +- PlanError (RuntimeError)              run() before plan()
     +- CompileError (RuntimeError)           the compiler's own message and the spec
     |   +- MissingKernelError                CUTE_INFER_JIT=off and the bundle lacks it
     +- CacheError (RuntimeError)
         +- UntrustedCacheError               wrong owner or writable by others

Each class inherits the built-in that a FlashInfer user would have caught.
"""

from __future__ import annotations

from typing import NoReturn


class CuteInferError(Exception):
    """Base of every error raised on purpose by cute_infer."""


class ConfigError(CuteInferError, ValueError):
    """A request that is understood and refused."""


class ShapeError(ConfigError):
    """A tensor's shape or strides contradict the call."""


class DTypeError(ConfigError, TypeError):
    """A tensor's dtype is not one the call accepts."""


class DeviceError(ConfigError):
    """A tensor lives on the wrong device, or the device is too old."""


class PageTableError(ConfigError):
    """indptr, indices and last_page_len contradict each other or the cache."""


class LayoutError(ConfigError, KeyError):
    """An unknown name for a layout or a mode."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class UnsupportedConfigError(ConfigError):
    """No kernel covers this configuration; the message lists each kernel's reason."""


class PlanError(CuteInferError, RuntimeError):
    """run(), forward() or explain() of a wrapper without a plan."""


class CompileError(CuteInferError, RuntimeError):
    """The kernel compiler refused; carries its message and the spec."""


class MissingKernelError(CompileError):
    """No prebuilt kernel matches, and compiling is switched off, over (after ``freeze()``) or impossible (no compiler)."""


class CacheError(CuteInferError, RuntimeError):
    """The kernel cache cannot be read or written."""


class UntrustedCacheError(CacheError):
    """The kernel cache could have been written by another user."""


def message(what: str, got: object = None, expected: object = None, fix: str | None = None) -> str:
    """Word an error: one line that says what, then what came, what was expected and what to do.

    run(): q has 32 query heads but plan() was called with num_qo_heads=64
      got:      q [7, 32, 128] bfloat16 cuda:0
      expected: q [batch_size=7, num_qo_heads=64, head_dim=128]
      fix:      call plan() again with num_qo_heads=32, or pass the full query
    """
    lines = [what]
    if got is not None:
        lines.append(f"  got:      {got}")
    if expected is not None:
        lines.append(f"  expected: {expected}")
    if fix is not None:
        lines.append(f"  fix:      {fix}")
    return "\n".join(lines)


def fail(
    error: type[CuteInferError],
    what: str,
    *,
    got: object = None,
    expected: object = None,
    fix: str | None = None,
) -> NoReturn:
    """Raise ``error`` with a message built by :func:`message`."""
    raise error(message(what, got, expected, fix))
