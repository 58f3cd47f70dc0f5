"""Sampling on the CPU: distributions, filters, edge cases, the random stream, spellings and refusals."""

from __future__ import annotations

import math
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch

import cute_infer
from cute_infer import errors, sampling
from cute_infer.errors import MissingKernelError
from cute_infer.sampling import launch, params, reference
from cute_infer.sampling.tiles import MAX_VOCAB, SM80_TILES, SM90_TILES, RowSpec, choose

VOCAB, DRAWS = 300, 20_000


def logits_of(kind: str, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One row. peaked: a few tokens hold most of the mass; flat: none does; tied: a dozen distinct values."""
    gen = torch.Generator().manual_seed(7)
    x = torch.randn(1, vocab, generator=gen)
    return {"peaked": 3 * x, "flat": x, "tied": (2 * x).round()}[kind].to(dtype)


def filtered(p: torch.Tensor, k: int = 0, top_p: float = 1.0, min_p: float = 0.0, order: str = "joint") -> torch.Tensor:
    """The exact distribution after the filters, by definition: one row of float64 probabilities, one token at a time."""
    values, total = p.unique().flip(0).tolist(), float(p.sum())
    keep_k = torch.ones_like(p, dtype=torch.bool)
    if 0 < k < p.numel():
        keep_k = torch.tensor([float((p > v).sum()) < k for v in p.tolist()])
    share = float(p[keep_k].sum()) if order == "top_k_first" else total
    kept = [v for v in values if top_p >= 1 or float(p[p > v].sum()) < top_p * share or v == values[0]]
    out = torch.where(keep_k & (p >= min(kept)) & (p >= min_p * values[0]), p, 0.0)
    return out / out.sum()


def assert_drawn_from(ids: torch.Tensor, want: torch.Tensor) -> None:
    """Nothing outside the support; Pearson's chi-square over bins of at least 8 expected draws within 5 standard deviations."""
    count = torch.bincount(ids.long(), minlength=want.numel()).double()
    assert count[want == 0].sum() == 0, f"outside the support: {torch.nonzero(count * (want == 0)).flatten().tolist()[:8]}"
    order = want.argsort(descending=True)
    expected, count = want[order] * ids.numel(), count[order]
    big = expected >= 8
    groups = torch.cat([expected[big], expected[~big].sum()[None]]), torch.cat([count[big], count[~big].sum()[None]])
    use = groups[0] > 0.5
    chi2, dof = float(((groups[1] - groups[0]) ** 2 / groups[0])[use].sum()), int(use.sum()) - 1
    assert chi2 <= dof + 5 * math.sqrt(2 * max(dof, 1)), f"chi-square {chi2:.1f} with {dof} degrees of freedom"


REPEAT = torch.zeros(DRAWS, dtype=torch.int32)
SAMPLERS: dict[str, tuple[str, Callable[..., torch.Tensor], dict]] = {
    "logits": ("logits", lambda x: sampling.sampling_from_logits(x, REPEAT), {}),
    "probs": ("probs", lambda x: sampling.sampling_from_probs(x, REPEAT), {}),
    "top_p probs": ("probs", lambda x: sampling.top_p_sampling_from_probs(x, 0.8, REPEAT), dict(top_p=0.8)),
    "top_k probs": ("probs", lambda x: sampling.top_k_sampling_from_probs(x, 20, REPEAT), dict(k=20)),
    "min_p probs": ("probs", lambda x: sampling.min_p_sampling_from_probs(x, 0.1, REPEAT), dict(min_p=0.1)),
    "top_p logits": ("logits", lambda x: sampling.top_p_sampling_from_logits(x, 0.8, REPEAT), dict(top_p=0.8)),
    "top_k logits": ("logits", lambda x: sampling.top_k_sampling_from_logits(x, 20, REPEAT), dict(k=20)),
    "first probs": (
        "probs",
        lambda x: sampling.top_k_top_p_sampling_from_probs(x, 20, 0.8, REPEAT),
        dict(k=20, top_p=0.8, order="top_k_first"),
    ),
    "first logits": (
        "logits",
        lambda x: sampling.top_k_top_p_sampling_from_logits(x, 20, 0.8, REPEAT),
        dict(k=20, top_p=0.8, order="top_k_first"),
    ),
    "joint logits": (
        "logits",
        lambda x: sampling.top_k_top_p_sampling_from_logits(x, 20, 0.3, REPEAT, filter_apply_order="joint"),
        dict(k=20, top_p=0.3),
    ),
    "joint probs": (
        "probs",
        lambda x: sampling.top_k_top_p_sampling_from_probs(x, 20, 0.3, REPEAT, filter_apply_order="joint"),
        dict(k=20, top_p=0.3),
    ),
    "fused": (
        "logits",
        lambda x: sampling.sample(x, None, 30, 0.9, 0.05, indices=REPEAT),
        dict(k=30, top_p=0.9, min_p=0.05, order="top_k_first"),
    ),
}


@pytest.mark.parametrize("kind", ["peaked", "flat", "tied"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_distribution(name: str, kind: str) -> None:
    source, draw, filters = SAMPLERS[name]
    logits = logits_of(kind)
    probs = logits.softmax(-1)
    ids = draw(logits if source == "logits" else probs)
    assert ids.shape == (DRAWS,) and ids.dtype == torch.int32
    assert_drawn_from(ids, filtered(probs[0].double(), **filters))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_and_temperature(dtype: torch.dtype) -> None:
    logits = logits_of("peaked", dtype=dtype)
    ids, logprob = sampling.sample(logits, 0.7, 25, indices=REPEAT, return_logprob=True)
    want = filtered((logits.double() / 0.7).softmax(-1)[0], k=25)
    assert_drawn_from(ids, want)
    torch.testing.assert_close(logprob.double(), want[ids.long()].log(), rtol=0, atol=1e-4)


def test_wrong_distribution_is_noticed() -> None:
    """The chi-square test itself can fail."""
    probs = logits_of("flat").softmax(-1)
    ids = sampling.sampling_from_probs(probs, REPEAT)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_drawn_from(ids, (probs[0].double() ** 1.1) / (probs[0].double() ** 1.1).sum())
    with pytest.raises(AssertionError, match="outside the support"):
        assert_drawn_from(ids, filtered(probs[0].double(), k=20))


# ------------------------------------------------------------------------------------------------------------------- edges
def test_ties_at_the_threshold_are_kept() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 5.0, -1.0]])
    assert sampling.top_k_mask_logits(logits, 2).isfinite().tolist() == [[False, True, True, True, True, False]]
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25]])
    assert sampling.top_p_renorm_probs(probs, 0.5).tolist() == probs.tolist()


