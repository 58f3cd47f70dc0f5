"""What a user says about an attention call, in the words the kernels use: dtypes, scales, soft cap, window, and the spec they add up to."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypedDict

import torch

from ..checks import POS_ENCODING_MODES, check_choice, describe, dtype_name, same_device
from ..config import get_config
from ..errors import ConfigError, DeviceError, DTypeError, ShapeError, UnsupportedConfigError, fail
from .spec import AttentionSpec

Scale: TypeAlias = "float | torch.Tensor | None"

# Kernels are picked from the configuration alone; peers' backend names are accepted as hints that change nothing.
BACKENDS = ("auto", "reference", "fa2", "fa3", "cudnn", "trtllm-gen", "cute-dsl", "xqa")

LSE_SCALE = {"log2": 1.0, "ln": math.log(2.0)}

_FAR = 1 << 30  # a window this long hides no key; kernels count positions in int32


class RunOptions(TypedDict, total=False):
    """Keywords of every wrapper's run() but ``return_lse``, which decides about the result; for type checkers."""

    q_scale: Scale
    k_scale: Scale
    v_scale: Scale
    out: torch.Tensor | None
    lse: torch.Tensor | None
    enable_pdl: bool | None
    window_left: int | None
    sinks: torch.Tensor | None
    lse_base: str


class DecodeRunOptions(RunOptions, total=False):
    """Those of the decode wrapper."""

    q_len_per_req: int | None
    kv_cache_sf: torch.Tensor | Sequence[torch.Tensor] | None
    skip_softmax_threshold_scale_factor: float | None


class PrefillRunOptions(RunOptions, total=False):
    """Those of the paged prefill wrapper."""

    kv_cache_sf: torch.Tensor | Sequence[torch.Tensor] | None
    skip_softmax_threshold_scale_factor: float | None
    use_fp16_softmax: bool | None
    uses_spcompress: bool | None


class RaggedRunOptions(RunOptions, total=False):
    """Those of the ragged prefill wrapper."""

    o_scale: float | None
    kv_cache_sf: Sequence[torch.Tensor] | None


class SingleOptions(TypedDict, total=False):
    """Keywords of both single-request functions but ``return_lse``; for type checkers."""

    kv_layout: str
    pos_encoding_mode: str
    k_scale: Scale
    v_scale: Scale
    window_left: int
    logits_soft_cap: float | None
    sm_scale: float | None
    rope_scale: float | None
    rope_theta: float | None
    sinks: torch.Tensor | None
    lse_base: str
    backend: str


class SingleDecodeOptions(SingleOptions, total=False):
    """Those of single_decode_with_kv_cache."""

    use_tensor_cores: bool
    q_scale: Scale


class SinglePrefillOptions(SingleOptions, total=False):
    """Those of single_prefill_with_kv_cache."""

    scale_q: torch.Tensor | None
    scale_k: torch.Tensor | None
    scale_v: torch.Tensor | None
    o_dtype: torch.dtype | None
    custom_mask: torch.Tensor | None
    packed_custom_mask: torch.Tensor | None
    causal: bool
    use_fp16_qk_reduction: bool
    kv_cache_sf: Sequence[torch.Tensor] | None
    fp8_fast_accumulation: bool


class Options(NamedTuple):
    """The options of plan() that run() reads again on every call; ``None`` means the default."""

    causal: bool = False
    pos_encoding_mode: str = "NONE"
    window_left: int = -1
    logits_soft_cap: float | None = None
    sm_scale: float | None = None
    rope_scale: float | None = None
    rope_theta: float | None = None
    fp8_fast_accumulation: bool = False


_ALL_DEFAULT = Options()[1:7]


def check_options(call: str, options: Options, head_dim_qk: int) -> Options:
    """``options`` as kernels take them: known names, finite numbers; a soft cap of 0 or less is none, as in FlashInfer.

    Raises:
        LayoutError: an unknown position encoding. ConfigError: something that is not a number, or not one the formulas allow.
        ShapeError: RoPE on an odd head dimension.
    """
    if options[1:7] == _ALL_DEFAULT:
        return options
    if torch.compiler.is_compiling():
        return _check_options(call, options, head_dim_qk)
    try:
        return _remembered_options(call, options, head_dim_qk)  # every layer and every step say the same
    except TypeError:  # something in it has no hash
        return _check_options(call, options, head_dim_qk)


