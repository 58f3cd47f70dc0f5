"""How a number is taken.

1. A candidate's calls are captured into one CUDA graph and the graph's replay is timed: no Python and no launch gaps inside.
2. The calls rotate over input sets that together exceed ``ROTATE_BYTES``, more than three times an H200's L2, so each call
   reads device memory.
3. All candidates of a case take turns in shuffled order, round after round, in one process: temperature, clocks and
   neighbours act on all alike. The median over rounds is the result; the 10th and 90th percentile say how steady it was.
4. The ceilings of the card are measured in the same process, before and after: GPUs of one kind differ and throttle, so
   ratios travel between machines and absolute numbers do not.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

ROTATE_BYTES = 200 * 2**20
ONE_SET_BYTES = 2**30  # a set this large evicts itself: no second one is needed
MAX_SETS = 1024
GRAPH_SECONDS = 2e-3  # a replay at least this long hides the event pair and the graph launch (a few microseconds)
MAX_CALLS = 2048

Call = Callable[[int], Any]
"""call(i) runs the candidate once on input set i and returns its output."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median and the spread over rounds."""

    us: float
    p10_us: float
    p90_us: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


class Timer(Protocol):
    """Prepares a candidate and returns a function that takes one sample, in seconds per call."""

    def __call__(self, call: Call, num_sets: int) -> Callable[[], float]: ...


def num_sets(bytes_per_set: int) -> int:
    """How many input sets a case needs so that none is still cached when its turn comes again."""
    if bytes_per_set >= ONE_SET_BYTES:
        return 1
    return min(MAX_SETS, -(-ROTATE_BYTES // bytes_per_set) + 1)


def graph_timer(call: Call, num_sets: int) -> Callable[[], float]:
    """Times replays of a graph of many calls, one per input set in turn."""

    def launch(count: int) -> None:
        for i in range(count):
            call(i % num_sets)

    def elapsed(work: Callable[[], None]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3

    def capture(count: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(count)
        return graph

    launch(min(3, num_sets))  # compile, load, allocate
    torch.cuda.synchronize()
    graph = capture(num_sets)
    graph.replay()
    seconds = min(elapsed(graph.replay) for _ in range(2))
    calls = num_sets
    if seconds < GRAPH_SECONDS:
        calls = min(MAX_CALLS, num_sets * int(-(-GRAPH_SECONDS // seconds)))
        graph = capture(calls)
        graph.replay()
        torch.cuda.synchronize()
    return lambda: elapsed(graph.replay) / calls


def compare(
    candidates: dict[str, Call],
    num_sets: int,
    *,
    rounds: int = 21,
    rest_s: float = 0.0,
    timer: Timer = graph_timer,
    seed: int = 0,
) -> dict[str, Timing | str]:
    """Time all candidates side by side. A candidate that fails gets the reason instead of a number.

    ``rest_s`` is idle time before every sample: 0 leaves a power-limited card throttled, 0.03 lets it recover.
    """
    samplers: dict[str, Callable[[], float]] = {}
    results: dict[str, Timing | str] = {}
    for name, call in candidates.items():
        try:
            samplers[name] = timer(call, num_sets)
        except Exception as error:
            results[name] = reason(error)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    shuffle = random.Random(seed)
    for _ in range(rounds):
        for name in shuffle.sample(list(samplers), len(samplers)):
            if rest_s:
                time.sleep(rest_s)
            samples[name].append(samplers[name]() * 1e6)
    for name, values in samples.items():
        cuts = statistics.quantiles(values, n=10) if len(values) > 1 else values * 9
        results[name] = Timing(statistics.median(values), cuts[0], cuts[8], rounds)
    return {name: results[name] for name in candidates}


def reason(error: Exception) -> str:
    """The first line of an error, as a table's footnote."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def difference(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in fp32; NaN when either holds NaN."""
    out, ref = out.float().flatten(), ref.float().flatten()
    return float((out - ref).norm() / ref.norm())


def ceilings(rounds: int = 15) -> dict[str, Any]:
    """What this card does right now: bf16 GEMM 8192^3 [TFLOP/s], a read-only stream and a copy [GB/s], and its clocks."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(2))
    source = torch.randn(2**30, device="cuda").view(-1, 4096)  # 4 GiB
    target = torch.empty_like(source)
    row_sums = torch.empty(source.shape[0], device="cuda")
    timings = compare(
        {
            "gemm": lambda _: torch.mm(a, b),
            "read": lambda _: torch.sum(source, dim=1, out=row_sums),
            "copy": lambda _: target.copy_(source),
        },
        1,
        rounds=rounds,
    )
    size = source.numel() * source.element_size()
    work = {"gemm": 2 * n**3 / 1e12, "read": size / 1e9, "copy": 2 * size / 1e9}
    rates = {name: round(work[name] / (t.us * 1e-6), 1) for name, t in timings.items() if isinstance(t, Timing)}
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader", "--id=0"]
    try:
        state = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except OSError:
        state = ""
    return {"gemm_bf16_tflops": rates.get("gemm"), "read_gbps": rates.get("read"), "copy_gbps": rates.get("copy"), "gpu_state": state}
