"""Models by name -> the kernels a server of that model launches. For compilation ahead of time and for the compile tests.

    for request in variants(MODELS["llama3-8b"], Target.parse("sm_90a")):
        get_entry(request)

A tile depends on the batch, so every batch size up to ``BATCH_SIZES[-1]`` contributes its tile; equal ones are listed once. Whatever is
missing here still compiles on first use (or raises MissingKernelError with the command, when CUTE_INFER_JIT=off).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .attention import tiles_merge
from .attention.spec import AttentionSpec
from .attention.tiles import Hints, pick
from .jit import Request, Target
from .paged import variants as paged_variants
from .sampling import variants as sampling_variants

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
QUERY_LENGTHS = (1, 16, 64, 128, 512, 2048, 8192, 32768)  # total_q of a prefill
NUM_SMS = {"sm_80": 108, "sm_90a": 132}  # A100; H100 SXM, H200. Tiles are chosen by SM count, other parts of the family may differ
NUM_SMS_OTHERS = 132


@dataclasses.dataclass(frozen=True)
class Model:
    """What attention and sampling need to know of a model (or of one tensor-parallel shard of it).

    window, soft_cap, sinks  as in :class:`AttentionSpec`. A windowed model alternates with full layers: both are listed.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str = "bfloat16"
    window: bool = False
    soft_cap: bool = False
    sinks: bool = False


MODELS = {
    "llama2-7b": Model(32, 32, 128, 32000, "float16"),
    "llama3-8b": Model(32, 8, 128, 128256),
    "llama3-70b-tp4": Model(16, 2, 128, 128256),
    "llama3-70b-tp8": Model(8, 1, 128, 128256),
    "qwen2.5-7b": Model(28, 4, 128, 152064),
    "mistral-7b": Model(32, 8, 128, 32000, window=True),
    "mixtral-8x7b": Model(32, 8, 128, 32000),
    "gemma2-9b": Model(16, 8, 256, 256000, window=True, soft_cap=True),
    "gpt-oss-20b": Model(64, 8, 64, 201088, window=True, sinks=True),
}


def attention_specs(model: Model, page_size: int, kv_dtype: str | None = None) -> Iterator[AttentionSpec]:
    """The attention calls of ``model``: paged decode and prefill, ragged and single prefill, and both halves of a cascade (with LSE)."""
    base = AttentionSpec(
        kind="decode",
        q_dtype=model.dtype,
        kv_dtype=kv_dtype or model.dtype,
        o_dtype=model.dtype,
        head_dim_qk=model.head_dim,
        head_dim_vo=model.head_dim,
        group_size=model.num_qo_heads // model.num_kv_heads,
        kv_layout="paged",
        page_size=page_size,
        soft_cap=model.soft_cap,
        sinks=model.sinks,
    )
    for window in (False, True) if model.window else (False,):
        layer = dataclasses.replace(base, window=window)
        prefill = dataclasses.replace(layer, kind="prefill", causal=True)
        yield layer
        yield prefill
        if base.kv_dtype == model.dtype:  # K and V straight from the projection, before they are stored
            for kv_layout in ("ragged", "single"):
                yield dataclasses.replace(prefill, kv_layout=kv_layout, page_size=0)
    if not (model.window or model.sinks):
        yield dataclasses.replace(base, lse=True)  # unique suffix of a cascade, decoding
        for causal in (False, True):  # shared prefix; unique suffix of a cascade, prefilling
            yield dataclasses.replace(base, kind="prefill", causal=causal, lse=True)


def variants(model: Model, target: Target, page_sizes: tuple[int, ...] = (16,), kv_dtype: str | None = None) -> list[Request]:
    """Every kernel of ``model`` on ``target``: attention for each page size, merge, append, sampling. In a fixed order, without repeats.

    Raises:
        UnsupportedConfigError: no kernel covers one of its attention calls.
    """
    found: dict[Request, None] = {}
    for page_size in page_sizes:
        for spec in attention_specs(model, page_size, kv_dtype):
            for hints in batches(model, target, spec.kind):
                choice = pick(spec, target, hints)
                found[Request(choice.path, spec, choice.tile, target.arch)] = None
    merges = tiles_merge.variants(target, head_dims=(model.head_dim,), dtypes=(model.dtype,))
    appends = (v for v in paged_variants.variants(target) if (v[1].row_dtype, v[1].cache_dtype) == (model.dtype, kv_dtype or model.dtype))
    for path, spec, tile in (*merges, *appends, *sampling_variants.variants(target, vocab_size=model.vocab_size)):
        found[Request(path, spec, tile, target.arch)] = None
    return list(found)


def batches(model: Model, target: Target, kind: str) -> Iterator[Hints]:
    """The batches whose tiles are compiled: batch-invariant mode, then all sizes for decode, all lengths and three sizes for prefill."""
    sms = NUM_SMS.get(target.arch, NUM_SMS_OTHERS)
    yield Hints(1, model.num_kv_heads, sms, 1, batch_invariant=True)
    if kind == "decode":
        for batch_size in BATCH_SIZES:
            yield Hints(batch_size, model.num_kv_heads, sms, batch_size)
    else:
        for total_q in QUERY_LENGTHS:
            for batch_size in {1, min(total_q, 16), min(total_q, 256)}:
                yield Hints(batch_size, model.num_kv_heads, sms, total_q)
