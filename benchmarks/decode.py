"""Paged decode: bytes of K and V read per second. The grid of cases is the one the project's goals are stated on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers import DECODE
from benchmarks.problems import DecodeProblem
from benchmarks.protocol import num_sets
from benchmarks.runner import Case, attention_row

UNIT = "GB/s"


@dataclass(frozen=True)
class DecodeCase(Case):
    """``L~n`` in the name: lengths log-uniform over a factor of 16 with mean n, in arrival order."""

    qo_heads: int
    kv_heads: int
    batch: int
    kv_len: int
    page_size: int
    kv_dtype: str
    mixed: bool = False

    @property
    def name(self) -> str:
        length = f"~{self.kv_len}" if self.mixed else f"{self.kv_len}"
        return f"{self.qo_heads}/{self.kv_heads} B{self.batch} L{length} p{self.page_size} {self.kv_dtype}"

    @property
    def lens(self) -> list[int]:
        if not self.mixed:
            return [self.kv_len] * self.batch
        draw = random.Random(self.batch)
        raw = [16 ** draw.random() for _ in range(self.batch)]
        return [max(1, round(x * self.kv_len * self.batch / sum(raw))) for x in raw]

    def run(self, rounds: int, device: str = "cuda", **timing):
        lens = self.lens
        size = DecodeProblem.kv_bytes(lens, self.kv_heads, self.kv_dtype)
        problem = DecodeProblem(lens, self.qo_heads, self.kv_heads, self.page_size, self.kv_dtype, num_sets(size), device)
        return attention_row(self.name, DECODE, problem, problem.num_sets, size / 1e9, rounds=rounds, **timing)


def cases() -> Iterator[DecodeCase]:
    for batch in (1, 4, 16, 64, 256):
        for kv_len in (512, 2048, 8192, 32768):
            yield DecodeCase(32, 8, batch, kv_len, 16, "bf16")
    for batch, kv_len in ((16, 2048), (64, 2048), (256, 2048), (64, 8192)):
        yield DecodeCase(32, 8, batch, kv_len, 16, "bf16", mixed=True)
    for batch, kv_len in ((1, 2048), (1, 8192), (16, 2048), (16, 8192), (64, 2048), (64, 8192), (256, 2048), (256, 8192)):
        yield DecodeCase(32, 8, batch, kv_len, 64, "fp8")
    for batch, kv_len in ((1, 32768), (16, 2048), (64, 2048), (64, 8192), (256, 2048)):
        for page_size in (64, 1):
            yield DecodeCase(32, 8, batch, kv_len, page_size, "bf16")
    for batch, kv_len in ((1, 8192), (4, 32768), (16, 2048), (64, 2048), (64, 8192), (256, 2048)):
        yield DecodeCase(64, 8, batch, kv_len, 64, "bf16")
        yield DecodeCase(32, 32, batch, kv_len, 16, "bf16")
    for batch, kv_len in ((16, 8192), (64, 2048)):
        yield DecodeCase(64, 8, batch, kv_len, 64, "fp8")
        yield DecodeCase(32, 32, batch, kv_len, 64, "fp8")


QUICK = (
    DecodeCase(32, 8, 1, 2048, 16, "bf16"),
    DecodeCase(32, 8, 1, 8192, 16, "bf16"),
    DecodeCase(32, 8, 64, 8192, 16, "bf16"),
    DecodeCase(32, 8, 64, 8192, 16, "bf16", mixed=True),
    DecodeCase(32, 8, 64, 8192, 64, "fp8"),
)
