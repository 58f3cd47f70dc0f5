"""The disk cache against the operating system itself: killed compilers, a disk that fills up, a directory that really cannot be written."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from cute_infer.jit.cache import DiskCache
from tests.jit.test_cache import entry

COMPILE = """
import sys
from cute_infer import jit
from cute_infer.jit import codegen
from tests.jit.tiny_spec import *
build = codegen.build
def announce(*args):
    print("compiling", flush=True)
    return build(*args)
codegen.build = announce
kernel = jit.get_kernel(PATH, TinySpec(), TinyTile(), jit.Target.parse("sm_90a"))
print(kernel.origin, kernel.facts.registers > 0, flush=True)
"""

# The same, but what was compiled is never handed over: however fast the machine, the process is killed before it has written anything.
ENDLESS = COMPILE.replace("return build(*args)", "built = build(*args)\n    __import__('time').sleep(600)\n    return built")


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_kill_in_the_middle_of_a_compile(cache_dir, spawn, seconds):
    """The lock dies with the process; one that waited for it compiles, and a later one finds a whole entry."""
    pytest.importorskip("cutlass", reason="needs the compiler")
    victim = spawn(ENDLESS)
    assert victim.stdout.readline() == "compiling\n", victim.stderr.read()
    waiting = spawn(COMPILE)
    time.sleep(seconds)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL and "True" not in victim.stdout.read()
    out, err = waiting.communicate(timeout=300)
    assert out.split() == ["compiling", "compiled", "True"], err
    disk = DiskCache(cache_dir)
    assert len(disk.keys()) == 1 and set(disk.verify().values()) == {None} and not list((disk.root / "tmp").iterdir())
    later = spawn(COMPILE)
    assert later.communicate(timeout=300)[0].split() == ["disk", "True"]


def test_a_file_that_cannot_grow(cache_dir, spawn):
    """The kernel's own limit on file sizes stops the write half-way: the kernel runs, nothing half-written stays, one warning."""
    process = spawn(
        """
        import logging, resource, signal
        from cute_infer.config import get_config
        from cute_infer.jit.cache import DiskCache
        from tests.jit.test_cache import entry
        logging.basicConfig(format="%(message)s")
        disk = DiskCache(get_config().cache_dir)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for label in "ab":
            one = entry(label, b"x" * 100_000)
            with disk.lock(one.key):
                print(disk.publish(one), disk.load(one.key), len(list((disk.root / "tmp").iterdir())))
        """
    )
    out, err = process.communicate(timeout=300)
    assert out.splitlines() == ["False None 0"] * 2, err
    assert err.count("are not saved") == 1 and "File too large" in err


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting needs rights that this process lacks")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_that_is_full(tiny_disk, caplog):
    disk = DiskCache(tiny_disk / "cache")
    small, large = entry("small"), entry("large", b"x" * 400_000)
    assert disk.publish(small)
    with caplog.at_level(logging.WARNING, "cute_infer.jit"), disk.lock(large.key):
        assert not disk.publish(large)
    assert "No space left on device" in caplog.text and len(caplog.records) == 1
    assert disk.load(large.key) is None and disk.load(small.key) == small  # what was there is not lost
    assert disk.verify() == {small.key: None} and not list((disk.root / "tmp").iterdir())
    assert disk.publish(entry("other"))  # and there is room again


def test_a_directory_without_write_permission(cache_dir, spawn):
    """As a user who owns the cache but may not write it (root may always write, so root becomes somebody else first)."""
    disk = DiskCache(cache_dir)
    assert disk.publish(entry())
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    for folder, _, files in os.walk(cache_dir, topdown=False):
        for name in files:
            os.chown(os.path.join(folder, name), user, -1)
        os.chown(folder, user, -1)
        os.chmod(folder, 0o500)
    for parent in cache_dir.parents:  # pytest's, which others may not pass through
        if os.geteuid() == 0 and parent.is_relative_to(tempfile.gettempdir()) and parent != Path(tempfile.gettempdir()):
            os.chmod(parent, parent.stat().st_mode | 0o111)
    process = spawn(
        f"""
        import logging, os
        from cute_infer.config import get_config
        from cute_infer.jit.cache import DiskCache
        from tests.jit.test_cache import entry
        import filelock
        logging.basicConfig(format="%(message)s")
        if os.geteuid() == 0:
            os.setgid({user})
            os.setuid({user})
        disk = DiskCache(get_config().cache_dir)
        with disk.lock(entry().key):
            print(disk.load(entry().key) == entry())
        with disk.lock(entry("b").key):
            print(disk.publish(entry("b")), disk.publish(entry("c")), disk.load(entry("b").key), disk.writable())
        """
    )
    out, err = process.communicate(timeout=300)
    for folder, _, _ in os.walk(cache_dir):
        os.chmod(folder, 0o700)  # so that the temporary directory can be removed
    assert out.splitlines() == ["True", "False False None False"], err
    assert err.count("are not saved") == 1 and "Permission denied" in err
