"""Compiled kernels on disk: one directory per object, published in one rename, checked before every load.

    <cache_dir>/v1/<key[:2]>/<key>/kernel.o      the object
                                   kernel.so     the object linked, where a linker was present
                                   entry.json    their SHA-256, symbol, facts, and what was asked and how it was made (key.py)
    <cache_dir>/v1/locks/<key>.lock              held while one process compiles what all of them want
    <cache_dir>/v1/tmp/<key>.*                   entries being written; left behind only by a killed process, removed by the next
    <cache_dir>/v1/quarantine/<key>.*            entries that failed a check, kept for the curious

What can go wrong and what happens then: an entry that is truncated, altered or does not load is moved to quarantine and rebuilt; a
directory that cannot be written (read-only, full) costs one warning, and the kernel is used from memory; an entry that another user could
have written raises :class:`UntrustedCacheError`, because running it would hand this process to that user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CacheError
from . import trust
from .inspect import KernelFacts
from .key import FORMAT, Request, canonical_json, digest

log = logging.getLogger("cute_infer.jit")

OBJECT, LIBRARY, SIDECAR = "kernel.o", "kernel.so", "entry.json"
LOCK_TIMEOUT_S = 600  # longest a process waits for another's compile; an abandoned lock is freed by the kernel, a stopped owner is not


@dataclasses.dataclass(frozen=True)
class Entry:
    """An object file with its description.

    object     ELF relocatable.
    symbol     name of its TVM-FFI function.
    facts      what the compiler reported.
    request    inputs of the request key (``key.request_inputs``).
    toolchain  what made it (``toolchain.toolchain``).
    library    the object as a shared library, which loads without the compiler; None where no linker was.
    """

    object: bytes
    symbol: str
    facts: KernelFacts
    request: dict[str, Any]
    toolchain: dict[str, str | None]
    library: bytes | None = None

    @property
    def key(self) -> str:
        """The name that its description implies."""
        return digest({"request": digest(self.request), "toolchain": self.toolchain})

    def sidecar(self) -> bytes:
        """The description as JSON text."""
        fields = {
            "format": FORMAT,
            "sha256": hashlib.sha256(self.object).hexdigest(),
            "library_sha256": None if self.library is None else hashlib.sha256(self.library).hexdigest(),
            "symbol": self.symbol,
            "facts": self.facts.to_data(),
            "request": self.request,
            "toolchain": self.toolchain,
        }
        return json.dumps(fields, indent=1).encode()

    @staticmethod
    def parse(object: bytes, sidecar: bytes, library: bytes | None = None) -> Entry:
        """Check an object and its library against their description.

        Raises:
            ValueError: the description is damaged or does not describe these.
        """
        try:
            fields = json.loads(sidecar)
            if fields["format"] != FORMAT:
                raise ValueError(f"format {fields['format']}, expected {FORMAT}")
            for content, recorded in ((object, fields["sha256"]), (library, fields.get("library_sha256"))):
                found = None if content is None else hashlib.sha256(content).hexdigest()
                if recorded != found:
                    raise ValueError(f"SHA-256 is {found}, recorded was {recorded}")
            facts = KernelFacts.from_data(fields["facts"])
            return Entry(object, fields["symbol"], facts, fields["request"], fields["toolchain"], library)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{SIDECAR} is incomplete ({error!r})") from error


class DiskCache:
    """The entries under ``root``. Every method is safe against other threads and processes doing the same."""

    def __init__(self, cache_dir: Path) -> None:
        self.root = Path(os.path.realpath(cache_dir)) / f"v{FORMAT}"
        self._warned = False

    # ------------------------------------------------------------------------------------------------------------------ one entry
    def directory(self, key: str) -> Path:
        """Where the entry lives."""
        return self.root / key[:2] / key

    def load(self, key: str) -> Entry | None:
        """The entry, or None when there is none or it had to be quarantined.

        Raises:
            UntrustedCacheError: the cache could have been written by another user.
        """
        directory = self.directory(key)
        try:
            self._check_roots()
            trust.check_directory(directory.parent)
            entry = _read(directory)
            if entry.key != key:
                raise ValueError(f"describes {entry.key}")
            return entry
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:
            if directory.exists():  # an entry without its files is as broken as one with wrong bytes
                self.quarantine(key, str(error))
            return None
        except OSError as error:
            self._warn(f"cannot read {directory}: {error}")
            return None

    def publish(self, entry: Entry) -> bool:
        """Write the entry so that others see all of it or nothing. Call it with the key's lock held.

        Returns False, after one warning, when the directory cannot be written; the caller still has the entry in memory.
        """
        key = entry.key
        temporary = None
        try:
            self._make_roots()
            for stale in (self.root / "tmp").glob(f"{key}.*"):  # the lock is ours, so its writer is dead
                shutil.rmtree(stale, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self.root / "tmp"))
            _write(temporary / OBJECT, entry.object)
            if entry.library is not None:
                _write(temporary / LIBRARY, entry.library)
            _write(temporary / SIDECAR, entry.sidecar())
            _sync(temporary)
            final = self.directory(key)
            final.parent.mkdir(mode=0o700, exist_ok=True)
            os.replace(temporary, final)
            _sync(final.parent)
            return True
        except OSError as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            if self.directory(key).exists():  # published by a process that could not lock either
                return True
            self._warn(f"kernels are not saved: cannot write {self.root} ({error}); they will be compiled again by the next process")
            return False

    def quarantine(self, key: str, reason: str) -> None:
        """Move a damaged entry aside so that it is rebuilt."""
        directory = self.directory(key)
        target = self.root / "quarantine" / f"{key}.{os.getpid()}.{time.monotonic_ns()}"
        log.warning("damaged kernel cache entry %s: %s; it is moved to %s and rebuilt", directory, reason, target)
        with contextlib.suppress(OSError):  # a read-only cache keeps it; it is refused again the next time
            self._make_roots()
            os.replace(directory, target)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the key's lock between processes. Where locking is impossible (read-only, no flock), proceed: the work is only repeated."""
        import filelock  # here, because a process that only loads kernels never needs it

        held = None
        try:
            self._make_roots()
            held = filelock.FileLock(self.root / "locks" / f"{key}.lock", timeout=LOCK_TIMEOUT_S, mode=0o600)
            held.acquire()
        except (OSError, NotImplementedError, filelock.Timeout) as error:
            log.debug("no lock for %s: %s", key, error)
            held = None
        try:
            yield
        finally:
            if held is not None:
                held.release()

    # ------------------------------------------------------------------------------------------------------------------ all entries
    def keys(self) -> list[str]:
        """Names of all entries, sorted."""
        return sorted(path.name for path in self.root.glob("[0-9a-f][0-9a-f]/*") if path.is_dir())

    def size(self) -> int:
        """Bytes of all entries."""
        total = 0
        for key in self.keys():
            with contextlib.suppress(FileNotFoundError):  # removed by another process just now
                total += sum(file.stat().st_size for file in self.directory(key).iterdir())
        return total

    def verify(self) -> dict[str, str | None]:
        """Check every entry without moving any: key -> what is wrong with it, or None."""
        result: dict[str, str | None] = {}
        for key in self.keys():
            try:
                found = _read(self.directory(key)).key
                result[key] = None if found == key else f"describes {found}"
            except (OSError, ValueError, CacheError) as error:
                result[key] = str(error)
        return result

    def clear(self) -> int:
        """Remove every entry, quarantined and half-written ones too; returns how many there were."""
        count = len(self.keys())
        for path in self.root.glob("*"):
            if path.name != "locks":  # a lock file removed under its owner would let a second process in
                shutil.rmtree(path, ignore_errors=True)
        return count

    def trusted(self) -> str:
        """One line for people: "yes", "not created yet", or why the cache is refused."""
        if not self.root.exists():
            return "not created yet"
        try:
            self._check_roots()
        except CacheError as error:
            return str(error).splitlines()[0]
        return "yes"

    def writable(self) -> bool:
        """Whether new entries can be saved."""
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        return os.access(existing, os.W_OK | os.X_OK)

    # ------------------------------------------------------------------------------------------------------------------ directories
    def _check_roots(self) -> None:
        trust.check_directory(self.root.parent)
        trust.check_directory(self.root)

    def _make_roots(self) -> None:
        for path in (self.root.parent, self.root, self.root / "tmp", self.root / "locks", self.root / "quarantine"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_roots()

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s", text)


def _read(directory: Path) -> Entry:
    object, sidecar = trust.read_files(directory, (OBJECT, SIDECAR))
    library = trust.read_files(directory, (LIBRARY,))[0] if os.path.lexists(directory / LIBRARY) else None
    return Entry.parse(object, sidecar, library)


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    """Make the names in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(fields: dict[str, Any]) -> str:
    """One line per entry for people: ``decode_sm90 sm_90a kind=decode group_size=8 | cluster=2 stages=4``."""
    words = [Request(fields["path"], None, None, "").name, fields["arch"]]
    for part in (fields["spec"], fields["tile"]):
        values = part["fields"] if isinstance(part, dict) else {}
        words += [f"{name}={canonical_json(value)}".replace('"', "") for name, value in values.items() if value not in (None, False)]
        words.append("|")
    return " ".join(words[:-1])
