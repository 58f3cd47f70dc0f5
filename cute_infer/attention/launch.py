"""One call from every public attention function to the code that computes it.

CUDA tensors go to a kernel, CPU tensors to the reference, traced tensors to the torch op (whose CUDA, CPU and Meta implementations are
these same functions). There is no silent fallback: on CUDA a spec without a kernel raises, and ``backend="reference"`` is a choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..alignment import aligned, is_aligned
from . import reference
from .lengths import UNKNOWN, KvLens
from .merge import merge_partials
from .plan import BoundKernel, Workspace
from .spec import AttentionSpec

_functional: dict[tuple[int, int], Workspace] = {}


def run_attention(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    batch_size: int,
    qo_indptr: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    kv_last_page_len: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    mask_indptr: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sm_scale: float,
    out_scale: float = 1.0,
    soft_cap: float = 0.0,
    lse_scale: float = 1.0,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
    window_left: int = -1,
    workspace: Workspace | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
    kv_lens: KvLens = UNKNOWN,
) -> Launch | None:
    """Write attention of ``q`` over ``k``, ``v`` into ``out`` (and ``lse``).

    Shapes as in ``device/args.py``: q ``[total_q, num_qo_heads, head_dim_qk]``, k and v ``[pages, page_size, num_kv_heads, head_dim]``
    (ragged and single: one page that holds every token), out ``[total_q, num_qo_heads, head_dim_vo]``, lse ``[total_q, num_qo_heads]``
    fp32. Everything has been checked by the caller. ``kv_lens`` is a hint for the choice of a tile.

    Returns:
        The launch, to be repeated with other tensors of the same shapes and the same metadata; None when there is nothing to repeat.

    Raises:
        UnsupportedConfigError: CUDA tensors and no kernel covers ``spec``.
    """
    tensors = (q, k, v, out, lse, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, mask, mask_indptr, sinks, k_scale, v_scale)
    scalars = (sm_scale, out_scale, soft_cap, lse_scale, rope_scale, rope_theta, window_left)
    if torch.compiler.is_compiling() and backend != "reference":
        status = workspace.status if workspace is not None else None
        torch.ops.cute_infer.attention(*tensors, status, spec.to_string(), batch_size, *scalars, batch_invariant, *kv_lens)
    elif q.is_cuda and backend != "reference":
        return _launch(spec, batch_size, tensors, scalars, workspace, batch_invariant, kv_lens)
    else:
        _reference(spec, tensors, scalars, workspace.status if workspace is not None else None)
    return None


class Launch:
    """A launch of a kernel, ready to be repeated: what no later run() of the same plan changes, sorted out once.

    The arguments of a kernel (``device/args.py``) are q, k, v, out, lse, then the metadata, sinks, the rest of the tensors, two scales and
    the remaining scalars; the tuples kept here are what lies between those that change.
    """

    __slots__ = ("bound", "between", "workspace_tensors", "scalars", "lse_scale", "lse", "sinks", "looks", "device_index")

    def __init__(self, bound: BoundKernel, args: tuple) -> None:
        q, k, v, _, lse = args[:5]
        self.bound = bound
        self.between = args[5:11]  # qo_indptr ... mask_indptr
        self.sinks = args[11] is not None
        self.workspace_tensors = args[12:17]  # k_scale, v_scale, out_partial, lse_partial, status
        self.scalars = args[19:]  # soft_cap ... num_ctas
        self.lse_scale: float = args[20]
        self.lse = lse is not None
        self.looks = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype)
        self.device_index = q.get_device()

    def fits(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether q, k and v look like those of the first launch. Anything else, and what is not a tensor, wants a thorough check."""
        index = self.device_index
        try:
            return (
                (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype) == self.looks
                and q.get_device() == index
                and k.get_device() == index
                and v.get_device() == index
            )
        except AttributeError:
            return False

    def suits(self, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether another argument is a tensor on the same device with this shape and dtype."""
        try:
            return tensor.shape == shape and tensor.dtype is dtype and tensor.get_device() == self.device_index
        except AttributeError:
            return False

    def repeat(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        sinks: torch.Tensor | None,
        sm_scale: float,
        out_scale: float,
    ) -> None:
        """Launch again; ``sm_scale`` is positive."""
        args = (q, k, v, out, lse, *self.between, sinks, *self.workspace_tensors, sm_scale, out_scale, *self.scalars)
        _run(self.bound, args)


def _launch(
    spec: AttentionSpec,
    batch_size: int,
    tensors: tuple,
    scalars: tuple,
    workspace: Workspace | None,
    batch_invariant: bool,
    kv_lens: KvLens = UNKNOWN,
) -> Launch | None:
    q, k, v, out, lse = tensors[:5]
    total_q, num_qo_heads = q.shape[0], q.shape[1]
    if total_q == 0 or num_qo_heads == 0:
        return None  # a grid of zero CTAs is an error
    repeatable = True
    sm_scale, out_scale, soft_cap, lse_scale, rope_scale, rope_theta, window_left = scalars
    if k.shape[0] * k.shape[1] == 0:  # a copy descriptor must describe something
        if spec.kv_layout == "single":
            out.zero_()
            if lse is not None:
                lse.fill_(-math.inf)
            return None
        k, v = (t.new_zeros((1, max(1, t.shape[1]), *t.shape[2:])) for t in (k, v))
        tensors, repeatable = (q, k, v, *tensors[3:]), False
    if sm_scale <= 0.0:  # kernels take row maxima before they scale: q' = -q with a positive scale is the same attention
        tensors, sm_scale = (_times(q, -1.0 if sm_scale < 0.0 else 0.0), *tensors[1:]), -sm_scale or 1.0
        repeatable = False
    if workspace is None:
        workspace, repeatable = _functional_workspace(q.device), False
    bound = workspace.bind(spec, batch_size, k.shape[2], total_q, batch_invariant, kv_lens)
    split = bound.choice.tile.split_kv
    out_partial, lse_partial = workspace.partials(bound.num_splits, total_q, num_qo_heads, spec.head_dim_vo) if split else (None, None)
    args = (
        *tensors,
        out_partial,
        lse_partial,
        workspace.status,
        sm_scale,
        out_scale,
        soft_cap,
        lse_scale,
        1.0 / rope_scale,
        math.log2(rope_theta),
        window_left,
        bound.num_splits,
        bound.num_ctas,
    )
    _run(bound, args)
    return Launch(bound, args) if repeatable else None


def _times(q: torch.Tensor, sign: float) -> torch.Tensor:
    """``q`` times -1 or 0; torch multiplies no 8-bit floats, but their sign is a bit."""
    if q.dtype.itemsize > 1:
        return q * sign
    return (q.view(torch.uint8) ^ 0x80).view(q.dtype) if sign else torch.zeros_like(q)


def _run(bound: BoundKernel, args: tuple) -> None:
    """Launch the kernel and, when it splits KV, the merge of its partials."""
    try:
        bound.run(*args)
    except (ValueError, TypeError):
        _launch_aligned(bound, args)
    out_partial, lse_partial = args[14], args[15]
    if out_partial is not None:
        merge_partials(out_partial, lse_partial, args[3], args[4], args[20])


def _launch_aligned(bound: BoundKernel, args: tuple) -> None:
    """The kernel refused an argument before it launched: some rows do not start on 16-byte boundaries. Copy those and try once more."""
    q, k, v, out, *rest = args
    result = out if is_aligned(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    bound.run(aligned(q), aligned(k), aligned(v), result, *rest)
    if result is not out:
        out.copy_(result)


def _functional_workspace(device: torch.device) -> Workspace:
    """Scratch for calls without a wrapper: one per stream; inside a graph a fresh one, so that replays share nothing with eager calls."""
    if torch.cuda.is_current_stream_capturing():
        return Workspace(device)
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream)
    workspace = _functional.get(key)
    if workspace is None:
        workspace = _functional[key] = Workspace(device)
    return workspace


def _reference(spec: AttentionSpec, tensors: tuple, scalars: tuple, status: torch.Tensor | None) -> None:
    q, k, v, out, lse, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, mask, mask_indptr, sinks, k_scale, v_scale = tensors
    sm_scale, out_scale, soft_cap, lse_scale, rope_scale, rope_theta, window_left = scalars
    reference.attention(
        spec,
        q,
        k,
        v,
        out,
        lse,
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
        kv_last_page_len=kv_last_page_len,
        mask=mask,
        mask_indptr=mask_indptr,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        sm_scale=sm_scale,
        out_scale=out_scale,
        soft_cap=soft_cap,
        lse_scale=lse_scale,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        window_left=window_left,
        status=status,
    )


# ---------------------------------------------------------------------------------------------------------------------------- torch op
_lib = torch.library.Library("cute_infer", "FRAGMENT")
_lib.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!)? lse, Tensor? qo_indptr, Tensor? kv_indptr, Tensor? kv_indices, "
    "Tensor? kv_last_page_len, Tensor? mask, Tensor? mask_indptr, Tensor? sinks, Tensor? k_scale, Tensor? v_scale, Tensor(c!)? status, "
    "str spec, int batch_size, float sm_scale, float out_scale, float soft_cap, float lse_scale, float rope_scale, float rope_theta, "
    "int window_left, bool batch_invariant, int kv_len_mean, int kv_len_spread) -> ()"
)


def _op_cuda(*args: Any) -> None:
    tensors, status, spec, batch_size, scalars, batch_invariant = args[:14], args[14], args[15], args[16], args[17:24], args[24]
    kv_lens = KvLens(*args[25:])
    # Scratch of this call alone: compiled code may run with every allocation in a CUDA graph's pool, where nothing else may outlive it.
    workspace = Workspace(args[0].device, status=status)
    _launch(AttentionSpec.from_string(spec), batch_size, tensors, scalars, workspace, batch_invariant, kv_lens)


def _op_cpu(*args: Any) -> None:
    _reference(AttentionSpec.from_string(args[15]), args[:14], args[17:24], args[14])


def _op_meta(*args: Any) -> None:
    """Everything is written in place: no shapes to report."""


_lib.impl("attention", _op_cuda, "CUDA")
_lib.impl("attention", _op_cpu, "CPU")
_lib.impl("attention", _op_meta, "Meta")

__all__ = ["Launch", "Workspace", "run_attention"]
