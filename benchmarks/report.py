"""Results as JSON (everything) and as markdown tables (what a reader compares)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.protocol import Timing

OURS = "cute_infer"
COLOURS = ("#76b900", "#4a7300", "#1f77b4", "#ff7f0e", "#9467bd", "#8c564b", "#7f7f7f")  # ours first

Save = Callable[[dict[str, Any]], None]


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


def saver(path: Path) -> Save:
    """Writes a result that may still grow: a run that is cut short leaves what it measured."""
    return lambda content: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8") and None


def value(entry: dict[str, Any], unit: str) -> float | None:
    return entry.get("us" if unit == "us" else "rate")


def markdown(content: dict[str, Any], heading: bool = True) -> str:
    """One table: cases down, candidates across, the best in bold, a dash where there is no number."""
    unit, rows = content["unit"], content["rows"]
    columns = list(dict.fromkeys(name for row in rows for name in row["results"]))
    best = min if unit == "us" else max
    gpu = content.get("gpu") or {}
    commit = (content["commit"] or "unknown")[:12] + (" with local changes" if content["dirty"] else "")
    lines = [f"## {content['benchmark']} [{unit}]", ""] if heading else []
    about = f"{gpu.get('name')}, driver {gpu.get('driver')}, torch {content['versions']['torch']}, commit {commit}, {content['date'][:10]}"
    how = content.get("protocol")
    lines.append(
        about
        + (f"; {how['cases']} of {how['cases_of_the_grid']} cases, medians of {how['rounds']} rounds. " if how else ". ")
        + f"[{unit}]"
    )
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


def share_of_ceiling(content: dict[str, Any]) -> tuple[float, str] | None:
    """(the ceiling of the same run that this unit is a share of, its name); None for microseconds."""
    name = {"GB/s": "read_gbps", "TFLOP/s": "gemm_bf16_tflops"}.get(content["unit"])
    measured = [c[name] for c in content.get("ceilings", {}).values() if name and c.get(name)]
    if not name or not measured:
        return None
    return sum(measured) / len(measured), "read-only stream" if name == "read_gbps" else "bf16 GEMM 8192^3"


def plot(content: dict[str, Any], path: Path) -> None:
    """A chart as PNG: a line per case, a dot per candidate. Rates as a share of the ceiling measured in the same run, times on a log axis.

    Needs matplotlib (``pip install 'cute-infer[bench]'``).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, unit = content["rows"], content["unit"]
    columns = list(dict.fromkeys(name for row in rows for name, entry in row["results"].items() if value(entry, unit) is not None))
    columns.sort(key=lambda name: not name.startswith(OURS))
    ceiling = share_of_ceiling(content)
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.21 * len(rows)))
    for name, colour in zip(columns, COLOURS * len(columns)):
        dots = [(value(row["results"].get(name, {}), unit), i) for i, row in enumerate(rows)]
        x = [v * 100 / ceiling[0] if ceiling else v for v, _ in dots if v is not None]
        ours = name.startswith(OURS)
        axes.scatter(x, [i for v, i in dots if v is not None], s=36 if ours else 18, color=colour, label=name, zorder=3 if ours else 2)
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="both", color="#dddddd", linewidth=0.5)
    if ceiling:
        axes.set_xlim(left=0)
        axes.set_xlabel(f"% of the {ceiling[1]} of the same run ({ceiling[0]:.0f} {unit})")
    else:
        axes.set_xscale("log")
        axes.set_xlabel(f"{unit}, less is better")
    commit = (content["commit"] or "unknown")[:12]
    axes.set_title(f"{content['benchmark']}: {(content.get('gpu') or {}).get('name')}, commit {commit}, {content['date'][:10]}", fontsize=9)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.6 / (1.6 + 0.21 * len(rows)) - 0.05), ncols=3, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
