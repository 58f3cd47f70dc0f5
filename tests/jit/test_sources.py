"""Fingerprints: every file that a kernel is made of, and no other."""

from __future__ import annotations

import pytest

from cute_infer.jit import kernel_sources, kernel_sources_hash, sources

FILES = {
    "app/__init__.py": "from .api import everything",
    "app/api.py": "everything = 1",
    "app/kernels/__init__.py": "NAME = 1",
    "app/kernels/one.py": """
from __future__ import annotations
import math
from typing import TYPE_CHECKING
from ..device import mask
from ..device.softmax import Softmax
from app.spec import Spec
if TYPE_CHECKING:
    from ..api import everything
def late():
    from .part import value
""",
    "app/kernels/part.py": "value = 1",
    "app/kernels/two.py": "from . import NAME",
    "app/device/__init__.py": "broken = (",
    "app/device/mask.py": "import app.device.bits",
    "app/device/bits.py": "from . import mask  # a cycle",
    "app/device/softmax.py": "Softmax = 1",
    "app/device/unused.py": "",
    "app/spec.py": "import torch",
    "single.py": "from app.spec import Spec",
}


@pytest.fixture
def app(tmp_path, monkeypatch):
    """A package on sys.path that nobody imports (its device/__init__ could not be)."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    sources._roots.cache_clear()
    yield tmp_path
    sources._roots.cache_clear()


def names(app, *modules):
    return [path.relative_to(app).as_posix() for path in sources.source_files(modules)]


def test_what_a_kernel_imports(app):
    expected = ["device/bits.py", "device/mask.py", "device/softmax.py", "kernels/one.py", "kernels/part.py", "spec.py"]
    assert names(app, "app.kernels.one") == [f"app/{name}" for name in expected]


@pytest.mark.parametrize(
    "text, imported",
    [
        ("import app.spec as s, math", "spec"),
        ("from app import (  # all of it\n    spec,\n)", "spec"),
        ("from .. import \\\n    spec", "spec"),
        ("from \\\n    .. import spec", "spec"),
        ("x = 1; from ..spec import Spec", "spec"),
        ("if True: from ..spec import Spec", "spec"),
        ("try:\n    from ..spec import (\n  Spec as S,  # a ) in a comment\n  T)\nexcept ImportError: pass", "spec"),
        ("class A:\n\tdef f(self):\n\t\timport app.spec\n", "spec"),
        ('"""\nimport of nothing\n"""\nfrom ..spec import Spec', "spec"),
        ("from __future__ import annotations\r\nfrom ..spec import (\r\n    Spec,\r\n)\r\n", "spec"),
        ("if not TYPE_CHECKING:\n    from ..spec import Spec", "spec"),
        ("if TYPE_CHECKING:\n    import typing\nelse:\n    from ..spec import Spec", "spec"),
        ("def f():\n    if typing.TYPE_CHECKING:\n        from ..spec import Spec", None),
        ("if typing.TYPE_CHECKING:  # only then\n\n    from ..spec import Spec\n\nx = 1", None),
        ("# from ..spec import Spec\nimportant = 'import app.spec'", None),
    ],
)
def test_ways_to_import(app, text, imported):
    (app / "app/kernels/two.py").write_bytes(text.encode())
    assert names(app, "app.kernels.two") == ["app/kernels/two.py", *([f"app/{imported}.py"] if imported else [])]


def test_finding_agrees_with_parsing(monkeypatch):
    files = kernel_sources()
    found = [sources._import_statements.__wrapped__(file.read_bytes()) for file in files]

    def doubt(text):
        raise SyntaxError

    monkeypatch.setattr(sources, "_import_texts", doubt)
    parsed = [sources._import_statements.__wrapped__(file.read_bytes()) for file in files]
    assert [set(each) for each in found] == [set(each) for each in parsed]


def test_a_name_from_a_package(app):
    assert names(app, "app.kernels.two") == ["app/kernels/__init__.py", "app/kernels/two.py"]


def test_other_packages_are_left_out(app):
    assert names(app, "single") == ["single.py"]
    assert names(app, "single", "app.kernels.part") == ["app/kernels/part.py", "app/spec.py", "single.py"]


@pytest.mark.parametrize("name", ["app/kernels/one.py", "app/device/bits.py", "app/spec.py"])
def test_fingerprint_follows_the_text(app, name):
    before = sources.source_fingerprint(["app.kernels.one"])
    (app / name).write_text(FILES[name] + "\n# changed\n")
    assert sources.source_fingerprint(["app.kernels.one"]) != before


@pytest.mark.parametrize("name", ["app/api.py", "app/__init__.py", "app/device/unused.py", "app/kernels/two.py"])
def test_fingerprint_ignores_the_rest(app, name):
    before = sources.source_fingerprint(["app.kernels.one"])
    (app / name).write_text("# changed")
    assert sources.source_fingerprint(["app.kernels.one"]) == before


@pytest.mark.parametrize("module", ["nowhere", "app.nowhere", "sys"])
def test_no_source_no_name(app, module):
    with pytest.raises(ModuleNotFoundError, match="no source file"):
        sources.source_files([module])


def test_kernel_sources_are_the_device_code():
    found = {path.relative_to(sources.PACKAGE).as_posix() for path in kernel_sources()}
    assert {"attention/device/args.py", "attention/spec.py", "attention/kernels/merge.py", "attention/tiles_decode_sm90.py"} <= found
    assert not any(name.startswith(("jit/", "cli", "attention/launch", "attention/plan", "__init__")) for name in found), found
    assert len(kernel_sources_hash()) == 64
