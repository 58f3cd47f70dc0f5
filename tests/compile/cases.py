"""What is compiled to watch the machine code: one entry per kernel feature, and the instructions each kernel must and must not contain."""

from __future__ import annotations

import dataclasses
from types import ModuleType

from cute_infer.attention import (
    tiles_decode_sm80,
    tiles_decode_sm90,
    tiles_merge,
    tiles_prefill_sm80,
    tiles_prefill_sm90,
    tiles_prefill_sm90_fp8,
    tiles_prefill_sm90_kv8,
)
from cute_infer.attention.spec import AttentionSpec
from cute_infer.attention.tiles import Hints
from cute_infer.jit import Request, Target
from cute_infer.paged import variants as paged
from cute_infer.sampling import tiles as sampling

AMPERE, HOPPER = Target.parse("sm_80"), Target.parse("sm_90a")
NUM_SMS = {AMPERE: 108, HOPPER: 132}
LLAMA3 = AttentionSpec("decode", "bfloat16", "bfloat16", "bfloat16", 128, 128, 4, "paged", 16)
LLAMA2 = dict(group_size=1, q_dtype="float16", kv_dtype="float16", o_dtype="float16")
GPT_OSS = dict(head_dim_qk=64, head_dim_vo=64, group_size=8, sinks=True, window=True)
GEMMA = dict(head_dim_qk=256, head_dim_vo=256, group_size=2, soft_cap=True)
FP8 = dict(kv_dtype="float8_e4m3fn")
ALL_FP8 = dict(q_dtype="float8_e4m3fn", kv_dtype="float8_e4m3fn")
PREFILL = dict(kind="prefill", causal=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request with a name for people and for facts.json."""

    name: str
    request: Request
    smem_limit: int

    @property
    def kernel(self) -> str:
        return self.request.name


def attention(name: str, tiles: ModuleType, targets: tuple[Target, ...], batch: tuple[int, int, int], **fields: object) -> list[Case]:
    """``batch`` is (requests, KV heads, query rows); ``fields`` are the differences from LLAMA3."""
    if fields.get("kv_layout") in ("ragged", "single"):
        fields["page_size"] = 0
    spec = dataclasses.replace(LLAMA3, **fields)
    cases = []
    for target in targets:
        assert tiles.why_not(spec, target) is None, (name, tiles.why_not(spec, target))
        batch_size, num_kv_heads, total_q = batch
        tile = tiles.choose(spec, target, Hints(batch_size, num_kv_heads, NUM_SMS[target], total_q))
        request = Request(tiles.PATH, spec, tile, target.arch)
        cases.append(Case(f"{request.name} {name} {target}", request, target.smem_limit))
    return cases


def other(name: str, path: str, spec: object, tile: object, target: Target) -> Case:
    request = Request(path, spec, tile, target.arch)
    return Case(f"{request.name} {name} {target}", request, target.smem_limit)


def all_cases() -> list[Case]:
    cases: list[Case] = []
    both, hopper, ampere = (AMPERE, HOPPER), (HOPPER,), (AMPERE,)

    def decode(name: str, batch: tuple[int, int], **fields: object) -> None:
        cases.extend(attention(name, tiles_decode_sm90, hopper, (*batch, batch[0]), **fields))

    decode("bf16, one request", (1, 8))
    decode("bf16, one request, one KV head: split KV", (1, 1), group_size=8)
    decode("bf16, few requests", (8, 8))
    decode("bf16, many requests", (256, 8))
    decode("fp16 MHA, page 64", (16, 32), **LLAMA2, page_size=64)
    decode("fp8 KV, many requests", (128, 8), **FP8)
    decode("fp8 e5m2 KV, scales per head", (4, 8), kv_dtype="float8_e5m2", k_scale=True, v_scale=True)
    decode("sinks, window, lse, d64", (64, 8), **GPT_OSS, lse=True)
    decode("soft cap, d256", (64, 8), **GEMMA)
    decode("ALiBi, group 16, ragged", (64, 2), pos_encoding="ALIBI", group_size=16, kv_layout="ragged")

    def decode80(name: str, batch: tuple[int, int], targets: tuple[Target, ...], **fields: object) -> None:
        cases.extend(attention(name, tiles_decode_sm80, targets, (*batch, batch[0]), **fields))

    decode80("bf16", (64, 8), both)
    decode80("bf16, split KV, lse", (1, 8), ampere, lse=True)
    decode80("RoPE, page 1", (64, 8), both, pos_encoding="ROPE_LLAMA", page_size=1)
    decode80("fp8 KV, scales per head", (64, 8), both, **FP8, k_scale=True, v_scale=True)
    decode80("sinks, window, d64", (64, 8), ampere, **GPT_OSS)
    decode80("soft cap, d256", (64, 8), ampere, **GEMMA)
    decode80("ALiBi, d96, single", (1, 8), ampere, pos_encoding="ALIBI", head_dim_qk=96, head_dim_vo=96, kv_layout="single")

    def prefill(name: str, **fields: object) -> None:
        cases.extend(attention(name, tiles_prefill_sm90, hopper, (4, 8, 8192), **{**PREFILL, **fields}))

    prefill("bf16 causal, paged")
    prefill("bf16 causal, ragged", kv_layout="ragged")
    prefill("fp16 full, single, lse", **LLAMA2, kv_layout="single", causal=False, lse=True)
    prefill("sinks, window, d64", **GPT_OSS)
    prefill("soft cap, d256", **GEMMA)
    prefill("d192/128, ragged", head_dim_qk=192, kv_layout="ragged", group_size=1)
    prefill("pages of 1", page_size=1)
    prefill("pages of 5, window, d256", page_size=5, window=True, head_dim_qk=256, head_dim_vo=256)
    prefill("pages of 64, d96, lse", page_size=64, head_dim_qk=96, head_dim_vo=96, lse=True)
    prefill("custom mask, ragged", custom_mask=True, kv_layout="ragged")
    prefill("ALiBi, custom mask, soft cap, sinks", pos_encoding="ALIBI", custom_mask=True, soft_cap=True, sinks=True)
    prefill("ALiBi, d64, single", pos_encoding="ALIBI", head_dim_qk=64, head_dim_vo=64, kv_layout="single")

    def prefill_tile(name: str, changes: dict[str, object], **fields: object) -> None:
        spec = dataclasses.replace(LLAMA3, **{**PREFILL, **fields})
        tile = tiles_prefill_sm90.choose(spec, HOPPER, Hints(4, 8, NUM_SMS[HOPPER], 8192))
        cases.append(other(name, tiles_prefill_sm90.PATH, spec, dataclasses.replace(tile, **changes), HOPPER))

    prefill_tile("V by its own warp, ragged", {"v_warp": True}, kv_layout="ragged", page_size=0)
    prefill_tile("clusters of 2, paged", {"cluster": 2})
    prefill_tile("clusters of 2, V by its own warp, ragged", {"cluster": 2, "v_warp": True}, kv_layout="ragged", page_size=0)

    def prefill8(name: str, batch: tuple[int, int, int] = (4, 8, 8192), **fields: object) -> None:
        cases.extend(attention(name, tiles_prefill_sm90_fp8, hopper, batch, **{**PREFILL, **ALL_FP8, **fields}))

    prefill8("causal, paged, scales per head", (4, 8, 4096), k_scale=True, v_scale=True)
    prefill8("causal, ragged, long", kv_layout="ragged")
    prefill8("full, single, lse, fast", kv_layout="single", causal=False, lse=True, fp8_fast_accumulation=True)
    prefill8("fp16 out, ragged, packed, split KV", (1, 8, 16), kv_layout="ragged", o_dtype="float16")
    prefill8("sinks, window, d64", **GPT_OSS)
    prefill8("soft cap, d256", **GEMMA)
    prefill8("d192/128, ragged", head_dim_qk=192, kv_layout="ragged", group_size=1)

    def prefill_kv8(name: str, batch: tuple[int, int, int] = (4, 8, 8192), **fields: object) -> None:
        cases.extend(attention(name, tiles_prefill_sm90_kv8, hopper, batch, **{**PREFILL, **FP8, **fields}))

    prefill_kv8("bf16 causal, paged, scales per head", k_scale=True, v_scale=True)
    prefill_kv8("fp16 full, single, lse", **{**LLAMA2, **FP8}, kv_layout="single", causal=False, lse=True)
    prefill_kv8("e5m2, ragged, packed, split KV", (1, 8, 16), kv_dtype="float8_e5m2", kv_layout="ragged")
    prefill_kv8("sinks, window, d64", **GPT_OSS)
    prefill_kv8("pages of 5, soft cap, d256", **GEMMA, page_size=5)
    prefill_kv8("fp16 q, bf16 out, d192/128, ragged", q_dtype="float16", head_dim_qk=192, kv_layout="ragged", group_size=1)

    def prefill80(name: str, batch: tuple[int, int, int], targets: tuple[Target, ...], **fields: object) -> None:
        cases.extend(attention(name, tiles_prefill_sm80, targets, batch, **{**PREFILL, **fields}))

    prefill80("bf16 causal, paged", (4, 8, 8192), both)
    prefill80("bf16 causal, ragged, split KV", (1, 8, 16), ampere, kv_layout="ragged")
    prefill80("custom mask, single", (1, 8, 512), both, custom_mask=True, causal=False, kv_layout="single")
    prefill80("RoPE, window, lse", (4, 8, 8192), both, pos_encoding="ROPE_LLAMA", window=True, lse=True)
    prefill80("fp8 KV", (4, 8, 8192), both, **FP8)
    prefill80("ALiBi, sinks, d64", (4, 8, 8192), ampere, pos_encoding="ALIBI", sinks=True, head_dim_qk=64, head_dim_vo=64)
    prefill80("soft cap, d256", (4, 8, 8192), ampere, **GEMMA)

    for name, spec, states in (
        ("split partials", tiles_merge.MergeSpec("float32", "bfloat16", 128, lse=True), 16),
        ("two states, masked", tiles_merge.MergeSpec("float16", "float16", 128, pair=True, masked=True), 2),
    ):
        cases += [other(name, tiles_merge.PATH, spec, tiles_merge.choose(states), target) for target in both]
    for name, append in (
        ("bf16", paged.AppendSpec("bfloat16", "bfloat16")),
        ("bf16 to fp8", paged.AppendSpec("bfloat16", "float8_e4m3fn")),
    ):
        cases += [other(name, paged.PATH, append, paged.choose(append, target, rows_of_16=True), target) for target in both]
    row = sampling.RowSpec("logits", "float32", "ids", temperature="row", top_k="row", top_p="row", min_p="row", seed="row", offset="row")
    renorm = sampling.RowSpec("probs", "float32", "renorm", top_p="scalar")
    nucleus = sampling.RowSpec("logits", "float32", "ids", top_p="row", seed="scalar", offset="scalar")
    first = dataclasses.replace(row, dtype="bfloat16", min_p="none", k_first=True)
    for name, rows, vocab in (
        ("top-k top-p min-p from logits, few rows", row, 128256),
        ("top-k before top-p, bf16", first, 128256),
        ("top-p renorm", renorm, 32000),
        ("top-p from logits", nucleus, 128256),
    ):
        for target in both:
            tile = sampling.choose(target.is_hopper, vocab, 8)
            cases.append(other(name, sampling.ROW_PATH, rows, tile, target))
    cases += [other("chain", sampling.CHAIN_PATH, sampling.ChainSpec(), sampling.ChainTile(), target) for target in both]
    return cases


CASES = {case.name: case for case in all_cases()}
assert len(CASES) == len(all_cases()), "two cases have one name"

# Kernel -> (instructions it must contain at least so often, instructions it must not contain).
HOPPER_ONLY = ("wgmma.mma_async", "cp.async.bulk.tensor", "cp.async.bulk", "setmaxnreg", "stmatrix")
EXPECTED: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "decode_sm90": ({"mma.sync": 2, "cp.async.bulk.tensor": 2, "ldmatrix": 2}, ("wgmma.mma_async", "cp.async")),
    "decode_sm80": ({"mma.sync": 2, "cp.async": 2, "ldmatrix": 2}, HOPPER_ONLY),
    "prefill_sm90": ({"wgmma.mma_async": 2, "cp.async.bulk.tensor": 2, "setmaxnreg": 2}, ("mma.sync",)),
    "prefill_sm90_fp8": (
        {"wgmma.mma_async": 2, "cp.async.bulk.tensor": 3, "ldmatrix": 2, "stmatrix": 2, "setmaxnreg": 2},
        ("mma.sync", "cp.async"),
    ),
    "prefill_sm90_kv8": ({"wgmma.mma_async": 2, "cp.async.bulk.tensor": 2, "setmaxnreg": 3}, ("mma.sync", "cp.async", "ldmatrix")),
    "prefill_sm80": ({"mma.sync": 2, "cp.async": 2, "ldmatrix": 2}, HOPPER_ONLY),
    "merge": ({}, (*HOPPER_ONLY, "mma.sync")),
    "paged_kernels": ({}, (*HOPPER_ONLY, "mma.sync")),
    "sampling_kernels_rows": ({}, (*(name for name in HOPPER_ONLY if name != "cp.async.bulk"), "mma.sync")),
    "sampling_kernels_chain": ({}, (*HOPPER_ONLY, "mma.sync")),
}
