"""What the tile sweeps share: the command line, compiling every candidate beforehand, one case, and the table.

A sweep times the tiles a kernel could use next to the one ``choose()`` picks, so that a row of a tile table can say why it is there.
It launches kernels directly, below the public functions, because those take no tile. How a number is taken: :mod:`benchmarks.protocol`.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import protocol
from cute_infer.attention.spec import AttentionSpec
from cute_infer.jit import Request, Target, get_entry, get_kernel
from tools.stamp import stamp, write_json

HOPPER = Target.parse("sm_90a")
SAME = 1e-2  # relative difference above which a candidate computes something else than the chosen tile

Job = tuple[str, AttentionSpec, Any]
"""(kernel path, spec, tile): what is compiled."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a case. ``splits`` is how many CTAs or clusters share the keys; 0 when the tile does not split them."""

    name: str
    path: str
    spec: AttentionSpec
    tile: Any
    splits: int = 0
    chosen: bool = False

    @property
    def job(self) -> Job:
        return self.path, self.spec, self.tile

    def kernel(self) -> Callable[..., None]:
        return get_kernel(*self.job, HOPPER).fn

    def as_dict(self) -> dict[str, Any]:
        return {"candidate": self.name, "chosen": self.chosen, "tile": dataclasses.asdict(self.tile), "splits": self.splits}


def num_sms() -> int:
    """SMs of this device; an H200's where there is none."""
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132


def parse(description: str | None, sections: Iterable[str], argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"sections or names of cases, all by default: {' '.join(dict.fromkeys(sections))}")
    parser.add_argument("--out", type=Path, help="results as JSON, rewritten after every case")
    parser.add_argument("--check", action="store_true", help="also run every candidate twice: are the bits the same?")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no case later than S seconds from now")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--list", action="store_true", help="print cases and candidates; needs no GPU")
    return parser.parse_args(argv)


def select(cases: Iterable[Any], wanted: list[str]) -> list[Any]:
    """The cases of those sections or of those names."""
    cases = list(cases)
    unknown = set(wanted) - {case.section for case in cases} - {case.name for case in cases}
    if unknown:
        raise SystemExit(f"no such section or case: {sorted(unknown)}")
    return [case for case in cases if not wanted or {case.section, case.name} & set(wanted)]


def compile_all(jobs: list[Job], processes: int) -> dict[Job, dict[str, Any]]:
    """Registers and spilled bytes of every kernel, or the error; the objects stay in the disk cache."""
    with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs))) as pool:
        return dict(zip(jobs, pool.map(_compile, jobs, chunksize=1), strict=True))


def _compile(job: Job) -> dict[str, Any]:
    try:
        facts = get_entry(Request(*job, HOPPER.arch)).facts
    except Exception as error:
        return {"error": protocol.reason(error)}
    return {"registers": facts.registers, "spill_bytes": facts.spill_bytes}


def compare(calls: dict[str, protocol.Call], num_sets: int, check: bool, timings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per candidate: how long it takes and how far its output is from the first one's, or the error.

    ``timings`` maps a label to the arguments of :func:`protocol.compare`.
    """
    facts: dict[str, dict[str, Any]] = {name: {} for name in calls}
    reference: torch.Tensor | None = None
    good: dict[str, protocol.Call] = {}
    for name, call in calls.items():
        try:
            out = call(0).clone()
            if reference is None:
                reference = out
            facts[name]["difference"] = protocol.difference(out, reference)
            if check:
                facts[name]["repeatable"] = torch.equal(call(0), out)
            good[name] = call
        except Exception as error:
            facts[name]["error"] = protocol.reason(error)
    for label, arguments in timings.items():
        for name, result in protocol.compare(good, num_sets, **arguments).items():
            facts[name].update({"error": result} if isinstance(result, str) else {label: result.as_dict()})
    return facts


def main(
    description: str | None,
    cases: Callable[[], Iterable[Any]],
    unit: str,
    headline: str,
    argv: list[str] | None = None,
) -> int:
    """A sweep's command line.

    A case has ``section``, ``name``, ``work``, ``candidates()`` and ``run(compiled, check)``, which returns rows.

    unit      of ``work`` per second.
    headline  label of the timing that orders the table.
    """
    start = time.perf_counter()
    args = parse(description, (case.section for case in cases()), argv)
    selected = select(cases(), args.sections)
    if args.list:
        for case in selected:
            print(f"{case.section}: {case.name}")
            for candidate in case.candidates():
                print("   *" if candidate.chosen else "    ", candidate.name)
        return 0
    compiled = compile_all(list(dict.fromkeys(c.job for case in selected for c in case.candidates())), args.jobs)
    about = stamp()
    about["ceilings"] = {"before": protocol.ceilings()}
    rows: list[dict[str, Any]] = []

    def save() -> None:
        if args.out:
            write_json(args.out, {"unit": unit, **about, "rows": rows})

    for case in selected:
        if time.perf_counter() - start > args.budget:
            print(f"out of time before {case.name}")
            break
        torch.manual_seed(0)
        new = case.run(compiled, args.check)
        rows += [{"section": case.section, "case": case.name, "work": case.work, **row} for row in new]
        print(table(case.name, case.work, new, unit, headline), flush=True)
        save()
        torch.cuda.empty_cache()
    about["ceilings"]["after"] = protocol.ceilings()
    save()
    return 0


def table(name: str, work: float, rows: list[dict[str, Any]], unit: str, headline: str) -> str:
    """The fastest first; * is what ``choose()`` picks, ! computes something else."""
    lines = [f"{name} [{unit}, us (10th to 90th percentile)]"]
    for row in sorted(rows, key=lambda row: row[headline]["us"] if headline in row else float("inf")):
        mark = "*" if row.get("chosen") else " "
        if "error" in row:
            lines.append(f"  {mark} {row['candidate']:36} {row['error']}")
            continue
        timings = [
            f"{label} {work / (t['us'] * 1e-6):.0f}, {t['us']:.2f} us ({t['p10_us']:.2f} to {t['p90_us']:.2f})"
            for label, t in row.items()
            if isinstance(t, dict) and "us" in t
        ]
        wrong = "" if row["difference"] < SAME else f"  ! differs by {row['difference']:.1e}"
        repeats = "" if row.get("repeatable", True) else "  ! not repeatable"
        lines.append(f"  {mark} {row['candidate']:36} {'; '.join(timings)}{wrong}{repeats}")
    return "\n".join(lines)