@pytest.mark.parametrize("k", [0, -1, 5, 6, 1000, 2**31 - 1])
def test_top_k_off(k: int) -> None:
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.25, 0.15]])
    torch.testing.assert_close(sampling.top_k_renorm_probs(probs, k), probs)


def test_top_p_zero_keeps_the_most_likely_and_one_keeps_all() -> None:
    probs = torch.tensor([[0.2, 0.5, 0.3, 1e-20]])
    assert sampling.top_p_renorm_probs(probs, 0.0).tolist() == [[0, 1, 0, 0]]
    kept = sampling.top_p_renorm_probs(probs, 1.0)
    torch.testing.assert_close(kept[:, :3], probs[:, :3])
    assert sampling.top_p_sampling_from_probs(probs, 0.0, torch.zeros(50, dtype=torch.int32)).unique().tolist() == [1]


def test_temperature_zero_is_argmax_even_among_equals() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0, -2.0], [3.0, 2.0, 1.0, 0.0]])
    ids, logprob = sampling.sample(logits, temperature=torch.tensor([0.0, 0.0]), return_logprob=True)
    assert ids.tolist() == [1, 0] and logprob.tolist() == pytest.approx([math.log(0.5), 0.0])
    assert sampling.softmax(logits, 0.0).tolist() == [[0, 0.5, 0.5, 0], [1, 0, 0, 0]]


