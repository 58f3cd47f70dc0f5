"""Run the GPU tests and record what they prove: reports/gpu-tests.json.

    python -m tools.gpu_test [pytest arguments]

Arguments select or tune (`-k decode`, `-n 4`); a report made with a selection says so and does not count as a full run.
"""

from __future__ import annotations

import collections
import importlib.util
import sys
from typing import Any

import pytest

from tools.stamp import ROOT, gpu, report_dir, stamp, write_json

SLOWEST = 15
SELECTING = ("-k", "-m", "--deselect", "--ignore", "--lf", "--ff", "-x", "--maxfail", "--exitfirst")


def what_failed(text: str) -> str:
    """The lines of a traceback that say what was wrong; without them its end. Where the machine keeps its files is no part of a report."""
    return "\n".join(line for line in text.splitlines() if line.startswith("E "))[-2000:] or text[-2000:]


class Recorder:
    """A pytest plugin: one outcome and one duration per test, under xdist too."""

    def __init__(self) -> None:
        self.outcome: dict[str, str] = {}
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.failures: dict[str, str] = {}
        self.skips: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid
        self.seconds[test] += report.duration
        if report.failed:  # in set-up or tear-down too
            self.outcome[test] = "failed"
            self.failures[test] = what_failed(report.longreprtext)
        elif report.skipped:
            self.outcome.setdefault(test, "skipped")
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(getattr(report, "wasxfail", report.longrepr))
            self.skips[reason] += 1
        elif report.when == "call":
            self.outcome.setdefault(test, "passed")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcome[report.nodeid] = "failed"
            self.failures[report.nodeid] = what_failed(report.longreprtext)

    def summary(self) -> dict[str, Any]:
        by_file: dict[str, dict[str, int]] = {}
        for test, outcome in sorted(self.outcome.items()):
            row = by_file.setdefault(test.split("::")[0], {"passed": 0, "failed": 0, "skipped": 0})
            row[outcome] += 1
        slowest = sorted(self.seconds, key=lambda test: -self.seconds[test])[:SLOWEST]
        return {
            "counts": {name: sum(row[name] for row in by_file.values()) for name in ("passed", "failed", "skipped")},
            "by_file": by_file,
            "slowest_s": {test: round(self.seconds[test], 2) for test in slowest},
            "skip_reasons": dict(self.skips),
            "failures": self.failures,
        }


def is_selection(arguments: list[str]) -> bool:
    """Whether these pytest arguments may leave tests out."""
    positional = [a for a in arguments if not a.startswith("-") and (ROOT / a.split("::")[0]).exists()]
    return bool(positional) or any(a.startswith(SELECTING) for a in arguments)


def main(arguments: list[str]) -> int:
    """Run, record, return pytest's exit status."""
    if gpu() is None:
        print("PyTorch sees no CUDA device here: nothing was run, nothing was written.", file=sys.stderr)
        return 1
    default = ["-m", "gpu", "-q"]
    if importlib.util.find_spec("xdist") and not any(a.startswith(("-n", "--numprocesses")) for a in arguments):
        default += ["-n", "6"]  # kernels compile on the CPU: workers overlap that, and a fault takes one worker down, not all
    recorder = Recorder()
    about = stamp()  # before the run: sources edited meanwhile must not be vouched for
    status = int(pytest.main([*default, *arguments], plugins=[recorder]))
    report = {**about, "arguments": arguments, "complete": not is_selection(arguments) and status in (0, 1), "exit_status": status}
    write_json(report_dir("reports") / "gpu-tests.json", {**report, **recorder.summary()})
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