def _check_options(call: str, options: Options, head_dim_qk: int) -> Options:
    check_choice(call, "pos_encoding_mode", options.pos_encoding_mode, POS_ENCODING_MODES)
    if options.pos_encoding_mode == "ROPE_LLAMA" and head_dim_qk % 2:
        fail(ShapeError, f"{call}: RoPE turns pairs of dimensions, head_dim={head_dim_qk} is odd", fix="pad head_dim, or apply RoPE before")
    soft_cap = _number(call, "logits_soft_cap", options.logits_soft_cap)
    return options._replace(
        window_left=check_window(call, options.window_left),
        logits_soft_cap=soft_cap if soft_cap is not None and soft_cap > 0.0 else None,
        sm_scale=_number(call, "sm_scale", options.sm_scale),
        rope_scale=_positive(call, "rope_scale", options.rope_scale),
        rope_theta=_positive(call, "rope_theta", options.rope_theta),
    )


_remembered_options = functools.lru_cache(maxsize=256)(_check_options)


def check_window(call: str, window_left: int) -> int:
    """A window as an int; one that hides no key of any request is none (-1)."""
    try:
        window = operator.index(window_left)
    except TypeError:
        what = f"{call}: window_left must be an int"
        fail(ConfigError, what, got=repr(window_left), expected="the number of keys to see before the query's own, or -1 for all")
    return window if window < _FAR else -1


def _number(call: str, name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real):
        got = describe(name, value)
        fail(ConfigError, f"{call}: {name} must be a number", got=got, expected="a float, or None for the default", fix=f"float({name})")
    if not math.isfinite(value):
        fail(ConfigError, f"{call}: {name} is {value}", expected="a finite number, or None for the default")
    return float(value)


def _positive(call: str, name: str, value: float | None) -> float | None:
    number = _number(call, name, value)
    if number is not None and number <= 0.0:
        fail(ConfigError, f"{call}: {name} is {number}", expected="a positive number, or None for the default")
    return number


class Scales(NamedTuple):
    """Scales as kernels take them: floats folded together, device tensors ``[num_kv_heads]`` apart.

    With 8-bit queries ``k_scale`` is ``[num_qo_heads]`` and holds the scales of q too.
    """

    sm_scale: float
    out_scale: float
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def make_spec(*facts: Any) -> AttentionSpec:
    """The spec of a call, see :func:`_make_spec` for the arguments. Equal ones give the same object, so that later stages may compare
    specs by identity."""
    return _make_spec(*facts) if torch.compiler.is_compiling() else _remembered_spec(*facts)


def _make_spec(
    kind: str,
    kv_layout: str,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    o_dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_vo: int,
    group_size: int,
    page_size: int,
    causal: bool,
    window: bool,
    soft_cap: bool,
    pos_encoding: str,
    custom_mask: bool,
    sinks: bool,
    k_scale: bool,
    v_scale: bool,
    lse: bool,
    fp8_fast_accumulation: bool = False,
) -> AttentionSpec:
    return AttentionSpec(
        kind=kind,
        q_dtype=dtype_name(q_dtype),
        kv_dtype=dtype_name(kv_dtype),
        o_dtype=dtype_name(o_dtype),
        head_dim_qk=head_dim_qk,
        head_dim_vo=head_dim_vo,
        group_size=group_size,
        kv_layout=kv_layout,
        page_size=page_size,
        causal=causal and kind == "prefill" and not custom_mask,
        window=window,
        soft_cap=soft_cap,
        pos_encoding=pos_encoding,
        custom_mask=custom_mask,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        lse=lse,
        fp8_fast_accumulation=fp8_fast_accumulation and kind == "prefill" and q_dtype.itemsize == 1,
    )


_remembered_spec = functools.lru_cache(maxsize=4096)(_make_spec)


def default_output(q_dtype: torch.dtype) -> torch.dtype:
    """The output dtype of a call that names none: q's, and bfloat16 for 8-bit queries, whose scales a result of 8 bits would not know."""
    return torch.bfloat16 if q_dtype.itemsize == 1 else q_dtype


