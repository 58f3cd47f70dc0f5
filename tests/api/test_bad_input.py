"""Arguments that a formula, a kernel or a reader of the results would stumble over later: each is refused at the call, by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cute_infer as fi
from cute_infer import ConfigError, DeviceError, DTypeError, LayoutError, PageTableError, PlanError, ShapeError, logits_processor
from tests.api.calls import ARGS, decode_plan, decode_run, graph_prefill, half, ints, prefill, prefill_plan, ragged_plan, single

LEVELS = ([ints(0, 2), ints(0, 1, 2)], [ints(0, 1), ints(0, 1, 2)], [ints(0), ints(1, 2)], [ints(4), ints(2, 3)])
CSR = (ints(0, 3, 4), ints(0, 1, 2, 3), ints(1, 4))


def cache() -> tuple[torch.Tensor, torch.Tensor]:
    return half(4, 4, 2, 16), half(4, 4, 2, 16)


def cascade(*levels: list[torch.Tensor], **options) -> fi.MultiLevelCascadeAttentionWrapper:
    wrapper = fi.MultiLevelCascadeAttentionWrapper(2)
    wrapper.plan(*(levels or LEVELS), *ARGS, **options)
    return wrapper


def graph_buffers(**changed) -> fi.BatchPrefillWithPagedKVCacheWrapper:
    buffers = dict(
        qo_indptr_buf=ints(0, 0, 0),
        paged_kv_indptr_buf=ints(0, 0, 0),
        paged_kv_indices_buf=ints(0, 0),
        paged_kv_last_page_len_buf=ints(0, 0),
    )
    return fi.BatchPrefillWithPagedKVCacheWrapper(use_cuda_graph=True, **(buffers | changed))


def append(**changed) -> None:
    arguments = dict(
        append_key=half(3, 2, 16),
        append_value=half(3, 2, 16),
        batch_indices=ints(0, 0, 1),
        positions=ints(7, 8, 3),
        paged_kv_cache=cache(),
        kv_indices=ints(0, 1, 2, 3),
        kv_indptr=ints(0, 3, 4),
        kv_last_page_len=ints(1, 4),
    )
    fi.append_paged_kv_cache(**(arguments | changed))


def pipe(*steps: str, **arguments) -> torch.Tensor:
    chain = [getattr(logits_processor, step)() for step in steps]
    return logits_processor.LogitsPipe(chain, compile=False)(torch.randn(3, 50), **arguments)


ROPE = dict(pos_encoding_mode="ROPE_LLAMA")
WORKSPACE = fi.BatchDecodeWithPagedKVCacheWrapper().workspace_size
# name -> (what is done, exception, pieces of the message in order)
REFUSALS = {
    # ------------------------------------------------------------------------------------------------- numbers that are none, or not usable
    **{
        f"{name}: {call.__name__}({option}={value})": (lambda call=call, o={option: value} | extra: call(**o), ConfigError, [option, text])
        for call in (single, prefill, decode_plan, prefill_plan, ragged_plan)
        for name, option, value, extra, text in (
            ("NaN", "sm_scale", math.nan, {}, "is nan"),
            ("text", "sm_scale", "0.1", {}, "must be a number"),
            ("tensor", "sm_scale", torch.tensor(0.1), {}, "must be a number"),
            ("infinite", "logits_soft_cap", math.inf, {}, "is inf"),
            ("fraction", "window_left", 2.5, {}, "must be an int"),
            ("None", "window_left", None, {}, "must be an int"),
            ("zero", "rope_scale", 0.0, ROPE, "is 0.0"),
            ("negative", "rope_theta", -1.0, ROPE, "is -1.0"),
        )
    },
    "window at run": (lambda: decode_run(window_left=1.5), ConfigError, ["run(): window_left must be an int", "1.5"]),
    "NaN at forward": (
        lambda: decode_plan().forward(half(2, 4, 16), cache(), sm_scale=math.nan),
        ConfigError,
        ["forward(): sm_scale is nan"],
    ),
    "mode at forward": (
        lambda: prefill_plan().forward(half(5, 4, 16), cache(), pos_encoding_mode="X"),
        LayoutError,
        ["forward()", "pos_encoding_mode 'X'"],
    ),
    "forward before plan": (
        lambda: fi.BatchDecodeWithPagedKVCacheWrapper().forward(half(2, 4, 16), cache()),
        PlanError,
        ["forward()", "has no plan"],
    ),
    "odd head_dim under RoPE": (
        lambda: single(half(4, 15), half(9, 2, 15), half(9, 2, 15), **ROPE),
        ShapeError,
        ["RoPE turns pairs of dimensions", "15"],
    ),
    "no head_dim": (lambda: single(half(4, 0), half(9, 2, 0), half(9, 2, 0)), ConfigError, ["head_dim must be a positive int", "0"]),
    "heads as text": (lambda: decode_plan(args=("4", 2, 16, 4)), ConfigError, ["num_qo_heads must be a positive int", "'4'"]),
    "heads as float": (lambda: decode_plan(args=(4, 2.0, 16, 4)), ConfigError, ["num_kv_heads must be a positive int", "2.0"]),
    "negative head_dim_vo": (lambda: decode_plan(head_dim_vo=-8), ConfigError, ["head_dim_vo must be a positive int", "-8"]),
    "no head_dim_vo": (lambda: prefill_plan(head_dim_vo=0), ConfigError, ["head_dim_vo must be a positive int", "0"]),
    "fixed_split_size": (lambda: decode_plan(fixed_split_size="4"), ConfigError, ["fixed_split_size must be an int", "'4'"]),
    "scale as text": (lambda: decode_run(k_scale="2"), DTypeError, ["k_scale is neither a number nor a tensor", "str"]),
    "scale on another device": (
        lambda: decode_run(k_scale=torch.ones(1, device="meta")),
        DeviceError,
        ["k_scale is on meta", ".to('cpu')"],
    ),
    # ------------------------------------------------------------------------------------------------------------------------------- masks
    "additive mask": (
        lambda: prefill(custom_mask=torch.zeros(5, 9)),
        DTypeError,
        ["custom_mask has dtype float32", "True = keep", "mask == 0"],
    ),
    "additive mask of a batch": (lambda: prefill_plan(custom_mask=torch.zeros(30)), DTypeError, ["custom_mask has dtype float32"]),
    "transposed mask": (
        lambda: prefill(custom_mask=torch.ones(9, 5).bool()),
        ShapeError,
        ["custom_mask has qo_len=9, expected 5", "[qo_len=5, kv_len=9]"],
    ),
    "mask in a list": (lambda: prefill_plan(custom_mask=[True]), DTypeError, ["custom_mask must be a torch.Tensor", "list"]),
    "mask on another device": (
        lambda: prefill(custom_mask=torch.ones(5, 9, device="meta").bool()),
        DeviceError,
        ["custom_mask is on meta"],
    ),
    "packed mask too short": (
        lambda: prefill_plan(packed_custom_mask=torch.ones(4, dtype=torch.uint8)),
        ShapeError,
        ["has 4 bytes, the batch needs 5"],
    ),
    "mask with k in a list": (lambda: prefill(k=[1], custom_mask=torch.ones(5, 9).bool()), DTypeError, ["k must be a torch.Tensor"]),
    # -------------------------------------------------------------------------------------------------------------------------- workspace
    "workspace that is a layout": (
        lambda: fi.BatchDecodeWithPagedKVCacheWrapper("NHD"),
        DTypeError,
        ["float_workspace_buffer must be a torch.Tensor", "str", "by name"],
    ),
    "strided workspace": (
        lambda: fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(64, dtype=torch.uint8)[::2]),
        ShapeError,
        ["is not contiguous", "[2]"],
    ),
    "no new workspace": (lambda: decode_plan().reset_workspace_buffer(None, None), DTypeError, ["reset_workspace_buffer()", "NoneType"]),
    "workspace_size without a page size": (lambda: WORKSPACE(*CSR, 4, 2, 16, 0), ConfigError, ["page_size must be a positive int"]),
    "workspace_size of an unknown mode": (lambda: WORKSPACE(*CSR, *ARGS, pos_encoding_mode="X"), LayoutError, ["workspace_size()", "'X'"]),
    "workspace_size of no table": (lambda: WORKSPACE(None, None, None, *ARGS), ConfigError, ["workspace_size(): no page table"]),
    # --------------------------------------------------------------------------------------------------------------- caches and results
    "cache in lists": (lambda: decode_plan().run(half(2, 4, 16), ([1], [2])), DTypeError, ["k_cache must be a torch.Tensor", "list"]),
    "half a cache": (lambda: decode_plan().run(half(2, 4, 16), (cache()[0], None)), DTypeError, ["v_cache must be a torch.Tensor"]),
    "k and v of different dtypes": (
        lambda: decode_plan().run(half(2, 4, 16), cache()[0], cache()[1].bfloat16()),
        DTypeError,
        ["v is bfloat16", "float16"],
    ),
    "expanded out": (lambda: decode_run(out=half(1, 4, 16).expand(2, 4, 16)), ShapeError, ["out is expanded", "[0, 16, 1]"]),
    "expanded lse": (lambda: decode_run(lse=torch.zeros(1, 4).expand(2, 4), return_lse=True), ShapeError, ["lse is expanded"]),
    "expanded state": (
        lambda: fi.merge_state_in_place(torch.ones(1, 4, 16).expand(3, 4, 16), torch.ones(3, 4), torch.ones(3, 4, 16), torch.ones(3, 4)),
        ShapeError,
        ["merge_state_in_place(): v is expanded"],
    ),
    "o_dtype": (lambda: prefill(o_dtype="float17"), DTypeError, ["o_dtype is not a dtype", "float17"]),
    "o_scale": (lambda: ragged_plan().run(half(5, 4, 16), half(13, 2, 16), half(13, 2, 16), o_scale=2.0), ConfigError, ["o_scale"]),
    # ------------------------------------------------------------------------------------------------------------------------ page tables
    "page id beyond int32": (
        lambda: decode_plan(ints(0, 3, 4), torch.tensor([0, 1, 2, 2**32 + 3]), ints(1, 4)),
        PageTableError,
        ["indices holds 4294967299", "int32"],
    ),
    "lengths in a list": (
        lambda: decode_plan(None, None, None, block_tables=ints(0, 1).view(1, 2), seq_lens=[3]),
        DTypeError,
        ["plan(): seq_lens", "list"],
    ),
    "negative length": (
        lambda: decode_plan(None, None, None, block_tables=ints(0, 1).view(1, 2), seq_lens=ints(-3)),
        PageTableError,
        ["seq_lens holds -3"],
    ),
    "fast plan of floats": (
        lambda: fi.fast_decode_plan(decode_plan(), torch.zeros(3), ints(0), ints(1, 1), *ARGS),
        DTypeError,
        ["fast_decode_plan(): indptr"],
    ),
    "fast plan of another length": (
        lambda: fi.fast_decode_plan(decode_plan(), ints(0, 1), ints(0), ints(1, 1), *ARGS),
        ShapeError,
        ["indptr has batch_size + 1=2"],
    ),
    "fast plan without a page size": (
        lambda: fi.fast_decode_plan(decode_plan(), *CSR, 4, 2, 16, 0),
        ConfigError,
        ["fast_decode_plan(): page_size must be a positive"],
    ),
    "lengths of another batch": (lambda: fi.get_seq_lens(ints(0, 3, 4), ints(1), 4), ShapeError, ["kv_last_page_len has batch_size=1"]),
    "offsets as floats": (lambda: fi.get_seq_lens(torch.zeros(2), ints(1), 4), DTypeError, ["get_seq_lens(): kv_indptr has dtype float32"]),
    "table too narrow": (
        lambda: fi.from_page_table(ints(0, 1).view(1, 2), page_size=4, seq_lens=ints(9)),
        PageTableError,
        ["needs 3 pages", "has 2 columns"],
    ),
    "table too narrow for pages": (
        lambda: fi.from_page_table(ints(0, 1).view(1, 2), page_size=4, num_pages_per_seq=ints(3)),
        PageTableError,
        ["needs 3 pages"],
    ),
    "negative nnz": (lambda: fi.get_batch_indices_positions(ints(0, 2), ints(5), -1), ConfigError, ["nnz must be an int, 0 or more", "-1"]),
    "nnz as float": (lambda: fi.get_batch_indices_positions(ints(0, 2), ints(5), 2.0), ConfigError, ["nnz", "2.0"]),
    "lengths before the append": (
        lambda: fi.get_batch_indices_positions(ints(0, 2), ints(1), 2),
        PageTableError,
        ["appends 2 tokens but seq_lens[0] = 1", "add"],
    ),
    "append offsets go down": (
        lambda: fi.get_batch_indices_positions(ints(0, 3, 2), ints(5, 5), 3),
        PageTableError,
        ["append_indptr decr"],
    ),
    "rows in a list": (lambda: append(append_key=[1]), DTypeError, ["append_key must be a torch.Tensor", "list"]),
    "fewer values than keys": (
        lambda: append(append_value=half(2, 2, 16)),
        ShapeError,
        ["append_value has nnz=2, expected 3 as append_key has"],
    ),
    "segments beyond x": (
        lambda: fi.segment_packbits(torch.ones(10).bool(), ints(0, 3, 20)),
        PageTableError,
        ["indptr ends at 20 but x has 10 elements"],
    ),
    "segments go down": (
        lambda: fi.segment_packbits(torch.ones(10).bool(), ints(0, 8, 3)),
        PageTableError,
        ["indptr decreases at request 1"],
    ),
    "segments as floats": (lambda: fi.segment_packbits(torch.ones(2).bool(), torch.tensor([0.0, 2.0])), DTypeError, ["indptr has dtype"]),
    # -------------------------------------------------------------------------------------------------------------------------- graph mode
    "lengths of graph buffers": (
        lambda: graph_buffers(paged_kv_indptr_buf=ints(0, 0)),
        ShapeError,
        ["paged_kv_indptr_buf has batch_size+1=2, expected 3"],
    ),
    "strided graph buffer": (
        lambda: graph_buffers(qo_indptr_buf=ints(0, 0, 0, 0, 0, 0)[::2]),
        ShapeError,
        ["qo_indptr_buf is not contiguous"],
    ),
    "graph buffers on two devices": (
        lambda: graph_buffers(paged_kv_indices_buf=ints(0).to("meta")),
        DeviceError,
        ["paged_kv_indices_buf is on meta"],
    ),
    "mask buffer without offsets": (
        lambda: graph_buffers(custom_mask_buf=torch.zeros(8, dtype=torch.uint8)),
        ConfigError,
        ["custom_mask_buf and mask_indptr_buf belong"],
    ),
    "mask buffer of floats": (
        lambda: graph_buffers(custom_mask_buf=torch.zeros(8), mask_indptr_buf=ints(0, 0, 0)),
        DTypeError,
        ["custom_mask_buf has dtype float32"],
    ),
    # ---------------------------------------------------------------------------------------------------------------------------- cascades
    "levels of different rows": (
        lambda: cascade([ints(0, 2), ints(0, 1, 3)], *LEVELS[1:]),
        ShapeError,
        ["the levels do not cover the same rows", "2, 3"],
    ),
    "cascade without q": (lambda: cascade().run(None, cache()), DTypeError, ["q must be a torch.Tensor"]),
    "cascade into another device": (
        lambda: cascade().run(half(2, 4, 16), cache(), out=half(2, 4, 16).to("meta")),
        DeviceError,
        ["out is on meta"],
    ),
    "workspaces of a cascade": (
        lambda: cascade().reset_workspace_buffer(torch.empty(8), [torch.empty(8)]),
        ShapeError,
        ["int_workspace_buffers has 1 arrays for 2"],
    ),
    # --------------------------------------------------------------------------------------------------------------------------- sampling
    "steps that are none": (
        lambda: logits_processor.LogitsPipe([logits_processor.TopK]),
        logits_processor.LegalizationError,
        ["Processor 0", "not a LogitsProcessor"],
    ),
    "temperatures of another batch": (
        lambda: pipe("Temperature", "Softmax", temperature=torch.ones(2)),
        ShapeError,
        ["expected length 3, got 2"],
    ),
    "no matrix of logits": (
        lambda: logits_processor.LogitsPipe([logits_processor.Softmax()])(torch.ones(5)),
        ShapeError,
        ["logits has 1 dimensions, expected 2"],
    ),
    # ------------------------------------------------------------------------------------------------------------------------------ others
    "explain for a number": (
        lambda: decode_plan().explain(90),
        ConfigError,
        ["target must be the name of an architecture", "90", "sm_90a"],
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_refused(refusal):
    act, error, pieces = refusal
    with pytest.raises(error) as caught:
        act()
    text, position = str(caught.value), -1
    for piece in pieces:
        position = text.find(piece, position + 1)
        assert position >= 0, f"{piece!r} missing (in this order) in:\n{text}"


# ------------------------------------------------------------------------------------------------------------------ what is welcome instead
@pytest.mark.parametrize("cap", [None, 0, 0.0, -3.0])
def test_a_soft_cap_of_zero_or_less_is_none(cap):
    q, k, v = half(4, 16), half(9, 2, 16), half(9, 2, 16)
    assert torch.equal(single(q, k, v, logits_soft_cap=cap), single(q, k, v))
    assert not torch.equal(single(q, k, v, logits_soft_cap=0.1), single(q, k, v))


def test_a_window_longer_than_any_sequence_is_none():
    q, k, v = half(4, 16), half(9, 2, 16), half(9, 2, 16)
    assert torch.equal(single(q, k, v, window_left=2**40), single(q, k, v))
    assert decode_plan(window_left=2**40)._window_left == -1


def test_numpy_numbers():
    q, k, v = half(4, 16), half(9, 2, 16), half(9, 2, 16)
    options = dict(sm_scale=np.float32(0.25), window_left=np.int64(3))
    assert torch.equal(single(q, k, v, **options), single(q, k, v, sm_scale=0.25, window_left=3))


def test_data_type_stands_for_the_query_too():
    assert decode_plan(q_data_type=None, data_type=torch.bfloat16)._plan_info[8:10] == (torch.bfloat16, torch.bfloat16)


def test_o_dtype_by_name():
    assert prefill(o_dtype="float32").dtype == torch.float32


def test_nothing_has_a_gradient():
    """On the CPU as on the GPU, where a kernel leaves no graph behind."""
    q, k, v = half(5, 4, 16).requires_grad_(), half(9, 2, 16).requires_grad_(), half(9, 2, 16)
    assert not prefill(q, k, v).requires_grad
    assert not decode_run(half(2, 4, 16).requires_grad_()).requires_grad
    state = torch.randn(3, 4, 16, requires_grad=True)
    fi.merge_state_in_place(state, torch.randn(3, 4), torch.randn(3, 4, 16), torch.randn(3, 4))


def test_a_refused_plan_of_a_cascade_leaves_none():
    wrapper = cascade()
    wrapper.run(half(2, 4, 16), cache())
    with pytest.raises(PageTableError):
        wrapper.plan(*LEVELS[:3], [ints(4), ints(2, 9)], *ARGS)
    with pytest.raises(PlanError):
        wrapper.run(half(2, 4, 16), cache())


def test_a_refused_forward_changes_nothing():
    wrapper, q, kv = decode_plan(), half(2, 4, 16), cache()
    want = wrapper.run(q, kv)
    with pytest.raises(ConfigError):
        wrapper.forward(q, kv, sm_scale=0.5, logits_soft_cap=math.nan)
    assert torch.equal(wrapper.run(q, kv), want)


def test_graph_buffers_that_fit():
    graph_buffers(custom_mask_buf=torch.zeros(8, dtype=torch.uint8), mask_indptr_buf=ints(0, 0, 0))
    graph_prefill()


def test_a_temperature_of_zero_is_greedy_step_by_step_too():
    logits = torch.randn(3, 50)
    chain = [logits_processor.Temperature(), logits_processor.Softmax(), logits_processor.Sample()]
    for temperature in (0.0, -1.0, torch.tensor([0.0, 0.0, -2.0])):
        for fused in (True, False):
            ids = logits_processor.LogitsPipe(chain, compile=fused)(logits, temperature=temperature)
            assert torch.equal(ids.long(), logits.argmax(-1)), (temperature, fused)
    mixed = logits_processor.LogitsPipe(chain[:2])(logits, temperature=torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(mixed[1:], (logits[1:] / torch.tensor([[1.0], [2.0]])).softmax(-1))
    assert mixed[0].max() == 1.0


def test_a_min_p_above_one_keeps_the_largest():
    kept = pipe("Softmax", "MinP", min_p=2.0)
    assert torch.equal(kept.sum(-1), torch.ones(3)) and torch.equal((kept > 0).sum(-1), torch.ones(3).long())
