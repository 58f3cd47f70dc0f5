"""Results as JSON (everything) and as markdown tables (what a reader compares)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.protocol import Timing

OURS = "cute_infer"


@dataclass
class Row:
    """One case: what it moves or computes, and what each candidate took.

    work   in units of 1e9 bytes or 1e12 operations per call; None leaves the result in microseconds.
    notes  anything a reader must know to judge the row, such as how far outputs differ between candidates.
    """

    case: str
    timings: dict[str, Timing | str]
    work: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        results = {}
        for name, timing in self.timings.items():
            if isinstance(timing, str):
                results[name] = {"missing": timing}
            else:
                results[name] = timing.as_dict()
                if self.work is not None:
                    results[name]["rate"] = round(self.work / (timing.us * 1e-6), 1)
        return {"case": self.case, "work": self.work, "results": results, **({"notes": self.notes} if self.notes else {})}


def result(name: str, unit: str, rows: Iterable[Row], about: dict[str, Any]) -> dict[str, Any]:
    """The content of one result file. ``unit`` is "GB/s", "TFLOP/s" (higher is better) or "us" (lower is better)."""
    return {"benchmark": name, "unit": unit, **about, "rows": [row.as_dict() for row in rows]}


def value(entry: dict[str, Any], unit: str) -> float | None:
    return entry.get("us" if unit == "us" else "rate")


def markdown(content: dict[str, Any]) -> str:
    """One table: cases down, candidates across, the best in bold, a dash where there is no number."""
    unit, rows = content["unit"], content["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row["results"]))
    best = min if unit == "us" else max
    gpu = content.get("gpu") or {}
    commit = (content["commit"] or "unknown")[:12] + (" with local changes" if content["dirty"] else "")
    lines = [
        f"## {content['benchmark']} [{unit}]",
        "",
        f"{gpu.get('name')}, driver {gpu.get('driver')}, torch {content['versions']['torch']}, commit {commit}, {content['date'][:10]}.",
    ]
    for when, ceiling in content.get("ceilings", {}).items():
        lines.append(
            f"Ceilings {when}: GEMM {ceiling['gemm_bf16_tflops']} TFLOP/s, read {ceiling['read_gbps']} GB/s, "
            f"copy {ceiling['copy_gbps']} GB/s ({ceiling['gpu_state']})."
        )
    lines += ["", f"| case | {' | '.join(columns)} | {OURS} [us] | {OURS} / best peer |", "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        values = {name: value(entry, unit) for name, entry in row["results"].items()}
        present = {name: v for name, v in values.items() if v is not None}
        top = best(present.values()) if present else None
        cells = [(f"**{v:g}**" if v == top else f"{v:g}") if (v := values.get(name)) is not None else "-" for name in columns]
        peers = [v for name, v in present.items() if not name.startswith(OURS)]
        ours = present.get(OURS)
        ratio = "-"
        if ours is not None and peers:
            ratio = f"{best(peers) / ours:.2f}x" if unit == "us" else f"{ours / best(peers):.2f}x"
        time_us = row["results"].get(OURS, {}).get("us")
        lines.append(f"| {row['case']} | {' | '.join(cells)} | {'-' if time_us is None else f'{time_us:.1f}'} | {ratio} |")
    missing = {(name, entry["missing"]) for row in rows for name, entry in row["results"].items() if "missing" in entry}
    if missing:
        lines += ["", "No number:", *(f"- {name}: {why}" for name, why in sorted(missing))]
    return "\n".join(lines) + "\n"


def tables(folder: Path) -> str:
    """The tables of every result in a folder."""
    return "\n".join(markdown(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json")))


def plot(content: dict[str, Any], path: Path) -> None:
    """Bars per case and candidate, as PNG. Needs matplotlib (`pip install cute-infer[bench]`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, unit = content["rows"], content["unit"]
    columns = list(dict.fromkeys(name for row in rows for name in row["results"]))
    height = 0.8 / len(columns)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(rows) * len(columns)))
    for c, name in enumerate(columns):
        values = [value(row["results"].get(name, {}), unit) or 0 for row in rows]
        axes.barh([i + c * height for i in range(len(rows))], values, height, label=name)
    axes.set_yticks([i + 0.4 for i in range(len(rows))], [row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(f"{content['benchmark']}, {(content.get('gpu') or {}).get('name')}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
