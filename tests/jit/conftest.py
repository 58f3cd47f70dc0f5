"""A private cache and a clean process state for each test, and a way to run code in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cute_infer import jit
from cute_infer.config import reload_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache; memory, counters and configuration are as in a new process."""
    directory = tmp_path / "cache"
    for name in [name for name in os.environ if name.startswith("CUTE_INFER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUTE_INFER_CACHE_DIR", str(directory))
    reload_config()
    jit.forget()
    yield directory
    monkeypatch.undo()
    reload_config()
    jit.forget()


@pytest.fixture
def setenv(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Set a variable and have it read."""

    def set_and_read(name: str, value: str) -> None:
        monkeypatch.setenv(name, value)
        reload_config()

    return set_and_read


def start(code: str, **env: str) -> subprocess.Popen[str]:
    """Run ``code`` in a new interpreter that can import the package and these tests."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def run() -> Callable[..., str]:
    """:func:`start`, wait, and the output; a failing process fails the test."""

    def run_and_read(code: str, **env: str) -> str:
        process = start(code, **env)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-4000:]
        return out

    return run_and_read


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """:func:`start`."""
    return start
