"""The GPU report: what counts as a full run, and when a report stops vouching for the sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_status, gpu_test, stamp

pytest_plugins = ["pytester"]


def report(**changes: Any) -> dict[str, Any]:
    base = {
        "date": "2026-11-22T12:00:00+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "kernel_sources": "aaaa",
        "gpu": {"name": "NVIDIA H200", "driver": "580"},
        "versions": {"torch": "2.11.0"},
        "arguments": [],
        "complete": True,
        "exit_status": 0,
        "counts": {"passed": 3, "failed": 0, "skipped": 0},
    }
    return {**base, **changes}


@pytest.mark.parametrize(
    "changes, good",
    [
        ({}, True),
        ({"kernel_sources": "bbbb"}, False),
        ({"complete": False}, False),
        ({"exit_status": 1}, False),
        ({"counts": {"passed": 3, "failed": 1, "skipped": 0}}, False),
        ({"counts": {"passed": 0, "failed": 0, "skipped": 9}}, False),
    ],
)
def test_a_report_vouches_only_for_what_it_ran(changes: dict[str, Any], good: bool) -> None:
    assert gpu_status.judge_tests(report(**changes), "aaaa")[0] is good


def test_status_reads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_status, "kernel_sources", lambda: "aaaa")
    assert gpu_status.main(tmp_path) == 1
    assert "no report yet" in capsys.readouterr().out
    for name in ("reports/gpu-tests", "benchmarks/results/decode"):
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(report()))
    assert gpu_status.main(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "3 passed" in printed and "0123456789ab on NVIDIA H200" in printed and "benchmark decode: these kernel sources" in printed


@pytest.mark.parametrize(
    "arguments, selection",
    [([], False), (["-n", "4"], False), (["-v"], False), (["-k", "decode"], True), (["tests/test_docs.py"], True), (["--maxfail=1"], True)],
)
def test_a_selection_is_recognized(arguments: list[str], selection: bool) -> None:
    assert gpu_test.is_selection(arguments) is selection


def test_the_recorder_counts_by_file(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_one="""
        import pytest
        def test_good(): pass
        def test_bad(): assert 1 == 2
        @pytest.mark.skip(reason="no such chip")
        def test_skipped(): pass
        @pytest.fixture
        def broken(): raise RuntimeError("set-up broke")
        def test_error(broken): pass
        """
    )
    recorder = gpu_test.Recorder()
    pytester.inline_run("-p", "no:cacheprovider", plugins=[recorder])
    summary = recorder.summary()
    assert summary["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert list(summary["by_file"].values()) == [summary["counts"]]
    assert any("set-up broke" in text for text in summary["failures"].values())
    assert list(summary["skip_reasons"]) == ["Skipped: no such chip"]


def test_commit_comes_from_the_environment_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamp, "output_of", lambda *command: None)
    monkeypatch.setenv("COMMIT", "feedface")
    assert stamp.commit() == {"commit": "feedface", "dirty": None}


def test_a_commit_in_the_environment_wins_over_the_history_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamp, "output_of", lambda *command: "0ld")
    monkeypatch.setenv("COMMIT", "feedface")
    assert stamp.commit()["commit"] == "feedface"
    monkeypatch.delenv("COMMIT")
    assert stamp.commit()["commit"] == "0ld"


def test_a_report_says_what_failed_and_not_where_files_are() -> None:
    assert (
        gpu_test.what_failed("/home/me/x.py:3: in f\n    g()\nE   assert 1 == 2\nE    +  where 1 = h()")
        == "E   assert 1 == 2\nE    +  where 1 = h()"
    )
    assert gpu_test.what_failed("worker crashed") == "worker crashed"


def test_the_stamp_is_whole_on_any_machine() -> None:
    about = json.loads(json.dumps(stamp.stamp()))
    assert len(about["kernel_sources"]) >= 16 and about["kernel_sources"] == stamp.kernel_sources()
    assert about["versions"]["torch"] and about["date"]
