"""What is drawn, on a GPU: every sampling function against the exact filtered distribution, speculative chains against the theory.

200 000 draws from one row per case: a kernel that is slightly wrong (a tie lost at a threshold, a bin counted twice, a stream that repeats)
fails Pearson's test or leaves the support.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from cute_infer import sampling

pytestmark = pytest.mark.gpu

DRAWS = 200_000
CHAINS = 100_000
Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(one row, [DRAWS] zeros) -> ids."""

JOINT = "joint"
# name: (what the function reads, the call, (temperature, k, p, min_p, whether p is a share of what top-k leaves))
FUNCTIONS: dict[str, tuple[str, Draw, tuple[float, int, float, float, bool]]] = {
    "sampling_from_logits": ("logits", lambda x, i: sampling.sampling_from_logits(x, i, seed=1), (1, 0, 1, 0, False)),
    "sampling_from_probs": ("probs", lambda x, i: sampling.sampling_from_probs(x, i, seed=2), (1, 0, 1, 0, False)),
    "top_p_sampling_from_probs": ("probs", lambda x, i: sampling.top_p_sampling_from_probs(x, 0.9, i, seed=3), (1, 0, 0.9, 0, False)),
    "top_k_sampling_from_probs": ("probs", lambda x, i: sampling.top_k_sampling_from_probs(x, 50, i, seed=4), (1, 50, 1, 0, False)),
    "min_p_sampling_from_probs": ("probs", lambda x, i: sampling.min_p_sampling_from_probs(x, 0.1, i, seed=5), (1, 0, 1, 0.1, False)),
    "top_p_sampling_from_logits": ("logits", lambda x, i: sampling.top_p_sampling_from_logits(x, 0.9, i, seed=6), (1, 0, 0.9, 0, False)),
    "top_k_sampling_from_logits": ("logits", lambda x, i: sampling.top_k_sampling_from_logits(x, 50, i, seed=7), (1, 50, 1, 0, False)),
    "top_k_sampling_from_logits, many": (
        "logits",
        lambda x, i: sampling.top_k_sampling_from_logits(x, 3000, i, seed=8),
        (1, 3000, 1, 0, False),
    ),
    "top_k_top_p_sampling_from_logits, first": (
        "logits",
        lambda x, i: sampling.top_k_top_p_sampling_from_logits(x, 50, 0.9, i, seed=9),
        (1, 50, 0.9, 0, True),
    ),
    "top_k_top_p_sampling_from_logits, joint": (
        "logits",
        lambda x, i: sampling.top_k_top_p_sampling_from_logits(x, 2000, 0.5, i, JOINT, seed=10),
        (1, 2000, 0.5, 0, False),
    ),
    "top_k_top_p_sampling_from_probs, first": (
        "probs",
        lambda x, i: sampling.top_k_top_p_sampling_from_probs(x, 50, 0.9, i, seed=11),
        (1, 50, 0.9, 0, True),
    ),
    "top_k_top_p_sampling_from_probs, joint": (
        "probs",
        lambda x, i: sampling.top_k_top_p_sampling_from_probs(x, 100, 0.02, i, JOINT, seed=12),
        (1, 100, 0.02, 0, False),
    ),
    "sample": ("logits", lambda x, i: sampling.sample(x, 0.8, 100, 0.95, 0.05, indices=i, seed=13), (0.8, 100, 0.95, 0.05, True)),
    "sample, min-p": ("logits", lambda x, i: sampling.sample(x, 1.5, min_p=0.02, indices=i, seed=14), (1.5, 0, 1, 0.02, False)),
    "sample, top-p": ("logits", lambda x, i: sampling.sample(x, 0.7, top_p=0.6, indices=i, seed=15), (0.7, 0, 0.6, 0, False)),
}


def row_of(kind: str, vocab: int) -> torch.Tensor:
    gen = torch.Generator("cuda").manual_seed(vocab)
    return {"peaked": 3.0, "flat": 1.0}[kind] * torch.randn(1, vocab, device="cuda", generator=gen)


def filtered(p: torch.Tensor, k: int, top_p: float, min_p: float, k_first: bool) -> torch.Tensor:
    """The distribution after the filters: one row of float64 probabilities."""
    value, order = p.sort(descending=True, stable=True)
    above = torch.cat([value.new_zeros(1), value.cumsum(0)[:-1]])
    keep = torch.ones_like(value, dtype=torch.bool)
    if 0 < k < p.numel():
        keep &= value >= value[k - 1]
    if top_p < 1:
        keep &= above < top_p * (value[keep].sum() if k_first else value.sum())
    keep &= value >= min_p * value[0]
    value = torch.where(value >= value[keep].min(), value, 0.0)
    return torch.zeros_like(value).scatter(0, order, value / value.sum())