def test_mixed_temperatures() -> None:
    logits = logits_of("flat").repeat(3, 1)
    greedy = sampling.sample(logits, temperature=torch.tensor([0.0, 1e-6, 0.0]), seed=1)
    assert greedy.tolist() == [int(logits[0].argmax())] * 3


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "temperature": 2.0}])
def test_degenerate_rows_are_not_valid(filters: dict) -> None:
    x = torch.randn(5, 9)
    x[0, 3], x[1], x[2, 0] = torch.nan, -torch.inf, torch.inf
    x[3, :8] = -torch.inf
    ids, valid, logprob = sampling.sample(x, **filters, return_valid=True, return_logprob=True)
    assert valid.tolist() == [False, False, False, True, True]
    assert ids[:4].tolist() == [0, 0, 0, 8]
    assert logprob[:3].tolist() == [-math.inf] * 3 and logprob[3] == 0
    assert 0 <= ids[4] < 9


def test_degenerate_probabilities() -> None:
    probs = torch.tensor([[0.0, 0.0], [torch.nan, 0.5], [0.0, 1.0], [0.5, 0.5]])
    ids, valid = sampling.top_k_sampling_from_probs(probs, k=1)
    assert valid.tolist() == [False, False, True, True] and ids[:3].tolist() == [0, 0, 1]
    renormed = sampling.top_p_renorm_probs(probs, 0.9)
    assert renormed[0].tolist() == [0, 0] and renormed[1].isnan().all() and renormed[2:].tolist() == [[0, 1], [0.5, 0.5]]


def test_fewer_live_tokens_than_k() -> None:
    """top_k_first with k above the number of tokens that have any mass: top-p still applies to all of it."""
    logits = torch.full((1, 50), -torch.inf)
    logits[0, :4] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    ids = sampling.top_k_top_p_sampling_from_logits(logits, 20, 0.5, torch.zeros(200, dtype=torch.int32))
    assert ids.unique().tolist() == [0]


@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 33, 50257])
def test_any_vocabulary(vocab: int) -> None:
    x = torch.randn(3, vocab)
    ids, ok = sampling.top_k_top_p_sampling_from_logits(x, k=4, p=0.9)
    assert ok.all() and (ids >= 0).all() and (ids < vocab).all()
    allowed = sampling.top_k_mask_logits(x, 4).gather(1, ids.long()[:, None])
    assert allowed.isfinite().all()


def test_empty_batch() -> None:
    x = torch.randn(0, 10)
    assert sampling.sampling_from_logits(x).shape == (0,)
    assert sampling.softmax(x).shape == (0, 10) and sampling.top_p_renorm_probs(x, 0.9).shape == (0, 10)
    ids, valid = sampling.sample(torch.randn(3, 10), return_valid=True, indices=torch.zeros(0, dtype=torch.int32))
    assert ids.shape == valid.shape == (0,)


def test_strided_rows() -> None:
    wide = torch.randn(6, 2, 40)
    x = wide[:, 1, 3:33]
    assert not x.is_contiguous()
    assert torch.equal(sampling.sample(x, 0.8, 5, seed=3), sampling.sample(x.contiguous(), 0.8, 5, seed=3))


# -------------------------------------------------------------------------------------------------------------- whole rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax(dtype: torch.dtype) -> None:
    x = (3 * torch.randn(4, 1000)).to(dtype)
    x[1, 5:] = -torch.inf
    t = torch.tensor([0.5, 1.0, 2.0, 10.0])
    out = sampling.softmax(x, t)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.softmax(x.double() / t[:, None], -1).float(), rtol=2e-6, atol=1e-9)
    assert torch.equal(sampling.softmax(torch.full((1, 4), -torch.inf)), torch.zeros(1, 4))


