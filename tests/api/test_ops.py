"""``torch.library.opcheck`` on every op: schema and mutations as declared, fakes that agree with the results, traceable by AOT autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cute_infer.attention import launch, merge  # noqa: F401  (each of these registers its ops)
from cute_infer.attention.spec import AttentionSpec
from cute_infer.paged import append  # noqa: F401
from cute_infer.sampling import ops  # noqa: F401
from tests.cases import DECODE, PREFILL
from tests.poison import make_batch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def attention(device: str, kind: str, lse: bool) -> tuple:
    case = (DECODE if kind == "decode" else PREFILL)[0]
    batch = make_batch(case)
    dims, group = (case.head_dim, case.head_dim), case.num_qo_heads // case.num_kv_heads
    spec = AttentionSpec(kind, *["float16"] * 3, *dims, group, "paged", case.page_size, causal=kind == "prefill", lse=lse)
    q, k, v, rows, *table = (x.to(device) for x in (batch.q, batch.k_pages, batch.v_pages, batch.qo_indptr, *batch.csr))
    log = torch.zeros(q.shape[:2], device=device) if lse else None
    status = torch.zeros(4, dtype=torch.int32, device=device)
    tensors = (q, k, v, torch.zeros_like(q), log, rows if kind == "prefill" else None, *table, *[None] * 5, status)
    return (*tensors, spec.to_string(), len(case.kv_lens), case.head_dim**-0.5, 1.0, 0.0, 1.0, 1.0, 1e4, -1, False, 0, 0)


def append_rows(device: str, second: bool) -> tuple:
    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    rows, cache = (torch.randn(*shape, 2, 16, device=device).half() for shape in ((5,), (6, 4)))
    others = (rows * 2, cache.clone()) if second else (None, None)
    return rows, others[0], ints(0, 0, 1, 1, 1), ints(3, 4, 0, 1, 2), cache, others[1], ints(5, 0, 2), ints(0, 2, 3)


def states(device: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(7, count, 4, 16, device=device).half(), torch.randn(7, count, 4, device=device)


def pair(device: str) -> tuple[torch.Tensor, ...]:
    return tuple(x[:, 0].contiguous() for _ in "ab" for x in states(device, 1))


def into(device: str, lse: bool) -> tuple:
    v, s = torch.randn(3, 7, 4, 16, device=device), torch.randn(3, 7, 4, device=device)
    return v, s, torch.zeros(7, 4, 16, device=device).half(), torch.zeros(7, 4, device=device) if lse else None


def draw(device: str, probs: bool, indices: bool) -> tuple:
    x = torch.randn(3, 97, device=device)
    rows = torch.tensor([2, 0, 1, 2], dtype=torch.int32, device=device) if indices else None
    slots = 4 if indices else 3
    top_k = torch.full((slots,), 5, dtype=torch.int32, device=device)
    filters = (None, 0.7, top_k, None, None, 0.9, None, None)
    return x.softmax(1) if probs else x, probs, rows, *filters, True, not probs, None, 7, None, 0, True, None


def rewrite(device: str, output: str) -> tuple:
    x = torch.randn(3, 97, device=device)
    return x.softmax(1) if output == "probs" else x, output, output == "probs", None, None, None, 5, None, 0.9


def chain(device: str) -> tuple:
    draft, target = torch.rand(2, 3, 31, device=device).softmax(2), torch.rand(2, 4, 31, device=device).softmax(2)
    ids = torch.randint(0, 31, (2, 3), dtype=torch.int32, device=device)
    return draft, ids, target, None, 7, None, 0, True, None


CALLS: dict[str, list[Callable[[str], tuple]]] = {
    "attention": [
        lambda d: attention(d, "decode", False), lambda d: attention(d, "decode", True),
        lambda d: attention(d, "prefill", False), lambda d: attention(d, "prefill", True),
    ],
    "append_paged_": [lambda d: append_rows(d, False), lambda d: append_rows(d, True)],
    "merge_state": [pair],
    "merge_state_": [lambda d: (*pair(d), None), lambda d: (*pair(d), torch.arange(7, device=d) % 2 == 0)],
    "merge_states": [lambda d: states(d, 3)],
    "merge_into": [lambda d: into(d, False), lambda d: into(d, True)],
    "sample_rows": [lambda d: draw(d, False, False), lambda d: draw(d, True, True)],
    "rewrite_rows": [lambda d: rewrite(d, "softmax"), lambda d: rewrite(d, "probs"), lambda d: rewrite(d, "logits")],
    "chain_speculative": [chain],
}  # fmt: skip


def test_every_op_is_checked() -> None:
    names = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("cute_infer::")}
    assert names == set(CALLS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, call", [(name, call) for name, calls in CALLS.items() for call in range(len(calls))])
def test_opcheck(name: str, call: int, device: str) -> None:
    arguments = CALLS[name][call](device)
    torch.library.opcheck(getattr(torch.ops.cute_infer, name).default, arguments, test_utils=CHECKS)


def test_a_wrong_fake_would_be_found() -> None:
    """The check itself can fail: an op like merge_states whose fake forgets to drop the axis of the states."""
    library = torch.library.Library("cute_infer_wrong", "DEF")
    library.define("merge(Tensor v) -> Tensor")
    library.impl("merge", lambda v: v.sum(1), "CPU")
    library.impl("merge", lambda v: torch.empty_like(v), "Meta")
    with pytest.raises(Exception, match="(?i)shape"):
        torch.library.opcheck(torch.ops.cute_infer_wrong.merge.default, (torch.randn(2, 3),), test_utils=("test_faketensor",))
