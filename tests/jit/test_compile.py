"""From request to callable: one compile among many, a result everywhere. Compiles the tiny kernel; needs no GPU."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest
import torch

from cute_infer import jit
from cute_infer.errors import CompileError, MissingKernelError, UnsupportedConfigError
from cute_infer.jit import Request, Target, cache, codegen
from cute_infer.jit import compile as compiling
from tests.jit.tiny_spec import PATH, TinySpec, TinyTile

pytest.importorskip("cutlass", reason="needs the compiler")
HOPPER, AMPERE = Target.parse("sm_90a"), Target.parse("sm_80")


def tiny(target=HOPPER, smem=1024, **spec):
    return jit.get_kernel(PATH, TinySpec(**spec), TinyTile(smem=smem), target)


def assert_is_the_tiny_kernel(kernel):
    """Its argument checks answer, which needs no GPU: the object was linked and its symbol found."""
    with pytest.raises(ValueError, match="expected device_type=cuda"):
        kernel(torch.zeros(128), 1)
    with pytest.raises(TypeError, match="Expects 2 parameters"):
        kernel.fn()


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=str)
def test_compile_then_memory_then_disk(target):
    first = tiny(target)
    assert first.origin == "compiled" and first.facts.arch == target.arch and tiny(target) is first
    assert_is_the_tiny_kernel(first)
    jit.forget()
    second = tiny(target)
    assert second.origin == "disk" and second.facts == first.facts and second.request == first.request
    assert_is_the_tiny_kernel(second)
    assert (jit.cache_stats().compiled, jit.cache_stats().disk_hits, jit.cache_stats().kernels_in_memory) == (0, 1, 1)


def test_loading_from_disk_takes_milliseconds():
    tiny()
    times = []
    for _ in range(10):
        jit.forget()
        started = time.perf_counter()
        tiny()
        times.append(time.perf_counter() - started)
    assert min(times) < 0.010, times


def test_facts():
    facts = tiny(smem=2048).facts
    assert (facts.smem_bytes, facts.spill_bytes, facts.stack_bytes, facts.warnings) == (2048, 0, 0, ())
    assert 0 < facts.registers < 64 and facts.ptx_instructions == {} and facts.flavour in ("cu12", "cu13")
    assert jit.KernelFacts.from_data(facts.to_data()) == facts


def test_facts_agree_with_cuobjdump(tmp_path, setenv):
    tool = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("needs nvidia-cuda-cuobjdump")
    setenv("CUTE_INFER_DUMP_DIR", str(tmp_path / "dump"))
    facts = tiny().facts
    (cubin,) = (tmp_path / "dump").glob("*.cubin")
    shown = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert re.search(rf"REG:{facts.registers} STACK:{facts.stack_bytes} ", shown), shown
    assert {path.suffix for path in (tmp_path / "dump").iterdir()} == {".ptx", ".cubin", ".ll", ".yaml"}


def test_host_code_runs_on_every_x86_64(tmp_path, setenv):
    if codegen.platform.machine() != "x86_64":
        pytest.skip("x86-64 only")
    setenv("CUTE_INFER_DUMP_DIR", str(tmp_path))
    entry = jit.get_entry(Request(PATH, TinySpec(), TinyTile(), "sm_90a"))
    (path,) = tmp_path.glob("*.ll")
    text = path.read_text(errors="replace")
    groups = dict(re.findall(r"^attributes (#\d+) = \{(.*)\}$", text, re.MULTILINE))
    defined = re.findall(r"^define [^\n]*?(#\d+)?[^#\n]*\{$", text, re.MULTILINE)
    assert defined and all('"target-cpu"="x86-64"' in groups.get(group, "") for group in defined)
    if shutil.which("objdump"):
        (tmp_path / "kernel.o").write_bytes(entry.object)
        listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", tmp_path / "kernel.o"], capture_output=True, text=True).stdout
        assert "\tcall" in listing and not re.search(r"%[yz]mm|\tv[a-z]", listing)


def test_objects_are_reproducible(run):
    code = """
        import hashlib
        from cute_infer.jit import *
        from tests.jit.tiny_spec import *
        print(hashlib.sha256(get_entry(Request(PATH, TinySpec(), TinyTile(), "sm_90a")).object).hexdigest())
    """
    first = run(code)
    jit.disk_cache().clear()
    assert run(code) == first


@pytest.mark.parametrize("name", [cache.OBJECT, cache.LIBRARY])
def test_damaged_object_is_rebuilt(caplog, name):
    tiny()
    (key,) = jit.disk_cache().keys()
    path = jit.disk_cache().directory(key) / name
    path.write_bytes(path.read_bytes()[:100])
    jit.forget()
    with caplog.at_level(logging.WARNING, "cute_infer.jit"):
        kernel = tiny()
    assert kernel.origin == "compiled" and "damaged" in caplog.text
    assert [path.name.partition(".")[0] for path in (jit.disk_cache().root / "quarantine").iterdir()] == [key]
    assert_is_the_tiny_kernel(kernel)


@pytest.mark.parametrize("library", [None, b"not a library"])
def test_object_that_does_not_load_is_rebuilt(caplog, library):
    real = jit.get_entry(Request(PATH, TinySpec(), TinyTile(), "sm_90a"))
    jit.disk_cache().clear()
    jit.disk_cache().publish(cache.Entry(b"not an object", real.symbol, real.facts, real.request, real.toolchain, library))
    jit.forget()
    assert_is_the_tiny_kernel(tiny())
    assert "does not load" in caplog.text and jit.cache_stats().compiled == 1


def test_full_disk(monkeypatch, caplog):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "_write", full)
    kernel = tiny()
    assert kernel.origin == "compiled" and "kernels are not saved" in caplog.text and jit.cache_stats().not_saved == 1
    assert_is_the_tiny_kernel(kernel)


def test_changed_sources_are_not_saved(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "source_fingerprint", lambda modules: "edited meanwhile")
    assert_is_the_tiny_kernel(tiny())
    assert "sources changed" in caplog.text and jit.disk_cache().keys() == []


def test_one_log_line_per_compile(caplog):
    with caplog.at_level(logging.INFO, "cute_infer.jit"):
        tiny()
        jit.forget()
        tiny()
    assert len(caplog.messages) == 1 and re.fullmatch(r"compiled tiny_kernel for sm_90a: TinySpec.* in \d+\.\d s", caplog.messages[0])


def test_the_compilers_own_words(caplog):
    with pytest.raises(CompileError, match="the compiler refused tiny_kernel for sm_90a") as error:
        tiny(factor="two")
    assert "two" in str(error.value) and "TinyTile" in str(error.value) and error.value.__cause__ is not None or error.value.__context__
    assert jit.cache_stats().kernels_in_memory == 0 and jit.disk_cache().keys() == []


def test_too_much_shared_memory_for_the_device():
    smem = 150 * 1024
    assert tiny(AMPERE, smem).facts.smem_bytes == smem
    with pytest.raises(UnsupportedConfigError, match="more shared memory") as error:
        tiny(Target.parse("8.6"), smem)
    assert "101376" in str(error.value) and str(smem) in str(error.value)


def test_freeze():
    kernel = tiny()
    jit.freeze()
    assert tiny() is kernel
    with pytest.raises(MissingKernelError, match="frozen.*tiny_kernel") as error:
        tiny(label="new")
    assert "cute-infer compile --variant" in str(error.value)
    jit.thaw()
    assert tiny(label="new").origin == "compiled"


def test_jit_off(setenv):
    tiny()
    jit.forget()
    setenv("CUTE_INFER_JIT", "off")
    assert tiny().origin == "disk"
    with pytest.raises(MissingKernelError, match="CUTE_INFER_JIT=off") as error:
        tiny(label="it's")
    command = re.search(r"cute-infer (compile --variant .*)$", str(error.value))
    from click.testing import CliRunner

    from cute_infer.cli import cli

    setenv("CUTE_INFER_JIT", "on")
    done = CliRunner().invoke(cli, [*compiling.shlex.split(command[1]), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    setenv("CUTE_INFER_JIT", "off")
    assert tiny(label="it's").origin == "disk"


# ------------------------------------------------------------------------------------------------------------------ many at once
@pytest.mark.slow
def test_eight_processes_compile_once(spawn):
    code = """
        from cute_infer.jit import *
        from tests.jit.tiny_spec import *
        get_entry(Request(PATH, TinySpec(), TinyTile(), "sm_90a"))
        print(cache_stats().compiled)
    """
    processes = [spawn(code) for _ in range(8)]
    results = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), results
    assert sorted(int(out) for out, _ in results) == [0] * 7 + [1]


def test_threads_compile_at_once(run):
    out = run(
        """
        import threading
        from cute_infer.jit import *
        from tests.jit.tiny_spec import *

        found = []
        def work(i):
            target = Target.parse("sm_90a" if i % 2 else "sm_80")
            found.append(get_kernel(PATH, TinySpec(label=str(i // 4)), TinyTile(), target))
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(len(found), len(set(map(id, found))), cache_stats().compiled)
        """
    )
    assert out.split() == ["8", "4", "4"]  # without the lock the process aborts


def test_fork(run):
    out = run(
        """
        import os, threading, time
        from cute_infer.jit import *
        from cute_infer.jit import compile as compiling
        from tests.jit.tiny_spec import *

        target = Target.parse("sm_90a")
        get_kernel(PATH, TinySpec(), TinyTile(), target)

        def hold():  # a thread of the parent holds the lock while the process forks
            with compiling._state.lock:
                time.sleep(2)
        threading.Thread(target=hold).start()
        time.sleep(0.5)

        child = os.fork()
        if child == 0:
            assert cache_stats().kernels_in_memory == 0
            assert get_kernel(PATH, TinySpec(), TinyTile(), target).origin == "disk"
            assert get_kernel(PATH, TinySpec(label="child"), TinyTile(), target).origin == "compiled"
            freeze()
            grandchild = os.fork()
            if grandchild == 0:
                try:
                    get_kernel(PATH, TinySpec(label="grandchild"), TinyTile(), target)
                except Exception as error:
                    os._exit(7 if "frozen" in str(error) else 1)
                os._exit(2)
            os._exit(0 if os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 7 else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), cache_stats().kernels_in_memory)
        """
    )
    assert out.split() == ["0", "1"]
