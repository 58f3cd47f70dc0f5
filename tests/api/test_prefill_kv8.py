"""16-bit queries over 8-bit K and V as far as the CPU sees them: which kernel and tile serve which call, and what is refused."""

from __future__ import annotations

import pytest

from cute_infer.attention import tiles_prefill_sm90_kv8
from cute_infer.attention.spec import AttentionSpec
from cute_infer.attention.tiles import Hints, pick
from cute_infer.attention.tiles_prefill_sm90 import MAX_SHARED_BYTES
from cute_infer.jit import Target

HOPPER, AMPERE = Target.parse("sm_90a"), Target.parse("sm_80")
DIMS = [(64, 64), (128, 128), (192, 128), (256, 256)]
LONG = Hints(4, 8, 132, 8192)


def kv8_spec(**fields: object) -> AttentionSpec:
    base = dict(kind="prefill", q_dtype="bfloat16", kv_dtype="float8_e4m3fn", o_dtype="bfloat16", head_dim_qk=128, head_dim_vo=128)
    return AttentionSpec(**{**base, "group_size": 4, "kv_layout": "ragged", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(q_dtype="float16", o_dtype="float16"),
        dict(q_dtype="float16"),
        dict(kv_dtype="float8_e5m2"),
        dict(kv_layout="single", causal=True),
        *(dict(kv_layout="paged", page_size=p) for p in (1, 5, 16, 48, 256)),
        dict(window=True, soft_cap=True, sinks=True, k_scale=True, v_scale=True, lse=True),
    ],
    ids=str,
)
def test_hopper_picks_it(fields):
    assert pick(kv8_spec(**fields), HOPPER, LONG).name == "prefill_sm90_kv8"


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("total_q", [1, 64, 4096, 65536])
def test_every_tile_fits(dims, total_q):
    choice = pick(kv8_spec(head_dim_qk=dims[0], head_dim_vo=dims[1]), HOPPER, Hints(1, 8, 132, total_q))
    assert choice.name == "prefill_sm90_kv8" and choice.tile.shared_bytes(*dims) <= MAX_SHARED_BYTES


def test_short_queries_are_packed_and_few_items_split():
    spec = kv8_spec()
    few = pick(spec, HOPPER, Hints(1, 8, 132, 16))
    assert few.tile.pack_heads and few.tile.split_kv and few.num_splits == 132 // 8
    long = pick(spec, HOPPER, LONG)
    assert not long.tile.pack_heads and not long.tile.split_kv and long.num_splits == 1
    assert not pick(kv8_spec(group_size=3), HOPPER, Hints(64, 8, 132, 64)).tile.pack_heads  # 3 does not divide 64


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(custom_mask=True), "custom masks"),
        (dict(pos_encoding="ALIBI"), "pos_encoding=ALIBI"),
        (dict(pos_encoding="ROPE_LLAMA"), "pos_encoding=ROPE_LLAMA"),
        (dict(o_dtype="float32"), "o_dtype=float32"),
        (dict(head_dim_qk=96, head_dim_vo=96), "head_dim_qk=96"),
    ],
    ids=str,
)
def test_what_it_refuses_goes_to_the_sm80_kernel(fields, reason):
    spec = kv8_spec(**fields)
    assert reason in str(tiles_prefill_sm90_kv8.why_not(spec, HOPPER))
    assert pick(spec, HOPPER, LONG).name == "prefill_sm80"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(kind="decode"), "made for prefill"),
        (dict(kv_dtype="bfloat16"), "made for 8-bit k and v"),
        (dict(q_dtype="float8_e4m3fn"), "q_dtype=float8_e4m3fn"),
    ],
    ids=str,
)
def test_other_kernels_specs(fields, reason):
    assert reason in str(tiles_prefill_sm90_kv8.why_not(kv8_spec(**fields), HOPPER))


def test_other_targets():
    assert "wgmma" in str(tiles_prefill_sm90_kv8.why_not(kv8_spec(), AMPERE))
    assert pick(kv8_spec(), AMPERE, LONG).name == "prefill_sm80"
