"""Merging attention states on the CPU: against attention computed in one piece, its algebra, empties, and every refusal."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cute_infer.attention.merge as merge_module
from cute_infer import errors
from cute_infer.attention.merge import merge_partials, merge_state, merge_state_in_place, merge_states

ROWS, HEADS, DIM = 3, 2, 16


def naive_state(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention state over the last axis of ``logits [rows, heads, kv]``, in fp64: (v, s base 2)."""
    if logits.shape[-1] == 0:
        return values.new_zeros(*logits.shape[:2], values.shape[-1]), logits.new_full(logits.shape[:2], -math.inf)
    v = torch.einsum("nhk,khd->nhd", logits.softmax(-1), values)
    return v, logits.logsumexp(-1) / math.log(2)


def random_segments(lengths: list[int], seed: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """States of consecutive segments of one KV sequence, and the state of the whole."""
    gen = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(ROWS, HEADS, sum(lengths), generator=gen, dtype=torch.float64)
    values = torch.randn(sum(lengths), HEADS, DIM, generator=gen, dtype=torch.float64)
    bounds = list(itertools.accumulate(lengths, initial=0))
    parts = [naive_state(logits[..., a:b], values[a:b]) for a, b in itertools.pairwise(bounds)]
    return [(v.float(), s.float()) for v, s in parts], naive_state(logits, values)


def stack(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer's order: v [rows, states, heads, dim], s [rows, states, heads]."""
    return torch.stack([v for v, _ in parts], 1), torch.stack([s for _, s in parts], 1)


def assert_state(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(got[1].double(), want[1].double(), rtol=2e-6, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=7), seed=st.integers(0, 2**31))
def test_merging_any_split_equals_no_split(lengths: list[int], seed: int) -> None:
    parts, whole = random_segments(lengths, seed)
    assert_state(merge_states(*stack(parts)), whole)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)), seed=st.integers(0, 2**31))
def test_order_does_not_matter_beyond_rounding(order: list[int], seed: int) -> None:
    parts, whole = random_segments([3, 0, 5, 1, 7], seed)
    assert_state(merge_states(*stack([parts[i] for i in order])), whole)


def test_pairwise_in_sequence_equals_all_at_once() -> None:
    parts, whole = random_segments([3, 4, 5, 6], seed=1)
    v, s = parts[0]
    for other in parts[1:]:
        v, s = merge_state(v, s, *other)
    assert_state((v, s), whole)
    assert_state((v, s), merge_states(*stack(parts)))


