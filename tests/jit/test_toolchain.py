"""Versions and flavours: found without importing the compiler, chosen as it chooses."""

from __future__ import annotations

import sys

import pytest

from cute_infer.jit import toolchain as tools


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Pretend that these flavours are installed and that the driver supports this CUDA version."""

    def pretend(majors, driver):
        for major in majors:
            directory = tmp_path / "nvidia_cutlass_dsl" / f"cu{major}" / "lib"
            directory.mkdir(parents=True)
            (directory / tools.RUNTIME).touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "nvidia_cutlass_dsl", raising=False)
        monkeypatch.setattr(tools, "driver_cuda_major", lambda: driver)
        monkeypatch.delenv("CUTE_DSL_LIBS", raising=False)
        tools.flavour.cache_clear()
        tools.toolchain.cache_clear()

    yield pretend
    monkeypatch.undo()
    tools.flavour.cache_clear()
    tools.toolchain.cache_clear()


@pytest.mark.parametrize(
    "majors, driver, chosen",
    [((12,), None, 12), ((12, 13), None, 13), ((12, 13), 12, 12), ((12, 13), 14, 13), ((13,), 12, None), ((), 13, None)],
)
def test_flavour(installed, tmp_path, majors, driver, chosen):
    installed(majors, driver)
    assert tools.flavour() == chosen
    library = tools.runtime_library()
    assert library == (tmp_path / "nvidia_cutlass_dsl" / f"cu{chosen}" / "lib" / tools.RUNTIME if chosen else None)
    assert tools.toolchain()["flavour"] == (f"cu{chosen}" if chosen else None)


def test_the_compilers_own_variable_wins(installed, monkeypatch):
    installed((12,), None)
    monkeypatch.setenv("CUTE_DSL_LIBS", f"/a/libother.so:/b/{tools.RUNTIME}")
    assert str(tools.runtime_library()) == f"/b/{tools.RUNTIME}"


def test_only_variables_that_change_code_are_in_the_key(installed, monkeypatch):
    for name in (
        "CUTE_DSL_DUMP_DIR",
        "CUTE_DSL_KEEP_PTX",
        "CUTE_DSL_LOG_LEVEL",
        "CUTE_DSL_ARCH",
        "CUTE_DSL_LINEINFO",
        "CUTE_DSL_NEW_IN_4_9",
    ):
        monkeypatch.setenv(name, "1")
    installed((12,), None)
    assert tools.toolchain()["env"] == "CUTE_DSL_LINEINFO=1 CUTE_DSL_NEW_IN_4_9=1"


def test_agrees_with_the_compiler():
    pytest.importorskip("cutlass")
    from cutlass.base_dsl.version_info import CUDA_VERSION

    assert tools.flavour() == CUDA_VERSION.major
    assert tools.runtime_library().exists()
