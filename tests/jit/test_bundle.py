"""Bundles: built here, run by a process that cannot import the compiler; refused when altered or foreign."""

from __future__ import annotations

import json
import os

import pytest

from cute_infer import jit
from cute_infer.errors import CacheError, UntrustedCacheError
from cute_infer.jit import Request, Target, key, library, sources
from cute_infer.jit import bundle as bundles
from tests.jit.tiny_spec import PATH, TinySpec, TinyTile

pytest.importorskip("cutlass", reason="needs the compiler")
REQUESTS = [Request(PATH, TinySpec(label=label), TinyTile(), arch) for arch in ("sm_80", "sm_90a") for label in "ab"]


@pytest.fixture
def bundle(tmp_path):
    directory = tmp_path / "bundle"
    bundles.write_bundle(directory, [jit.get_entry(request) for request in REQUESTS])
    jit.disk_cache().clear()
    return directory


def load(arch="sm_90a", **spec):
    return jit.get_kernel(PATH, TinySpec(**spec), TinyTile(), Target.parse(arch))


def test_without_the_compiler(bundle, run):
    out = run(
        """
        import sys
        sys.modules["cutlass"] = None  # importing it raises
        import torch
        from cute_infer.jit import *
        from tests.jit.tiny_spec import *
        for arch in ("sm_80", "sm_90a"):
            for label in "ab":
                kernel = get_kernel(PATH, TinySpec(label=label), TinyTile(), Target.parse(arch))
                try:
                    kernel(torch.zeros(128), 1)
                except ValueError as error:
                    print(kernel.origin, kernel.facts.arch, "expected device_type=cuda" in str(error))
        try:
            get_kernel(PATH, TinySpec(label="missing"), TinyTile(), Target.parse("sm_80"))
        except Exception as error:
            print(type(error).__name__)
        """,
        CUTE_INFER_BUNDLE=str(bundle),
    )
    assert out.split() == ["bundle", "sm_80", "True"] * 2 + ["bundle", "sm_90a", "True"] * 2 + ["MissingKernelError"]


def test_first_bundle_that_has_it(bundle, tmp_path, setenv):
    other = tmp_path / "other"
    bundles.write_bundle(other, [jit.get_entry(Request(PATH, TinySpec(label="c"), TinyTile(), "sm_90a"))])
    setenv("CUTE_INFER_BUNDLE", os.pathsep.join([str(bundle), str(other)]))
    assert load(label="a").origin == load(label="c").origin == "bundle" and load(label="d").origin == "compiled"
    assert jit.cache_stats().bundle_hits == 2


def test_altered_library(bundle, setenv):
    file = bundle / "cute_infer_sm_90a.so"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    setenv("CUTE_INFER_BUNDLE", str(bundle))
    with pytest.raises(CacheError, match="was altered"):
        load(label="a")
    assert load("sm_80", label="a").origin == "bundle"


def test_writable_by_others(bundle, setenv):
    (bundle / "cute_infer_sm_90a.so").chmod(0o666)
    setenv("CUTE_INFER_BUNDLE", str(bundle))
    with pytest.raises(UntrustedCacheError):
        load(label="a")


def alter(bundle, **change):
    manifest = bundle / bundles.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))


def test_made_by_another_compiler(bundle, setenv, caplog):
    alter(bundle, toolchain={"dsl": "4.7.0"})
    setenv("CUTE_INFER_BUNDLE", str(bundle))
    assert load(label="a").origin == load(label="b").origin == "compiled"
    assert "nvidia-cutlass-dsl 4.7.0" in caplog.text and len(caplog.records) == 1


def test_a_runtime_library_of_unknown_version(bundle, setenv, monkeypatch, caplog):
    """Copied by hand, without the files in which a package notes its version."""
    monkeypatch.setattr(bundles, "toolchain", lambda: {"libs": None})
    setenv("CUTE_INFER_BUNDLE", str(bundle))
    assert load(label="a").origin == load(label="b").origin == "bundle"
    assert "version of the runtime library here is not known" in caplog.text and len(caplog.records) == 1


def test_no_runtime_library(bundle, setenv, monkeypatch, caplog):
    monkeypatch.setattr(bundles, "runtime_library", lambda: None)
    setenv("CUTE_INFER_BUNDLE", str(bundle))
    assert load(label="a").origin == "compiled" and "the runtime library is not installed" in caplog.text


def test_made_from_other_sources(bundle, setenv, caplog):
    alter(bundle, sources="0")
    setenv("CUTE_INFER_BUNDLE", str(bundle))
    assert load(label="a").origin == load(label="b").origin == "bundle"  # these two did not change
    assert not caplog.records
    assert load(label="c").origin == load(label="d").origin == "compiled"
    assert "other kernel sources" in caplog.text and len(caplog.records) == 1


def test_a_kernel_that_changed(bundle, setenv, monkeypatch):
    monkeypatch.setattr(bundles, "fingerprint_of", lambda closure: "changed")
    setenv("CUTE_INFER_BUNDLE", str(bundle))
    assert load(label="a").origin == "compiled"


@pytest.mark.parametrize(
    "modules", [{}, {"tests.jit.tiny_kernel tests.jit.tiny_spec tests.jit.tiny_spec": ["tests.jit.tiny_kernel", "tests.jit.gone"]}]
)
def test_modules_it_does_not_know(bundle, setenv, modules):
    alter(bundle, modules=modules)
    setenv("CUTE_INFER_BUNDLE", str(bundle))
    assert load(label="a").origin == "compiled"


def test_reads_the_modules_that_make_the_kernel(bundle):
    """The fingerprint by the bundle's list of modules is the one by the search for imports."""
    manifest = json.loads((bundle / bundles.MANIFEST).read_text())
    assert {key.request_inputs(request)["sources"] for request in REQUESTS} == {
        sources.fingerprint_of(c) for c in manifest["modules"].values()
    }


@pytest.mark.parametrize("content", [None, "", "{}", '{"format": 99}'])
def test_not_a_bundle(tmp_path, setenv, content):
    if content is not None:
        (tmp_path / bundles.MANIFEST).write_text(content)
    setenv("CUTE_INFER_BUNDLE", str(tmp_path))
    with pytest.raises(CacheError, match="bundle"):
        load(label="a")


def test_the_linkers_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(CacheError, match="linking cute_infer_sm_80.so failed"):
        bundles.write_bundle(tmp_path, [jit.get_entry(REQUESTS[0])])
    assert not (tmp_path / bundles.MANIFEST).exists()


def test_no_linker(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "find_linker", lambda: None)
    with pytest.raises(CacheError, match="needs a linker"):
        bundles.write_bundle(tmp_path, [jit.get_entry(REQUESTS[0])])
