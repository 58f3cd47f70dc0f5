"""Importing is cheap and has no side effects; every public name resolves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from packaging.version import Version

import cute_infer as fi


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


HEAVY = "print([m for m in ('cutlass', 'tvm_ffi', 'triton', 'transformers', 'rich') if m in sys.modules], torch.cuda.is_initialized())"


def test_import_is_light():
    assert run(f"import sys, torch, cute_infer; {HEAVY}") == "[] False"


def test_the_reference_needs_no_compiler_and_no_cuda():
    code = """
import sys, torch, cute_infer as fi
q, k, v = torch.randn(4, 16).half(), torch.randn(9, 2, 16).half(), torch.randn(9, 2, 16).half()
fi.single_decode_with_kv_cache(q, k, v)
fi.single_prefill_with_kv_cache(q[None], k, v, causal=True)
w = fi.BatchDecodeWithPagedKVCacheWrapper()
w.plan(torch.tensor([0, 1]).int(), torch.tensor([0]).int(), torch.tensor([9]).int(), 4, 2, 16, 16)
w.run(q[None], (torch.randn(1, 16, 2, 16).half(), torch.randn(1, 16, 2, 16).half()))
fi.packbits(torch.ones(9))
"""
    assert run(code + HEAVY) == "[] False"


@pytest.mark.parametrize("name", fi.__all__)
def test_every_public_name_resolves(name):
    assert getattr(fi, name) is getattr(fi, name)


# FlashInfer 0.6.18 has these in flashinfer.sampling and at top level.
FLAT_SAMPLING = """
chain_speculative_sampling min_p_sampling_from_probs sampling_from_logits sampling_from_probs softmax top_k top_k_mask_logits
top_k_renorm_probs top_k_sampling_from_probs top_k_top_p_sampling_from_logits top_k_top_p_sampling_from_probs top_p_renorm_probs
top_p_sampling_from_probs
""".split()


@pytest.mark.parametrize("name", FLAT_SAMPLING)
def test_sampling_is_flat_too(name):
    assert getattr(fi, name) is getattr(fi.sampling, name)


def test_modules_are_attributes():
    assert run("import cute_infer as fi; print(fi.logits_processor.LogitsPipe.__name__, 'llama3-8b' in fi.zoo.MODELS)") == "LogitsPipe True"


def test_dir_lists_what_is_lazy():
    assert set(fi.__all__) <= set(dir(fi))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        fi.no_such_thing  # noqa: B018


def test_version():
    assert Version(fi.__version__) >= Version("0.1.0")


def test_cuda_version(monkeypatch):
    assert fi.get_cuda_version() == Version(torch.version.cuda or "0.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert str(fi.get_cuda_version()) == "13.0"


def test_warmup_names_the_models_it_knows():
    with pytest.raises(fi.ConfigError, match="llama3-8b"):
        fi.warmup("no-such-model")


def test_star_import():
    namespace: dict[str, object] = {}
    exec("from cute_infer import *", namespace)
    assert "single_decode_with_kv_cache" in namespace
