"""Every refusal: the right exception, the offending argument and its value in the message, and what to do about it."""

from __future__ import annotations

import pytest
import torch

import cute_infer as fi
from cute_infer import (
    ConfigError,
    DeviceError,
    DTypeError,
    LayoutError,
    PageTableError,
    PlanError,
    ShapeError,
    UnsupportedConfigError,
    checks,
)
from cute_infer.attention import metadata
from tests.api.calls import ARGS, decode_plan, decode_run, graph, graph_prefill, half, ints, prefill, prefill_plan, ragged_plan, single
from tests.cases import Case
from tests.poison import make_batch

E5M2 = torch.float8_e5m2
# name -> (what is done, exception, pieces of the message in order)
REFUSALS = {
    # ------------------------------------------------------------------------------------------------------------------------- device
    "k on another device": (lambda: single(k=half(9, 2, 16).to("meta")), DeviceError, ["k is on meta", "cpu", ".to('cpu')"]),
    "cache on another device": (lambda: decode_run(k=half(4, 4, 2, 16).to("meta")), DeviceError, ["run(): k is on meta"]),
    "wrapper on another device": (
        lambda: fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(64, device="meta"))._use_device(torch.device("cpu")),
        DeviceError,
        ["on cpu", "works on meta", "one wrapper per device"],
    ),
    # -------------------------------------------------------------------------------------------------------------------------- dtype
    "not a tensor": (lambda: single(q=[1.0]), DTypeError, ["q must be a torch.Tensor", "list"]),
    "integer q": (lambda: single(q=torch.zeros(4, 16).int()), DTypeError, ["q has dtype int32", "float16 | bfloat16"]),
    "kv dtype": (lambda: single(q=half(4, 16).bfloat16()), DTypeError, ["k and v have dtype float16 but q has bfloat16"]),
    "v is not k": (lambda: single(v=half(9, 2, 16).to(E5M2)), DTypeError, ["v is float8_e5m2", "float16"]),
    "unknown dtype": (lambda: decode_plan(q_data_type="float17"), DTypeError, ["q_data_type", "float17"]),
    "q is not what was planned": (
        lambda: decode_run(q=half(2, 4, 16).bfloat16()),
        DTypeError,
        ["q is bfloat16 but plan() was called with q_data_type=float16", "plan(..., q_data_type=torch.bfloat16)"],
    ),
    "cache is not what was planned": (
        lambda: decode_run(k=half(4, 4, 2, 16).to(E5M2), v=half(4, 4, 2, 16).to(E5M2)),
        DTypeError,
        ["k is float8_e5m2 but plan() was called with kv_data_type=float16"],
    ),
    "out dtype": (lambda: decode_run(out=torch.empty(2, 4, 16)), DTypeError, ["out has dtype float32", "expected: float16"]),
    "float indptr": (lambda: decode_plan(torch.zeros(3), ints(0), ints(1, 1)), DTypeError, ["indptr has dtype float32"]),
    "sinks dtype": (lambda: decode_run(sinks=half(4)), DTypeError, ["sinks has dtype float16", "float32"]),
    "output dtype": (lambda: decode_plan(o_data_type=torch.int32), DTypeError, ["output dtype int32"]),
    # -------------------------------------------------------------------------------------------------------------------------- shape
    "q with too many dimensions": (lambda: single(q=half(1, 4, 16)), ShapeError, ["q has 3 dimensions, expected 2", "[1, 4, 16]"]),
    "head_dim differs": (lambda: single(k=half(9, 2, 24)), ShapeError, ["k has head_dim=24, expected 16", "head_dim=16]"]),
    "kv_len differs": (lambda: single(v=half(8, 2, 16)), ShapeError, ["v has kv_len=8, expected 9"]),
    "heads of q not a multiple": (lambda: single(q=half(5, 16)), ShapeError, ["num_qo_heads=5", "num_kv_heads=2"]),
    "heads in plan": (lambda: decode_plan(args=(6, 4, 16, 4)), ShapeError, ["num_qo_heads=6 is not a multiple of num_kv_heads=4"]),
    "no heads": (lambda: decode_plan(args=(0, 4, 16, 4)), ShapeError, ["num_qo_heads=0"]),
    "page_size": (lambda: decode_plan(args=(4, 2, 16, 0)), ConfigError, ["page_size must be a positive int", "0"]),
    "head_dim": (lambda: decode_plan(args=(4, 2, -16, 4)), ConfigError, ["head_dim must be a positive int", "-16"]),
    "q heads at run": (
        lambda: decode_run(q=half(2, 8, 16)),
        ShapeError,
        [
            "run(): q has num_qo_heads=8, expected 4",
            "got:      q [2, 8, 16] float16 cpu",
            "expected: q [num_tokens, num_qo_heads=4",
            "plan()",
        ],
    ),
    "batch size at run": (lambda: decode_run(q=half(3, 4, 16)), ShapeError, ["q has 3 rows", "batch_size=2"]),
    "q rows of prefill": (
        lambda: prefill_plan().run(half(4, 4, 16), half(4, 4, 2, 16), half(4, 4, 2, 16)),
        ShapeError,
        ["q has 4 rows", "qo_indptr[-1]=5"],
    ),
    "page_size at run": (lambda: decode_run(k=half(4, 8, 2, 16), v=half(4, 8, 2, 16)), ShapeError, ["page_size=8, expected 4"]),
    "layout mixed up": (lambda: decode_run(k=half(4, 2, 4, 16)), ShapeError, ["k has page_size=2", "kv_layout is 'NHD'"]),
    "v pages": (lambda: decode_run(v=half(5, 4, 2, 16)), ShapeError, ["v has num_pages=5, expected 4"]),
    "cache in one tensor": (
        lambda: decode_plan().run(half(2, 4, 16), half(4, 4, 2, 16)),
        ShapeError,
        ["must have 2 (K and V) at dimension 1", "[4, 4, 2, 16]", "pass (k_cache, v_cache)"],
    ),
    "cache of the wrong rank": (lambda: decode_run(k=half(8, 16)), ShapeError, ["k_cache has 2 dimensions, expected 4"]),
    "cache of the wrong type": (lambda: decode_plan().run(half(2, 4, 16), {"k": 1}), DTypeError, ["dict", "pass (k_cache"]),
    "out shape": (lambda: decode_run(out=half(2, 4, 8)), ShapeError, ["out has head_dim=8, expected 16"]),
    "lse shape": (lambda: decode_run(lse=torch.empty(4, 2)), ShapeError, ["lse has num_tokens=4, expected 2"]),
    "sinks shape": (lambda: single(sinks=torch.zeros(2)), ShapeError, ["sinks has num_qo_heads=2, expected 4"]),
    "indptr length": (lambda: decode_plan(ints(0, 1), ints(0), ints(1, 1)), ShapeError, ["indptr has batch_size + 1=2, expected 3"]),
    "qo_indptr length": (lambda: prefill_plan((0, 2)), ShapeError, ["qo_indptr", "expected 3"]),
    "k tokens of ragged": (
        lambda: ragged_plan().run(half(5, 4, 16), half(12, 2, 16), half(12, 2, 16)),
        ShapeError,
        ["k has 12 tokens", "kv_indptr[-1]=13"],
    ),
    "mask size": (lambda: prefill_plan(custom_mask=torch.ones(29).bool()), ShapeError, ["29 elements, the batch needs 30"]),
    "mask of single": (lambda: prefill(custom_mask=torch.ones(5, 8).bool()), ShapeError, ["custom_mask has kv_len=8, expected 9"]),
    "packed mask of single": (
        lambda: prefill(packed_custom_mask=torch.zeros(5, dtype=torch.uint8)),
        ShapeError,
        ["packed_custom_mask has num_bytes=5, expected 6"],
    ),
    "scale length": (lambda: decode_run(k_scale=torch.ones(3)), ShapeError, ["k_scale has 3 elements", "num_kv_heads=2"]),
    # ------------------------------------------------------------------------------------------------------------------- layout names
    "kv_layout": (
        lambda: fi.BatchDecodeWithPagedKVCacheWrapper(kv_layout="NDH"),
        LayoutError,
        ["invalid kv_layout 'NDH'", "'NHD' | 'HND'"],
    ),
    "kv_layout of single": (lambda: single(kv_layout="HDN"), LayoutError, ["invalid kv_layout 'HDN'"]),
    "pos_encoding_mode": (lambda: decode_plan(pos_encoding_mode="ROPE"), LayoutError, ["'ROPE'", "'NONE' | 'ROPE_LLAMA' | 'ALIBI'"]),
    "lse_base": (lambda: decode_run(lse_base="e"), LayoutError, ["lse_base 'e'", "'log2' | 'ln'"]),
    "backend": (lambda: fi.BatchDecodeWithPagedKVCacheWrapper(backend="fa9"), LayoutError, ["backend 'fa9'", "'reference'"]),
    "bitorder": (lambda: fi.packbits(torch.ones(3), "middle"), LayoutError, ["bitorder 'middle'"]),
    # --------------------------------------------------------------------------------------------------------------------- page tables
    "too few indices": (
        lambda: decode_plan(ints(0, 3, 6), ints(0, 1, 2, 3), ints(1, 4)),
        PageTableError,
        ["indptr ends at 6 pages while indices has 4 entries", "len(indices) = 4"],
    ),
    "last_page_len too large": (
        lambda: decode_plan(ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 5)),
        PageTableError,
        ["last_page_len[1] = 5 is outside 1..page_size=4", "(seq_len - 1) % page_size + 1"],
    ),
    "last_page_len of 0": (lambda: decode_plan(ints(0, 3, 4), ints(0, 1, 2, 3), ints(0, 4)), PageTableError, ["last_page_len[0] = 0"]),
    "indptr goes down": (
        lambda: decode_plan(ints(0, 3, 2), ints(0, 1, 2, 3), ints(1, 1)),
        PageTableError,
        ["kv_indptr decreases at request 1", "kv_indptr[1] = 3, kv_indptr[2] = 2", "cumsum"],
    ),
    "negative indptr": (lambda: decode_plan(ints(-1, 3, 4), ints(0, 1, 2, 3), ints(1, 1)), PageTableError, ["kv_indptr[0] is -1"]),
    "qo_indptr starts late": (lambda: prefill_plan((1, 2, 5)), PageTableError, ["qo_indptr[0] is 1"]),
    "qo_indptr goes down": (lambda: ragged_plan((0, 2, 1)), PageTableError, ["qo_indptr decreases at request 1"]),
    "kv_indptr of ragged goes down": (lambda: ragged_plan(kv=(0, 9, 3)), PageTableError, ["kv_indptr decreases"]),
    "page id beyond the cache": (
        lambda: decode_run(wrapper=decode_plan(ints(0, 3, 4), ints(0, 1, 2, 9), ints(1, 4))),
        PageTableError,
        ["page id 9 is outside the cache of 4 pages"],
    ),
    "negative page id": (
        lambda: decode_run(wrapper=decode_plan(ints(0, 3, 4), ints(0, -1, 2, 3), ints(1, 4))),
        PageTableError,
        ["page id -1"],
    ),
    "block table too narrow": (
        lambda: decode_plan(None, None, None, block_tables=torch.zeros(2, 2).int(), seq_lens=torch.tensor([9, 4])),
        PageTableError,
        ["needs 3 pages but block_tables has 2 columns"],
    ),
    "no page table": (lambda: decode_plan(None, None, None), ConfigError, ["no page table", "block_tables"]),
    "page table and lengths": (
        lambda: fi.from_page_table(torch.zeros(2, 2).int(), page_size=4),
        ConfigError,
        ["either seq_lens or num_pages_per_seq"],
    ),
    # ------------------------------------------------------------------------------------------------------------------- order of calls
    "run before plan": (
        lambda: fi.BatchDecodeWithPagedKVCacheWrapper().run(half(2, 4, 16), half(4, 4, 2, 16), half(4, 4, 2, 16)),
        PlanError,
        ["BatchDecodeWithPagedKVCacheWrapper has no plan", "call plan()"],
    ),
    "ragged run before plan": (
        lambda: fi.BatchPrefillWithRaggedKVCacheWrapper().run(half(2, 4, 16), half(4, 2, 16), half(4, 2, 16)),
        PlanError,
        ["no plan"],
    ),
    "q_len_per_req at run": (lambda: decode_run(q_len_per_req=2), ShapeError, ["q_len_per_req=2", "1"]),
    # ---------------------------------------------------------------------------------------------------------------------- graph mode
    "graph batch size": (
        lambda: graph().plan(ints(0, 1), ints(0), ints(1), *ARGS),
        ShapeError,
        ["the batch has 1 requests", "buffers hold 2"],
    ),
    "graph pages": (
        lambda: graph(pages=3).plan(ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 4), *ARGS),
        ShapeError,
        ["4 entries do not fit the 3 of paged_kv_indices_buffer"],
    ),
    "graph without buffers": (
        lambda: fi.BatchDecodeWithPagedKVCacheWrapper(use_cuda_graph=True),
        ConfigError,
        ["needs paged_kv_indptr_buffer"],
    ),
    "graph buffer lengths": (
        lambda: fi.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(None, ints(0, 0), ints(0), ints(0, 0)),
        ShapeError,
        ["paged_kv_indptr_buffer has batch_size + 1=2, expected 3"],
    ),
    "graph without mask buffers": (
        lambda: graph_prefill(custom_mask=torch.ones(30).bool()),
        ConfigError,
        ["made without custom_mask_buf"],
    ),
    "graph rows": (
        lambda: graph_prefill().plan(ints(0, 2, 6), ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 4), *ARGS),
        ShapeError,
        ["6 query rows exceed the 5 of the first plan()"],
    ),
    # --------------------------------------------------------------------------------------------------------------- unsupported options
    "jit_args": (lambda: fi.BatchDecodeWithPagedKVCacheWrapper(jit_args=["name"]), ConfigError, ["CUDA source", "logits_soft_cap"]),
    "multi-item scoring": (lambda: prefill_plan(prefix_len_ptr=ints(1)), UnsupportedConfigError, ["prefix_len_ptr", "custom_mask"]),
    "fp4 cache": (lambda: decode_run(kv_cache_sf=half(1)), UnsupportedConfigError, ["kv_cache_sf is not supported"]),
    "skip softmax": (lambda: decode_run(skip_softmax_threshold_scale_factor=1.0), UnsupportedConfigError, ["skip_softmax"]),
    "v_indptr": (lambda: ragged_plan(v_indptr=ints(0)), UnsupportedConfigError, ["v_indptr", "lay v out as k"]),
    "window_right": (lambda: decode_plan(window_right=2), UnsupportedConfigError, ["window_right=2"]),
    "q_scale per query head": (
        lambda: decode_run(q_scale=torch.ones(4)),
        UnsupportedConfigError,
        ["one value per query head", "multiply the scale into q"],
    ),
    "two names of one scale": (lambda: prefill(scale_k=torch.ones(1), k_scale=2.0), ConfigError, ["scale_k and k_scale"]),
    "unknown positional arguments": (
        lambda: decode_plan().run(half(2, 4, 16), (half(4, 4, 2, 16), half(4, 4, 2, 16)), torch.zeros(4), 0.5),
        ConfigError,
        ["2 unexpected positional arguments", "sinks="],
    ),
}
BUILTIN = {  # what a FlashInfer user would have caught
    DTypeError: (TypeError, ValueError),
    LayoutError: (KeyError, ValueError),
    PlanError: (RuntimeError,),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refused(refusal):
    act, error, pieces = refusal
    with pytest.raises(error) as caught:
        act()
    assert type(caught.value) is error
    assert all(isinstance(caught.value, builtin) for builtin in (fi.CuteInferError, *BUILTIN.get(error, (ValueError,))))
    text = str(caught.value)
    position = -1
    for piece in pieces:
        position = text.find(piece, position + 1)
        assert position >= 0, f"{piece!r} missing (in this order) in:\n{text}"


def test_two_names_of_the_workspace():
    with pytest.raises(TypeError, match="two names of one argument"):
        fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(8), workspace_buffer=torch.empty(8))


