"""Keys: the same for the same request in every process, different for any difference."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cute_infer.attention.spec import AttentionSpec
from cute_infer.jit import Request, key
from tests.jit.tiny_spec import PATH, TinySpec, TinyTile

SPECS = st.builds(
    TinySpec,
    factor=st.floats(allow_nan=False, allow_infinity=False),
    label=st.text(max_size=8),
    flag=st.booleans(),
    optional=st.none() | st.integers(-3, 3),
    dims=st.tuples(st.integers(0, 9), st.integers(0, 9)) | st.tuples(st.integers(0, 9)),
)
REQUEST = Request(PATH, TinySpec(), TinyTile(), "sm_90a")
DECODE = AttentionSpec("decode", "bfloat16", "bfloat16", "bfloat16", 128, 128, 8, "paged", 16)
OTHER = {
    "kind": "prefill",
    "kv_layout": "ragged",
    "page_size": 32,
    "pos_encoding": "ALIBI",
    "q_dtype": "float16",
    "kv_dtype": "float8_e4m3fn",
    "o_dtype": "float16",
}


def test_same_key_in_another_process(run):
    code = """
        from cute_infer.jit import Request, key
        from tests.jit.tiny_spec import *
        print(key.request_key(Request(PATH, TinySpec(), TinyTile(), "sm_90a")))
    """
    assert run(code, PYTHONHASHSEED="1").strip() == run(code, PYTHONHASHSEED="2").strip() == key.request_key(REQUEST)


@settings(deadline=None)
@given(SPECS, SPECS)
def test_specs_that_differ_have_keys_that_differ(a, b):
    assume(key.encode(a) != key.encode(b) or repr(a) != repr(b))
    assert key.request_key(dataclasses.replace(REQUEST, spec=a)) != key.request_key(dataclasses.replace(REQUEST, spec=b))


@settings(deadline=None)
@given(SPECS, st.sampled_from([field.name for field in dataclasses.fields(TinySpec)]), st.data())
def test_every_field_is_in_the_key(spec, name, data):
    value = getattr(data.draw(SPECS), name)
    assume(repr(value) != repr(getattr(spec, name)))
    changed = dataclasses.replace(spec, **{name: value})
    assert key.request_key(dataclasses.replace(REQUEST, spec=changed)) != key.request_key(dataclasses.replace(REQUEST, spec=spec))


@pytest.mark.parametrize("field", dataclasses.fields(AttentionSpec), ids=lambda field: field.name)
def test_every_field_of_the_attention_spec_is_in_the_key(field):
    old = getattr(DECODE, field.name)
    new = OTHER.get(field.name, not old if isinstance(old, bool) else old * 2 if isinstance(old, int) else None)
    changes = {"page_size": 0} if field.name == "kv_layout" else {}
    changed = dataclasses.replace(DECODE, **{**changes, field.name: new})
    assert key.request_key(Request("m:C", changed, TinyTile(), "sm_80")) != key.request_key(Request("m:C", DECODE, TinyTile(), "sm_80"))


@pytest.fixture(autouse=True)
def _path_without_module(monkeypatch):
    """Requests for "m:C" have no source to fingerprint; the other parts of the key are what these tests are about."""
    real = key.source_fingerprint
    monkeypatch.setattr(key, "_cached_fingerprint", lambda modules: real(module for module in modules if module != "m"))


@pytest.mark.parametrize("change", [{"arch": "sm_80"}, {"tile": TinyTile(threads=64)}, {"path": "tests.jit.tiny_kernel:Other"}])
def test_everything_else_of_a_request_is_in_the_key(change):
    assert key.request_key(dataclasses.replace(REQUEST, **change)) != key.request_key(REQUEST)


def test_one_true_and_one_point_zero_are_three_values():
    keys = {key.request_key(dataclasses.replace(REQUEST, spec=TinySpec(optional=value))) for value in (1, True, 1.0)}
    assert len(keys) == 3


def test_the_class_is_part_of_the_value():
    twin = dataclasses.make_dataclass("Twin", [("threads", int, 128), ("smem", int, 1024)], frozen=True)
    assert key.digest(key.encode(twin())) != key.digest(key.encode(TinyTile()))


@given(SPECS)
def test_decode_inverts_encode(spec):
    assert key.decode(key.encode(spec)) == spec


def test_request_survives_json():
    request = Request("m:C", DECODE, TinyTile(), "sm_80")
    assert Request.from_data(request.to_data()) == request


@pytest.mark.parametrize("value", [[1], {"a": 1}, {1}, b"x", object(), float("nan"), float("inf"), TinySpec, int])
def test_values_without_canonical_form_are_refused(value):
    with pytest.raises(TypeError, match="cannot name a kernel"):
        key.encode(TinySpec(label=value))


def test_mutable_dataclasses_are_refused():
    mutable = dataclasses.make_dataclass("Mutable", [("x", int, 1)])
    with pytest.raises(TypeError, match="not a frozen dataclass"):
        key.encode(mutable())


def test_toolchain_is_in_the_object_key():
    base = {"dsl": "4.8.1", "flavour": "cu12", "env": ""}
    keys = {key.object_key("r", base)} | {key.object_key("r", {**base, name: "other"}) for name in base}
    assert len(keys) == 4