def test_renorm_and_mask_keep_the_dtype_and_match_the_definition() -> None:
    probs = logits_of("peaked").softmax(-1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = probs.to(dtype)
        for got, filters in (
            (sampling.top_p_renorm_probs(p, 0.7), dict(top_p=0.7)),
            (sampling.top_k_renorm_probs(p, 17), dict(k=17)),
        ):
            assert got.dtype == dtype
            want = filtered(p[0].double(), **filters)
            torch.testing.assert_close(got[0].double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    masked = sampling.top_k_mask_logits(probs.log(), torch.tensor([9]))
    assert masked.isfinite().sum() == 9 and torch.equal(masked[masked.isfinite()], probs.log()[masked.isfinite()])


def test_top_k_values_and_ties() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    values, where = sampling.top_k(x, 2, deterministic=True)
    assert values.tolist() == [[3, 3]] and where.tolist() == [[1, 2]] and where.dtype == torch.int64
    assert sampling.top_k(x, 2, tie_break="LARGE")[1].tolist() == [[4, 2]]
    assert sampling.top_k(x, 3, sorted=True)[0].tolist() == [[3, 3, 3]]
    with pytest.raises(ValueError, match="k=6"):
        sampling.top_k(x, 6)


# ---------------------------------------------------------------------------------------------------------- random numbers
def test_philox_known_answers() -> None:
    """Random123's published Philox-4x32-10 vectors: counter and key all zero, all ones."""

    def words(seed: int, offset: int, row: int, draw: int) -> int:
        one = lambda v: torch.tensor([v], dtype=torch.int64)  # noqa: E731
        return int(reference.uniform53(one(seed), one(offset), one(row), one(draw)))

    assert words(0, 0, 0, 0) == (0x6627E8D5 << 21) | (0xE169C58D >> 11)
    assert words(-1, -1, 0xFFFFFFFF, 0xFFFFFFFF) == (0x408F276D << 21) | (0x41C83B0E >> 11)


def test_same_seed_alone_and_in_a_batch() -> None:
    gen = torch.Generator().manual_seed(1)
    batch = torch.randn(64, 500, generator=gen)
    seeds, steps = torch.arange(64) * 1_000_003, torch.arange(64) % 7
    together = sampling.sample(batch, 0.9, 40, 0.95, seed=seeds, offset=steps)
    shuffled = torch.randperm(64, generator=gen)
    assert torch.equal(sampling.sample(batch[shuffled], 0.9, 40, 0.95, seed=seeds[shuffled], offset=steps[shuffled]), together[shuffled])
    for i in (0, 17, 63):
        alone = sampling.sample(batch[i : i + 1], 0.9, 40, 0.95, seed=seeds[i : i + 1], offset=steps[i : i + 1])
        assert alone.item() == together[i].item()
        assert sampling.sample(batch[i : i + 1], 0.9, 40, 0.95, seed=int(seeds[i]), offset=int(steps[i])).item() == together[i].item()


def test_one_seed_gives_every_row_its_own_stream() -> None:
    x = torch.zeros(2000, 50)
    for seed in (5, torch.tensor([5])):
        ids = sampling.sampling_from_logits(x, seed=seed)
        assert_drawn_from(ids, torch.full((50,), 0.02, dtype=torch.float64))
        assert torch.equal(ids, sampling.sampling_from_logits(x, seed=5))
        assert not torch.equal(ids, sampling.sampling_from_logits(x, seed=seed, offset=1))


def test_generator_is_honoured_and_moves_on() -> None:
    x = torch.zeros(100, 50)
    draw = lambda g: sampling.sampling_from_logits(x, generator=g)  # noqa: E731
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first = draw(a)
    assert torch.equal(first, draw(b)) and not torch.equal(first, draw(a))
    torch.manual_seed(11)
    default = sampling.sampling_from_logits(x)
    torch.manual_seed(11)
    assert torch.equal(default, sampling.sampling_from_logits(x))


def test_indices_pick_rows_and_set_the_dtype() -> None:
    probs = torch.eye(4, 6)
    for dtype in (torch.int32, torch.int64):
        ids = sampling.top_p_sampling_from_probs(probs, torch.tensor([0.5, 0.9, 1.0]), torch.tensor([2, 0, 2], dtype=dtype))
        assert ids.tolist() == [2, 0, 2] and ids.dtype == dtype
    by_row = sampling.top_k_sampling_from_probs(torch.rand(4, 6), torch.tensor([1, 2, 3, 4]), torch.tensor([3, 3, 0], dtype=torch.int32))
    assert by_row.shape == (3,)


# ------------------------------------------------------------------------------------------------------------- spellings
def test_quick_start_spellings() -> None:
    logits = torch.randn(4, 32000)
    for tokens, success in (
        cute_infer.sampling.top_p_sampling_from_logits(logits, p=0.9),
        cute_infer.sampling.top_k_sampling_from_logits(logits, k=50),
        cute_infer.sampling.top_k_top_p_sampling_from_logits(logits, k=50, p=0.9),
    ):
        assert tokens.shape == (4,) and tokens.dtype == torch.int32
        assert success.dtype == torch.bool and success.all()
    ids = cute_infer.sampling.top_k_top_p_sampling_from_logits(logits, 50, 0.9)
    assert isinstance(ids, torch.Tensor)
    assert isinstance(cute_infer.sampling.top_p_sampling_from_logits(logits, p=0.9, return_valid=False), torch.Tensor)
    assert len(cute_infer.sampling.top_k_sampling_from_logits(logits, top_k=5, return_valid=True)) == 2


def test_one_spelling_at_a_time() -> None:
    logits = torch.randn(1, 8)
    with pytest.raises(TypeError, match="use one spelling"):
        sampling.top_p_sampling_from_logits(logits, p=0.9, top_p=0.9)
    with pytest.raises(TypeError, match="use one spelling"):
        sampling.top_p_sampling_from_logits(logits, 0.9, p=0.9)
    with pytest.raises(TypeError, match="'k'"):
        sampling.top_p_sampling_from_logits(logits, k=3)


# --------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            torch.tensor(0.9),
            r"Expected a 1D tensor of shape \(batch_size,\) or scalar for the sampling parameter, but got a 0-dimensional tensor",
        ),
        (torch.full((3, 1), 0.9), "Expected a 1D tensor or scalar for the sampling parameter, but got a 2D tensor"),
        (torch.full((2,), 0.9), "Sampling parameter tensor batch size mismatch: expected length 3, got 2"),
    ],
)
def test_parameter_shapes(value: torch.Tensor, text: str) -> None:
    x = torch.rand(3, 8)
    for call in (sampling.top_p_sampling_from_probs, sampling.top_p_renorm_probs, sampling.min_p_sampling_from_probs, sampling.softmax):
        with pytest.raises(ValueError, match=text):
            call(x, value)


