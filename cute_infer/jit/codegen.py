"""One compilation: kernel class, spec and tile in; object file, shared library and facts out. The only caller of ``cute.compile``.

The object has two halves. The device half is machine code for one architecture. The host half checks the arguments and launches; the
compiler would tune it for the CPU it happens to run on (AVX-512 here, an illegal instruction there), so every host function is marked
with the baseline instruction set first. That makes one object good for every x86-64 machine: a home directory shared between different
nodes, or a bundle built in CI.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import get_config
from ..errors import CompileError, MissingKernelError, fail
from .cache import Entry
from .inspect import kernel_facts
from .key import Request, digest
from .library import load_library, try_link
from .progress import compiling

# The psABI's x86-64 baseline, in LLVM's words. Both attributes are needed: the features a function does not list come from the module.
BASELINE_CPU = "x86-64"
BASELINE_FEATURES = ("+cmov", "+cx8", "+fxsr", "+mmx", "+sse", "+sse2", "+x87")


def build(request: Request, inputs: dict[str, Any], toolchain: dict[str, str | None]) -> Entry:
    """Compile ``request``; ``inputs`` and ``toolchain`` become the entry's description. Not thread-safe: hold the compile lock.

    Raises:
        CompileError: the compiler refused; carries its message and the spec.
        MissingKernelError: it is not installed.
    """
    try:
        import cutlass.cute as cute
    except ImportError as error:
        fail(
            MissingKernelError,
            f"{request.name} must be compiled, and the compiler is not installed",
            got=f"{type(error).__name__}: {error}",
            fix="pip install nvidia-cutlass-dsl, or point CUTE_INFER_BUNDLE at a bundle made by `cute-infer compile --out`",
        )
    symbol = f"cute_infer_{request.name}_{digest(inputs)[:16]}"
    what = f"{request.name} for {request.arch}: {request.spec}"
    try:
        with compiling(what), _without_advice(), tempfile.TemporaryDirectory(prefix="cute_infer-") as directory:
            scratch = Path(directory)
            report = scratch / "report.yaml"
            options = (
                f"--gpu-arch {request.arch} --enable-tvm-ffi --keep-ptx --keep-cubin --dump-dir {shlex.quote(directory)} "
                f"--remark-output {shlex.quote(str(report))} remarks{{ptx}}"
            )
            kernel = _resolve(request.path)(request.spec, request.tile)
            compiled = cute.compile(kernel, *kernel.abi(), options=options)
            _mark_host_code_portable(compiled.ir_module)
            for suffix in ("o", "ll"):
                compiled.export_to_c(str(scratch / f"{symbol}.{suffix}"), function_name=symbol, export_only_tvm_ffi_symbols=True)
            _dump(scratch, symbol)
            facts = kernel_facts(
                ptx="\n".join(path.read_text(errors="replace").rstrip("\0") for path in scratch.glob("*.ptx")),
                ptxas_report=report.read_text(errors="replace"),
                llvm_ir=(scratch / f"{symbol}.ll").read_text(errors="replace"),
                flavour=toolchain["flavour"] or "unknown",
            )
            content = (scratch / f"{symbol}.o").read_bytes()
            return Entry(content, symbol, facts, inputs, toolchain, try_link(content))
    except CompileError:
        raise
    except Exception as error:
        fail(
            CompileError,
            f"the compiler refused {what}",
            got=f"{type(error).__name__}: {error}",
            expected=f"tile {request.tile}",
            fix="set CUTE_INFER_DUMP_DIR=<dir> to keep what was generated so far, and report both",
        )


def load(entry: Entry) -> Any:
    """The entry's raw TVM-FFI function (positional arguments only), loaded from memory.

    An entry made where no linker was is linked into this process by the compiler, whose import takes seconds.
    """
    if entry.library is not None:
        return load_library(entry.library, entry.symbol)[entry.symbol]
    from cutlass.cute.runtime import load_module

    descriptor = os.memfd_create(entry.symbol, os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(entry.object)
        return load_module(f"/proc/self/fd/{descriptor}", enable_tvm_ffi=True)[entry.symbol]
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Hide the tracer's warnings (long unrolled loops, deprecated names) from users: they are for whoever dumps the code to read it."""
    with warnings.catch_warnings():
        if get_config().dump_dir is None:
            warnings.simplefilter("ignore")
        yield


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _mark_host_code_portable(module: Any) -> None:
    """Restrict every function of the host half to the baseline instruction set (x86-64 only; see ``toolchain.host``)."""
    if platform.machine() != "x86_64":
        return
    from cutlass._mlir import ir

    with module.context:
        cpu = ir.StringAttr.get(BASELINE_CPU)
        features = ir.Attribute.parse(f"#llvm.target_features<[{', '.join(repr(name) for name in BASELINE_FEATURES)}]>".replace("'", '"'))

        def mark(op: Any) -> Any:
            if op.name == "llvm.func" and len(op.regions) and len(op.regions[0].blocks):
                op.attributes["target_cpu"] = cpu
                op.attributes["target_features"] = features
            return ir.WalkResult.ADVANCE

        module.operation.walk(mark)


def _dump(scratch: Path, symbol: str) -> None:
    """Copy what the compiler wrote to CUTE_INFER_DUMP_DIR, under the kernel's symbol."""
    directory = get_config().dump_dir
    if directory is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for path in scratch.iterdir():
        if path.suffix in (".ptx", ".cubin", ".ll", ".yaml"):
            shutil.copyfile(path, directory / f"{symbol}{path.suffix}")