def test_q_len_per_req_is_frozen_in_a_graph():
    wrapper = graph()
    wrapper.plan(ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 4), *ARGS)
    with pytest.raises(fi.ConfigError, match="q_len_per_req=2"):
        wrapper.plan(ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 4), *ARGS, q_len_per_req=2)


@pytest.mark.parametrize(
    "q, kv, name", [(torch.float32, torch.float32, "q is float32"), (torch.float16, torch.float32, "k and v are float32")]
)
def test_float32_is_for_the_reference(q, kv, name):
    with pytest.raises(fi.DTypeError, match=name) as caught:
        checks.check_attention_dtypes("single_decode_with_kv_cache()", q, kv, q, "cuda")
    assert ".half()" in str(caught.value) and 'backend="reference"' in str(caught.value)
    checks.check_attention_dtypes("single_decode_with_kv_cache()", torch.float32, torch.float32, torch.float32, "cpu")


def test_what_is_legal():
    """Over-long indices, requests without pages whose last_page_len is anything, an empty batch."""
    decode_plan(ints(0, 0, 1), ints(0, 2**31 - 1, -5), ints(99, 4))
    wrapper = decode_plan(ints(0), ints(), ints())
    assert wrapper.run(half(0, 4, 16), (half(4, 4, 2, 16), half(4, 4, 2, 16))).shape == (0, 4, 16)