X = torch.zeros(3, 50)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    **{
        f"{name}={value!r}": (lambda o={name: value}: sampling.sample(X, **o), error, rf"sample\(\): {name} {text}")
        for name in ("temperature", "top_k", "top_p", "min_p")
        for value, error, text in (
            ("0.5", errors.DTypeError, "must be a number"),
            ([0.5, 0.5, 0.5], errors.DTypeError, "must be a number"),
            (math.nan, errors.ConfigError, "is nan"),
            (math.inf, errors.ConfigError, "is inf"),
            (torch.zeros(3, dtype=torch.complex64), errors.DTypeError, "has dtype complex64"),
        )
    },
    "softmax": (lambda: sampling.softmax(X, math.nan), errors.ConfigError, r"softmax\(\): temperature is nan"),
    "renorm": (lambda: sampling.top_p_renorm_probs(X, "1"), errors.DTypeError, "top_p must be a number"),
    "mask": (lambda: sampling.top_k_mask_logits(X, -math.inf), errors.ConfigError, "top_k is -inf"),
    **{
        f"{name}={value!r}": (lambda o={name: value}: sampling.sample(X, **o), errors.DTypeError, f"{name} must be an int")
        for name in ("seed", "offset")
        for value in ("1", [1, 2, 3], 1.5, math.nan)
    },
    "index": (lambda: sampling.sample(X, indices=torch.tensor([0, 3])), errors.ConfigError, "indices holds 3"),
    "negative index": (lambda: sampling.sample(X, indices=torch.tensor([0, -1])), errors.ConfigError, "indices holds -1"),
    "generator": (lambda: sampling.sample(X, generator=7), errors.DTypeError, "generator must be"),
    "top_k of text": (lambda: sampling.top_k(X, "a"), errors.DTypeError, "k must be an int"),
    "top_k of a float": (lambda: sampling.top_k(X, 2.5), errors.DTypeError, "k must be an int"),
}


