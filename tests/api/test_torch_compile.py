"""torch.compile(fullgraph=True) goes through every attention call without a graph break."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cute_infer as fi
from tests.cases import DECODE, PREFILL
from tests.poison import make_batch


def decode():
    case = DECODE[1]
    batch = make_batch(case)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*batch.csr, case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    return lambda q, k, v: wrapper.run(q * 0.5, (k, v), return_lse=True), (batch.q, batch.k_pages, batch.v_pages)


def prefill():
    case = PREFILL[1]
    batch = make_batch(case)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(batch.qo_indptr, *batch.csr, case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size, causal=True)
    return lambda q, k, v: wrapper.run(q * 0.5, k, v, return_lse=True), (batch.q, batch.k_pages, batch.v_pages)


def single():
    q, k, v = torch.randn(5, 4, 16).half(), torch.randn(9, 2, 16).half(), torch.randn(9, 2, 16).half()
    return lambda q, k, v: fi.single_prefill_with_kv_cache(q * 0.5, k, v, causal=True, return_lse=True), (q, k, v)


@pytest.mark.parametrize("make", [decode, prefill, single])
def test_fullgraph(make):
    f, inputs = make()
    eager = f(*inputs)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs)
    for got, want in zip(compiled, eager):
        assert torch.equal(got, want)


ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_decoder_layer_in_a_fresh_process(device: str, backend: str) -> None:
    """Append, attention and sampling in one graph: the same ids, and the cache written exactly where eager writes it."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch's own compiler needs a C++ compiler")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "tests.api.compiled_layer", device, backend]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    tolerance = 0.0 if backend == "aot_eager" else 0.02  # inductor rounds to 16 bits in other places
    assert (
        (found["same ids"] or backend == "inductor") and found["logits differ by"] <= tolerance and found["caches differ by"] <= tolerance
    ), found
    assert found["slots written"] == 4 and found["graph breaks"] == 0 and found["graphs"] == 1, found
