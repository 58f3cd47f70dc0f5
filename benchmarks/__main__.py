"""python -m benchmarks decode|prefill|sampling|append|startup|all|report"""

from __future__ import annotations

import gc
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import protocol, report
from tools.stamp import report_dir, stamp, write_json

TABLES = ("decode", "prefill", "sampling", "append")


def measure(name: str, quick: bool, only: str, rounds: int) -> dict[str, Any]:
    """The result of one benchmark: stamp, protocol, ceilings before and after, rows."""
    about = stamp()
    if name == "startup":
        module = importlib.import_module("benchmarks.startup")
        content = report.result(name, module.UNIT, module.rows(), about)
    else:
        module = importlib.import_module(f"benchmarks.{name}")
        chosen = [case for case in (module.QUICK if quick else module.cases()) if re.search(only, case.name)]
        before = protocol.ceilings()
        rows = []
        for case in chosen:
            row = case.run(rounds)
            rows.append(row)
            print(json.dumps(row.as_dict()), flush=True)  # a run that is cut short leaves what it measured
            gc.collect()
            torch.cuda.empty_cache()
        about["ceilings"] = {"before": before, "after": protocol.ceilings()}
        about["protocol"] = {"rounds": rounds, "rotate_bytes": protocol.ROTATE_BYTES, "quick": quick, "only": only}
        content = report.result(name, module.UNIT, rows, about)
    return content


@click.command(help=__doc__)
@click.argument("what", type=click.Choice([*TABLES, "startup", "all", "report"]))
@click.option("--quick", is_flag=True, help="a handful of cases")
@click.option("--only", default="", help="cases whose name matches this regular expression")
@click.option("--rounds", default=21, show_default=True, help="samples per candidate and case")
@click.option("--out", type=click.Path(path_type=Path), help="folder for the results [REPORT_DIR or benchmarks/results]")
@click.option("--plots", is_flag=True, help="PNG charts too (needs matplotlib)")
def main(what: str, quick: bool, only: str, rounds: int, out: Path | None, plots: bool) -> None:
    folder = out or report_dir("benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    if what != "report":
        if not torch.cuda.is_available():
            print("PyTorch sees no CUDA device here: nothing was measured, nothing was written.", file=sys.stderr)
            sys.exit(1)
        torch.manual_seed(0)
        for name in (*TABLES, "startup") if what == "all" else (what,):
            content = measure(name, quick, only, rounds)
            write_json(folder / f"{name}.json", content)
            print(report.markdown(content), flush=True)
            if plots:
                report.plot(content, folder / f"{name}.png")
    (folder / "tables.md").write_text(report.tables(folder), encoding="utf-8")
    print(f"wrote {folder / 'tables.md'}")


if __name__ == "__main__":
    main()
