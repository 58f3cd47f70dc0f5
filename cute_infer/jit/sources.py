"""Which source files make a kernel what it is: its module and everything that module imports from its own package, found by reading.

Nothing is imported to find out, so the answer is the same where the compiler is missing. Followed are import statements anywhere in a file
except under ``if TYPE_CHECKING:``; ``__init__.py`` files only where a name is taken from them. A kernel that imports by other means would
escape, and none may.

Every process does this before its first kernel, so files are searched for import statements and parsed as a whole only where that leaves a
doubt, which takes a tenth of the time. An import statement quoted in a docstring counts as one.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
KERNEL_MODULES = ("attention/kernels/*.py", "paged/kernels*.py", "sampling/kernels*.py")

# The text on a line before the word "import" if that begins an import statement, there or behind a colon or semicolon: "from x", "if y: ".
_BEFORE = re.compile(r"(?:.*[:;])?\s*(?:from\b[^;#]*)?$")
_FOR_TYPES = re.compile(r"^if (?:typing\.)?TYPE_CHECKING:[ \t]*(?:#.*)?\n(?:(?:[ \t]+.*|)\n)+", re.MULTILINE)


def kernel_sources() -> list[Path]:
    """Every file of this package whose text can change one of its kernels: kernels, device functions, specs, tiles; sorted."""
    modules = {path for pattern in KERNEL_MODULES for path in PACKAGE.glob(pattern) if path.name != "__init__.py"}
    return source_files(".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)) for path in modules)


def kernel_sources_hash() -> str:
    """SHA-256 over names and bytes of :func:`kernel_sources`: equal hashes, equal kernels. Reports cite it beside their numbers."""
    return hash_files(kernel_sources())


def source_fingerprint(modules: Iterable[str]) -> str:
    """SHA-256 over names and bytes of the files that ``modules`` consist of, directly or by import."""
    return hash_files(source_files(modules))


def fingerprint_of(closure: Iterable[str]) -> str | None:
    """:func:`source_fingerprint` of the modules whose :func:`source_modules` were ``closure``, without searching them for imports again.

    Equal to an older fingerprint only if no file changed, and then the closure did not change either. None when a module is gone.
    """
    files = [_file_of(module) for module in closure]
    return hash_files(sorted({file for file in files if file is not None})) if None not in files else None


def source_files(modules: Iterable[str]) -> list[Path]:
    """Files of :func:`source_modules`; sorted."""
    return sorted(set(source_modules(modules).values()))


def source_modules(modules: Iterable[str]) -> dict[str, Path]:
    """``modules`` and what they import from their own top-level packages, with their files.

    Raises:
        ModuleNotFoundError: one of ``modules`` has no source file.
    """
    waiting = list(modules)
    for module in waiting:
        if _file_of(module) is None:
            raise ModuleNotFoundError(f"no source file for {module}, so its kernels have no name", name=module)
    own = {module.partition(".")[0] for module in waiting}
    found: dict[str, Path] = {}
    while waiting:
        module = waiting.pop()
        file = _file_of(module)
        if module not in found and file is not None:
            found[module] = file
            waiting += _imports(module, file, own)
    return found


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over names (relative to the package) and bytes."""
    total = hashlib.sha256()
    for path in files:
        name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
        content = path.read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def _file_of(module: str) -> Path | None:
    """The source of a module, found without importing it or its parents."""
    top, *rest = module.split(".")
    for root in _roots(top):
        path = os.path.join(root, *rest)  # not pathlib: this runs a hundred times before a process's first kernel
        if os.path.isfile(file := os.path.join(path, "__init__.py")) or (rest and os.path.isfile(file := path + ".py")):
            return Path(file)
    return None if rest else _single_file(top)


@functools.lru_cache(maxsize=64)
def _roots(top: str) -> tuple[Path, ...]:
    """Directories of a top-level package."""
    if top == PACKAGE.name:
        return (PACKAGE,)
    spec = importlib.util.find_spec(top) if top != "__main__" else None
    return tuple(Path(place).resolve() for place in spec.submodule_search_locations or ()) if spec else ()


def _single_file(module: str) -> Path | None:
    """The source of a top-level module that is no package; ``__main__`` is the script."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    spec = None if loaded or module == "__main__" else importlib.util.find_spec(module)
    origin = loaded or (spec.origin if spec else None)
    return Path(origin).resolve() if origin and origin.endswith(".py") else None


def _imports(module: str, file: Path, own: set[str]) -> Iterator[str]:
    """Absolute names of the modules of the packages ``own`` that ``file`` imports; a name taken from a package counts as its submodule
    where there is one."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for level, base, names in _import_statements(file.read_bytes()):
        if level:
            above = package.split(".")[: len(package.split(".")) - level + 1]
            base = ".".join(filter(None, (*above, base)))
        if base.partition(".")[0] in own:
            for inner in [f"{base}.{name}" for name in names] or [base]:
                yield inner if _file_of(inner) else base


@functools.lru_cache(maxsize=256)
def _import_statements(content: bytes) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
    """Leading dots, module and imported names (none for ``import module``) of each import statement in a source text."""
    try:
        tree = ast.parse("\n".join(_import_texts(content.decode(errors="replace"))))
    except SyntaxError:
        tree = ast.parse(content)
    found: list[tuple[int, str, tuple[str, ...]]] = []
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
    return tuple(found)


def _import_texts(text: str) -> Iterator[str]:
    """The import statements of ``text``, each with what stands behind it up to the end of the line on which its parenthesis closes.

    Raises:
        SyntaxError: they cannot be told without parsing all of it.
    """
    text = text.replace("\r\n", "\n").replace("\\\n", " ")
    if "TYPE_CHECKING" in text:
        text = _FOR_TYPES.sub("", text)
        if re.search(r"TYPE_CHECKING\b.*:", text):
            raise SyntaxError("TYPE_CHECKING in another form")
    for word in re.finditer(r"import\b", text):
        before = text[text.rfind("\n", 0, word.start()) + 1 : word.start()]
        if not _BEFORE.match(before):
            continue
        start = word.start() - len(before) + before.rfind("from") if "from" in before else word.start()
        end = text.find("\n", word.end())
        opened = text.find("(", word.end(), end)
        if opened >= 0:
            end = text.find("\n", text.find(")", opened))
        yield text[start : end if end >= 0 else None]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """The statements under ``node``, without the bodies of ``if TYPE_CHECKING:``."""
    yield node
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    for child in ast.iter_child_nodes(node) if not for_types else node.orelse:  # type: ignore[attr-defined]
        if not isinstance(child, ast.expr):
            yield from _walk(child)
