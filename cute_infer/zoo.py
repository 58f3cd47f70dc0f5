"""Models by name -> the kernels a server of that model launches. For compilation ahead of time and for the compile tests.

    for request in variants(MODELS["llama3-8b"], Target.parse("sm_90a")):
        get_entry(request)

A tile depends on the batch, so every batch size up to ``BATCH_SIZES[-1]``, with every class of KV lengths, contributes its tile; equal ones
are listed once. Whatever is missing here still compiles on first use (or raises MissingKernelError with the command, when
CUTE_INFER_JIT=off).

    transformers_variants(json.load(open("path/to/model/config.json")), Target.parse("sm_90a"))

lists instead what a model under Hugging Face transformers launches, which reads K and V where transformers keeps them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from .attention import tiles_merge
from .attention.lengths import CLASSES
from .attention.spec import AttentionSpec
from .attention.tiles import Hints, pick
from .errors import ConfigError, fail
from .jit import Request, Target
from .paged import variants as paged_variants
from .sampling import variants as sampling_variants

BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
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
        found.update(_attention_requests(attention_specs(model, page_size, kv_dtype), model, target))
    merges = tiles_merge.variants(target, head_dims=(model.head_dim,), dtypes=(model.dtype,))
    appends = (v for v in paged_variants.variants(target) if (v[1].row_dtype, v[1].cache_dtype) == (model.dtype, kv_dtype or model.dtype))
    for path, spec, tile in (*merges, *appends, *sampling_variants.variants(target, vocab_size=model.vocab_size)):
        found[Request(path, spec, tile, target.arch)] = None
    return list(found)


def _attention_requests(specs: Iterable[AttentionSpec], model: Model, target: Target, batch_invariant: bool = True) -> dict[Request, None]:
    """``specs`` with every tile that a batch can get."""
    found: dict[Request, None] = {}
    for spec in specs:
        for hints in batches(model, target, spec.kind):
            if hints.kv_lens.mean and (spec.lse or spec.kv_layout == "single"):
                continue  # single calls take the tile for any lengths, and so does half of a cascade where nothing may be compiled
            if hints.batch_size == 1 or spec.kv_layout != "single":
                if batch_invariant or not hints.batch_invariant:
                    choice = pick(spec, target, hints)
                    found[Request(choice.path, spec, choice.tile, target.arch)] = None
    return found


def batches(model: Model, target: Target, kind: str) -> Iterator[Hints]:
    """The batches whose tiles are compiled: batch-invariant mode, then all sizes and classes of lengths for decode, all lengths and three
    sizes for prefill."""
    sms = NUM_SMS.get(target.arch, NUM_SMS_OTHERS)
    yield Hints(1, model.num_kv_heads, sms, 1, batch_invariant=True)
    if kind == "decode":
        for batch_size in BATCH_SIZES:
            for kv_lens in CLASSES:
                yield Hints(batch_size, model.num_kv_heads, sms, batch_size, kv_lens=kv_lens)
    else:
        for total_q in QUERY_LENGTHS:
            for batch_size in {1, min(total_q, 16), min(total_q, 256)}:
                yield Hints(batch_size, model.num_kv_heads, sms, total_q)


# ------------------------------------------------------------------------------------------------------------------ transformers
def transformers_variants(config: dict[str, Any], target: Target, dtype: str | None = None) -> list[Request]:
    """Every kernel that ``attn_implementation="cute_infer"`` and continuous batching launch for the model that ``config`` describes.

    Args:
        config: a model's ``config.json``. dtype: "float16" or "bfloat16"; default what the config says.

    Raises:
        ConfigError: the config lacks the heads of an attention layer, or names no 16-bit dtype.
    """
    model = transformers_model(config, dtype)
    found = _attention_requests(_transformers_specs(model, _causalities(config)), model, target, batch_invariant=False)
    for path, spec, tile in tiles_merge.variants(target, head_dims=(model.head_dim,), dtypes=(model.dtype,)):
        if spec.v_dtype == "float32" and not spec.lse:  # the partials of split KV; transformers asks for no LSE
            found[Request(path, spec, tile, target.arch)] = None
    return list(found)


def transformers_model(config: dict[str, Any], dtype: str | None = None) -> Model:
    """The preset that a ``config.json`` of transformers amounts to; of a model with several parts, its text part's."""
    config = {**config, **config.get("text_config", {})}
    heads = config.get("num_attention_heads")
    head_dim = config.get("head_dim") or (config["hidden_size"] // heads if heads and config.get("hidden_size") else None)
    if not heads or not head_dim:
        fail(ConfigError, f"no attention heads in the config of {config.get('model_type')}", expected="num_attention_heads, hidden_size")
    dtype = (dtype or str(config.get("dtype") or config.get("torch_dtype"))).removeprefix("torch.")
    if dtype not in ("float16", "bfloat16"):
        fail(ConfigError, "the dtype the model runs in is not known", got=dtype, expected="float16 | bfloat16", fix="pass --dtype")
    return Model(
        heads,
        config.get("num_key_value_heads") or heads,
        head_dim,
        config.get("vocab_size", 1),
        dtype,
        window=config.get("sliding_window") is not None and config.get("use_sliding_window", True),
        soft_cap=bool(config.get("attn_logit_softcapping")),
        sinks=config.get("model_type") == "gpt_oss",
    )


def _causalities(config: dict[str, Any]) -> tuple[bool, ...]:
    """Whether attention is causal. A bare model (BertModel, LlamaModel) does not say, so both are meant."""
    names = config.get("architectures") or ()
    return (True,) if any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names) else (True, False)


def _transformers_specs(model: Model, causalities: tuple[bool, ...]) -> Iterator[AttentionSpec]:
    """One request without padding, a batch (a paged cache of one-token pages), and sequences packed into one row."""
    for window in (False, True) if model.window else (False,):
        for kind, kv_layout in (
            ("decode", "single"),
            ("decode", "paged"),
            ("prefill", "single"),
            ("prefill", "paged"),
            ("prefill", "ragged"),
        ):
            for causal in causalities if kind == "prefill" else (False,):
                if causal or not window or kind == "decode":  # windows to both sides are refused
                    yield AttentionSpec(
                        kind=kind,
                        q_dtype=model.dtype,
                        kv_dtype=model.dtype,
                        o_dtype=model.dtype,
                        head_dim_qk=model.head_dim,
                        head_dim_vo=model.head_dim,
                        group_size=model.num_qo_heads // model.num_kv_heads,
                        kv_layout=kv_layout,
                        page_size=1 if kv_layout == "paged" else 0,
                        causal=causal,
                        window=window,
                        soft_cap=model.soft_cap,
                        sinks=model.sinks,
                    )
