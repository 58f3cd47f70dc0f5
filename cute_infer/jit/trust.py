"""Reading files that will be executed: only what this user (or root) wrote and nobody else can change.

A kernel object is machine code. Every directory and file from the root of the cache (or bundle) on is checked on an open descriptor,
symbolic links are not followed, and the bytes that were checked are the bytes that are loaded (a bundle's library is opened again by path).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..errors import UntrustedCacheError, fail


def check(status: os.stat_result, path: Path | str) -> None:
    """Refuse what another user owns or could write.

    Raises:
        UntrustedCacheError: owner is neither this user nor root, or group or others may write.
    """
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        fail(
            UntrustedCacheError,
            f"{path} belongs to another user",
            got=f"uid {status.st_uid}",
            expected=f"uid {user} or root",
            fix="set CUTE_INFER_CACHE_DIR (or CUTE_INFER_BUNDLE) to a directory of your own",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fail(
            UntrustedCacheError,
            f"{path} can be written by other users",
            got=f"mode {stat.S_IMODE(status.st_mode):04o}",
            expected="not writable by group or others",
            fix=f"chmod go-w {path}",
        )


def check_directory(path: Path) -> None:
    """:func:`check` for a directory; a missing one is fine."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    check(status, path)


def read_files(directory: Path, names: tuple[str, ...]) -> tuple[bytes, ...]:
    """The contents of ``names`` in ``directory``, both checked.

    Raises:
        FileNotFoundError: the directory or a file is missing.
        UntrustedCacheError: see :func:`check`; also a symbolic link where a file or the directory should be.
    """
    folder = _open(directory, os.O_DIRECTORY)
    try:
        check(os.fstat(folder), directory)
        return tuple(_read(name, folder, directory / name) for name in names)
    finally:
        os.close(folder)


def _read(name: str, folder: int, path: Path) -> bytes:
    descriptor = _open(name, 0, folder, path)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            fail(UntrustedCacheError, f"{path} is not a regular file", fix=f"remove {path}")
        check(status, path)
        return file.read()


def _open(path: Path | str, flags: int, folder: int | None = None, shown: Path | None = None) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | flags, dir_fd=folder)
    except OSError as error:
        # Linux reports a link as ELOOP, or as ENOTDIR when a directory was asked for.
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and os.path.islink(shown or path):
            fail(UntrustedCacheError, f"{shown or path} is a symbolic link", fix=f"remove {shown or path}")
        raise
