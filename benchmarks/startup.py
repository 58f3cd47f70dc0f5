"""Start-up and host cost, in microseconds: import, first call with an empty and a filled cache, and Python's share of a call.

Every start is a fresh process; the other rows time the CPU alone (nothing waits for the GPU inside the timed region).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

import cute_infer
from benchmarks.protocol import Timing
from benchmarks.report import OURS, Row

UNIT = "us"
STARTS = 5

IMPORT = """
import time
import torch
start = time.perf_counter()
import cute_infer
print(time.perf_counter() - start)
"""

FIRST_CALL = """
import json, time
import torch, cute_infer
q = torch.randn(32, 128, dtype=torch.bfloat16, device="cuda")
k, v = (torch.randn(2048, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in "kv")
torch.cuda.synchronize()
seconds = []
for _ in range(2):
    start = time.perf_counter()
    cute_infer.single_decode_with_kv_cache(q, k, v)
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def fresh_process(code: str, **env: str) -> str:
    """The last line that a new interpreter prints when it runs ``code``."""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def summary(seconds: list[float]) -> Timing:
    micro = sorted(s * 1e6 for s in seconds)
    cuts = statistics.quantiles(micro, n=10) if len(micro) > 1 else micro * 9
    return Timing(statistics.median(micro), cuts[0], cuts[8], len(micro))


def host_cost(call: Callable[[], object], rounds: int = 20, burst: int = 50) -> Timing:
    """CPU time per call: bursts short enough for the launch queue, the GPU drained between them."""
    for _ in range(5):
        call()
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(burst):
            call()
        samples.append((time.perf_counter() - start) / burst)
    return summary(samples)


def starts(deadline: float) -> dict[str, Timing]:
    """Import beside torch, and the first decode call with an empty and then a filled kernel cache: STARTS times, at least once."""
    imports, cold, warm, second = [], [], [], []
    for i in range(STARTS):
        if i and time.perf_counter() > deadline:
            break
        imports.append(float(fresh_process(IMPORT)))
        with tempfile.TemporaryDirectory() as cache:
            os.chmod(cache, 0o700)
            cold.append(json.loads(fresh_process(FIRST_CALL, CUTE_INFER_CACHE_DIR=cache))[0])
            first, again = json.loads(fresh_process(FIRST_CALL, CUTE_INFER_CACHE_DIR=cache))
            warm.append(first)
            second.append(again)
    return {
        "import cute_infer (torch already imported)": summary(imports),
        "first single_decode call, empty cache (compiles)": summary(cold),
        "first single_decode call, filled cache (loads)": summary(warm),
        "second single_decode call": summary(second),
    }


def calls() -> dict[str, Callable[[], object]]:
    """The calls a serving loop makes, for a batch of 8."""
    batch, heads, kv_heads, dim, page_size, pages = 8, 32, 8, 128, 16, 32
    q = torch.randn(batch, heads, dim, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(batch * pages, page_size, kv_heads, dim, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    out = torch.empty_like(q)
    indptr = torch.arange(batch + 1, dtype=torch.int32) * pages
    indices = torch.arange(batch * pages, dtype=torch.int32, device="cuda")
    last = torch.full((batch,), page_size, dtype=torch.int32)
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper()

    def plan(*metadata: torch.Tensor) -> None:
        wrapper.plan(*metadata, heads, kv_heads, dim, page_size, q_data_type=torch.bfloat16)

    on_device = (indptr.cuda(), indices, last.cuda())
    one_k, one_v = k[:pages].flatten(0, 1), v[:pages].flatten(0, 1)
    logits = torch.randn(batch, 32000, device="cuda")
    return {
        "plan, batch 8, indptr on the CPU": lambda: plan(indptr, indices, last),
        "plan, batch 8, indptr on the GPU": lambda: plan(*on_device),
        "run, batch 8": lambda: wrapper.run(q, (k, v), out=out),
        "single_decode_with_kv_cache": lambda: cute_infer.single_decode_with_kv_cache(q[0], one_k, one_v),
        "top_p_sampling_from_logits": lambda: cute_infer.sampling.top_p_sampling_from_logits(logits, top_p=0.9),
    }


def rows(deadline: float = float("inf")) -> list[Row]:
    """Python's share of each call first, then as many starts as the time allows."""
    timings = {name: host_cost(call) for name, call in calls().items()}
    return [Row(name, {OURS: timing}) for name, timing in {**starts(deadline), **timings}.items()]
