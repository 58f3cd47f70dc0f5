"""The merge kernel against its fp32 reference on a GPU: every tile, dtype and odd size, aliasing, views, empties, graphs."""

from __future__ import annotations

import math

import pytest
import torch

from cute_infer.attention import merge as merge_module
from cute_infer.attention.merge import merge_partials, merge_reference, merge_state, merge_state_in_place, merge_states
from cute_infer.attention.tiles_merge import PATH, TILES, MergeSpec
from cute_infer.jit import Target, get_kernel
from tests.checks import assert_attention_close

pytestmark = pytest.mark.gpu

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
HALF_TILES = [tile for _, tile, _ in TILES]


def random_states(
    states: int, rows: int, heads: int, dim: int, dtype: torch.dtype, empty: float = 0.25
) -> tuple[torch.Tensor, torch.Tensor]:
    """``v [states, rows, heads, dim]``, ``s [states, rows, heads]``; some states are empty and hold NaN, as an unwritten split does."""
    gen = torch.Generator("cuda").manual_seed(states * 1000 + rows)
    v = torch.randn(states, rows, heads, dim, device="cuda", generator=gen)
    s = 8 * torch.randn(states, rows, heads, device="cuda", generator=gen)
    gone = torch.rand(s.shape, device="cuda", generator=gen) < empty
    return torch.where(gone[..., None], torch.nan, v).to(dtype), torch.where(gone, -torch.inf, s)


def assert_state(out: torch.Tensor, lse: torch.Tensor | None, v: torch.Tensor, s: torch.Tensor, lse_scale: float = 1.0) -> None:
    """Within rounding of the output dtype, plus a few roundings of the fp32 sums and of ex2.approx."""
    want, want_lse = merge_reference(v.double(), s.double())
    noise = want.float().abs().amax() * 2e-6
    same = (want.float() + noise).to(out.dtype)
    assert_attention_close(out, want, same)
    if lse is not None:
        assert_attention_close(lse, want_lse * lse_scale, (want_lse * lse_scale).float() * (1 + 2e-6) + 2e-6, what="lse")


@pytest.mark.parametrize("dim", [8, 40, 64, 72, 128, 192, 256, 264, 512, 576])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_head_dims(dtype: torch.dtype, dim: int) -> None:
    v, s = random_states(3, 5, 3, dim, dtype)
    assert_state(*merge_states(v.transpose(0, 1), s.transpose(0, 1)), v, s)


@pytest.mark.parametrize("states", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 64, 132, 257])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("dim", [128, 576])
def test_split_partials(dim: int, dtype: torch.dtype, states: int) -> None:
    v, s = random_states(states, 3, 5, dim, FP32)
    out = torch.full((3, 5, dim), torch.nan, dtype=dtype, device="cuda")
    lse = torch.full((3, 5), torch.nan, device="cuda")
    merge_partials(v, s, out, lse, math.log(2))
    assert_state(out, lse, v, s, math.log(2))
    without_lse = torch.full_like(out, torch.nan)
    merge_partials(v, s, without_lse, None)
    assert torch.equal(out, without_lse)


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (1, 128), (7, 71), (1000, 33), (4099, 128), (1, 2048)])
def test_grid(rows: int, heads: int) -> None:
    """128 heads of 128 and more: FlashInfer's launch stops at 1024 threads per row."""
    v, s = random_states(2, rows, heads, 128, FP16)
    assert_state(*merge_state(v[0], s[0], v[1], s[1]), v, s)


@pytest.mark.parametrize("tile", HALF_TILES, ids=str)
def test_every_tile_gives_the_sum_in_its_own_fixed_order(tile: object) -> None:
    kernel = get_kernel(PATH, MergeSpec("float32", "float32", 128), tile, Target.detect())
    v, s = random_states(37, 6, 9, 128, FP32)
    results = []
    for _ in range(3):
        out, lse = torch.full((6, 9, 128), torch.nan, device="cuda"), torch.full((6, 9), torch.nan, device="cuda")
        kernel(v, s, None, None, None, out, lse, 1.0)
        assert_state(out, lse, v, s)
        results.append((out, lse))
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    v, s = random_states(9, 64, 8, 128, FP32)
    out, alone = torch.empty(64, 8, 128, device="cuda"), torch.empty(1, 8, 128, device="cuda")
    merge_partials(v, s, out, None)
    for row in (0, 17, 63):
        merge_partials(v[:, row : row + 1], s[:, row : row + 1], alone, None)
        assert torch.equal(out[row], alone[0])


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
@pytest.mark.parametrize("states", [2, 4, 9, 40])
def test_empty_states_change_no_bit(states: int, dtype: torch.dtype) -> None:
    v, s = random_states(states, 33, 5, 128, dtype, empty=1.0)
    only = torch.randint(0, states, (33, 5), device="cuda")
    kept, kept_s = torch.randn(33, 5, 128, device="cuda").to(dtype), 100 * torch.randn(33, 5, device="cuda")
    v.scatter_(0, only[None, :, :, None].expand(1, 33, 5, 128), kept[None])
    s.scatter_(0, only[None], kept_s[None])
    out, lse = merge_states(v.transpose(0, 1), s.transpose(0, 1))
    assert torch.equal(out, kept) and torch.equal(lse, kept_s)


