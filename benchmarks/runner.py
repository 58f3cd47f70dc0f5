"""What every benchmark of the table kind shares: a case that can be named and run, and a row that can be trusted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.peers import OURS, prepare
from benchmarks.protocol import Call, compare, difference
from benchmarks.report import Row


class Case(ABC):
    """One line of a table."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def run(self, rounds: int, device: str = "cuda", **timing: Any) -> Row: ...


def attention_row(name: str, candidates: dict[str, Callable[[Any], Call]], problem: Any, num_sets: int, work: float, **timing: Any) -> Row:
    """Time all candidates, and note how far every output is from ours: a fast wrong answer must not win unseen."""
    calls = prepare(candidates, problem)
    outputs: dict[str, torch.Tensor] = {}
    for candidate, call in calls.items():
        try:
            outputs[candidate] = call(0).clone()
        except Exception:  # compare() meets the same error and reports it
            continue
    timings = compare(calls, num_sets, **timing)
    far = {c: float(f"{difference(out, outputs[OURS]):.1e}") for c, out in outputs.items() if c != OURS} if OURS in outputs else {}
    return Row(name, timings, work, {"difference from ours": far} if far else {})
