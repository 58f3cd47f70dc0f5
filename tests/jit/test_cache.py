"""The disk cache when disks, users and processes misbehave. No compiler involved."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import stat
import time

import pytest

from cute_infer.errors import UntrustedCacheError
from cute_infer.jit import KernelFacts, cache
from cute_infer.jit.cache import LIBRARY, OBJECT, SIDECAR, DiskCache, Entry

FACTS = KernelFacts("sm_90a", "cu12", 32, 0, 0, 1024, {"mma.sync": 4}, ("C7514",))


def entry(label: str = "a", content: bytes = b"\x7fELF object") -> Entry:
    request = {"path": "m:C", "spec": {"class": "m:S", "fields": {"label": label}}, "tile": None, "arch": "sm_90a", "sources": "0"}
    return Entry(content, "symbol", FACTS, request, {"dsl": "4.8.1", "flavour": "cu12"}, b"\x7fELF library")


@pytest.fixture
def disk(cache_dir) -> DiskCache:
    return DiskCache(cache_dir)


@pytest.fixture
def saved(disk) -> Entry:
    one = entry()
    assert disk.publish(one)
    return one


def test_publish_and_load(disk, saved):
    assert disk.load(saved.key) == saved
    assert disk.keys() == [saved.key] and disk.size() > len(saved.object) and disk.verify() == {saved.key: None}


def test_missing(disk):
    assert disk.load("ab" * 32) is None
    assert not disk.root.exists()  # looking creates nothing


def test_private(disk, saved):
    for path in (disk.root.parent, disk.root, disk.directory(saved.key), disk.root / "tmp", disk.root / "locks"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for name in (OBJECT, LIBRARY, SIDECAR):
        assert stat.S_IMODE((disk.directory(saved.key) / name).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "name, damage",
    [
        (OBJECT, lambda text: text[:-3]),
        (OBJECT, lambda text: b""),
        (OBJECT, lambda text: text.replace(b"object", b"0bject")),
        (LIBRARY, lambda text: text[:-3]),
        (LIBRARY, lambda text: text.replace(b"library", b"1ibrary")),
        (SIDECAR, lambda text: text.replace(b'"library_sha256"', b'"other"')),
        (SIDECAR, lambda text: text[:40]),
        (SIDECAR, lambda text: b"[]"),
        (SIDECAR, lambda text: b"{}"),
        (SIDECAR, lambda text: text.replace(b'"sm_90a"', b'"sm_80"')),
        (SIDECAR, lambda text: text.replace(b'"format": 1', b'"format": 99')),
    ],
    ids=[
        *("truncated", "empty", "altered", "library truncated", "library altered", "library unrecorded"),
        *("sidecar truncated", "not an object", "sidecar empty", "other request", "other format"),
    ],
)
def test_damage_is_quarantined(disk, saved, caplog, name, damage):
    path = disk.directory(saved.key) / name
    path.write_bytes(damage(path.read_bytes()))
    assert disk.verify()[saved.key] is not None
    with caplog.at_level(logging.WARNING, "cute_infer.jit"):
        assert disk.load(saved.key) is None
    assert "damaged" in caplog.text and disk.keys() == []
    assert [path.name.partition(".")[0] for path in (disk.root / "quarantine").iterdir()] == [saved.key]
    assert disk.publish(saved) and disk.load(saved.key) == saved


@pytest.mark.parametrize("name", [OBJECT, LIBRARY, SIDECAR])
def test_half_an_entry_is_quarantined(disk, saved, name):
    (disk.directory(saved.key) / name).unlink()
    assert disk.load(saved.key) is None and disk.publish(saved) and disk.load(saved.key) == saved


def test_an_entry_without_library(disk):
    one = dataclasses.replace(entry(), library=None)
    assert disk.publish(one) and disk.load(one.key) == one and disk.verify() == {one.key: None}
    sidecar = disk.directory(one.key) / SIDECAR
    fields = json.loads(sidecar.read_text())
    del fields["library_sha256"]  # as written before there were libraries
    sidecar.write_text(json.dumps(fields))
    assert disk.load(one.key) == one


def test_an_entry_under_another_name_is_refused(disk, saved):
    stolen = disk.directory("ab" * 32)
    stolen.parent.mkdir()
    os.replace(disk.directory(saved.key), stolen)
    assert disk.load("ab" * 32) is None


@pytest.mark.parametrize("part", ["", "v1", "directory", OBJECT, LIBRARY, SIDECAR])
@pytest.mark.parametrize("mode", [stat.S_IWGRP, stat.S_IWOTH], ids=["group", "others"])
def test_writable_by_others_is_refused(disk, saved, part, mode):
    directory = disk.directory(saved.key)
    path = {"": disk.root.parent, "v1": disk.root, "directory": directory}.get(part, directory / part)
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(UntrustedCacheError, match="can be written by other users") as error:
        disk.load(saved.key)
    assert f"chmod go-w {path}" in str(error.value) and path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("part", ["", "directory", OBJECT, LIBRARY])
def test_another_owner_is_refused(disk, saved, part):
    directory = disk.directory(saved.key)
    path = {"": disk.root.parent, "directory": directory}.get(part, directory / part)
    os.chown(path, 12345, -1)
    with pytest.raises(UntrustedCacheError, match="belongs to another user") as error:
        disk.load(saved.key)
    assert "uid 12345" in str(error.value)


def test_another_user_refuses_ours(disk, saved, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1 if os.getuid() else 0)
    if os.getuid() == 0:
        assert disk.load(saved.key) == saved  # root's files are trusted by everyone: read-only system caches
    else:
        with pytest.raises(UntrustedCacheError):
            disk.load(saved.key)


@pytest.mark.parametrize("part", ["directory", OBJECT, LIBRARY])
def test_symbolic_links_are_refused(disk, saved, tmp_path, part):
    directory = disk.directory(saved.key)
    path = directory if part == "directory" else directory / part
    elsewhere = tmp_path / "elsewhere"
    os.replace(path, elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(UntrustedCacheError, match="symbolic link"):
        disk.load(saved.key)


def test_a_fifo_is_refused_without_waiting(disk, saved):
    path = disk.directory(saved.key) / OBJECT
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(UntrustedCacheError, match="not a regular file"):
        disk.load(saved.key)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["_write", "_sync"])
def test_a_disk_that_cannot_be_written_costs_one_warning(disk, monkeypatch, caplog, code, call):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache, call, refuse)
    with caplog.at_level(logging.WARNING, "cute_infer.jit"):
        assert not disk.publish(entry("a")) and not disk.publish(entry("b"))
    assert len(caplog.records) == 1 and os.strerror(code) in caplog.text
    assert disk.keys() == [] and not list((disk.root / "tmp").iterdir())


def test_a_cache_directory_that_cannot_exist(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    disk = DiskCache(tmp_path / "file" / "cache")
    assert disk.load(entry().key) is None
    with disk.lock(entry().key):
        assert not disk.publish(entry())
    assert "not saved" in caplog.text


def test_a_read_only_cache_is_still_read(disk, saved, monkeypatch):
    monkeypatch.setattr(DiskCache, "_make_roots", lambda self: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with disk.lock(saved.key):
        assert disk.load(saved.key) == saved


def test_published_by_someone_else_meanwhile(disk, saved):
    assert disk.publish(saved)  # rename onto the existing entry fails; the entry is there
    assert disk.load(saved.key) == saved and not list((disk.root / "tmp").iterdir())


def test_kill_in_the_middle_of_a_write(disk, spawn):
    process = spawn(
        """
        import os, signal
        from cute_infer.jit import cache
        from tests.jit.test_cache import entry
        from cute_infer.config import get_config
        cache._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # both files written, not yet renamed
        disk = cache.DiskCache(get_config().cache_dir)
        with disk.lock(entry().key):
            disk.publish(entry())
        """
    )
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert list((disk.root / "tmp").iterdir()) and disk.keys() == [] and disk.load(entry().key) is None
    started = time.monotonic()
    with disk.lock(entry().key):
        assert disk.publish(entry())
    assert time.monotonic() - started < 30  # the dead process's lock was freed by the kernel
    assert disk.load(entry().key) == entry() and not list((disk.root / "tmp").iterdir())


def test_clear(disk, saved):
    disk.publish(entry("b"))
    assert disk.clear() == 2 and disk.keys() == [] and disk.load(saved.key) is None
    assert disk.publish(saved)


def test_trusted_in_words(disk, saved):
    assert disk.trusted() == "yes" and disk.writable()
    disk.root.chmod(0o777)
    assert "can be written by other users" in disk.trusted()


def test_describe(saved):
    fields = {"path": "a.b:C", "arch": "sm_80", "spec": {"class": "m:S", "fields": {"x": "y", "off": False}}, "tile": None}
    assert cache.describe(fields) == "b sm_80 x=y |"
    assert json.loads(saved.sidecar())["facts"]["warnings"] == ["C7514"]
