"""Every library behind one call signature.

A candidate is a function of a problem that prepares whatever the library wants (wrappers, plans, views) and returns
``call(i)``, which runs it on input set i and returns the output, rows in the problem's order. Preparing may raise: the
reason becomes a dash in the table. Peers are imported when asked for, never at module level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cute_infer
from benchmarks.problems import DTYPES, AppendProblem, DecodeProblem, PrefillProblem, SamplingProblem
from benchmarks.protocol import Call

OURS = "cute_infer"


def prepare(candidates: dict[str, Callable[[Any], Call]], problem: Any) -> dict[str, Call]:
    """The calls of all candidates for one problem; one that cannot be prepared fails when it is called."""

    def failing(error: Exception) -> Call:
        def call(i: int) -> Any:
            raise error

        return call

    calls = {}
    for name, make in candidates.items():
        try:
            calls[name] = make(problem)
        except Exception as error:
            calls[name] = failing(error)
    return calls


# Decode -----------------------------------------------------------------------------------------------------------------


def decode_ours(p: DecodeProblem) -> Call:
    return _decode_wrapper(cute_infer.BatchDecodeWithPagedKVCacheWrapper(), p)


def decode_flashinfer(p: DecodeProblem) -> Call:
    import flashinfer

    workspace = torch.empty(512 * 2**20, dtype=torch.uint8, device=p.device)
    return _decode_wrapper(flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=True), p)


def _decode_wrapper(wrapper: Any, p: DecodeProblem) -> Call:
    wrapper.plan(
        p.indptr, p.indices, p.last_page_len, p.num_qo_heads, p.num_kv_heads, p.head_dim, p.page_size,
        q_data_type=torch.bfloat16, kv_data_type=DTYPES[p.kv_dtype],
    )  # fmt: skip
    out = torch.empty_like(p.q)
    return lambda i: wrapper.run(p.q, p.kv[i], out=out)


def decode_sdpa(backend: SDPBackend) -> Callable[[DecodeProblem], Call]:
    def make(p: DecodeProblem) -> Call:
        q, dense = p.q.unsqueeze(2), p.dense
        grouped = p.num_qo_heads != p.num_kv_heads

        def call(i: int) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, *dense[i], enable_gqa=grouped).squeeze(2)

        return call

    return make


def decode_fa4(p: DecodeProblem) -> Call:
    from flash_attn.cute import flash_attn_varlen_func

    q, table = p.q.unsqueeze(1), p.block_table

    def call(i: int) -> torch.Tensor:
        k, v = p.kv[i]
        out = flash_attn_varlen_func(q, k, v, seqused_k=p.seq_lens, page_table=table)
        return (out[0] if isinstance(out, tuple) else out).squeeze(1)

    return call


DECODE: dict[str, Callable[[DecodeProblem], Call]] = {
    OURS: decode_ours,
    "FlashInfer (tensor cores)": decode_flashinfer,
    "cuDNN (torch SDPA, contiguous KV)": decode_sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-2 (torch SDPA, contiguous KV)": decode_sdpa(SDPBackend.FLASH_ATTENTION),
    "FA4": decode_fa4,
}

# Prefill ----------------------------------------------------------------------------------------------------------------


def prefill_ours(p: PrefillProblem) -> Call:
    return _prefill_wrapper(cute_infer.BatchPrefillWithRaggedKVCacheWrapper(), p)


def prefill_ours_fast(p: PrefillProblem) -> Call:
    if p.dtype != "fp8":
        raise NotImplementedError("FP8 inputs only")
    return _prefill_wrapper(cute_infer.BatchPrefillWithRaggedKVCacheWrapper(), p, fp8_fast_accumulation=True)


def prefill_ours_paged(p: PrefillProblem) -> Call:
    kv_indptr, kv_indices, kv_last_page_len, caches = p.paged
    wrapper = cute_infer.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(
        p.indptr, kv_indptr, kv_indices, kv_last_page_len, p.num_qo_heads, p.num_kv_heads, p.head_dim, p.page_size,
        causal=p.causal, q_data_type=DTYPES[p.dtype], kv_data_type=DTYPES[p.dtype], o_data_type=torch.bfloat16,
    )  # fmt: skip
    out = torch.empty(p.qkv[0][0].shape, dtype=torch.bfloat16, device=p.device)
    return lambda i: wrapper.run(p.qkv[i][0], caches[i], out=out)


def prefill_flashinfer(p: PrefillProblem) -> Call:
    import flashinfer

    workspace = torch.empty(512 * 2**20, dtype=torch.uint8, device=p.device)
    return _prefill_wrapper(flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace), p)


def _prefill_wrapper(wrapper: Any, p: PrefillProblem, **options: Any) -> Call:
    wrapper.plan(
        p.indptr, p.indptr, p.num_qo_heads, p.num_kv_heads, p.head_dim,
        causal=p.causal, q_data_type=DTYPES[p.dtype], kv_data_type=DTYPES[p.dtype], o_data_type=torch.bfloat16, **options,
    )  # fmt: skip
    out = torch.empty(p.qkv[0][0].shape, dtype=torch.bfloat16, device=p.device)
    return lambda i: wrapper.run(*p.qkv[i], out=out)


def prefill_sdpa(backend: SDPBackend) -> Callable[[PrefillProblem], Call]:
    def make(p: PrefillProblem) -> Call:
        if p.dtype == "fp8":
            raise NotImplementedError("no FP8 inputs")
        grouped = p.num_qo_heads != p.num_kv_heads

        def call(i: int) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in p.batched(i))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=p.causal, enable_gqa=grouped)
            return out.transpose(1, 2).flatten(0, 1)

        return call

    return make


def prefill_fa4(p: PrefillProblem) -> Call:
    from flash_attn.cute import flash_attn_func

    def call(i: int) -> torch.Tensor:
        out = flash_attn_func(*p.batched(i), causal=p.causal)
        return (out[0] if isinstance(out, tuple) else out).flatten(0, 1)

    return call


PREFILL: dict[str, Callable[[PrefillProblem], Call]] = {
    OURS: prefill_ours,
    f"{OURS}, fast accumulation": prefill_ours_fast,
    f"{OURS} (paged)": prefill_ours_paged,
    "FlashInfer": prefill_flashinfer,
    "cuDNN (torch SDPA)": prefill_sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-2 (torch SDPA)": prefill_sdpa(SDPBackend.FLASH_ATTENTION),
    "FA4": prefill_fa4,
}

# Sampling ---------------------------------------------------------------------------------------------------------------
# Each operation: (which tensor it reads, the call on FlashInfer-compatible sampling modules, the same in plain torch or None).

TOP_P, TOP_K, MIN_P, TEMPERATURE = 0.9, 50, 0.1, 0.8
RANDOM = {"seed": 1, "offset": 0}  # fixed, so that no candidate pays for drawing a seed inside the captured graph


def torch_top_p(probs: torch.Tensor) -> torch.Tensor:
    values, ids = probs.sort(dim=-1, descending=True)
    values = values.masked_fill(values.cumsum(-1) - values > TOP_P, 0.0)
    return ids.gather(-1, torch.multinomial(values, 1)).squeeze(-1)


def torch_top_k(probs: torch.Tensor) -> torch.Tensor:
    values, ids = probs.topk(TOP_K, dim=-1)
    return ids.gather(-1, torch.multinomial(values, 1)).squeeze(-1)


def torch_top_k_renorm(probs: torch.Tensor) -> torch.Tensor:
    kept = torch.where(probs >= probs.topk(TOP_K, dim=-1).values[:, -1:], probs, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def torch_top_k_mask(logits: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits < logits.topk(TOP_K, dim=-1).values[:, -1:], float("-inf"))


SAMPLERS: dict[str, tuple[str, Callable[[Any, torch.Tensor], Any], Callable[[torch.Tensor], Any] | None]] = {
    "softmax": ("logits", lambda m, x: m.softmax(x), lambda x: x.softmax(-1)),
    "sample, from logits": ("logits", lambda m, x: m.sampling_from_logits(x, **RANDOM), None),
    "sample, from probs": ("probs", lambda m, x: m.sampling_from_probs(x, **RANDOM), None),
    "top-p, from logits": (
        "logits",
        lambda m, x: m.top_p_sampling_from_logits(x, top_p=TOP_P, **RANDOM),
        lambda x: torch_top_p(x.softmax(-1)),
    ),
    "top-p, from probs": ("probs", lambda m, x: m.top_p_sampling_from_probs(x, TOP_P, **RANDOM), torch_top_p),
    "top-k, from logits": (
        "logits",
        lambda m, x: m.top_k_sampling_from_logits(x, top_k=TOP_K, **RANDOM),
        lambda x: torch_top_k(x.softmax(-1)),
    ),
    "top-k, from probs": ("probs", lambda m, x: m.top_k_sampling_from_probs(x, TOP_K, **RANDOM), torch_top_k),
    "top-k then top-p, from logits": ("logits", lambda m, x: m.top_k_top_p_sampling_from_logits(x, TOP_K, TOP_P, **RANDOM), None),
    "top-k and top-p jointly, from logits": (
        "logits",
        lambda m, x: m.top_k_top_p_sampling_from_logits(x, TOP_K, TOP_P, filter_apply_order="joint", **RANDOM),
        None,
    ),
    "min-p, from probs": ("probs", lambda m, x: m.min_p_sampling_from_probs(x, MIN_P, **RANDOM), None),
    "temperature, top-k, top-p, min-p, from logits": (
        "logits",
        lambda m, x: m.sample(x, TEMPERATURE, TOP_K, TOP_P, MIN_P, **RANDOM),
        None,
    ),
    "top-p renorm": ("probs", lambda m, x: m.top_p_renorm_probs(x, TOP_P), None),
    "top-k renorm": ("probs", lambda m, x: m.top_k_renorm_probs(x, TOP_K), torch_top_k_renorm),
    "top-k mask": ("logits", lambda m, x: m.top_k_mask_logits(x, TOP_K), torch_top_k_mask),
}
REWRITES = ("softmax", "top-p renorm", "top-k renorm", "top-k mask")  # a row in, a row out: a copy of the tensor is timed beside them
COPY = "torch copy_ of the tensor"


def sampling_candidates(operation: str) -> dict[str, Callable[[SamplingProblem], Call]]:
    source, run, plain = SAMPLERS[operation]

    def on_module(find: Callable[[], Any]) -> Callable[[SamplingProblem], Call]:
        def make(p: SamplingProblem) -> Call:
            module, inputs = find(), getattr(p, source)
            return lambda i: run(module, inputs[i])

        return make

    def flashinfer_sampling() -> Any:
        import flashinfer.sampling

        return flashinfer.sampling

    candidates = {OURS: on_module(lambda: cute_infer.sampling), "FlashInfer": on_module(flashinfer_sampling)}
    if plain is not None:

        def make_plain(p: SamplingProblem) -> Call:
            inputs = getattr(p, source)
            return lambda i: plain(inputs[i])

        candidates["torch"] = make_plain
    if operation in REWRITES:

        def make_copy(p: SamplingProblem) -> Call:
            inputs = getattr(p, source)
            target = torch.empty_like(inputs[0])
            return lambda i: target.copy_(inputs[i])

        candidates[COPY] = make_copy
    return candidates


# Append -----------------------------------------------------------------------------------------------------------------


def append_with(find: Callable[[], Any]) -> Callable[[AppendProblem], Call]:
    def make(p: AppendProblem) -> Call:
        append = find().append_paged_kv_cache
        metadata = (p.indices, p.indptr, p.last_page_len)

        def call(i: int) -> torch.Tensor:
            append(*p.rows[i], p.batch_indices, p.positions, p.caches[i], *metadata)
            return p.caches[i][0]

        return call

    return make


def append_torch(p: AppendProblem) -> Call:
    pages, slots = p.indices[p.batch_indices].long(), p.positions.long()

    def call(i: int) -> torch.Tensor:
        for cache, rows in zip(p.caches[i], p.rows[i], strict=True):
            cache.index_put_((pages, slots), rows)
        return p.caches[i][0]

    return call


def _flashinfer() -> Any:
    import flashinfer

    return flashinfer


APPEND: dict[str, Callable[[AppendProblem], Call]] = {
    OURS: append_with(lambda: cute_infer),
    "FlashInfer": append_with(_flashinfer),
    "torch index_put_": append_torch,
}