def test_the_base_is_two() -> None:
    v = torch.tensor([[[1.0] * 8], [[4.0] * 8]])
    s = torch.tensor([[0.0], [1.0]])  # weights 1 and 2
    merged, lse = merge_states(v.unsqueeze(0), s.unsqueeze(0))
    assert torch.equal(merged, torch.full((1, 1, 8), 3.0))
    assert lse.item() == pytest.approx(math.log2(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_empty_states_change_no_bit(dtype: torch.dtype) -> None:
    v, s = torch.randn(ROWS, HEADS, DIM).to(dtype), 100 * torch.randn(ROWS, HEADS)
    nothing = torch.full_like(v, torch.nan), torch.full_like(s, -math.inf)
    for got in (
        merge_state(v, s, *nothing),
        merge_state(*nothing, v, s),
        merge_states(*stack([nothing, (v, s), nothing])),
        merge_states(*stack([(v, s)])),
    ):
        assert got[0].dtype == dtype and torch.equal(got[0], v)
        assert torch.equal(got[1], s)


def test_nothing_at_all_is_zero_and_minus_infinity() -> None:
    nothing = torch.full((ROWS, HEADS, DIM), torch.nan), torch.full((ROWS, HEADS), -math.inf)
    for v, s in (merge_state(*nothing, *nothing), merge_states(*stack([nothing] * 3)), merge_states(*(x[:, :0] for x in stack([nothing])))):
        assert torch.equal(v, torch.zeros(ROWS, HEADS, DIM))
        assert torch.equal(s, torch.full((ROWS, HEADS), -math.inf))


def test_extreme_logits_neither_overflow_nor_vanish() -> None:
    v = torch.stack([torch.ones(1, 1, 8), torch.full((1, 1, 8), 3.0)], 1)
    for s, want in (([3e4, 3e4], 2.0), ([-3e4, -3e4], 2.0), ([-3e4, 3e4], 3.0), ([3e38, -3e38], 1.0)):
        merged, lse = merge_states(v, torch.tensor(s).view(1, 2, 1))
        assert torch.equal(merged, torch.full((1, 1, 8), want)), s
        assert lse.item() == pytest.approx(max(s), rel=1e-4)


def test_nan_is_not_hidden() -> None:
    v, s = torch.ones(1, 2, 1, 8), torch.tensor([0.0, torch.nan]).view(1, 2, 1)
    merged, lse = merge_states(v, s)
    assert merged.isnan().all() and lse.isnan().all()


def test_views_of_any_strides() -> None:
    parts, whole = random_segments([3, 4, 5], seed=2)
    v, s = stack(parts)
    wide = torch.full((3, ROWS, HEADS, 2 * DIM), torch.nan)
    wide[..., :DIM] = v.transpose(0, 1)
    assert_state(merge_states(wide[..., :DIM].transpose(0, 1), s.transpose(0, 2).contiguous().transpose(0, 2)), whole)


def test_in_place_writes_the_arguments() -> None:
    (a, b), whole = random_segments([5, 6], seed=3)
    v, s = a[0].clone(), a[1].clone()
    assert merge_state_in_place(v, s, *b) is None
    assert_state((v, s), whole)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_in_place_mask_keeps_rows(dtype: torch.dtype) -> None:
    (a, b), whole = random_segments([5, 6], seed=4)
    v, s = a[0].clone(), a[1].clone()
    merge_state_in_place(v, s, *b, mask=torch.tensor([1, 0, 1]).to(dtype))
    for row, merged in enumerate((True, False, True)):
        assert_state((v[row], s[row]), (whole[0][row], whole[1][row]) if merged else (a[0][row], a[1][row]))
    assert torch.equal(v[1], a[0][1]) and torch.equal(s[1], a[1][1])


@pytest.mark.parametrize("lse_scale", [1.0, math.log(2)])
def test_partials_of_a_split(lse_scale: float) -> None:
    parts, whole = random_segments([4, 0, 9], seed=5)
    out_partial = torch.stack([v for v, _ in parts])
    lse_partial = torch.stack([s for _, s in parts])
    out, lse = torch.full((ROWS, HEADS, DIM), torch.nan, dtype=torch.float16), torch.full((ROWS, HEADS), torch.nan)
    merge_partials(out_partial, lse_partial, out, lse, lse_scale)
    torch.testing.assert_close(out, whole[0].half(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), whole[1] * lse_scale, rtol=2e-6, atol=2e-6)
    merge_partials(out_partial, lse_partial, out.zero_(), None)
    torch.testing.assert_close(out, whole[0].half(), rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- tracing
def test_torch_compile_without_graph_breaks() -> None:
    (a, b), whole = random_segments([5, 6], seed=7)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        v, s = v.clone(), s.clone()
        merge_state_in_place(v, s, *b)
        empty = torch.zeros_like(v), torch.full_like(s, -math.inf)
        v, s = merge_state(v, s, *empty)
        return merge_states(v.unsqueeze(1), s.unsqueeze(1))

    assert_state(step(*a), whole)


def test_shapes_without_data() -> None:
    v, s = torch.empty(7, 3, 4, 64, dtype=torch.bfloat16, device="meta"), torch.empty(7, 3, 4, device="meta")
    merged, lse = merge_states(v, s)
    assert (merged.shape, merged.dtype, lse.shape, lse.dtype) == ((7, 4, 64), torch.bfloat16, (7, 4), torch.float32)
    merged, lse = merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    assert (merged.shape, merged.is_contiguous(), lse.shape) == ((7, 4, 64), True, (7, 4))


@pytest.mark.parametrize("name", ["merge_state", "merge_state_", "merge_states"])
def test_op_registration(name: str) -> None:
    (a, b), _ = random_segments([5, 6], seed=8)
    args = {"merge_state": (*a, *b), "merge_state_": (*a, *b, torch.tensor([True, False, True])), "merge_states": stack([a, b])}[name]
    torch.library.opcheck(getattr(torch.ops.cute_infer, name).default, args, test_utils=("test_schema", "test_faketensor"))


# ------------------------------------------------------------------------------------------------------------- refusals
V, S = torch.zeros(ROWS, HEADS, DIM), torch.zeros(ROWS, HEADS)


@pytest.mark.parametrize("function", [merge_state, merge_state_in_place])
@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((V, S, V[:2], S), errors.ShapeError, "seq_len"),
        ((V, S, V, S[:, :1]), errors.ShapeError, "num_heads"),
        ((V, S.T, V, S), errors.ShapeError, "seq_len"),
        ((V[0], S, V, S), errors.ShapeError, "dimensions"),
        ((V[..., :12], S, V[..., :12], S), errors.ShapeError, "multiple of 8"),
        ((V, S, V.half(), S), errors.DTypeError, "float16"),
        ((V.double(), S, V, S), errors.DTypeError, "float64"),
        ((V, S.half(), V, S), errors.DTypeError, "keep the log-sum-exp in fp32"),
        ((V, S, V, S.double()), errors.DTypeError, "keep the log-sum-exp in fp32"),
        ((V, S, V, S.to("meta")), errors.DeviceError, "meta"),
        ((V, None, V, S), errors.DTypeError, "must be a torch.Tensor"),
    ],
)
def test_pair_refusals(function: object, args: tuple, error: type[Exception], words: str) -> None:
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(error, match=words):
        function(*args)  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(args, before) if isinstance(a, torch.Tensor) and not a.is_meta)


