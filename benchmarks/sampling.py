"""Sampling: microseconds per call, for peaked (softmax of 3 x normal) and flat (softmax of normal) distributions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers import SAMPLERS, prepare, sampling_candidates
from benchmarks.problems import SamplingProblem
from benchmarks.protocol import compare, num_sets
from benchmarks.report import Row
from benchmarks.runner import Case

UNIT = "us"
SPREAD = {"peaked": 3.0, "flat": 1.0}


@dataclass(frozen=True)
class SamplingCase(Case):
    operation: str
    batch: int
    vocab: int
    shape: str

    @property
    def name(self) -> str:
        return f"{self.operation}: B{self.batch} V{self.vocab} {self.shape}"

    def run(self, rounds: int, device: str = "cuda", **timing) -> Row:
        sets = num_sets(4 * self.batch * self.vocab)
        problem = SamplingProblem(self.batch, self.vocab, SPREAD[self.shape], sets, device)
        calls = prepare(sampling_candidates(self.operation), problem)
        return Row(self.name, compare(calls, sets, rounds=rounds, **timing))


def cases() -> Iterator[SamplingCase]:
    for operation in SAMPLERS:
        for vocab in (32000, 128256):
            for batch in (1, 16, 128, 512):
                for shape in SPREAD:
                    yield SamplingCase(operation, batch, vocab, shape)


QUICK_OPERATIONS = ("top-p, from logits", "top-k, from logits", "top-k then top-p, from logits")
QUICK = tuple(SamplingCase(operation, 128, 128256, "peaked") for operation in QUICK_OPERATIONS)