def test_a_refused_plan_leaves_the_last_one_in_force():
    batch = make_batch(Case("two", (9, 4)))
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*batch.csr, *ARGS)
    want = wrapper.run(batch.q, (batch.k_pages, batch.v_pages))
    for bad in (dict(last_page_len=ints(9, 9)), dict(pos_encoding_mode="ROPE")):
        arguments = dict(indptr=batch.page_indptr, indices=batch.page_indices, last_page_len=batch.last_page_len) | bad
        with pytest.raises(ValueError):
            wrapper.plan(num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, **arguments)
    assert torch.equal(wrapper.run(batch.q, (batch.k_pages, batch.v_pages)), want)


def test_check_reports_a_page_outside_the_cache():
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper()
    wrapper.check()  # nothing has run
    wrapper.plan(ints(0, 3, 4), ints(0, 77, 2, 3), ints(1, 4), *ARGS, validate=False)
    out = decode_run(wrapper=wrapper)
    assert out.isfinite().all()
    with pytest.raises(fi.PageTableError, match="page id was outside the cache"):
        wrapper.check()
    wrapper.check()  # reported once


# ----------------------------------------------------------------------------------------------------- metadata that is not on the host
class _Remote:
    """Stands for an int32 array on a GPU: it counts the copies to the host."""

    copies = 0

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.shape, self.device = values, values.shape, torch.device("cuda:0")
        self.is_cuda, self.is_cpu = True, False


