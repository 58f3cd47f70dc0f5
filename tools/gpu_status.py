"""Does the last GPU report belong to the kernel sources as they are? Exit status 0: yes, complete, and nothing failed.

python -m tools.gpu_status
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tools.stamp import ROOT, kernel_sources


def headline(report: dict[str, Any]) -> str:
    """``abc1234 (dirty) on NVIDIA H200, driver 580, torch 2.11.0, 2026-11-22``."""
    gpu, versions = report["gpu"] or {}, report["versions"]
    commit = (report["commit"] or "unknown commit")[:12] + (" (with local changes)" if report["dirty"] else "")
    return f"{commit} on {gpu.get('name')}, driver {gpu.get('driver')}, torch {versions['torch']}, {report['date'][:10]}"


def judge_tests(report: dict[str, Any], sources: str) -> tuple[bool, list[str]]:
    """Whether the test report vouches for these kernel sources, and the lines that say why."""
    counts = report["counts"]
    lines = [f"GPU tests: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped", f"  {headline(report)}"]
    current = report["kernel_sources"] == sources
    lines.append(f"  kernel sources: {'the ones here' if current else 'CHANGED since this report; run make gpu-test'}")
    if not report["complete"]:
        lines.append(f"  a selection only: {' '.join(report['arguments']) or 'interrupted'}")
    good = current and report["complete"] and counts["failed"] == 0 and counts["passed"] > 0 and report["exit_status"] == 0
    return good, lines


def main(root: Path = ROOT) -> int:
    """Print the state of the test report and of every benchmark result."""
    sources = kernel_sources()
    path = root / "reports" / "gpu-tests.json"
    good = False
    if path.exists():
        good, lines = judge_tests(json.loads(path.read_text(encoding="utf-8")), sources)
        print("\n".join(lines))
    else:
        print("GPU tests: no report yet; run make gpu-test on a GPU machine")
    for result in sorted((root / "benchmarks" / "results").glob("*.json")):
        report = json.loads(result.read_text(encoding="utf-8"))
        state = "these kernel sources" if report["kernel_sources"] == sources else "other kernel sources"
        print(f"benchmark {result.stem}: {state}; {headline(report)}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
