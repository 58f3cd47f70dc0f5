"""The model presets: host-only, so that a machine without the compiler can name what a bundle must hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cute_infer import cli, zoo
from cute_infer.attention.tiles import Hints, pick
from cute_infer.errors import ConfigError
from cute_infer.jit import Request, Target, key

TARGETS = [Target.parse(arch) for arch in ("sm_80", "sm_86", "sm_90a")]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.capability[0]}.{target.capability[1]}")
@pytest.mark.parametrize("name", zoo.MODELS)
def test_variants(name: str, target: Target):
    requests = zoo.variants(zoo.MODELS[name], target)
    assert requests == zoo.variants(zoo.MODELS[name], target)
    assert len({key.request_key(request) for request in requests}) == len(requests)
    kernels = {request.name.partition("_sm")[0] for request in requests}
    assert {"decode", "prefill", "merge", "paged_kernels", "sampling_kernels_rows"} <= kernels
    for request in requests:
        assert request.arch == target.arch and Request.from_data(request.to_data()) == request


def test_options_change_the_attention_kernels():
    model, target = zoo.MODELS["llama3-8b"], TARGETS[-1]
    pages = {r.spec.page_size for r in zoo.variants(model, target, page_sizes=(16, 64)) if r.name.startswith("decode")}
    dtypes = {r.spec.kv_dtype for r in zoo.variants(model, target, kv_dtype="float8_e4m3fn") if r.name.startswith("decode")}
    assert pages == {16, 64} and dtypes == {"float8_e4m3fn"}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_group_sizes_are_whole(name: str):
    model = zoo.MODELS[name]
    assert model.num_qo_heads % model.num_kv_heads == 0


def test_no_compiler_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cutlass", None)
    assert zoo.variants(zoo.MODELS["mixtral-8x7b"], TARGETS[0])


# ------------------------------------------------------------------------------------------------------------------ transformers
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "vocab_size": 128256, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_models_of_transformers():
    assert zoo.transformers_model(LLAMA) == zoo.MODELS["llama3-8b"]
    mistral = {**LLAMA, "dtype": "bfloat16", "sliding_window": 4096, "head_dim": 64, "attn_logit_softcapping": 50.0}
    assert zoo.transformers_model(mistral) == zoo.Model(32, 8, 64, 128256, window=True, soft_cap=True)
    assert not zoo.transformers_model({**mistral, "use_sliding_window": False}).window
    assert zoo.transformers_model({**LLAMA, "model_type": "gpt_oss"}).sinks
    assert zoo.transformers_model({"model_type": "vision", "text_config": LLAMA}).num_kv_heads == 8
    for config, word in (({**LLAMA, "torch_dtype": "float32"}, "--dtype"), ({"model_type": "mamba"}, "no attention heads")):
        with pytest.raises(ConfigError, match=word):
            zoo.transformers_model(config)
    assert zoo.transformers_model({**LLAMA, "torch_dtype": None}, "float16").dtype == "float16"


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2", "GptOss", "Bert"])
def test_a_bundle_holds_every_call_of_a_transformers_model(kind: str, monkeypatch: pytest.MonkeyPatch):
    """The specs of a padded and a single generation (or encoding) on the CPU, with the tile that an H200 would choose."""
    transformers = pytest.importorskip("transformers")
    from cute_infer.integrations import transformers as integration

    integration.register()
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
        "pad_token_id": 0,
    }
    if kind != "Bert":
        sizes |= {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": None}
    if kind in ("Mistral", "Gemma2", "GptOss"):
        sizes |= {"sliding_window": 5}
    if kind == "GptOss":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model" if kind == "Bert" else f"{kind}ForCausalLM")._from_config(
        config, attn_implementation="cute_infer"
    )
    listed = {
        (r.path, r.spec, r.tile)
        for r in zoo.transformers_variants({**config.to_dict(), "architectures": [type(model).__name__]}, TARGETS[-1], "bfloat16")
    }
    asked = set()
    plain = integration.run_attention

    def spy(spec, q, k, *args, batch_size, **kwargs):
        asked.add(
            (type(spec)(**{**vars(spec), **dict.fromkeys(("q_dtype", "kv_dtype", "o_dtype"), "bfloat16")}), batch_size, k.shape[2], len(q))
        )
        return plain(spec, q, k, *args, batch_size=batch_size, **kwargs)

    monkeypatch.setattr(integration, "run_attention", spy)
    for ids in (torch.randint(2, 97, (1, 7)), torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])):
        if kind == "Bert":
            model.eval()(ids, attention_mask=(ids != 0).long())
        else:
            model.eval().generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=3, do_sample=False)
    assert len({spec for spec, *_ in asked}) >= 2
    for spec, batch_size, num_kv_heads, total_q in asked:
        choice = pick(spec, TARGETS[-1], Hints(batch_size, num_kv_heads, 132, total_q))
        assert (choice.path, spec, choice.tile) in listed, spec


def test_compile_lists_a_transformers_model(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shown = CliRunner().invoke(cli.cli, ["compile", "--list", "--transformers", str(tmp_path), "--arch", "sm_90a"])
    assert shown.exit_code == 0 and "page=1" in shown.output and "single" in shown.output, shown.output
    (tmp_path / "config.json").write_text("{")
    assert CliRunner().invoke(cli.cli, ["compile", "--list", "--transformers", str(tmp_path), "--arch", "sm_80"]).exit_code == 2
