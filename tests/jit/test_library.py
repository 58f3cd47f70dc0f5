"""Linked kernels: loaded in milliseconds by a process that never imports the compiler."""

from __future__ import annotations

import logging

import pytest

from cute_infer import jit
from cute_infer.jit import Request, cache, library
from tests.jit.tiny_spec import PATH, TinySpec, TinyTile

pytest.importorskip("cutlass", reason="needs the compiler")

FRESH = """
    import logging, sys, time
    import torch, tvm_ffi
    from cute_infer import jit
    from tests.jit.tiny_spec import *
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(message)s")
    started = time.perf_counter()
    kernels = [jit.get_kernel(PATH, TinySpec(label=label), TinyTile(), jit.Target.parse("sm_90a")) for label in LABELS]
    elapsed = time.perf_counter() - started
    for kernel in kernels:
        try:
            kernel(torch.zeros(128), 1)
        except ValueError as error:
            assert "expected device_type=cuda" in str(error)
    print("RESULT", {kernel.origin for kernel in kernels}, "cutlass" in sys.modules, elapsed * 1e3)
"""


def entry(label: str = "a") -> cache.Entry:
    return jit.get_entry(Request(PATH, TinySpec(label=label), TinyTile(), "sm_90a"))


def fresh(run, labels="a") -> tuple[str, float]:
    """Output of a new process that loads these kernels, and the milliseconds it took."""
    out = run(f"    LABELS = {labels!r}{FRESH}")
    (result,) = (line for line in out.splitlines() if line.startswith("RESULT"))
    return out, float(result.split()[-1])


@pytest.fixture
def linked():
    if library.find_linker() is None:
        pytest.skip("needs a linker")


def test_another_process_does_not_import_the_compiler(linked, run):
    for label in "abc":
        assert entry(label).library
    out, _ = fresh(run, "abc")
    assert "RESULT {'disk'} False" in out
    assert out.count("loaded tiny_kernel for sm_90a: origin disk") == 3 and out.count("libcute_dsl_runtime.so in") == 1


def test_the_first_kernel_takes_milliseconds(linked, run):
    entry()
    times = [fresh(run)[1] for _ in range(3)]
    assert min(times) < 30, times  # 5 to 8 on a quiet machine; importing the compiler alone takes over 500


def test_without_a_linker(monkeypatch, caplog, run):
    monkeypatch.setattr(library, "find_linker", lambda: None)
    library._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "cute_infer.jit"):
        assert entry("a").library is None and entry("b").library is None
    assert caplog.text.count("no linker") == 1
    (key, _) = jit.disk_cache().keys()
    assert not (jit.disk_cache().directory(key) / cache.LIBRARY).exists()
    assert "RESULT {'disk'} True" in fresh(run, "ab")[0]


@pytest.mark.parametrize("command", ["false", "/nowhere/cc"])
def test_a_linker_that_fails(monkeypatch, caplog, command):
    monkeypatch.setenv("CC", command)
    library._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "cute_infer.jit"):
        assert entry().library is None
    assert "linking kernel.so failed" in caplog.text
    jit.forget()
    assert jit.get_kernel(PATH, TinySpec(), TinyTile(), jit.Target.parse("sm_90a")).origin == "disk"


def test_which_linker(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(library.shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert library.find_linker() == ["/usr/bin/clang"]
    monkeypatch.setenv("CC", "ccache 'my cc'")
    assert library.find_linker() == ["ccache", "my cc"]
    monkeypatch.delenv("CC")
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: object())
    assert library.find_linker()[1:] == ["-m", "ziglang", "cc"]
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    assert library.find_linker() is None


def test_a_library_that_misses_a_symbol_does_not_load(linked):
    one = entry()
    broken = one.object.replace(b"\0cuda_dialect_init_library_once\0", b"\0cuda_dialect_init_library_xxxx\0")
    content = library.try_link(broken)
    assert content is not None and broken != one.object
    with pytest.raises(RuntimeError, match="undefined symbol"):
        library.load_library(content, one.symbol)


def test_libraries_loaded_one_after_the_other_stay_apart(linked):
    """The descriptor is the same every time. The first library, returned again, would lack the second's symbol."""
    for label in "abc":
        one = entry(label)
        with pytest.raises(TypeError, match="Expects 2 parameters"):
            library.load_library(one.library, one.symbol)[one.symbol]()
