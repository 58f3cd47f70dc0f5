"""Measure cute_infer beside the peers that are installed, or draw what was measured.

\b
    cute-infer bench decode|prefill|sampling|append|startup|all     measure; needs a GPU
    cute-infer bench plots                                          results -> PNG charts and tables in README and docs

Results go to benchmarks/results/NAME.json. A peer that is not installed, or cannot do a case, is a dash in the table.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import protocol, publish, report, schedule
from tools.stamp import ROOT, report_dir, stamp, write_json

TABLES = ("decode", "prefill", "sampling", "append")
ROUNDS, ROUNDS_IN_A_HURRY = 21, 9


def measure(name: str, cases: list[Any], of: int, rounds: int, deadline: float, save: report.Save) -> dict[str, Any]:
    """The result of one table: stamp, protocol, ceilings before and after, rows; saved after every row."""
    about = stamp()
    module = importlib.import_module(f"benchmarks.{name}")
    about["ceilings"] = {"before": protocol.ceilings()}
    order = [case.name for case in module.cases()]
    rows: list[report.Row] = []
    for case in cases:
        if rows and time.perf_counter() > deadline:
            break
        rows.append(case.run(rounds))
        rows.sort(key=lambda row: order.index(row.case) if row.case in order else len(order))
        about["protocol"] = {"rounds": rounds, "rotate_bytes": protocol.ROTATE_BYTES, "cases": len(rows), "cases_of_the_grid": of}
        content = report.result(name, module.UNIT, rows, about)
        save(content)
        gc.collect()
        torch.cuda.empty_cache()
    about["ceilings"]["after"] = protocol.ceilings()
    return report.result(name, module.UNIT, rows, about)


@click.command(help=__doc__)
@click.argument("what", type=click.Choice([*TABLES, "startup", "all", "plots"]))
@click.option("--quick", is_flag=True, help="a handful of cases")
@click.option("--only", default="", help="cases whose name matches this regular expression")
@click.option("--budget", type=float, metavar="S", help="end after about S seconds: an even selection of the cases, fewer rounds")
@click.option("--rounds", type=int, help=f"samples per candidate and case [{ROUNDS}; {ROUNDS_IN_A_HURRY} with a budget]")
@click.option("--jobs", type=int, default=14, show_default=True, help="processes that compile kernels beforehand")
@click.option("--out", type=click.Path(path_type=Path), help="folder for the results [REPORT_DIR or benchmarks/results]")
def main(what: str, quick: bool, only: str, budget: float | None, rounds: int | None, jobs: int, out: Path | None) -> None:
    began = time.perf_counter()
    folder = out or report_dir("benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    if what == "plots":
        for path in publish.publish(folder, ROOT):
            print(f"wrote {path}")
        return
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device here: nothing was measured, nothing was written.", file=sys.stderr)
        sys.exit(1)
    names = (*TABLES, "startup") if what == "all" else (what,)
    grids = {
        name: schedule.select(importlib.import_module(f"benchmarks.{name}"), quick, only, budget is not None)
        for name in TABLES
        if name in names
    }
    schedule.precompile([case for cases, _ in grids.values() for case in cases], "startup" in names, jobs)
    print(f"kernels ready after {time.perf_counter() - began:.0f} s", flush=True)
    deadlines = schedule.deadlines(names, time.perf_counter(), began + budget if budget else None)
    torch.manual_seed(0)
    for name in names:
        path = folder / f"{name}.json"
        if name == "startup":
            startup = importlib.import_module("benchmarks.startup")
            content = report.result(name, startup.UNIT, startup.rows(deadlines[name]), stamp())
        else:
            cases, of = grids[name]
            content = measure(name, cases, of, rounds or (ROUNDS_IN_A_HURRY if budget else ROUNDS), deadlines[name], report.saver(path))
        write_json(path, content)
        print(report.markdown(content), flush=True)
    print(f"done after {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