@pytest.mark.parametrize(("call", "error", "text"), WRONG.values(), ids=WRONG)
def test_values_that_are_none(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("k", [2**40, 2**32 + 5, -(2**40), torch.full((3,), 2**32 + 5), torch.full((3,), -(2**40))], ids=str)
def test_a_top_k_beyond_32_bits_keeps_all(k: int | torch.Tensor) -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sampling.top_k_mask_logits(x, k), x)


@pytest.mark.parametrize("k", [2**40, -(2**40)])
def test_a_top_k_beyond_32_bits_fits_the_kernel(k: int) -> None:
    _, value = params.per_row(k, torch.int32, 3, X, None)
    assert value == (2**31 - 1 if k > 0 else -1)


def test_numbers_of_other_kinds() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    mine = sampling.sample(x, 0.5, 7, 0.5, seed=3)
    assert torch.equal(sampling.sample(x, np.float32(0.5), np.int64(7), np.float16(0.5), seed=np.int32(3)), mine)


def test_other_refusals() -> None:
    x = torch.rand(3, 8)
    with pytest.raises(ValueError, match="Invalid filter_apply_order: sideways"):
        sampling.top_k_top_p_sampling_from_probs(x, 2, 0.5, filter_apply_order="sideways")
    with pytest.raises(errors.ShapeError, match="probs has 1 dimensions"):
        sampling.sampling_from_probs(x[0])
    with pytest.raises(errors.DTypeError, match="dtype int64"):
        sampling.sampling_from_logits(x.long())
    with pytest.raises(errors.ShapeError, match=f"vocab={MAX_VOCAB + 1}"):
        sampling.sampling_from_logits(torch.zeros(1, MAX_VOCAB + 1))
    with pytest.raises(errors.ShapeError, match="vocab=0"):
        sampling.softmax(torch.zeros(2, 0))
    with pytest.raises(errors.DTypeError, match="seed must be an integer"):
        sampling.sampling_from_logits(x, seed=torch.tensor([0.5]))
    with pytest.raises(errors.ShapeError, match="seed has 2 values for 3 rows"):
        sampling.sampling_from_logits(x, seed=torch.tensor([1, 2]))
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="Input probs contains NaN"):
        sampling.top_k_sampling_from_probs(x, 2, check_nan=True)
    with pytest.raises(ValueError, match="Input logits contains NaN"):
        sampling.sampling_from_logits(x, check_nan=True)


# ------------------------------------------------------------------------------------------------------------ speculative
def test_speculative_output_follows_the_target_model() -> None:
    """First emitted token ~ q whatever the draft; acceptance rate = sum(min(p, q))."""
    n, vocab = 100_000, 12
    gen = torch.Generator().manual_seed(0)
    p, q = (torch.rand(vocab, generator=gen) ** 2 for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    draft = torch.multinomial(p.expand(n, -1), 2, replacement=True, generator=gen)
    ids, accepted, emitted = sampling.chain_speculative_sampling(p.expand(n, 2, -1), draft, q.expand(n, 3, -1), seed=9)
    assert_drawn_from(ids[:, 0], q.double())
    second = ids[:, 1][ids[:, 1] >= 0]
    assert_drawn_from(second, q.double())
    assert_drawn_from(ids[:, 2][ids[:, 2] >= 0], q.double())
    rate = float(torch.minimum(p, q).sum())
    assert float((emitted >= 1).float().mean()) == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / n))
    assert float((emitted == 2).float().mean()) == pytest.approx(rate**2, abs=5 * math.sqrt(rate**2 * (1 - rate**2) / n))
    assert torch.equal((ids >= 0).sum(1), emitted.long() + 1) and (accepted >= emitted).all()
    assert float(accepted.float().mean()) == pytest.approx(2 * rate, abs=5 * math.sqrt(2 * rate * (1 - rate) / n))