@pytest.fixture
def remote(monkeypatch):
    def cat(arrays):
        joined = _Remote(torch.hstack([a.values for a in arrays]))

        def to_cpu():
            _Remote.copies += 1
            return joined.values

        joined.cpu = to_cpu
        return joined

    _Remote.copies = 0
    monkeypatch.setattr(metadata.torch, "cat", cat)
    monkeypatch.setattr(metadata.torch.cuda, "is_current_stream_capturing", lambda: False)
    return lambda *values: _Remote(ints(*values))


def test_gpu_metadata_is_fetched_in_one_copy(remote):
    got = metadata.host_view([remote(0, 2, 5), ints(7), remote(1, 4)], None)
    assert [x.tolist() for x in got] == [[0, 2, 5], [7], [1, 4]] and _Remote.copies == 1


def test_gpu_metadata_is_not_fetched_when_that_is_unwanted(remote, monkeypatch):
    from cute_infer import config

    arrays = [remote(0, 2), ints(1)]
    assert metadata.host_view(arrays, False) is None
    monkeypatch.setattr(metadata.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert metadata.host_view(arrays, True) is None
    monkeypatch.setattr(metadata.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("CUTE_INFER_VALIDATE", "0")
    config.reload_config()
    try:
        assert metadata.host_view(arrays, None) is None
        assert _Remote.copies == 0
        assert metadata.host_view(arrays, True) is not None
    finally:
        monkeypatch.undo()
        config.reload_config()
    assert metadata.host_view([ints(1), ints(2)], False) is not None  # on the CPU looking is free
