"""Our signatures against a snapshot of FlashInfer's: same names, same positional order, same defaults, or a reason why not."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import cute_infer as fi

SNAPSHOT = json.loads((Path(__file__).parent / "flashinfer_signatures.json").read_text())["signatures"]

OPTIONAL_WORKSPACE = "the workspace is optional: what is needed comes from torch"
# (function, parameter) -> why it differs. An entry that is no longer a deviation fails the test.
DEVIATIONS = {
    ("BatchDecodeWithPagedKVCacheWrapper.__init__", "float_workspace_buffer"): OPTIONAL_WORKSPACE,
    ("BatchPrefillWithPagedKVCacheWrapper.__init__", "float_workspace_buffer"): OPTIONAL_WORKSPACE,
    ("BatchPrefillWithRaggedKVCacheWrapper.__init__", "float_workspace_buffer"): OPTIONAL_WORKSPACE,
    ("MultiLevelCascadeAttentionWrapper.__init__", "float_workspace_buffer"): OPTIONAL_WORKSPACE,
    ("MultiLevelCascadeAttentionWrapper.reset_workspace_buffer", "int_workspace_buffers"): "there is no integer workspace",
    ("BatchDecodeWithPagedKVCacheWrapper.plan", "deprecated_positional_args"): "spelled out: the same arguments, in the same order",
    ("BatchDecodeWithPagedKVCacheWrapper.plan", "kwargs"): "spelled out",
}
# FlashInfer unpacks these from *deprecated_positional_args, in this order.
LEGACY_DECODE_PLAN = (
    "pos_encoding_mode window_left logits_soft_cap q_data_type kv_data_type o_data_type data_type sm_scale rope_scale rope_theta "
    "non_blocking block_tables seq_lens fixed_split_size disable_split_kv q_len_per_req"
).split()


def ours(name: str) -> inspect.Signature:
    found = fi
    for part in name.split("."):
        found = getattr(found, part)
    return inspect.signature(found)


def differences(name: str) -> dict[str, str]:
    """FlashInfer's parameters that ours lacks, has elsewhere or defaults otherwise."""
    parameters = ours(name).parameters
    mine = [p for n, p in parameters.items() if not ("." in name and n == "self")]
    positional = [p.name for p in mine if p.kind == p.POSITIONAL_OR_KEYWORD]
    theirs = [(p, kind, default) for p, kind, default in SNAPSHOT[name]]
    found = {}
    for i, (p, kind, default) in enumerate(theirs):
        if kind == "*args":
            wrong = "missing" if not any(m.kind == m.VAR_POSITIONAL for m in mine) else None
        elif p not in parameters:
            wrong = "missing"
        elif kind == "positional" and (i >= len(positional) or positional[i] != p):
            wrong = f"not at position {i}"
        else:
            given = parameters[p].default
            same = given is inspect.Parameter.empty if default == "<required>" else repr(given) == repr(eval(default))
            wrong = None if same else f"default {given!r}, FlashInfer's {default}"
        if wrong:
            found[p] = wrong
    return found


@pytest.mark.parametrize("name", SNAPSHOT)
def test_signature_is_flashinfers(name):
    found = differences(name)
    allowed = {p for function, p in DEVIATIONS if function == name}
    assert set(found) == allowed, f"{name}: {found}, allowed: {sorted(allowed)}"


@pytest.mark.parametrize("name", SNAPSHOT)
def test_what_we_add_cannot_shift_a_positional_argument(name):
    theirs = [p for p, kind, _ in SNAPSHOT[name] if kind == "positional"]
    for parameter in list(ours(name).parameters.values()):
        if parameter.name not in {p for p, _, _ in SNAPSHOT[name]} | {"self"} and parameter.kind == parameter.POSITIONAL_OR_KEYWORD:
            position = [p for p in ours(name).parameters if p != "self"].index(parameter.name)
            assert position >= len(theirs), parameter.name
            assert parameter.default is not inspect.Parameter.empty, parameter.name


def test_decode_plan_keeps_the_legacy_positional_order():
    names = [n for n in ours("BatchDecodeWithPagedKVCacheWrapper.plan").parameters if n != "self"]
    assert names[7 : 7 + len(LEGACY_DECODE_PLAN)] == LEGACY_DECODE_PLAN


@pytest.mark.parametrize("wrapper", [fi.BatchDecodeWithPagedKVCacheWrapper, fi.BatchPrefillWithPagedKVCacheWrapper])
def test_legacy_method_names(wrapper):
    assert wrapper.begin_forward is wrapper.plan
    for name in ("forward", "forward_return_lse", "end_forward", "run_return_lse", "reset_workspace_buffer", "workspace_size"):
        assert callable(getattr(wrapper, name))


def test_aliases():
    assert fi.BatchDecodeWrapper is fi.BatchDecodeWithPagedKVCacheWrapper
    assert fi.BatchPrefillWrapper is fi.BatchPrefillWithPagedKVCacheWrapper