def test_speculative_accumulates_counters_in_place() -> None:
    vocab = 8
    same = torch.rand(3, 4, vocab).softmax(-1)
    draft = torch.randint(0, vocab, (3, 3))
    accepted, emitted = torch.full((3,), 10, dtype=torch.int64), torch.full((3,), 20, dtype=torch.int32)
    ids, a, e = sampling.chain_speculative_sampling(same[:, :3], draft, same, accepted, emitted)
    assert a is accepted and e is emitted
    assert accepted.tolist() == [13] * 3 and emitted.tolist() == [23] * 3
    assert torch.equal(ids[:, :3], draft.int()) and (ids[:, 3] >= 0).all()


def test_speculative_rejects_impossible_tokens() -> None:
    draft = torch.tensor([[[0.5, 0.5, 0.0]]])
    target = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
    for token in (0, 1, -1, 3):
        ids, accepted, emitted = sampling.chain_speculative_sampling(draft, torch.tensor([[token]]), target)
        assert ids.tolist() == [[2, -1]] and accepted.tolist() == emitted.tolist() == [0]
    with pytest.raises(errors.ShapeError, match=r"num_draft \+ 1=1, expected 2"):
        sampling.chain_speculative_sampling(draft, torch.tensor([[0]]), target[:, :1])


# ----------------------------------------------------------------------------------------------------------------- compile
def test_fullgraph_compile() -> None:
    x = torch.randn(4, 100)

    def step(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ids, ok = sampling.top_k_top_p_sampling_from_logits(x, k=5, p=0.9)
        probs = sampling.top_p_renorm_probs(sampling.softmax(sampling.top_k_mask_logits(x, 7)), 0.9)
        return sampling.sample(x, 0.8, 5, 0.9, seed=seed), sampling.sampling_from_probs(probs, seed=3), ids, ok

    seed = torch.arange(4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, seed)
    eager = step(x, seed)
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1]) and compiled[3].all()


def test_two_unseeded_draws_in_one_graph_differ() -> None:
    x = torch.zeros(64, 1000)
    two = torch.compile(lambda x: (sampling.sampling_from_logits(x), sampling.sampling_from_logits(x)), fullgraph=True, backend="aot_eager")
    a, b = two(x)
    assert not torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------------- tiles
def test_every_vocabulary_has_a_tile_that_holds_it() -> None:
    for vocab in (1, 4096, 8192, 8193, 32000, 50257, 65537, 128256, 131072, 151936, 202048, 256000, MAX_VOCAB):
        for rows in (1, 16, 17, 4096):
            tile = choose(True, vocab, rows)
            assert tile.cluster * tile.threads * tile.per_thread >= vocab and tile.cluster <= 8
            fallback = choose(False, vocab, rows)
            assert fallback.cluster == 1 and (fallback.per_thread == 0 or fallback.threads * fallback.per_thread >= vocab)


def test_tiles_divide_every_vector() -> None:
    tiles = [t for _, *pair in SM90_TILES for t in pair] + [t for _, t in SM80_TILES]
    for tile in tiles:
        assert tile.per_thread % RowSpec("logits", "bfloat16", "ids").vector == 0 and 1024 % tile.threads == 0


def test_without_the_compiler_few_rows_take_the_kernel_for_many(monkeypatch, caplog):
    """A bundle holds the tile for many rows; a server that cannot compile uses it for few rows as well."""
    few, many = (choose(True, 32000, rows) for rows in (1, 64))
    assert few != many
    held = {many}

    def get_kernel(path, spec, tile, target):
        if tile not in held:
            raise MissingKernelError("not in the bundle")
        return types.SimpleNamespace(fn=tile, facts=types.SimpleNamespace(smem_bytes=100_000))

    monkeypatch.setattr(launch, "get_kernel", get_kernel)
    monkeypatch.setattr(launch, "resident_clusters", lambda *args: 32)
    monkeypatch.setattr(launch.Target, "detect", lambda device: launch.Target.parse("sm_90a"))
    find = launch._row_kernel.__wrapped__
    assert find(torch.device("cuda"), 32000, 1, ("logits", "float32", "ids")) == (many, 1) and "for 1 rows" in caplog.text
    assert find(torch.device("cuda"), 32000, 64, ("logits", "float32", "ids")) == (many, 32)
    held.clear()
    with pytest.raises(MissingKernelError):
        find(torch.device("cuda"), 32000, 1, ("logits", "float32", "ids"))
