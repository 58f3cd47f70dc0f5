"""Cascade attention on the CPU: levels against the whole sequence in one level, and every refusal."""

from __future__ import annotations

import pytest
import torch

import cute_infer
from cute_infer import errors
from cute_infer.attention.cascade import MultiLevelCascadeAttentionWrapper

PAGE, QO, KV, DIM, PAGES = 4, 4, 2, 16, 40


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def csr(pages: list[list[int]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    indptr = ints(0, *torch.tensor([len(p) for p in pages]).cumsum(0).tolist())
    return indptr, ints(*sum(pages, [])), ints(*((n - 1) % PAGE + 1 if n else 0 for n in lengths))


def cache(layout: str = "NHD", seed: int = 0) -> torch.Tensor:
    page = (PAGE, KV, DIM) if layout == "NHD" else (KV, PAGE, DIM)
    return torch.randn(PAGES, 2, *page, generator=torch.Generator().manual_seed(seed)).half()


# Three requests: 8 tokens shared by all, 4 shared by the first two, then 5, 1 and 7 of their own. Shared parts fill their pages.
SHARED, MIDDLE, OWN = [30, 3], [[17], []], [[5, 9], [11], [0, 21]]
OWN_LENGTHS = [5, 1, 7]
LEVELS = [csr([SHARED], [8]), csr(MIDDLE, [4, 0]), csr(OWN, OWN_LENGTHS)]
WHOLE = csr([SHARED + MIDDLE[0] + OWN[0], SHARED + MIDDLE[0] + OWN[1], SHARED + OWN[2]], [17, 13, 15])


def qo_levels(rows: list[int]) -> list[torch.Tensor]:
    bounds = [0, *torch.tensor(rows).cumsum(0).tolist()]
    return [ints(0, bounds[3]), ints(0, bounds[2], bounds[3]), ints(*bounds)]


def plan_arrays(rows: list[int]) -> tuple[list[torch.Tensor], ...]:
    return qo_levels(rows), *(list(arrays) for arrays in zip(*LEVELS))


def whole(q: torch.Tensor, kv: torch.Tensor, rows: list[int], layout: str = "NHD", **options) -> tuple[torch.Tensor, torch.Tensor]:
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper(kv_layout=layout)
    wrapper.plan(qo_levels(rows)[-1], *WHOLE, QO, KV, DIM, PAGE, **options)
    return wrapper.run(q, kv, return_lse=True)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [[1, 1, 1], [3, 1, 2]])  # never more than a request's own keys: causal rows stay within them
def test_three_levels_equal_one(rows: list[int], causal: bool, layout: str) -> None:
    q, kv = torch.randn(sum(rows), QO, DIM).half(), cache(layout)
    wrapper = MultiLevelCascadeAttentionWrapper(3, torch.empty(1024, dtype=torch.uint8), layout)
    wrapper.plan(*plan_arrays(rows), QO, KV, DIM, PAGE, causal=causal)
    out, lse = wrapper.run(q, kv, return_lse=True)
    want, want_lse = whole(q, kv, rows, layout, causal=causal)
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(wrapper.run(q, kv), out)


def test_options_reach_every_level() -> None:
    rows, kv = [1, 1, 1], cache()
    q = 4 * torch.randn(3, QO, DIM).half()
    wrapper = MultiLevelCascadeAttentionWrapper(3)
    wrapper.plan(*plan_arrays(rows), QO, KV, DIM, PAGE, sm_scale=0.5, logits_soft_cap=3.0)
    want, _ = whole(q, kv, rows, sm_scale=0.5, logits_soft_cap=3.0)
    torch.testing.assert_close(wrapper.run(q, kv), want, rtol=2e-3, atol=2e-3)


def test_fp8_cache_with_scales() -> None:
    rows, kv = [1, 1, 1], cache().to(torch.float8_e4m3fn)
    q = torch.randn(3, QO, DIM).half()
    wrapper = MultiLevelCascadeAttentionWrapper(3)
    wrapper.plan(*plan_arrays(rows), QO, KV, DIM, PAGE, kv_data_type=torch.float8_e4m3fn)
    plain = cute_infer.BatchPrefillWithPagedKVCacheWrapper()
    plain.plan(qo_levels(rows)[-1], *WHOLE, QO, KV, DIM, PAGE, kv_data_type=torch.float8_e4m3fn)
    scales = {"k_scale": 0.5, "v_scale": 2.0}
    torch.testing.assert_close(wrapper.run(q, kv, **scales), plain.run(q, kv, **scales), rtol=2e-3, atol=2e-3)


def test_an_empty_level_changes_nothing() -> None:
    q, kv, rows = torch.randn(3, QO, DIM).half(), cache(), [1, 1, 1]
    one = MultiLevelCascadeAttentionWrapper(1)
    one.plan([qo_levels(rows)[-1]], *([a] for a in WHOLE), QO, KV, DIM, PAGE)
    two = MultiLevelCascadeAttentionWrapper(2)
    nothing = csr([[]], [0])
    two.plan([ints(0, 3), qo_levels(rows)[-1]], *([a, b] for a, b in zip(nothing, WHOLE)), QO, KV, DIM, PAGE)
    for a, b in zip(one.run(q, kv, return_lse=True), two.run(q, kv, return_lse=True)):
        assert torch.equal(a, b)


def test_out_and_old_names() -> None:
    q, kv, rows = torch.randn(3, QO, DIM).half(), cache(), [1, 1, 1]
    wrapper = MultiLevelCascadeAttentionWrapper(3)
    wrapper.begin_forward(*plan_arrays(rows), QO, KV, DIM, PAGE)
    out = torch.empty_like(q)
    assert wrapper.run(q, kv, out=out) is out
    assert torch.equal(wrapper.forward(q, kv), out)
    wrapper.end_forward()
    wrapper.reset_workspace_buffer(torch.empty(64, dtype=torch.uint8), [None] * 3)
    assert torch.equal(wrapper.run(q, kv), out)
    with pytest.raises(errors.ShapeError, match="out has num_tokens=2"):
        wrapper.run(q, kv, out=out[:2])


def test_cuda_graph_buffers_are_used() -> None:
    q, kv, rows = torch.randn(3, QO, DIM).half(), cache(), [1, 1, 1]
    qo = [torch.zeros_like(a) for a in qo_levels(rows)]
    indptr, indices, last = ([torch.zeros(n, dtype=torch.int32) for n in sizes] for sizes in ((2, 3, 4), (8, 8, 8), (1, 2, 3)))
    wrapper = MultiLevelCascadeAttentionWrapper(3, torch.empty(64, dtype=torch.uint8), "NHD", True, qo, indptr, indices, last)
    assert wrapper.is_cuda_graph_enabled
    wrapper.plan(*plan_arrays(rows), QO, KV, DIM, PAGE)
    assert torch.equal(indices[2][:5], LEVELS[2][1]) and torch.equal(qo[1], qo_levels(rows)[1])
    torch.testing.assert_close(wrapper.run(q, kv), whole(q, kv, rows)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("option", [{"pos_encoding_mode": "ROPE_LLAMA"}, {"pos_encoding_mode": "ALIBI"}, {"window_left": 3}])
def test_options_that_need_positions_are_refused(option: dict) -> None:
    with pytest.raises(errors.UnsupportedConfigError, match="does not know where it stands"):
        MultiLevelCascadeAttentionWrapper(3).plan(*plan_arrays([1, 1, 1]), QO, KV, DIM, PAGE, **option)
    wrapper = MultiLevelCascadeAttentionWrapper(1)  # a single level knows
    wrapper.plan([ints(0, 1, 2, 3)], *([a] for a in WHOLE), QO, KV, DIM, PAGE, **option)


def test_refusals() -> None:
    wrapper = MultiLevelCascadeAttentionWrapper(2)
    with pytest.raises(errors.PlanError, match="not been planned"):
        wrapper.run(torch.zeros(3, QO, DIM).half(), cache())
    with pytest.raises(errors.ShapeError, match="3 arrays for 2 levels"):
        wrapper.plan(*plan_arrays([1, 1, 1]), QO, KV, DIM, PAGE)
    with pytest.raises(errors.ConfigError, match="one tensor per level"):
        wrapper.plan(ints(0, 3), *plan_arrays([1, 1, 1])[1:], QO, KV, DIM, PAGE)
    with pytest.raises(errors.ConfigError, match="num_levels"):
        MultiLevelCascadeAttentionWrapper(0)
