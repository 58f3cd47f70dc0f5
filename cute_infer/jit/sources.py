"""Which source files make a kernel what it is: its module and everything that module imports from its own package, found by reading.

Nothing is imported to find out, so the answer is the same where the compiler is missing. Followed are import statements anywhere in a file
except under ``if TYPE_CHECKING:``; ``__init__.py`` files only where a name is taken from them. A kernel that imports by other means would
escape, and none may.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
KERNEL_MODULES = ("attention/kernels/*.py", "paged/kernels*.py", "sampling/kernels*.py")


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


def source_files(modules: Iterable[str]) -> list[Path]:
    """Files of ``modules`` and of what they import from their own top-level packages; sorted.

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
            waiting += [name for name in _imports(module, file) if name.partition(".")[0] in own]
    return sorted(set(found.values()))


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
        path = root.joinpath(*rest)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file() and (rest or file.name == "__init__.py"):
                return file
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


def _imports(module: str, file: Path) -> Iterator[str]:
    """Absolute names of the modules that ``file`` imports; a name taken from a package counts as its submodule where there is one."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in _walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(filter(None, (*above, base)))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if _file_of(inner) else base


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """``ast.walk`` without the bodies of ``if TYPE_CHECKING:``."""
    yield node
    checked = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for child in ast.iter_child_nodes(node) if not checked else node.orelse:  # type: ignore[attr-defined]
        yield from _walk(child)
