"""The command line: what it prints and with which exit status."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner, Result

from cute_infer import __version__, cli, jit
from cute_infer.config import VARIABLES
from cute_infer.jit import Request
from cute_infer.jit.cache import OBJECT
from cute_infer.jit.key import canonical_json
from tests.jit.tiny_spec import PATH, TinySpec, TinyTile

REQUEST = Request(PATH, TinySpec(), TinyTile(), "sm_90a")


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.cli, list(words))


def test_show_config(cache_dir):
    shown = invoke("show-config")
    assert shown.exit_code == 0 and str(cache_dir) in shown.output
    facts = json.loads(invoke("show-config", "--json").output)
    assert set(facts) == {"versions", "devices", "target", "backends", "cache", "environment"}
    assert set(facts["environment"]) == set(VARIABLES) and facts["cache"]["trusted"] == "not created yet"
    assert not cache_dir.exists()  # looking creates nothing


def test_version():
    shown = invoke("--version")
    assert shown.exit_code == 0 and __version__ in shown.output


@pytest.mark.parametrize(
    "words", [["compile"], ["nonsense"], ["compile", "--variant", "{"], ["compile", "--variant", '{"path": 1}'], ["cache"]]
)
def test_wrong_usage(words):
    assert invoke(*words).exit_code == 2


def test_refusals_exit_with_one(cache_dir, capsys, monkeypatch):
    cache_dir.mkdir(mode=0o777)
    cache_dir.chmod(0o777)
    (cache_dir / "v1").mkdir()
    monkeypatch.setattr("sys.argv", ["cute-infer", "compile", "--jobs", "1", "--variant", canonical_json(REQUEST.to_data())])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and f"chmod go-w {cache_dir}" in capsys.readouterr().err


def test_bench_runs_the_checkouts_benchmarks(monkeypatch):
    assert {"decode", "prefill", "sampling", "append", "startup"} <= set(re.findall(r"\w+", invoke("bench", "--help").output))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = invoke("bench", "decode", "--quick")
    assert refused.exit_code == 1 and "no CUDA device" in refused.output
    assert invoke("bench", "nonsense").exit_code == 2


def test_bench_in_an_installed_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "cute_infer" / "cli.py"))
    monkeypatch.setattr("sys.argv", ["cute-infer", "bench", "decode"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and "clone the repository" in capsys.readouterr().err


def test_compile_list_verify_clear(tmp_path):
    pytest.importorskip("cutlass", reason="needs the compiler")
    text = canonical_json(REQUEST.to_data())
    listed = invoke("compile", "--list", "--variant", text)
    assert listed.exit_code == 0 and listed.output.startswith(f"sm_90a {PATH} TinySpec") and jit.disk_cache().keys() == []

    done = invoke("compile", "--variant", text, "--out", str(tmp_path / "bundle"), "--jobs", "1")
    assert done.exit_code == 0 and "1 kernels ready" in done.output and "[1/1] tiny_kernel sm_90a: " in done.output, done.output
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["libraries"].keys() == {"sm_90a"}

    shown = invoke("cache", "list")
    assert shown.exit_code == 0 and "tiny_kernel sm_90a" in shown.output and "1 kernels" in shown.output
    (row,) = json.loads(invoke("cache", "list", "--json").output)
    assert row["request"]["path"] == PATH and row["facts"]["arch"] == "sm_90a"

    assert invoke("cache", "verify").output == "1 checked, 0 bad\n"
    path = jit.disk_cache().directory(row["key"]) / OBJECT
    path.write_bytes(path.read_bytes() + b"x")
    checked = invoke("cache", "verify", "--json")
    assert checked.exit_code == 1 and list(json.loads(checked.output)["bad"]) == [row["key"]]

    assert invoke("cache", "clear").output.startswith("1 kernels removed") and invoke("cache", "list").output.startswith("0 kernels")
