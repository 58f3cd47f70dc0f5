"""transformers on cute_infer's reference backend: tiny random models against eager attention, where the failure would be silent."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

transformers = pytest.importorskip("transformers")

from cute_infer import errors  # noqa: E402
from cute_infer.integrations import transformers as integration  # noqa: E402

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def registered():
    """Register, and give "paged|eager" back afterwards."""
    from transformers import AttentionInterface

    before = dict(AttentionInterface._global_mapping)
    integration.register()
    yield
    AttentionInterface._global_mapping.clear()
    AttentionInterface._global_mapping.update(before)
    gc.collect()


def pair(kind: str = "Llama", **config):
    """The same random weights with eager attention and with ours."""
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **config})
    made = []
    for attn in ("eager", "cute_infer"):
        torch.manual_seed(0)
        own = copy.deepcopy(config)  # some versions keep the one they get, and write the implementation into it
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(own, attn_implementation=attn)
        made.append(model.eval())
    made[1].load_state_dict(made[0].state_dict())
    return made


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape)


def padded(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    return torch.where(mask, tokens(len(lengths), width), 0), mask.long()


@torch.no_grad()
def compare(models, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> None:
    want, got = (m(input_ids=ids, attention_mask=mask, **kwargs).logits for m in models)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)


MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "GptOss": {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Qwen3": {},
}


@pytest.mark.parametrize("kind", MODELS)
def test_one_request(kind: str) -> None:
    compare(pair(kind, **MODELS[kind]), tokens(1, 13))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(kind: str, side: str) -> None:
    compare(pair(kind, **MODELS[kind]), *padded([13, 4, 1, 9], side))


def test_batch_without_padding() -> None:
    compare(pair(), tokens(3, 11))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(kind: str, cache: str) -> None:
    ids, mask = padded([9, 3, 6], "left")
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static" if cache == "static" else None}
    want, got = (m.generate(ids, attention_mask=mask, **options) for m in pair(kind, **MODELS[kind]))
    assert want.shape == (3, 17) and torch.equal(got, want)


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_from_a_static_cache_without_padding(batch: int) -> None:
    """The cache is longer than the text: its empty slots are not tokens."""
    ids = tokens(batch, 5)
    want, got = (m.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation="static") for m in pair())
    assert torch.equal(got, want)


def test_generate_for_one_request() -> None:
    ids = tokens(1, 5)
    want, got = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in pair())
    assert torch.equal(got, want)


def test_several_tokens_after_a_cached_prefix() -> None:
    ids, mask = padded([12, 7], "left")
    results = []
    for model in pair():
        with torch.no_grad():
            past = model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
            results.append(model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=past).logits)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_sequences_packed_into_one_row() -> None:
    models = pair()
    a, b, c = tokens(1, 5), tokens(1, 1), tokens(1, 7)
    row, positions = torch.cat([a, b, c], 1), torch.cat([torch.arange(5), torch.arange(1), torch.arange(7)])[None]
    with torch.no_grad():
        want = torch.cat([models[0](x).logits for x in (a, b, c)], 1)
        got = models[1](row, position_ids=positions, use_cache=False).logits
        bounds = torch.tensor([0, 5, 6, 13])
        told = models[1](row, position_ids=positions, use_cache=False, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told, want, rtol=1e-4, atol=1e-5)


def test_bidirectional_model() -> None:
    module = torch.nn.Module()
    module.is_causal = False
    q, k, v = (torch.randn(2, h, 6, 16) for h in (4, 2, 2))
    out, _ = integration._attention(module.eval(), q, k, v, None)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", ["cache", "projection", "static", "expanded", "odd"])
def test_caches_are_read_in_place(view: str) -> None:
    """Every memory order of K and V that transformers makes is a view; anything else is copied, and still right."""
    batch, heads, length, dim = 3, 2, 5, 16
    if view == "cache":
        x = torch.randn(batch, heads, length, dim)
    elif view == "projection":
        x = torch.randn(batch, length, heads, dim).transpose(1, 2)
    elif view == "static":
        x = torch.randn(batch, heads, 9, dim)[:, :, :length]
    elif view == "expanded":
        x = torch.randn(1, heads, length, dim).expand(batch, heads, length, dim)
    else:
        x = torch.randn(batch, heads, dim, length).transpose(2, 3)
    k, v, stride = integration._as_pages(x, x)
    for request in range(batch):
        for token in range(length):
            assert torch.equal(k[request * stride + token, 0], x[request, :, token])
    assert (k.data_ptr() == x.data_ptr()) == (view != "odd") and torch.equal(k, v)


# -------------------------------------------------------------------------------------------------------------- continuous batching
def test_continuous_batching_equals_generate() -> None:
    reference, model = pair()
    model.set_attn_implementation("eager")
    prompts = [tokens(n).tolist() for n in (9, 3, 6)]
    want = [reference.generate(torch.tensor([p]), max_new_tokens=6, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    calls = []
    integration.register_paged()
    paged = transformers.AttentionInterface._global_mapping["paged|eager"]
    transformers.AttentionInterface.register("paged|eager", lambda *a, **k: calls.append(1) or paged(*a, **k))
    assert continuous_batching(model, prompts, 6) == want and calls


def continuous_batching(model, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The tokens generated for each prompt by transformers' continuous batching, through what "paged|eager" stands for."""
    model.set_attn_implementation("paged|eager")
    config = transformers.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(block_size=8, num_blocks=32, max_batch_tokens=64)
    done = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    return [done[key].generated_tokens for key in sorted(done, key=lambda key: int(key.split("_")[-1]))]