def parse_dtype(call: str, name: str, dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype, or its name (``"float16"``, ``"half"``, ``"torch.bfloat16"``)."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        fail(DTypeError, f"{call}: {name} is not a dtype", got=repr(dtype), expected='a torch.dtype or its name, e.g. "float16"')
    return found


def choose_backend(call: str, backend: str) -> str:
    """``"reference"`` if asked for here or in the environment, otherwise ``backend``, which is one of the accepted names."""
    if backend != "auto":
        check_choice(call, "backend", backend, BACKENDS)
    return "reference" if _reference_everywhere() else backend


@torch.compiler.assume_constant_result
def _reference_everywhere() -> bool:
    return get_config().backend == "reference"


def lse_scale(call: str, lse_base: str) -> float:
    """What a base-2 log-sum-exp is multiplied with: 1 for ``"log2"``, ln 2 for ``"ln"``."""
    if lse_base not in LSE_SCALE:
        check_choice(call, "lse_base", lse_base, LSE_SCALE)
    return LSE_SCALE[lse_base]


def resolve_scales(
    call: str,
    options: Options,
    head_dim_qk: int,
    num_kv_heads: int,
    num_qo_heads: int,
    device: torch.device,
    q_scale: Scale,
    k_scale: Scale,
    v_scale: Scale,
    q_dtype: torch.dtype | None = None,
) -> Scales:
    """Fold float scales of q and k into sm_scale and of v into the output; keep tensors on the device, one value per KV head.

    A tensor is never read on the host. It has one element (expanded without a copy) or ``num_kv_heads``; that of 8-bit queries may have
    ``num_qo_heads``.
    """
    eight_bit_q = q_dtype is not None and q_dtype.itemsize == 1
    sm_scale = options.sm_scale if options.sm_scale is not None else 1.0 / math.sqrt(head_dim_qk)
    if q_scale is None and k_scale is None and v_scale is None:
        return Scales(sm_scale, 1.0, None, None)
    out_scale = 1.0
    per_head: dict[str, torch.Tensor] = {}
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        if isinstance(scale, torch.Tensor):
            per_head[name] = _per_head(call, name, scale, num_kv_heads, num_qo_heads, device, eight_bit_q and name == "q_scale")
        elif not isinstance(scale, Real):
            expected = f"a float, or a tensor with 1 or num_kv_heads={num_kv_heads} elements"
            fail(DTypeError, f"{call}: {name} is neither a number nor a tensor", got=describe(name, scale), expected=expected)
        elif name == "v_scale":
            out_scale *= scale
        else:
            sm_scale *= scale
    k = per_head.get("k_scale")
    q = per_head.get("q_scale")
    if eight_bit_q:
        k = _per_query_head(q, k, num_kv_heads, num_qo_heads)
    elif q is not None:
        k = q if k is None else k * q
    return Scales(sm_scale, out_scale, k, per_head.get("v_scale"))


def _per_query_head(q: torch.Tensor | None, k: torch.Tensor | None, num_kv_heads: int, num_qo_heads: int) -> torch.Tensor | None:
    """``q * k`` ``[num_qo_heads]``; ``q`` may have a value per query head, ``k`` has one per KV head."""
    parts = [x.view(num_kv_heads, -1) for x in (q, k) if x is not None]
    if not parts:
        return None
    product = parts[0] * parts[1] if len(parts) == 2 else parts[0]
    return product.expand(num_kv_heads, num_qo_heads // num_kv_heads).reshape(-1)


def _per_head(
    call: str, name: str, scale: torch.Tensor, num_kv_heads: int, num_qo_heads: int, device: torch.device, query_heads: bool
) -> torch.Tensor:
    """``[num_kv_heads]``, or as given where ``query_heads`` allows ``[num_qo_heads]``. A tensor on the CPU is moved."""
    if scale.device.type != "cpu" and not same_device(scale.device, device):
        what = f"{call}: {name} is on {scale.device} but the call runs on {device}"
        fail(DeviceError, what, got=describe(name, scale), fix=f"move it: {name}.to({str(device)!r})")
    flat = scale.reshape(-1).to(device=device, dtype=torch.float32)
    if len(flat) == num_kv_heads or (query_heads and len(flat) == num_qo_heads):
        return flat
    if len(flat) == 1:
        return flat.expand(num_kv_heads)
    if name == "q_scale" and len(flat) == num_qo_heads:
        fail(
            UnsupportedConfigError,
            f"{call}: q_scale has one value per query head",
            got=describe(name, scale),
            expected=f"a float, 1 element, or num_kv_heads={num_kv_heads} elements",
            fix="multiply the scale into q (only 8-bit queries take it per head), or use one scale per KV head",
        )
    fail(
        ShapeError,
        f"{call}: {name} has {len(flat)} elements",
        got=describe(name, scale),
        expected=f"a float, 1 element, or num_kv_heads={num_kv_heads} elements",
        fix="pass one scale per tensor or one per KV head",
    )


def scale_arguments(call: str, positional: tuple, q_scale: Scale, k_scale: Scale, v_scale: Scale) -> tuple[Scale, Scale, Scale]:
    """FlashInfer's positional ``scale_q, scale_k, scale_v`` after the inputs of run(), or the keywords."""
    if not positional:
        return q_scale, k_scale, v_scale
    if len(positional) != 3 or any(s is not None for s in (q_scale, k_scale, v_scale)):
        fail(
            ConfigError,
            f"{call}: {len(positional)} unexpected positional arguments",
            got=", ".join(describe("", a).strip() for a in positional),
            expected="nothing, or scale_q, scale_k, scale_v (and then no q_scale, k_scale, v_scale)",
            fix="pass attention sinks as sinks=, scales as q_scale=, k_scale=, v_scale=, sm_scale to plan()",
        )
    return positional