def assert_drawn_from(ids: torch.Tensor, want: torch.Tensor, border: torch.Tensor | None = None) -> None:
    """Nothing outside the support (or outside ``border``, a support widened by rounding), and Pearson's statistic within 5 deviations."""
    count = torch.bincount(ids.long(), minlength=want.numel()).double()
    assert count.numel() == want.numel(), "an id beyond the vocabulary"
    outside = ~(want > 0) if border is None else ~border
    assert count[outside].sum() == 0, f"outside the support: {torch.nonzero((count > 0) & outside).flatten().tolist()[:8]}"
    expected = want * ids.numel()
    big = expected >= 8
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    count = torch.cat([count[big], count[~big].sum()[None]])
    use = expected > 0.5
    chi2, dof = float(((count - expected) ** 2 / expected.clamp_min(1e-9))[use].sum()), int(use.sum()) - 1
    assert chi2 <= dof + 5 * math.sqrt(2 * max(dof, 1)), f"chi-square {chi2:.1f} with {dof} degrees of freedom"


@pytest.mark.parametrize("kind", ["peaked", "flat"])
@pytest.mark.parametrize("vocab", [32000, 128256])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_distribution(name: str, vocab: int, kind: str) -> None:
    source, draw, (temperature, *filters) = FUNCTIONS[name]
    logits = row_of(kind, vocab)
    ids = draw(logits if source == "logits" else logits.softmax(-1), torch.zeros(DRAWS, dtype=torch.int32, device="cuda"))
    assert ids.shape == (DRAWS,)
    p = (logits[0].double() / temperature).softmax(-1)
    want = filtered(p, *filters)
    # fp32 and fp64 may disagree about one token at a border: the support may be wider by what lies within 1e-4 of its least likely token
    assert_drawn_from(ids, want, border=p >= want[want > 0].min() / (want / p).amax() * 0.9999)


@pytest.mark.parametrize("vocab", [32000, 128256])
def test_a_wrong_distribution_is_noticed(vocab: int) -> None:
    logits = row_of("peaked", vocab)
    where = torch.zeros(DRAWS, dtype=torch.int32, device="cuda")
    p = logits[0].double().softmax(-1)
    ids = sampling.sample(logits, 1.05, indices=where, seed=1)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_drawn_from(ids, p)
    ids = sampling.top_k_sampling_from_logits(logits, 51, where, seed=1)
    with pytest.raises(AssertionError, match="outside the support"):
        assert_drawn_from(ids, filtered(p, 50, 1.0, 0.0, False))


@pytest.mark.parametrize("vocab", [12, 1000, 32000])
def test_speculative_chains_follow_the_theory(vocab: int) -> None:
    """Every emitted token is distributed as the target's whatever the draft, and a draft token passes with probability sum(min(p, q))."""
    num_draft = 3
    gen = torch.Generator("cuda").manual_seed(vocab)
    p, q = (torch.randn(vocab, device="cuda", generator=gen).mul(1.5).softmax(-1) for _ in range(2))
    p = 0.5 * p + 0.5 * q
    draft = torch.multinomial(p, CHAINS * num_draft, replacement=True, generator=gen).view(CHAINS, num_draft)
    rows = p.expand(CHAINS, num_draft, vocab), draft, q.expand(CHAINS, num_draft + 1, vocab)
    ids, accepted, emitted = sampling.chain_speculative_sampling(*rows, seed=9)
    assert torch.equal((ids >= 0).sum(1), emitted.long() + 1) and (accepted >= emitted).all()
    for position in range(num_draft + 1):
        assert_drawn_from(ids[:, position][ids[:, position] >= 0], q.double())
    rate = float(torch.minimum(p.double(), q.double()).sum())
    for length in range(1, num_draft + 1):
        reached = rate**length
        deviation = math.sqrt(reached * (1 - reached) / CHAINS)
        assert float((emitted >= length).double().mean()) == pytest.approx(reached, abs=5 * deviation)
    deviation = math.sqrt(num_draft * rate * (1 - rate) / CHAINS)
    assert float(accepted.double().mean()) == pytest.approx(num_draft * rate, abs=5 * deviation)
    before = torch.arange(num_draft, device="cuda") < emitted[:, None]
    assert torch.equal(ids[:, :-1].long()[before], draft[before])  # what is accepted is emitted as drafted
