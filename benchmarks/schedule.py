"""Which cases are measured when time is short, and compiling their kernels beforehand, in parallel."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import importlib
import multiprocessing
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

SHARES = {"decode": 6, "prefill": 7, "sampling": 4, "append": 1, "startup": 4}  # of the time that compiling leaves


def select(module: ModuleType, quick: bool, only: str, spread_out: bool) -> tuple[list[Any], int]:
    """The cases to measure, in the order in which to measure them, and how many the grid has."""
    grid = list(module.cases())
    chosen = list(module.QUICK) if quick else grid
    if spread_out and not quick:
        first = {case.name for case in module.QUICK}
        chosen = [*module.QUICK, *(case for case in spread(grid) if case.name not in first)]
    return [case for case in chosen if re.search(only, case.name)], len(grid)


def spread(items: list[Any]) -> list[Any]:
    """The same items so that every prefix is an even sample: by the reversed bits of their positions."""
    bits = max(1, (len(items) - 1).bit_length())
    return [items[i] for i in sorted(range(len(items)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))]


def deadlines(names: Iterable[str], now: float, end: float | None) -> dict[str, float]:
    """When each table must start no further case. What one table leaves is the next one's."""
    names = list(names)
    if end is None:
        return dict.fromkeys(names, float("inf"))
    total, gone, found = sum(SHARES[name] for name in names), 0, {}
    for name in names:
        gone += SHARES[name]
        found[name] = now + max(0.0, end - now) * gone / total
    return found


# -------------------------------------------------------------------------------------------------------------- compiling beforehand
def precompile(cases: list[Any], startup: bool, jobs: int) -> None:
    """Fill the disk cache with the kernels that ``cases`` launch. Without it they are compiled one after the other, when first called."""
    from cute_infer.cli import compile_all

    spawn = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:  # a process of its own: what it "loads" are no kernels
            requests = pool.submit(record, cases, startup).result()
        if requests:
            compile_all(requests, jobs)
    except Exception:
        traceback.print_exc()
        print("compiling beforehand failed; kernels are compiled when they are first called", file=sys.stderr)


def record(cases: list[Any], startup: bool) -> list[Any]:
    """The requests that ``cases`` ask the jit for: every call is made once, on one input set, with kernels that do nothing."""
    from benchmarks import peers, runner, sampling
    from benchmarks import startup as startup_benchmark
    from cute_infer.jit import compile as jit_compile

    found: dict[Any, None] = {}
    facts = type("Facts", (), {"smem_bytes": 0})

    def load(request: Any, target: Any) -> Any:
        found[request] = None
        return jit_compile.CompiledKernel(lambda *_: None, facts, request, "compiled")

    jit_compile._load = load  # type: ignore[assignment]
    for table in (peers.DECODE, peers.PREFILL, peers.APPEND):
        for name in [name for name in table if not name.startswith(peers.OURS)]:
            del table[name]
    candidates = sampling.sampling_candidates
    sampling.sampling_candidates = lambda operation: {peers.OURS: candidates(operation)[peers.OURS]}
    for name in ("decode", "prefill", "sampling", "append"):
        importlib.import_module(f"benchmarks.{name}").num_sets = lambda size: 1
    runner.difference = lambda a, b: 0.0
    for case in cases:
        with contextlib.suppress(Exception):  # measuring it will say why
            case.run(1, timer=once)
        gc.collect()
        torch.cuda.empty_cache()
    if startup:
        for call in startup_benchmark.calls().values():
            call()
    return list(found)


def once(call: Callable[[int], Any], num_sets: int) -> Callable[[], float]:
    """A timer that makes the call and takes no time."""
    call(0)
    return lambda: 1.0
