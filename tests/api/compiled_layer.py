"""A decoder layer on a paged cache and the sampling of the next token, compiled whole; run by test_torch_compile.py in a fresh process.

python -m tests.api.compiled_layer cpu aot_eager      prints one JSON object: how the compiled step differs from the eager one
"""

from __future__ import annotations

import json
import sys

import torch

import cute_infer as fi

HEADS, KV_HEADS, DIM, PAGE, PAGES, VOCAB = 4, 2, 64, 16, 12, 97
HIDDEN = HEADS * DIM


class Layer(torch.nn.Module):
    """Projection, append to the paged cache, attention over it, MLP; no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = torch.nn.Linear(HIDDEN, HIDDEN)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))

    def forward(self, x, wrapper, cache, where, table):
        q, k, v = self.qkv(x).view(-1, HEADS + 2 * KV_HEADS, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
        fi.append_paged_kv_cache(k, v, *where, cache, table[1], table[0], table[2])
        x = x + self.out(wrapper.run(q, cache).flatten(1))
        return x + self.mlp(x)


def main(device: str, backend: str) -> dict:
    torch.manual_seed(0)
    dtype = torch.float16
    layer, head = Layer().to(device, dtype).eval(), torch.nn.Linear(HIDDEN, VOCAB).to(device, dtype)
    lens = torch.tensor([37, 1, 32, 17])
    pages = (lens + PAGE - 1) // PAGE
    indptr = torch.tensor([0, *pages.cumsum(0)], dtype=torch.int32, device=device)
    indices = torch.randperm(PAGES, device=device)[: int(indptr[-1])].int()
    table = (indptr, indices, ((lens - 1) % PAGE + 1).int().to(device))
    where = (torch.arange(len(lens), dtype=torch.int32, device=device), (lens - 1).int().to(device))
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*table, HEADS, KV_HEADS, DIM, PAGE, q_data_type=dtype)

    def step(x, k, v):
        x = layer(x, wrapper, (k, v), where, table)
        logits = head(x).float()
        return fi.sampling.sample(logits, temperature=0.8, top_k=20, top_p=0.9, seed=1), logits

    x = torch.randn(len(lens), HIDDEN, dtype=dtype, device=device)
    cache = [torch.randn(PAGES, PAGE, KV_HEADS, DIM, dtype=dtype, device=device) for _ in "kv"]
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    caches, results = [], []
    with torch.no_grad():
        for run in (step, compiled, compiled):
            caches.append([c.clone() for c in cache])
            results.append(run(x, *caches[-1]))
    (ids, logits), *others = results
    return {
        "same ids": all(torch.equal(other[0], ids) for other in others),
        "logits differ by": max(float((other[1] - logits).abs().max()) for other in others),
        "caches differ by": max(float((a - b).abs().max()) for other in caches[1:] for a, b in zip(other, caches[0], strict=True)),
        "slots written": int((caches[1][0] != cache[0]).any(3).any(2).sum()),
        "graph breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