# ------------------------------------------------------------------------------------------------------------------------------ GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_kernels_with_padding_and_a_cache(dtype: torch.dtype) -> None:
    """Logits of a padded prefill and of a decode step, no further from fp32 than eager attention of the same dtype (twice, FA's rule)."""
    config = {"head_dim": 64, "hidden_size": 256}
    ids, mask = padded([33, 9, 17, 1], "left")
    ids, mask, next_ids = ids.cuda(), mask.cuda(), tokens(4, 1).cuda()
    longer = torch.cat([mask, mask[:, :1].new_ones(4, 1)], 1)
    logits = {}
    for name, kind, model_dtype in (("exact", 0, torch.float32), ("eager", 0, dtype), ("ours", 1, dtype)):
        model = pair(**config)[kind].to("cuda", model_dtype)
        first = model(input_ids=ids, attention_mask=mask, use_cache=True)
        second = model(input_ids=next_ids, attention_mask=longer, past_key_values=first.past_key_values)
        logits[name] = torch.cat([first.logits[mask.bool()], second.logits[:, 0]]).float()
    error = (logits["ours"] - logits["exact"]).abs().max()
    assert error <= 2 * (logits["eager"] - logits["exact"]).abs().max() + torch.finfo(dtype).eps


KNOWN = torch.randint(2, 34, (160,), generator=torch.Generator().manual_seed(1))  # of 32 tokens: the next one follows from several


@pytest.fixture(scope="module")
def taught() -> dict[str, torch.Tensor]:
    """Weights that know KNOWN by heart: the next token wins by a wide margin, so greedy texts survive the rounding of 16-bit attention."""
    torch.manual_seed(0)
    model = llama(torch.float32, "eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        starts = torch.randint(0, len(KNOWN) - 48, (16,))
        rows = torch.stack([KNOWN[start : start + 48] for start in starts]).cuda()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def llama(dtype: torch.dtype, attention: str, weights: dict[str, torch.Tensor] | None = None):
    config = transformers.LlamaConfig(**{**SMALL, "hidden_size": 128, "head_dim": 64})
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)
    if weights is not None:
        model.load_state_dict(weights)
    return model.to("cuda", dtype).eval()


def known_prompts(lengths: list[int]) -> list[list[int]]:
    return [KNOWN[20 * i : 20 * i + length].tolist() for i, length in enumerate(lengths)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("lengths", [[17], [40], [9, 33, 16]], ids=["one", "one longer", "padded"])
def test_kernels_generate_eagers_tokens(taught, dtype: torch.dtype, cache: str | None, lengths: list[int]) -> None:
    prompts, width = known_prompts(lengths), max(lengths)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts]).cuda()
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 24, "do_sample": False, "cache_implementation": cache}
    want, got = (llama(dtype, attention, taught).generate(ids, **options) for attention in ("eager", "cute_infer"))
    assert torch.equal(got, want)
    text = KNOWN[lengths[0] : lengths[0] + 24]
    assert (got[0, width:].cpu() == text).float().mean() > 0.9  # and it is the text: nothing here is a tie


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_serve_continuous_batching(taught, dtype: torch.dtype) -> None:
    prompts = known_prompts([9, 33, 16])
    eager, model = llama(dtype, "eager", taught), llama(dtype, "eager", taught)
    want = [eager.generate(torch.tensor([p]).cuda(), max_new_tokens=12, do_sample=False)[0, len(p) :].tolist() for p in prompts]
    integration.register_paged()
    assert continuous_batching(model, prompts, 12) == want


# ------------------------------------------------------------------------------------------------------------------------- refusals
def call(**change):
    module = torch.nn.Module()
    q = torch.randn(1, 4, 3, 16)
    args = {"module": module.eval(), "query": q, "key": q[:, :2], "value": q[:, :2], "attention_mask": None} | change
    return integration._attention(**args)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dropout": 0.1}, "inference only"),
        ({"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "4 dimensions"),
        ({"sliding_window": 4, "is_causal": False}, "both sides"),
        ({"position_bias": torch.zeros(1, 4, 3, 3)}, "position_bias"),
    ],
)
def test_refusals(change: dict, words: str) -> None:
    with pytest.raises(errors.UnsupportedConfigError, match=words):
        call(**change)


def test_training_is_refused() -> None:
    _, model = pair()
    with pytest.raises(errors.UnsupportedConfigError, match="inference only"):
        model.train()(tokens(1, 4))
    with torch.no_grad():
        model(tokens(1, 4))


@pytest.mark.parametrize("name", ["cute_infer_flash", "paged|cute_infer"])
def test_names_transformers_keeps(name: str) -> None:
    with pytest.raises(errors.ConfigError, match="for itself"):
        integration.register(name)


def test_paged_function_without_a_cache() -> None:
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(errors.ConfigError, match="without a paged cache"):
        integration._paged_attention(torch.nn.Module(), q, q, q, None)
