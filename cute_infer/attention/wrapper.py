"""What the plan/run wrappers share: the workspace, the metadata buffers, and run().

A wrapper remembers three kinds of things between calls, and only plan() changes them:

    Planned     what run()'s inputs must look like (counts, dimensions, dtypes)
    options     causal, window, scales ... as plain attributes, read by every run()
    buffers     int32 metadata on the device, read live by the kernels; in CUDA-graph mode the caller's own tensors

run() checks its inputs against the first, allocates the outputs and makes one call to ``launch.run_attention``. What that call found out
is kept as a ``Launch``: while nothing it depends on changes, the next run() (the next layer) is that launch again with other tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch.compiler import is_compiling

from ..checks import (
    KV_LAYOUTS,
    check_attention_dtypes,
    check_choice,
    check_page_ids,
    check_planned_dtype,
    check_tensor,
    check_written,
    describe,
    refuse,
    same_device,
)
from ..errors import ConfigError, DeviceError, PageTableError, PlanError, ShapeError, UnsupportedConfigError, fail
from .explain import Batch, Chip, Explanation, Request, chip_named, chip_of, explain
from .launch import Launch, run_attention
from .lengths import UNKNOWN, KvLens
from .metadata import to_device
from .options import (
    LSE_SCALE,
    Options,
    Scale,
    check_options,
    check_window,
    choose_backend,
    default_output,
    lse_scale,
    make_spec,
    parse_dtype,
    resolve_scales,
)
from .plan import Workspace, bind, workspace_bytes
from .spec import AttentionSpec


class Planned(NamedTuple):
    """What plan() was told. ``None`` stands for what the host was not told: it is then not checked.

    total_q     rows of q.   total_kv  tokens of k and v (ragged).   page_ids  smallest and largest page id in use (paged).
    batch_invariant   the kernel is chosen without looking at the batch.   kv_lens  the class of its KV lengths, a hint.
    """

    kind: str
    kv_layout: str
    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int | None
    page_size: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    o_dtype: torch.dtype
    custom_mask: bool = False
    total_q: int | None = None
    total_kv: int | None = None
    page_ids: tuple[int, int] | None = None
    batch_invariant: bool = False
    kv_lens: KvLens = UNKNOWN

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads


class _PlanModule:
    """Stands where FlashInfer keeps its compiled module: engines call ``wrapper._cached_module.plan(...)`` to refresh a schedule.

    There is nothing to refresh, the kernels read lengths from the device, so any arguments are taken and nothing is done.
    """

    def plan(self, *args: Any) -> list[int]:
        return [0]


# Attributes that a run() reads besides its arguments. Engines assign to some of them, so a kept launch is dropped with any of them.
_READ_BY_RUN = frozenset(
    (
        "_backend _plan_info _causal _pos_encoding_mode _window_left _logits_soft_cap _sm_scale _rope_scale _rope_theta "
        "_fp8_fast_accumulation _qo_indptr_buf "
        "_paged_kv_indptr_buf _paged_kv_indices_buf _paged_kv_last_page_len_buf _kv_indptr_buf _custom_mask_buf _mask_indptr_buf"
    ).split()
)


class BatchAttentionWrapper:
    """Base of the batch wrappers; holds no attention of its own."""

    # metadata attribute -> constructor argument, in the order of the kernel's arguments
    _buffers: ClassVar[dict[str, str]] = {}
    _required_in_graph: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        workspace: torch.Tensor | None,
        workspace_alias: torch.Tensor | None,
        kv_layout: str,
        use_cuda_graph: bool,
        backend: str,
        buffers: dict[str, torch.Tensor | None],
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        self._launch: Launch | None = None  # what the last run() did, see _repeat
        call = type(self).__name__
        if workspace is not None and workspace_alias is not None:
            raise TypeError(f"{call}(): float_workspace_buffer and workspace_buffer are two names of one argument; pass one")
        if jit_args is not None or jit_kwargs is not None:
            fail(
                ConfigError,
                f"{call}: jit_args and jit_kwargs carry CUDA source, which is not compiled here",
                fix="use the options of plan() and run(): logits_soft_cap, window_left, pos_encoding_mode, custom_mask, sinks",
            )
        check_choice(call, "kv_layout", kv_layout, KV_LAYOUTS)
        self._kv_layout = kv_layout
        self._backend = choose_backend(call, backend)
        self._use_cuda_graph = use_cuda_graph
        self._float_workspace_buffer = _check_workspace(call, workspace if workspace is not None else workspace_alias)
        self._int_workspace_buffer: torch.Tensor | None = None
        self._pin_memory_int_workspace_buffer: torch.Tensor | None = None
        self._cached_module = _PlanModule()
        self._plan_info: Planned | None = None
        self._plan_options: Options | None = None  # with which the kernel was loaded
        self._spec: AttentionSpec | None = None  # of the last run()
        self._accepted: tuple | None = None  # shapes, dtypes and devices that run() has checked
        self._workspace: Workspace | None = None
        self._device: torch.device | None = None
        self._set_options(Options())
        for name in ("_qo_indptr_buf", "_custom_mask_buf", "_mask_indptr_buf"):
            setattr(self, name, None)
        for name in self._buffers:
            setattr(self, name, buffers.get(name))
        self._check_buffers(call, buffers)
        owned = [t for t in (self._float_workspace_buffer, *buffers.values()) if t is not None]
        if owned:
            self._use_device(owned[0].device)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in _READ_BY_RUN:
            object.__setattr__(self, "_launch", None)

    def _check_buffers(self, call: str, buffers: dict[str, torch.Tensor | None]) -> None:
        """Metadata buffers of the caller: needed, and written, in CUDA-graph mode only."""
        for name in self._required_in_graph:
            if self._use_cuda_graph and buffers.get(name) is None:
                fail(
                    ConfigError,
                    f"{call}: use_cuda_graph=True needs {self._buffers[name]}",
                    fix="allocate the metadata buffers once; plan() copies into them and captured graphs read them live",
                )
        given = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        for name, buffer in given.items():
            label = self._buffers[name]
            dtype = torch.uint8 if name == "_custom_mask_buf" else torch.int32
            check_tensor(call, label, buffer, {"length": None}, dtypes=(dtype,))
            check_tensor(call, label, buffer, device=next(iter(given.values())).device)
            if not buffer.is_contiguous():
                fail(ShapeError, f"{call}: {label} is not contiguous", got=f"stride {buffer.stride(0)}", fix=f"allocate {label} by itself")
        if self._use_cuda_graph and ("_custom_mask_buf" in given) != ("_mask_indptr_buf" in given):
            fail(ConfigError, f"{call}: custom_mask_buf and mask_indptr_buf belong together", fix="pass both, or neither")

    # ------------------------------------------------------------------------------------------------------------------- what users ask
    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() copies into the buffers given to the constructor."""
        return self._use_cuda_graph

    @property
    def device(self) -> torch.device | None:
        """Where the wrapper runs; None until a workspace, metadata on a GPU or a first run() has decided it."""
        return self._device

    @property
    def resolved_backend(self) -> str:
        """What computes: ``"reference"``, the name of the kernel of the last plan() or run(), or ``"unplanned"``."""
        if self._plan_info is None:
            return "unplanned"
        if self._backend == "reference" or self._device is None or self._device.type != "cuda":
            return "reference"
        plan = self._plan_info
        spec = self._spec or self._make_spec(self._get_options(), plan.head_dim_vo or plan.head_dim_qk)
        total_q = plan.total_q or plan.batch_size
        return bind(spec, self._device, plan.batch_size, plan.num_kv_heads, total_q, plan.batch_invariant, plan.kv_lens).choice.name

    def check(self) -> None:
        """Wait for the device and raise PageTableError if any run() since the last check met a page id outside the cache.

        Such a page reads as zeros; it never faults. This is the one method that synchronises.
        """
        if self._workspace is None:
            return
        status = self._workspace.status
        if int(status[0]) != 0:
            status[0].zero_()
            fail(
                PageTableError,
                f"{type(self).__name__}: a page id was outside the cache",
                expected="0 <= kv_indices[i] < num_pages for every i < kv_indptr[-1] <= len(kv_indices)",
                fix="check the metadata given to plan(); CPU metadata, or validate=True, is checked there",
            )

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor | None) -> None:
        """Use another workspace from the next run() on. There is no integer workspace; the second tensor is only kept."""
        check_tensor("reset_workspace_buffer()", "float_workspace_buffer", float_workspace_buffer)
        self._float_workspace_buffer = _check_workspace("reset_workspace_buffer()", float_workspace_buffer)
        self._int_workspace_buffer = int_workspace_buffer
        self._device = self._workspace = self._accepted = self._launch = None
        self._use_device(float_workspace_buffer.device)

    def end_forward(self) -> None:
        """Does nothing; FlashInfer once needed it."""

    def explain(self, target: str | None = None, *, lengths: bool = True) -> Explanation:
        """What run() will do with the planned batch and what it should take; ``print()`` it. Nothing is compiled or launched.

        Args:
            target: explain for this GPU ("sm_90a": an H200, "sm_80": an A100) instead of the wrapper's device. It need not be there.
            lengths: count bytes and predict a time, which needs the lengths: metadata on the GPU is then copied to the host, and the call
                waits for it (never during a stream capture). False: the kernel, its tile and its grid only.

        Returns:
            An :class:`~cute_infer.attention.explain.Explanation`. The prediction is a roofline: bytes over memory bandwidth, for
            prefill also operations over the tensor cores' peak, plus a launch. On the CPU ``kernel`` is ``"reference"``, without one.

        Raises:
            PlanError: no plan(). UnsupportedConfigError: no kernel for this attention on that GPU.
        """
        plan = self._planned("explain()")
        if target is not None:
            chip: Chip | None = chip_named(target)
        else:
            chip = chip_of(self._device) if self._device is not None and self._on_gpu() else None
        requests = self._requests() if lengths else None
        total_q = plan.total_q if plan.total_q is not None else sum(r.qo_len for r in requests) if requests else plan.batch_size
        spec = self._spec or self._make_spec(self._get_options(), plan.head_dim_vo or plan.head_dim_qk)
        batch = Batch(plan.batch_size, plan.num_kv_heads, total_q, self._window_left, plan.batch_invariant, requests, plan.kv_lens)
        return explain(spec, batch, chip)

    def _on_gpu(self) -> bool:
        return self._backend != "reference" and self._device is not None and self._device.type == "cuda"

    def _requests(self) -> list[Request] | None:
        """Lengths of the planned requests, fetched if need be; None where that is not possible."""
        if self._on_gpu() and torch.cuda.is_current_stream_capturing():
            return None
        plan = self._planned("explain()")
        kv_lens = self._kv_lens().tolist()[: plan.batch_size]
        if plan.kind == "decode" or self._qo_indptr_buf is None:
            return [Request(1, n) for n in kv_lens]
        rows = self._qo_indptr_buf[: plan.batch_size + 1].cpu()
        return [Request(*pair) for pair in zip((rows[1:] - rows[:-1]).tolist(), kv_lens)]

    def _kv_lens(self) -> torch.Tensor:
        raise NotImplementedError  # tokens of each request, from the metadata

    def __repr__(self) -> str:
        name, where = type(self).__name__, f"{self._kv_layout} on {self._device or 'any device'}"
        if self._use_cuda_graph:
            where += ", cuda_graph"
        if self._plan_info is None:
            return f"{name}(not planned, {where})"
        try:
            told = self.explain(lengths=False)
        except UnsupportedConfigError:
            return f"{name}(no kernel, batch_size={self._plan_info.batch_size}, {where})"
        what = [told.kernel] if told.tile is None else [told.kernel, told.tile_text, told.grid_text]
        return f"{name}({', '.join(what)}, batch_size={told.batch_size}, {told.spec}, {where})"

    # --------------------------------------------------------------------------------------------------------------------- for plan()
    def _set_options(self, options: Options) -> None:
        """Options live in plain attributes because engines read them."""
        vars(self).update(
            _causal=options.causal,
            _pos_encoding_mode=options.pos_encoding_mode,
            _window_left=options.window_left,
            _logits_soft_cap=options.logits_soft_cap or 0.0,
            _sm_scale=options.sm_scale,
            _rope_scale=options.rope_scale,
            _rope_theta=options.rope_theta,
            _fp8_fast_accumulation=options.fp8_fast_accumulation,
            _launch=None,
        )

    def _get_options(self, window_left: int | None = None) -> Options:
        """The plan's options; ``window_left`` is run()'s, which goes before the plan's."""
        return Options(
            self._causal,
            self._pos_encoding_mode,
            self._window_left if window_left is None else check_window("run()", window_left),
            self._logits_soft_cap,
            self._sm_scale,
            self._rope_scale,
            self._rope_theta,
            self._fp8_fast_accumulation,
        )

    def _override(self, causal: bool, pos_encoding_mode: str, window_left: int, *rest: float | None) -> None:
        """forward()'s arguments replace the plan's options from this call on, as in FlashInfer."""
        options = Options(causal, pos_encoding_mode, window_left, *rest)  # type: ignore[arg-type]
        options = check_options("forward()", options, self._planned("forward()").head_dim_qk)
        self._set_options(options._replace(fp8_fast_accumulation=self._fp8_fast_accumulation))

    def _use_device(self, device: torch.device) -> Workspace:
        """Settle on ``device`` (a tensor's device) and make the workspace there."""
        if self._device is not None and not same_device(self._device, device):
            fail(
                DeviceError,
                f"{type(self).__name__}: a tensor is on {device} but the wrapper works on {self._device}",
                expected=f"tensors on {self._device}",
                fix="make one wrapper per device; its device is that of its workspace, or of the first tensors it met",
            )
        if self._workspace is None:
            self._device = device
            self._workspace = Workspace(device, self._float_workspace_buffer)
            if self._int_workspace_buffer is None:
                self._int_workspace_buffer = torch.empty(16, dtype=torch.uint8, device=device)
        return self._workspace

    def _dtypes(
        self, q: torch.dtype | str, kv: torch.dtype | str | None, o: torch.dtype | str | None
    ) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        q_dtype = parse_dtype("plan()", "q_data_type", q)
        kv_dtype = parse_dtype("plan()", "kv_data_type", kv) if kv is not None else q_dtype
        o_dtype = parse_dtype("plan()", "o_data_type", o) if o is not None else default_output(q_dtype)
        check_attention_dtypes("plan()", q_dtype, kv_dtype, o_dtype, self._kernel_device())
        return q_dtype, kv_dtype, o_dtype

    def _kernel_device(self) -> str | None:
        """Device type as far as dtypes are concerned: the reference computes everything wherever it runs."""
        return "cpu" if self._backend == "reference" else self._device.type if self._device is not None else None

    def _finish_plan(self, planned: Planned, options: Options, arrays: dict[str, torch.Tensor], in_place: bool = False) -> None:
        """Publish what plan() found. ``in_place``: the caller keeps the buffers of a graph up to date itself."""
        if self._device is None:
            device = next((a.device for a in arrays.values() if a.device.type != "cpu"), None)
            if device is not None:
                self._use_device(device)
                check_attention_dtypes("plan()", planned.q_dtype, planned.kv_dtype, planned.o_dtype, self._kernel_device())
        if not self._use_cuda_graph:
            self._keep(arrays)
        elif not in_place:
            self._copy_into_buffers(arrays)
        self._set_options(options)
        loaded = planned is self._plan_info and options is self._plan_options
        vars(self).update(_plan_info=planned, _plan_options=None, _spec=None, _accepted=None)
        if not loaded:
            self._compile_ahead(planned, options)
        self._plan_options = options

    def _keep(self, arrays: dict[str, torch.Tensor]) -> None:
        device = self._device
        moved: Sequence[torch.Tensor] = list(arrays.values())
        if device is not None and any(a.device != device for a in moved):
            moved = to_device(moved, device)
        vars(self).update(zip(arrays, moved), _launch=None)
        if "_custom_mask_buf" not in arrays:
            vars(self).update(_custom_mask_buf=None, _mask_indptr_buf=None)

    def _copy_into_buffers(self, arrays: dict[str, torch.Tensor]) -> None:
        for name, array in arrays.items():
            buffer = getattr(self, name)
            label = self._buffers.get(name, name)
            if not isinstance(buffer, torch.Tensor):
                fail(ConfigError, f"plan(): this CUDA-graph wrapper was made without {label}", fix=f"pass {label} to the constructor")
            if len(array) > len(buffer):
                fail(
                    ShapeError,
                    f"plan(): {len(array)} entries do not fit the {len(buffer)} of {label}",
                    got=describe(label, buffer),
                    fix=f"allocate {label} for the largest batch, or pass only the entries in use",
                )
        for name, array in arrays.items():  # every array fits: now the buffers may change
            buffer = getattr(self, name)
            if array is not buffer:
                buffer[: len(array)].copy_(array, non_blocking=True)

    def _compile_ahead(self, planned: Planned, options: Options) -> None:
        """Compile or load the kernel now, where that can take its time, so that run() only launches."""
        device = self._device
        if device is None or device.type != "cuda" or self._backend == "reference":
            return
        if not planned.total_q or is_compiling():
            return
        spec = self._make_spec(options, planned.head_dim_vo or planned.head_dim_qk)
        try:
            workspace = self._workspace or self._use_device(device)
            workspace.bind(spec, planned.batch_size, planned.num_kv_heads, planned.total_q, planned.batch_invariant, planned.kv_lens)
        except UnsupportedConfigError:
            if planned.head_dim_vo is not None:
                raise  # otherwise V's dimension is not known yet, and run() has the last word

    def _workspace_bytes(self, planned: Planned, options: Options) -> tuple[int, int]:
        """``(float bytes, int bytes)`` a batch needs; both positive, as callers allocate exactly that."""
        device = self._device or torch.device("cpu")
        if self._backend == "reference":
            device = torch.device("cpu")
        args = (planned.batch_size, planned.num_kv_heads, planned.total_q or planned.batch_size, planned.batch_invariant, planned.kv_lens)
        spec = self._spec_of(planned, options, planned.head_dim_vo or planned.head_dim_qk)
        return workspace_bytes(spec, device, *args), 16

    # ---------------------------------------------------------------------------------------------------------------------- for run()
    def _make_spec(
        self, options: Options, head_dim_vo: int, sinks: bool = False, k_scale: bool = False, v_scale: bool = False, lse: bool = False
    ) -> AttentionSpec:
        assert self._plan_info is not None
        return self._spec_of(self._plan_info, options, head_dim_vo, sinks, k_scale, v_scale, lse)

    @staticmethod
    def _spec_of(
        plan: Planned,
        options: Options,
        head_dim_vo: int,
        sinks: bool = False,
        k_scale: bool = False,
        v_scale: bool = False,
        lse: bool = False,
    ) -> AttentionSpec:
        return make_spec(
            plan.kind,
            plan.kv_layout,
            plan.q_dtype,
            plan.kv_dtype,
            plan.o_dtype,
            plan.head_dim_qk,
            head_dim_vo,
            plan.group_size,
            plan.page_size,
            options.causal,
            options.window_left >= 0,
            bool(options.logits_soft_cap),
            options.pos_encoding_mode,
            plan.custom_mask,
            sinks,
            k_scale,
            v_scale,
            lse,
            options.fp8_fast_accumulation,
        )

    def _planned(self, call: str = "run()") -> Planned:
        if self._plan_info is None:
            fail(
                PlanError,
                f"{call}: {type(self).__name__} has no plan",
                expected=f"plan(...) before {call.replace('()', '(...)')}",
                fix="call plan() with the batch's metadata once per batch",
            )
        return self._plan_info

    def _accept(self, plan: Planned, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Workspace:
        """Check run()'s inputs, unless they look like those of the last run(); the workspace on their device."""
        if is_compiling():
            self._check_inputs(plan, q, k, v)
            return self._settle(plan, q.device)
        try:
            looks = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
        except AttributeError:  # not a tensor: the check says which
            looks = None
        if looks is None or looks != self._accepted or self._workspace is None:
            self._check_inputs(plan, q, k, v)
            self._settle(plan, q.device)
            self._accepted = looks
        return self._workspace  # type: ignore[return-value]

    def _settle(self, plan: Planned, device: torch.device) -> Workspace:
        """The workspace on ``device``; metadata that waited on the CPU for a device follows."""
        if self._workspace is not None and self._device == device:
            return self._workspace
        workspace = self._use_device(device)
        check_attention_dtypes("run()", plan.q_dtype, plan.kv_dtype, plan.o_dtype, self._kernel_device())
        names = [n for n in self._buffers if isinstance(getattr(self, n), torch.Tensor)]
        for name, array in zip(names, to_device([getattr(self, n) for n in names], device)):
            setattr(self, name, array)
        return workspace

    def _check_inputs(self, plan: Planned, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Shapes, dtypes and device of run()'s inputs against the plan."""
        replan = "call plan() again with what run() gets, or pass what plan() was told"
        check_tensor(
            "run()",
            "q",
            q,
            {"num_tokens": None, "num_qo_heads": plan.num_qo_heads, "head_dim": plan.head_dim_qk},
            because="as plan() was told",
            fix=replan,
        )
        rows = plan.total_q
        spare = self._use_cuda_graph and plan.kind == "prefill"  # a captured q is as long as the longest batch
        if rows is not None and (q.shape[0] < rows if spare else q.shape[0] != rows):
            told = f"qo_indptr[-1]={rows}" if plan.kind == "prefill" else f"batch_size={rows}"
            what = f"run(): q has {q.shape[0]} rows but plan() was called with {told}"
            expected = f"q [{rows}, {plan.num_qo_heads}, {plan.head_dim_qk}]"
            fail(ShapeError, what, got=describe("q", q), expected=expected, fix=replan)
        tokens = plan.page_size or None
        shape = {"num_pages": None, "page_size": tokens, "num_kv_heads": plan.num_kv_heads, "head_dim": plan.head_dim_qk}
        because = f"as plan() was told; kv_layout is {self._kv_layout!r}"
        check_tensor("run()", "k", k, shape, device=q.device, because=because, fix=replan)
        shape = {"num_pages": k.shape[0], "page_size": k.shape[1], "num_kv_heads": plan.num_kv_heads, "head_dim": plan.head_dim_vo}
        check_tensor("run()", "v", v, shape, device=q.device, because="as k and plan() say", fix=replan)
        if q.dtype != plan.q_dtype:
            check_planned_dtype("run()", "q", q, plan.q_dtype, "q_data_type")
        if k.dtype != plan.kv_dtype or v.dtype != plan.kv_dtype:
            check_planned_dtype("run()", "k", k, plan.kv_dtype, "kv_data_type")
            check_planned_dtype("run()", "v", v, plan.kv_dtype, "kv_data_type")
        if plan.page_ids is not None:
            check_page_ids("run()", *plan.page_ids, k.shape[0])
        if plan.total_kv is not None and k.shape[1] < plan.total_kv:
            what = f"run(): k has {k.shape[1]} tokens but plan() was called with kv_indptr[-1]={plan.total_kv}"
            fail(ShapeError, what, got=describe("k", k[0]), fix=replan)

    def _repeat(
        self,
        cache: torch.Tensor | Sequence[torch.Tensor],
        q: torch.Tensor,
        q_scale: Scale,
        k_scale: Scale,
        v_scale: Scale,
        out: torch.Tensor | None,
        return_lse: bool,
        sinks: torch.Tensor | None,
        lse_base: str,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None:
        """The last run() again with other tensors and float scales, or None if it differs in more than that.

        Every layer of a model makes the same call; this path costs it little more than the launch. It decides by looking, and whatever
        it does not recognise (a wrong shape, a tensor scale, a rare spelling of the cache) goes the long way with all its checks.
        """
        if is_compiling():
            return None
        launch = self._launch
        if launch is None:
            return None
        pair = self._usual_views(cache)
        if pair is None:
            return None
        k, v = pair
        if return_lse is not launch.lse or (sinks is not None) is not launch.sinks or LSE_SCALE.get(lse_base) != launch.lse_scale:
            return None
        if not launch.fits(q, k, v):
            return None
        sm_scale, out_scale = self._sm_scale, 1.0
        if sm_scale is None:
            sm_scale = self._default_sm_scale
        if q_scale is not None or k_scale is not None or v_scale is not None:  # as resolve_scales folds them
            for scale in (q_scale, k_scale):
                if scale is not None:
                    if type(scale) is not float:
                        return None
                    sm_scale *= scale
            if v_scale is not None:
                if type(v_scale) is not float:
                    return None
                out_scale = v_scale
        if sm_scale <= 0.0:
            return None
        plan = self._plan_info
        assert plan is not None
        shape = (q.shape[0], plan.num_qo_heads, plan.head_dim_vo or v.shape[3])
        if out is None:
            if q.dtype is plan.o_dtype and shape == q.shape and q.is_contiguous():
                out = torch.empty_like(q)  # half the cost of empty()
            else:
                out = torch.empty(shape, dtype=plan.o_dtype, device=q.device)
        elif not launch.suits(out, shape, plan.o_dtype):
            return None
        if sinks is not None and not launch.suits(sinks, shape[1:2], torch.float32):
            return None
        lse = torch.empty(shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
        launch.repeat(q, k, v, out, lse, sinks, sm_scale, out_scale)
        return out if lse is None else (out, lse)

    def _usual_views(self, cache: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What ``split_kv_cache`` makes of the two usual spellings, a pair of 4-D tensors and one 5-D tensor; None for others.

        ``Launch.fits`` looks at the result, so only what would make another call fail in a way of its own is looked at here.
        """
        if type(cache) is tuple:
            if len(cache) != 2:
                return None
            k, v = cache
            if self._kv_layout == "NHD":
                return k, v
            if type(k) is not torch.Tensor or type(v) is not torch.Tensor or k.dim() != 4 or v.dim() != 4:
                return None
            return k.transpose(1, 2), v.transpose(1, 2)
        if type(cache) is not torch.Tensor or cache.dim() != 5 or cache.shape[1] != 2:
            return None
        k, v = (cache if self._kv_layout == "NHD" else cache.transpose(2, 3)).unbind(1)
        return k, v

    def _execute(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        options: Options,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        sinks: torch.Tensor | None = None,
        lse_base: str = "log2",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of ``q`` over 4-D ``k``, ``v`` (page, token, head, dim) and this wrapper's metadata."""
        plan = self._planned()
        workspace = self._accept(plan, q, k, v)
        scales = resolve_scales(
            "run()", options, plan.head_dim_qk, plan.num_kv_heads, plan.num_qo_heads, q.device, q_scale, k_scale, v_scale, plan.q_dtype
        )
        head_dim_vo = plan.head_dim_vo or int(v.shape[3])
        shape = (q.shape[0], plan.num_qo_heads, head_dim_vo)
        out, lse = make_outputs("run()", q, shape, plan.o_dtype, out, lse, want_lse=return_lse or lse is not None)
        if sinks is not None:
            check_tensor("run()", "sinks", sinks, {"num_qo_heads": plan.num_qo_heads}, dtypes=(torch.float32,), device=q.device)
        spec = self._spec = self._spec_of(
            plan, options, head_dim_vo, sinks is not None, scales.k_scale is not None, scales.v_scale is not None, lse is not None
        )
        launch = run_attention(
            spec,
            q,
            k,
            v,
            out,
            lse,
            batch_size=plan.batch_size,
            qo_indptr=self._qo_indptr_buf if plan.kind == "prefill" else None,
            **self._kv_metadata(),
            mask=self._custom_mask_buf if plan.custom_mask else None,
            mask_indptr=self._mask_indptr_buf if plan.custom_mask else None,
            sinks=sinks,
            k_scale=scales.k_scale,
            v_scale=scales.v_scale,
            sm_scale=scales.sm_scale,
            out_scale=scales.out_scale,
            soft_cap=options.logits_soft_cap or 0.0,
            lse_scale=lse_scale("run()", lse_base),
            rope_scale=options.rope_scale or 1.0,
            rope_theta=options.rope_theta or 1e4,
            window_left=options.window_left,
            workspace=workspace,
            backend="reference" if self._backend == "reference" else "auto",
            batch_invariant=plan.batch_invariant,
            kv_lens=plan.kv_lens,
        )
        if launch is not None and scales.k_scale is None and scales.v_scale is None and options.window_left == self._window_left:
            self._default_sm_scale = 1.0 / math.sqrt(plan.head_dim_qk)
            self._launch = launch
        return (out, lse) if return_lse and lse is not None else out

    def _kv_metadata(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError  # each wrapper names the arrays its kernels read

    # set through _set_options, _keep, _execute and __init__
    _causal: bool
    _pos_encoding_mode: str
    _window_left: int
    _logits_soft_cap: float
    _sm_scale: float | None
    _rope_scale: float | None
    _rope_theta: float | None
    _fp8_fast_accumulation: bool
    _default_sm_scale: float
    _qo_indptr_buf: torch.Tensor | None
    _custom_mask_buf: torch.Tensor | None
    _mask_indptr_buf: torch.Tensor | None


def _check_workspace(call: str, workspace: torch.Tensor | None) -> torch.Tensor | None:
    if workspace is not None:
        check_tensor(call, "float_workspace_buffer", workspace, fix="pass a uint8 tensor or None, the other arguments by name")
        if not workspace.is_contiguous():
            what = f"{call}: float_workspace_buffer is not contiguous"
            fail(ShapeError, what, got=f"strides {list(workspace.stride())}", fix="allocate it by itself")
    return workspace


def make_outputs(
    call: str,
    q: torch.Tensor,
    shape: tuple[int, int, int],
    o_dtype: torch.dtype,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    want_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The caller's ``out`` and ``lse`` after a check, or new ones."""
    tokens, heads, dim = shape
    if out is None:
        out = torch.empty(shape, dtype=o_dtype, device=q.device)
    else:
        extents: dict[str, int | None] = {"num_tokens": tokens, "num_qo_heads": heads, "head_dim": dim}
        fix = "allocate out as expected, or leave it out"
        check_tensor(call, "out", out, extents, dtypes=(o_dtype,), device=q.device, fix=fix)
        check_written(call, "out", out)
    if lse is not None:
        check_tensor(call, "lse", lse, {"num_tokens": tokens, "num_qo_heads": heads}, dtypes=(torch.float32,), device=q.device)
        check_written(call, "lse", lse)
    elif want_lse:
        lse = torch.empty(shape[:2], dtype=torch.float32, device=q.device)
    return out, lse


def is_batch_invariant(fixed_split_size: int | None, disable_split_kv: bool) -> bool:
    """Whether plan()'s two split options ask for batch-invariant results; a ``fixed_split_size`` of -1 says no, as with FlashInfer."""
    if fixed_split_size is not None and not isinstance(fixed_split_size, int):
        fail(ConfigError, "plan(): fixed_split_size must be an int or None", got=repr(fixed_split_size))
    return disable_split_kv or (fixed_split_size is not None and fixed_split_size > 0)


def refuse_peer_options(call: str, **options: Any) -> None:
    """Options of other chips' kernels that would change the result and have no meaning here."""
    refuse(call, "leave it out: it belongs to FP4 caches or other architectures' kernels", **options)


def refuse_multi_item_scoring(**options: Any) -> None:
    """Multi-item scoring arrays of FlashInfer's prefill plan()."""
    refuse("plan()", "describe which items see each other with custom_mask=", **options)
