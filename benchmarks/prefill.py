"""Prefill: TFLOP/s, causal work counted half. Each case twice: rested (idle before every sample) and back to back (power-limited)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers import PREFILL
from benchmarks.problems import PrefillProblem
from benchmarks.protocol import num_sets
from benchmarks.runner import Case, attention_row

UNIT = "TFLOP/s"
REST_S = 0.03


@dataclass(frozen=True)
class PrefillCase(Case):
    qo_heads: int
    kv_heads: int
    batch: int
    seq_len: int
    causal: bool
    dtype: str
    rested: bool

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == "bf16" else f" {self.dtype}"
        mask, state = "causal" if self.causal else "full", "rested" if self.rested else "back to back"
        return f"{self.qo_heads}/{self.kv_heads} d128 B{self.batch} S{self.seq_len} {mask}{dtype}, {state}"

    def run(self, rounds: int, device: str = "cuda", **timing):
        shape = (self.batch, self.seq_len, self.qo_heads, self.kv_heads)
        sets = num_sets(PrefillProblem.set_bytes(*shape, self.dtype))
        problem = PrefillProblem(*shape, self.causal, self.dtype, sets, device)
        timing.setdefault("rest_s", REST_S if self.rested else 0.0)
        return attention_row(self.name, PREFILL, problem, sets, problem.flops / 1e12, rounds=rounds, **timing)


def cases() -> Iterator[PrefillCase]:
    for dtype in ("bf16", "fp8"):
        for batch, seq_len in ((16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384), (1, 32768)):
            for heads in ((32, 8), (16, 16)):
                for causal in (True, False):
                    for rested in (True, False):
                        yield PrefillCase(*heads, batch, seq_len, causal, dtype, rested)


QUICK = tuple(
    PrefillCase(32, 8, batch, seq_len, causal, "bf16", rested=True) for batch, seq_len in ((8, 2048), (2, 8192)) for causal in (True, False)
)
