"""Append to a paged cache: bytes moved per second, K and V each read once and written once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers import APPEND, prepare
from benchmarks.problems import AppendProblem
from benchmarks.protocol import compare, num_sets
from benchmarks.report import Row
from benchmarks.runner import Case

UNIT = "GB/s"


@dataclass(frozen=True)
class AppendCase(Case):
    tokens: int
    kv_heads: int
    page_size: int

    @property
    def name(self) -> str:
        return f"T{self.tokens} p{self.page_size} h{self.kv_heads}"

    def run(self, rounds: int, device: str = "cuda", **timing) -> Row:
        size = 2 * 2 * self.tokens * self.kv_heads * 128 * 2
        problem = AppendProblem(self.tokens, self.kv_heads, self.page_size, num_sets(size), device)
        assert size == problem.bytes
        return Row(self.name, compare(prepare(APPEND, problem), problem.num_sets, rounds=rounds, **timing), size / 1e9)


def cases() -> Iterator[AppendCase]:
    for tokens in (64, 1024, 16384):
        for page_size in (16, 64):
            yield AppendCase(tokens, 8, page_size)


QUICK = (AppendCase(64, 8, 16), AppendCase(16384, 8, 16))