def test_in_place_refuses_the_dtype_that_would_lose_the_result() -> None:
    with pytest.raises(errors.DTypeError, match="s has dtype float16"):
        merge_state_in_place(V.clone(), S.half(), V, S)


@pytest.mark.parametrize(
    ("mask", "error"), [(torch.ones(ROWS + 1, dtype=torch.bool), errors.ShapeError), (torch.ones(ROWS), errors.DTypeError)]
)
def test_mask_refusals(mask: torch.Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="mask"):
        merge_state_in_place(V.clone(), S.clone(), V, S, mask)


@pytest.mark.parametrize(
    ("v", "s", "error", "words"),
    [
        (V, S, errors.ShapeError, "4"),
        (V[:, None], S, errors.ShapeError, "num_states"),
        (V[:, None], S[:, None, :1], errors.ShapeError, "num_heads"),
        (V[:, None], S[:, None].half(), errors.DTypeError, "keep the log-sum-exp in fp32"),
        (V[:, None].int(), S[:, None], errors.DTypeError, "int32"),
        (V[:, None, :, :4], S[:, None], errors.ShapeError, "multiple of 8"),
    ],
)
def test_states_refusals(v: torch.Tensor, s: torch.Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        merge_states(v, s)


# ---------------------------------------------------------------------------------------------------------------- tiles
def test_tile_grows_with_the_states_and_a_pair_is_one_round() -> None:
    tiles = [merge_module.choose(n) for n in (1, 2, 3, 4, 5, 16, 17, 1000)]
    assert [t.ways for t in tiles] == sorted(t.ways for t in tiles)
    assert merge_module.choose(2) == merge_module.MergeTile(batch=2, ways=1)
