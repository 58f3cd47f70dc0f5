"""Sampling kernels against the reference on a GPU: every tile and dtype, thresholds, distributions, random streams, graphs.

The reference runs on the GPU too (``CUTE_INFER_BACKEND=reference`` does the same): both see the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cute_infer import sampling
from cute_infer.sampling import launch, ops, reference, tiles

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
FAMILIES = ["sm90", "sm80"] if HOPPER else ["sm80"]
VOCABS = [1, 2, 31, 32, 1000, 4096, 8200, 12288, 16384, 32000, 50257, 65536, 128256, 151936, 262144]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run with one family of tiles: the one-CTA tiles must serve every GPU."""
    choose = tiles.choose
    monkeypatch.setattr(launch, "choose", lambda is_hopper, vocab, rows: choose(request.param == "sm90", vocab, rows))
    launch._row_kernel.cache_clear()
    yield request.param
    launch._row_kernel.cache_clear()


def on_reference(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same call through the reference."""
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_use_reference", lambda device: True)
        return call()


def rows_of(kind: str, rows: int, vocab: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator("cuda").manual_seed(seed + vocab)
    x = torch.randn(rows, vocab, device="cuda", generator=gen)
    if kind == "peaked":
        x = 3 * x
    elif kind == "tied":
        x = (2 * x).round()
    elif kind == "masked":
        x = torch.where(torch.rand(x.shape, device="cuda", generator=gen) < 0.9, -torch.inf, x)
        x[:, -1] = 0.5
    elif kind == "equal":
        x = torch.full_like(x, 1.25)
    elif kind == "steep":
        x = 8 * x
    elif kind == "coarse":  # what a bf16 head writes: hundreds of equal values
        x = (3 * x).bfloat16().float()
    elif kind == "zipf":
        x = -1.1 * torch.log(x.argsort(-1).argsort(-1) + 1.0)
    elif kind == "heavy":  # one token with most of the mass
        x = 2 * x
        x[:, vocab // 3] = 15.0
    elif kind == "close":
        x = 20 + 1e-5 * x
    elif kind == "wide":
        x = 1e4 * x
    return x.to(dtype)


KINDS = ["flat", "peaked", "tied", "masked", "equal", "close", "wide"]


# -------------------------------------------------------------------------------------------------------------- thresholds
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_top_k_mask_is_exact(vocab: int, kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows_of(kind, 7, vocab)
    k = torch.tensor([1, 2, 50, 5000, vocab, 0, max(1, vocab - 1)], dtype=torch.int32, device="cuda")
    call = lambda: sampling.top_k_mask_logits(x, k)  # noqa: E731
    assert torch.equal(call(), on_reference(call, monkeypatch))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "masked", "equal"])
@pytest.mark.parametrize("vocab", [33, 4096, 32000, 50257, 128256])
def test_renorm_keeps_the_same_tokens(vocab: int, kind: str, dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probs = rows_of(kind, 5, vocab).softmax(-1).to(dtype)
    for call in (
        lambda: sampling.top_k_renorm_probs(probs, torch.tensor([1, 3, 100, vocab, 20000], dtype=torch.int32, device="cuda")),
        lambda: sampling.top_p_renorm_probs(probs, torch.tensor([0.0, 0.1, 0.9, 0.999, 1.0], device="cuda")),
        lambda: sampling.top_p_renorm_probs(probs, 0.5),
    ):
        got, want = call(), on_reference(call, monkeypatch)
        assert torch.equal(got > 0, want > 0)
        torch.testing.assert_close(got, want, rtol=2e-6 if dtype == F32 else torch.finfo(dtype).eps, atol=0)


TOP_P = [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.99999]


@pytest.mark.parametrize("kind", [*KINDS, "steep", "zipf", "coarse", "heavy"])
@pytest.mark.parametrize("vocab", [1, 33, 1000, 8200, 32000, 50257, 128256, 151936, 262144])
def test_top_p_keeps_exactly_the_nucleus(vocab: int, kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masses of probabilities are the reference's bit for bit: so are the thresholds, the sums and the tokens."""
    probs = rows_of(kind, 2 * len(TOP_P), vocab).softmax(-1)
    p = torch.tensor(2 * TOP_P, device="cuda")
    rewrite = lambda: sampling.top_p_renorm_probs(probs, p)  # noqa: E731
    assert torch.equal(rewrite() > 0, on_reference(rewrite, monkeypatch) > 0)
    for indices in (None, torch.arange(2 * len(TOP_P) - 1, -1, -1, device="cuda")):
        draw = lambda: sampling.top_p_sampling_from_probs(probs, p, indices, seed=5, offset=2)  # noqa: B023, E731
        assert torch.equal(draw(), on_reference(draw, monkeypatch))


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize("vocab", [4096, 32000, 128256, 151936])
def test_every_search_in_one_batch(vocab: int, order: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a small k, a large one, none, and no filter at all go different ways in one launch."""
    probs = rows_of("peaked", 40, vocab).softmax(-1)
    k = torch.tensor([1, 50, 128, 1000, 0, vocab, -1, 3000], dtype=torch.int32, device="cuda").repeat(5)
    p = torch.tensor([0.9, 0.5, 1.0, 0.0, 0.99], device="cuda").repeat_interleave(8)
    draw = lambda: sampling.top_k_top_p_sampling_from_probs(probs, k, p, filter_apply_order=order, seed=5, offset=2)  # noqa: E731
    assert torch.equal(draw(), on_reference(draw, monkeypatch))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("vocab", VOCABS)
def test_softmax(vocab: int, dtype: torch.dtype, family: str) -> None:
    x = rows_of("peaked", 4, vocab, dtype)
    t = torch.tensor([0.3, 1.0, 2.0, 50.0], device="cuda")
    want = torch.softmax(x.double() / t[:, None], -1)
    torch.testing.assert_close(sampling.softmax(x, t).double(), want, rtol=2e-5, atol=1e-10)
    torch.testing.assert_close(sampling.softmax(x, 2.0)[2].double(), want[2], rtol=2e-5, atol=1e-10)


# --------------------------------------------------------------------------------------------------------------------- ids
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("logits", {}),
    "top_k": ("logits", dict(top_k=50)),
    "top_p": ("logits", dict(top_p=0.9)),
    "first": ("logits", dict(top_k=50, top_p=0.9)),
    "joint": ("logits", dict(top_k=3000, top_p=0.7, filter_apply_order="joint")),
    "fused": ("logits", dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02)),
    "hot": ("logits", dict(temperature=5.0, top_p=0.5)),
    "greedy": ("logits", dict(temperature=0.0)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 33, 4096, 32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("name", CALLS)
def test_ids_match_the_reference(name: str, vocab: int, kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal ids but for draws within rounding of a border; and those are neighbours that the reference would also draw."""
    rows = 24
    x = rows_of(kind, rows, vocab)
    arguments = dict(seed=torch.arange(rows, device="cuda") * 7919, offset=3, return_valid=True, return_logprob=True, **CALLS[name][1])
    ids, valid, logprob = sampling.sample(x, **arguments)
    want, want_valid, want_logprob = on_reference(lambda: sampling.sample(x, **arguments), monkeypatch)
    assert torch.equal(valid, want_valid) and valid.all()
    same = ids == want
    assert same.sum() >= rows - 1, f"{(~same).sum()} of {rows} ids differ"
    torch.testing.assert_close(logprob[same], want_logprob[same], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied"])
@pytest.mark.parametrize("vocab", [33, 32000, 50257, 128256])
def test_ids_from_probs_match_the_reference(vocab: int, kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masses of probabilities are the same integers on both sides, so the ids are equal, all of them."""
    probs = rows_of(kind, 32, vocab).softmax(-1)
    for call in (
        lambda: sampling.sampling_from_probs(probs, seed=5),
        lambda: sampling.top_p_sampling_from_probs(probs, 0.9, seed=5),
        lambda: sampling.top_k_sampling_from_probs(probs, 100, seed=5),
        lambda: sampling.min_p_sampling_from_probs(probs, 0.1, seed=5),
        lambda: sampling.top_k_top_p_sampling_from_probs(probs, 100, 0.9, seed=5),
        lambda: sampling.top_k_top_p_sampling_from_probs(probs, 100, 0.1, seed=5, filter_apply_order="joint"),
    ):
        assert torch.equal(call(), on_reference(call, monkeypatch))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("vocab", [1000, 32000, 128256])
def test_dtypes_strides_and_indices(vocab: int, dtype: torch.dtype, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = rows_of("peaked", 12, 2 * vocab + 24, dtype)
    where = torch.tensor([3, 0, 11, 3, 5], dtype=torch.int64, device="cuda")
    for x in (wide[:, 8 : 8 + vocab], wide[:, 1 : 1 + vocab], wide[::2, :vocab], wide.t()[:vocab].t()):
        picked = where % x.shape[0]
        call = lambda x=x, picked=picked: sampling.sample(x, 0.9, 30, 0.9, indices=picked, seed=8)  # noqa: E731
        assert (call() == on_reference(call, monkeypatch)).sum() >= 4
        assert call().dtype == torch.int64
        assert torch.equal(call(), sampling.sample(x[picked].contiguous(), 0.9, 30, 0.9, seed=8).long())


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 2.0, "top_k": 3, "top_p": 0.9, "min_p": 0.1}])
def test_degenerate_rows(filters: dict[str, Any], family: str) -> None:
    x = torch.randn(5, 32000, device="cuda")
    x[0, 3], x[1], x[2, 0] = torch.nan, -torch.inf, torch.inf
    x[3] = -torch.inf
    x[3, 31999] = -5.0
    ids, valid, logprob = sampling.sample(x, **filters, return_valid=True, return_logprob=True)
    assert valid.tolist() == [False, False, False, True, True]
    assert ids[:4].tolist() == [0, 0, 0, 31999]
    assert logprob[:3].tolist() == [-math.inf] * 3
    out = sampling.softmax(x)
    assert out[0].isnan().all() and (out[1] == 0).all() and out[3, 31999] == 1
    probs = torch.zeros(2, 32000, device="cuda")
    probs[1, 7] = 1
    ids, valid = sampling.top_p_sampling_from_probs(probs, p=0.9)
    assert valid.tolist() == [False, True] and ids.tolist() == [0, 7]


def test_empty_batch(family: str) -> None:
    x = torch.randn(0, 100, device="cuda")
    assert sampling.sampling_from_logits(x).shape == (0,) and sampling.softmax(x).shape == (0, 100)


# ---------------------------------------------------------------------------------------------------------- random streams
STREAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p": dict(top_p=0.95),
    "top-k": dict(top_k=100),
    "all": dict(temperature=0.9, top_k=100, top_p=0.95, min_p=0.01),
    "large k": dict(top_k=5000, top_p=0.5, filter_apply_order="joint"),
}


@pytest.mark.parametrize("vocab", [4096, 32000, 128256])
@pytest.mark.parametrize("name", STREAMS)
def test_same_seed_anywhere(name: str, vocab: int) -> None:
    """Alone, in another slot of a batch of 64 (which takes another tile), and replayed by a CUDA graph: the same id."""
    x = rows_of("flat", 64, vocab)
    seeds, steps = torch.arange(64, device="cuda") * 10_007, torch.arange(64, device="cuda") % 5
    draw = lambda rows: sampling.sample(x[rows], seed=seeds[rows], offset=steps[rows], **STREAMS[name])  # noqa: E731
    together = draw(slice(None))
    order = torch.randperm(64, device="cuda")
    assert torch.equal(draw(order), together[order])
    alone = {i: draw(slice(i, i + 1)) for i in range(0, 64, 9)}
    assert {i: ids.item() for i, ids in alone.items()} == {i: together[i].item() for i in alone}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = draw(slice(None))
    for _ in range(2):
        ids.fill_(-1)
        graph.replay()
        assert torch.equal(ids, together)


def test_bitwise_repeatable(family: str) -> None:
    x = rows_of("flat", 40, 128256)
    first = sampling.sample(x, 1.0, 20000, 0.9, seed=1), sampling.top_p_renorm_probs(x.softmax(-1), 0.9), sampling.softmax(x)
    for _ in range(20):
        again = sampling.sample(x, 1.0, 20000, 0.9, seed=1), sampling.top_p_renorm_probs(x.softmax(-1), 0.9), sampling.softmax(x)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_generator_offset_moves_on_without_a_sync() -> None:
    x = rows_of("flat", 64, 1000)
    gen = torch.Generator("cuda").manual_seed(4)
    sampling.sampling_from_logits(x, generator=gen)
    before = gen.get_offset()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        a, b = sampling.sampling_from_logits(x, generator=gen), sampling.sampling_from_logits(x, generator=gen)
        sampling.sample(x, 0.7, 5, 0.9, 0.1, seed=3, return_valid=True, return_logprob=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gen.get_offset() > before and not torch.equal(a, b)
    gen.manual_seed(4)
    sampling.sampling_from_logits(x, generator=gen)
    assert torch.equal(sampling.sampling_from_logits(x, generator=gen), a)


def test_graph_replay_follows_seeds_parameters_and_logits() -> None:
    x = rows_of("flat", 32, 32000)
    seed, offset = torch.arange(32, device="cuda"), torch.zeros(32, dtype=torch.int64, device="cuda")
    top_p = torch.full((32,), 0.9, device="cuda")
    step = lambda: sampling.sample(x, 0.8, 50, top_p, seed=seed, offset=offset)  # noqa: E731
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = step()
    for i in range(4):
        offset.fill_(i)
        top_p.fill_(0.9 - 0.2 * i)
        x.copy_(rows_of("flat", 32, 32000, seed=i))
        graph.replay()
        assert torch.equal(ids, step())


def test_graph_without_a_seed_draws_anew() -> None:
    x = torch.zeros(256, 32000, device="cuda")
    sampling.sampling_from_logits(x, seed=torch.zeros(1, dtype=torch.int64, device="cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = sampling.sampling_from_logits(x)
    graph.replay()
    first = ids.clone()
    graph.replay()
    assert not torch.equal(first, ids)


def test_fullgraph_compile() -> None:
    x, seed = rows_of("peaked", 8, 32000), torch.arange(8, device="cuda")
    step = lambda x, seed: sampling.sample(x, 0.8, 50, 0.9, seed=seed, return_valid=True)  # noqa: E731
    ids, valid = torch.compile(step, fullgraph=True)(x, seed)
    assert torch.equal(ids, step(x, seed)[0]) and valid.all()


# ------------------------------------------------------------------------------------------------------------- speculative
@pytest.mark.parametrize("vocab", [7, 1000, 32000, 50257])
@pytest.mark.parametrize("num_draft", [0, 1, 5])
def test_speculative_matches_the_reference(num_draft: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All integers: ids and counters are equal, all of them."""
    batch = 40
    p, q = (
        rows_of("peaked", batch * max(num_draft, 1), vocab).softmax(-1),
        rows_of("peaked", batch * (num_draft + 1), vocab, seed=1).softmax(-1),
    )
    p = p.view(batch, -1, vocab)[:, :num_draft]
    q = q.view(batch, num_draft + 1, vocab).clone()
    q[:, :num_draft] = 0.6 * p + 0.4 * q[:, :num_draft]
    draft = (
        torch.multinomial(p.reshape(-1, vocab), 1).view(batch, num_draft)
        if num_draft
        else torch.zeros(batch, 0, dtype=torch.long, device="cuda")
    )
    for seed in (1, torch.arange(batch, device="cuda")):
        call = lambda seed=seed: sampling.chain_speculative_sampling(p, draft, q, seed=seed)  # noqa: E731
        for got, want in zip(call(), on_reference(call, monkeypatch)):
            assert torch.equal(got, want)


def test_reference_is_the_cpu_path() -> None:
    """The oracle gives the same ids on both devices for probabilities."""
    probs = rows_of("peaked", 16, 1000).softmax(-1)
    start = dict(seed=torch.tensor([3]), offset=torch.tensor([0]), row_in_counter=True, k_first=False)
    none = dict(indices=None, temperature=None, top_k=None, top_p=None, min_p=None)
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in start.items()}
    a, b = reference.sample_rows(probs, True, **none, **on_gpu), reference.sample_rows(probs.cpu(), True, **none, **start)
    assert torch.equal(a[0].cpu(), b[0])
