"""8-bit queries as far as the CPU sees them: scales, output dtype, refusals, and which tile serves which call."""

from __future__ import annotations

import math

import pytest
import torch

import cute_infer
from cute_infer.attention import launch, tiles_prefill_sm90_fp8
from cute_infer.attention.options import Options, make_spec, resolve_scales
from cute_infer.attention.spec import AttentionSpec
from cute_infer.attention.tiles import Hints, pick
from cute_infer.errors import DTypeError, ShapeError, UnsupportedConfigError
from cute_infer.jit import Target

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
HOPPER = Target.parse("sm_90a")
QO, KV = 8, 2
GEN = torch.Generator().manual_seed(0)


def eight_bits(rows: int, heads: int) -> torch.Tensor:
    return torch.randn(rows, heads, 64, generator=GEN).to(E4M3)


def scale(n: int) -> torch.Tensor:
    return torch.rand(n, generator=GEN) + 0.5


def fp8_spec(**fields: object) -> AttentionSpec:
    base = dict(kind="prefill", q_dtype="float8_e4m3fn", kv_dtype="float8_e4m3fn", o_dtype="bfloat16", head_dim_qk=128, head_dim_vo=128)
    return AttentionSpec(**{**base, "group_size": 4, "kv_layout": "ragged", **fields})  # type: ignore[arg-type]


def resolve(q: object, k: object, v: object):
    return resolve_scales("call()", Options(), 64, KV, QO, torch.device("cpu"), q, k, v, E4M3)


@pytest.mark.parametrize("q_heads", [1, KV, QO])
@pytest.mark.parametrize("k_heads", [None, 1, KV])
def test_scales_of_q_and_k_meet_in_one_value_per_query_head(q_heads, k_heads):
    q, k = scale(q_heads), scale(k_heads) if k_heads else None
    found = resolve(q, k, None)
    whole = lambda x: x.repeat_interleave(QO // len(x)) if len(x) > 1 else x.expand(QO)  # noqa: E731
    assert found.k_scale is not None and found.k_scale.shape == (QO,)
    torch.testing.assert_close(found.k_scale, whole(q) * (whole(k) if k is not None else 1.0))


def test_floats_are_folded_beside_tensors():
    found = resolve(0.5, scale(KV), 3.0)
    assert found.sm_scale == 0.5 / math.sqrt(64) and found.out_scale == 3.0 and found.v_scale is None
    with pytest.raises(ShapeError, match="k_scale has 8 elements"):
        resolve(None, scale(QO), None)


@pytest.mark.parametrize("spelling", ["positional", "keywords", "single"])
def test_flashinfers_spellings(spelling):
    q, k, v = eight_bits(5, QO), eight_bits(9, KV), eight_bits(9, KV)
    scales = [scale(QO), scale(KV), scale(KV)]
    if spelling == "single":
        out = cute_infer.single_prefill_with_kv_cache(q, k, v, *scales, causal=True)
    else:
        wrapper = cute_infer.BatchPrefillWithRaggedKVCacheWrapper()
        wrapper.plan(torch.tensor([0, 5]), torch.tensor([0, 9]), QO, KV, 64, causal=True, q_data_type=E4M3, kv_data_type=E4M3)
        named = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
        out = wrapper.run(q, k, v, *scales) if spelling == "positional" else wrapper.run(q, k, v, **named)
    assert out.dtype == BF16
    wide = (x.float() * (s.repeat_interleave(x.shape[1] // len(s)))[None, :, None] for x, s in zip((q, k, v), scales, strict=True))
    expected = cute_infer.single_prefill_with_kv_cache(*wide, causal=True)
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-8)


def test_sign_flips_without_multiplying():
    q = torch.tensor([1.5, -0.25, 0.0, float("nan")]).to(E4M3)
    assert torch.equal(launch._times(q, -1.0).float(), -q.float()) or launch._times(q, -1.0).float()[3].isnan()
    assert launch._times(q, -1.0).float()[:3].tolist() == [-1.5, 0.25, 0.0]
    assert launch._times(q, 0.0).float().tolist() == [0.0] * 4


def test_16_bit_queries_do_not_know_the_mode():
    facts = ("single", BF16, BF16, BF16, 128, 128, 4, 0, True, False, False, "NONE", False, False, False, False, False)
    assert make_spec("prefill", *facts, True) == make_spec("prefill", *facts, False)
    assert make_spec("prefill", "single", E4M3, E4M3, *facts[3:], True).fp8_fast_accumulation


def test_forward_keeps_the_mode():
    wrapper = cute_infer.BatchPrefillWithRaggedKVCacheWrapper()
    options = dict(q_data_type=E4M3, kv_data_type=E4M3, fp8_fast_accumulation=True)
    wrapper.plan(torch.tensor([0, 5]), torch.tensor([0, 9]), QO, KV, 64, **options)
    wrapper.forward(eight_bits(5, QO), eight_bits(9, KV), eight_bits(9, KV), causal=True)
    assert wrapper._get_options().causal and wrapper._get_options().fp8_fast_accumulation


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("per_request", "page", "tile_kv"), [(1024, 16, 128), (2048, 16, 192), (2048, 128, 128), (8192, 64, 192)])
def test_tile(fast, per_request, page, tile_kv):
    spec = fp8_spec(kv_layout="paged", page_size=page, fp8_fast_accumulation=fast)
    tile = pick(spec, HOPPER, Hints(8, 8, 132, 8 * per_request)).tile
    assert tile.tile_kv == tile_kv and not tile.pack_heads and not tile.split_kv
    assert tile.promote_every * tile_kv == (0 if fast else tiles_prefill_sm90_fp8.PROMOTE_TOKENS)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("total_q", [1, 64, 4096, 65536])
def test_every_tile_fits(dims, fast, total_q):
    spec = fp8_spec(head_dim_qk=dims[0], head_dim_vo=dims[1], fp8_fast_accumulation=fast)
    assert pick(spec, HOPPER, Hints(1, 8, 132, total_q)).name == "prefill_sm90_fp8"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(q_dtype="float8_e5m2"), "two bits of mantissa"),
        (dict(kv_dtype="float8_e5m2"), "8-bit operands with 8-bit operands only"),
        (dict(o_dtype="float8_e4m3fn"), "o_dtype=float8_e4m3fn is not"),
        (dict(custom_mask=True), "custom masks"),
        (dict(kv_layout="paged", page_size=8), "below 16 tokens"),
        (dict(kv_layout="paged", page_size=48), "neither divides"),
    ],
    ids=str,
)
def test_refusals_say_why(fields, reason):
    with pytest.raises(UnsupportedConfigError, match=reason):
        pick(fp8_spec(**fields), HOPPER, Hints(1, 8, 132, 128))


def test_8_bit_queries_need_8_bit_keys():
    with pytest.raises(DTypeError, match="k and v have dtype bfloat16 but q has float8_e4m3fn"):
        cute_infer.single_prefill_with_kv_cache(eight_bits(5, QO), *(torch.randn(9, KV, 64).bfloat16() for _ in range(2)))