@pytest.mark.parametrize("states", [0, 1, 2, 3, 9, 40])
def test_nothing_at_all_is_zero_and_minus_infinity(states: int) -> None:
    v, s = random_states(states, 3, 2, 64, BF16, empty=1.0)
    out, lse = merge_states(v.transpose(0, 1), s.transpose(0, 1))
    assert torch.equal(out, torch.zeros_like(out)) and torch.equal(lse, torch.full_like(lse, -math.inf))


def test_nan_in_s_is_not_hidden() -> None:
    v, s = random_states(5, 2, 2, 64, FP16, empty=0.0)
    s[3, 1, 0] = torch.nan
    out, lse = merge_states(v.transpose(0, 1), s.transpose(0, 1))
    assert out[1, 0].isnan().all() and lse[1, 0].isnan() and out.isnan().sum() == 64


@pytest.mark.parametrize("dim", [64, 128, 576])
@pytest.mark.parametrize("masked", [False, True])
def test_in_place(masked: bool, dim: int) -> None:
    v, s = random_states(2, 301, 7, dim, BF16)
    mask = torch.rand(301, device="cuda") < 0.5 if masked else None
    out, lse = v[0].clone(), s[0].clone()
    merge_state_in_place(out, lse, v[1], s[1], mask)
    merged = mask if masked else torch.ones(301, dtype=torch.bool, device="cuda")
    assert_state(out[merged], lse[merged], v[:, merged], s[:, merged])
    kept = ~merged
    assert torch.equal(out[kept].view(torch.int16), v[0][kept].view(torch.int16)) and torch.equal(lse[kept], s[0][kept])


def test_in_place_on_views_that_vectors_cannot_read() -> None:
    wide = torch.randn(5, 3, 65, device="cuda").half()  # rows start on odd 2-byte addresses
    v, v_other = wide[..., 1:], torch.randn(5, 3, 64, device="cuda").half()
    s, s_other = torch.randn(3, 5, device="cuda").T, torch.randn(5, 6, device="cuda")[:, ::2]
    states, scores = torch.stack([v, v_other]), torch.stack([s, s_other])
    border = wide[..., 0].clone()
    merge_state_in_place(v, s, v_other, s_other, torch.tensor([1, 1, 0, 1, 1], dtype=torch.uint8, device="cuda"))
    for row in (0, 1, 3, 4):
        assert_state(v[row : row + 1], s[row : row + 1], states[:, row : row + 1], scores[:, row : row + 1])
    assert torch.equal(v[2], states[0, 2]) and torch.equal(wide[..., 0], border)


def test_strided_states() -> None:
    v, s = random_states(3, 17, 4, 64, FP16)
    wide = torch.full((17, 3, 5, 96), torch.nan, dtype=FP16, device="cuda")
    wide[:, :, :4, 16:80] = v.transpose(0, 1)
    assert_state(*merge_states(wide[:, :, :4, 16:80], s.transpose(0, 1)), v, s)


def test_nothing_to_do() -> None:
    out, lse = merge_states(torch.empty(0, 2, 4, 64, device="cuda"), torch.empty(0, 2, 4, device="cuda"))
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_cuda_graph_reads_live_values() -> None:
    v, s = random_states(9, 4, 8, 128, FP32)
    out, lse = torch.empty(4, 8, 128, dtype=BF16, device="cuda"), torch.empty(4, 8, device="cuda")
    merge_module.load_partials_kernel(out.device, BF16, 128, lse=True, num_splits=9)
    merge_partials(v, s, out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge_partials(v, s, out, lse)
    new_v, new_s = random_states(9, 4, 8, 128, FP32, empty=0.6)
    v.copy_(new_v)
    s.copy_(new_s)
    out.fill_(torch.nan)
    graph.replay()
    assert_state(out, lse, v, s)


def test_torch_compile_without_graph_breaks() -> None:
    v, s = random_states(2, 9, 4, 64, FP16)

    @torch.compile(fullgraph=True)
    def step(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = merge_state(v[0], s[0], v[1], s[1])
        merge_state_in_place(out, lse, v[1], torch.full_like(s[1], -math.inf))
        return out, lse

    assert_state(*step(v, s), v, s)


def test_more_than_two_billion_elements() -> None:
    """The last state starts 2**31 elements after the first: its address needs 64 bits."""
    states, rows, heads, dim = 2, 2**21 + 64, 8, 128
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free memory")
    v = torch.empty(states, rows, heads, dim, dtype=FP16, device="cuda")
    s = torch.zeros(states, rows, heads, device="cuda")
    v[0], v[1] = 1, 3
    out, lse = merge_states(v.transpose(0, 1), s.transpose(0, 1))
    assert out.eq(2).all() and lse.eq(1).all()
