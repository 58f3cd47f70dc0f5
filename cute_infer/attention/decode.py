"""Decode attention: one query token per request (or a few, ``q_len_per_req``) over the request's whole KV.

    single_decode_with_kv_cache                 one request, K and V as plain tensors
    BatchDecodeWithPagedKVCacheWrapper          a batch over a paged cache: plan() once per batch, run() once per layer

Names, argument order and semantics are FlashInfer's. The log-sum-exp is **base 2** unless ``lse_base="ln"``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..checks import Offsets, check_heads, check_positive, check_tensor, offsets_of, refuse
from ..errors import ConfigError, ShapeError, fail
from ..paged.cache import unpack_run_arguments
from ..paged.tables import PageTable
from .lengths import UNKNOWN, KvLens
from .metadata import csr_table, host_view, look_at_table, page_table
from .options import Options, Scale, check_options, scale_arguments
from .paged_wrapper import PagedWrapper
from .single import attend
from .wrapper import Planned, is_batch_invariant, refuse_peer_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DecodeRunOptions, SingleDecodeOptions


@overload
def single_decode_with_kv_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[SingleDecodeOptions]
) -> torch.Tensor: ...
@overload
def single_decode_with_kv_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True], **options: Unpack[SingleDecodeOptions]
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def single_decode_with_kv_cache(*args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
    *,
    sinks: torch.Tensor | None = None,
    lse_base: str = "log2",
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One query token over one request's KV.

        out[h] = softmax(q[h] . k[:, h // group_size] * sm_scale) @ v[:, h // group_size]

    Args:
        q: ``[num_qo_heads, head_dim]`` fp16 | bf16.
        k, v: ``[kv_len, num_kv_heads, head_dim]`` (``"NHD"``) or ``[num_kv_heads, kv_len, head_dim]`` (``"HND"``), q's dtype or fp8.
            Strides are free. A new ``kv_len`` never recompiles.
        pos_encoding_mode: ``"NONE"``, ``"ROPE_LLAMA"`` (q at position kv_len - 1, keys at theirs) or ``"ALIBI"``.
        use_tensor_cores: accepted for FlashInfer's sake; the kernel is chosen without it.
        q_scale, k_scale, v_scale: floats, or tensors on the device with 1 or num_kv_heads elements.
        window_left: attend to the last ``window_left + 1`` tokens only; -1 for all.
        logits_soft_cap: ``cap * tanh(logits / cap)``; None or 0 for none.
        sm_scale: default ``1 / sqrt(head_dim)``. rope_scale, rope_theta: default 1 and 1e4.
        sinks: ``[num_qo_heads]`` fp32, ``exp(sink)`` joins the softmax denominator.
        lse_base: ``"log2"`` or ``"ln"``.

    Returns:
        ``out`` ``[num_qo_heads, head_dim]`` in q's dtype; with ``return_lse`` also ``lse`` ``[num_qo_heads]`` fp32, base 2.

    Raises:
        ShapeError, DTypeError, DeviceError, LayoutError: an argument does not fit. UnsupportedConfigError: no kernel for it.
    """
    call = "single_decode_with_kv_cache()"
    if type(q) is not torch.Tensor or q.dim() != 2:
        check_tensor(call, "q", q, {"num_qo_heads": None, "head_dim": None})
    options = Options(False, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
    out, lse = attend(
        call,
        "decode",
        q.unsqueeze(0),
        k,
        v,
        kv_layout,
        options,
        q_scale,
        k_scale,
        v_scale,
        sinks=sinks,
        want_lse=return_lse,
        lse_base=lse_base,
        backend=backend,
    )
    return out.squeeze(0) if lse is None else (out.squeeze(0), lse.squeeze(0))


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Decode attention of a batch of requests over a paged KV cache.

        wrapper = BatchDecodeWithPagedKVCacheWrapper(kv_layout="NHD")
        wrapper.plan(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type=torch.bfloat16)
        out = wrapper.run(q, (k_cache, v_cache))            # once per layer

    Lengths and page ids stay on the device and are read by the kernel itself, so nothing has to be planned again for a CUDA graph:
    with ``use_cuda_graph=True`` a captured run() serves every later content of the metadata buffers.

    Args:
        float_workspace_buffer (alias ``workspace_buffer``): uint8 scratch for split-KV partials, of any content; optional.
        kv_layout: ``"NHD"`` or ``"HND"``.
        use_cuda_graph: plan() copies into the three buffers below, whose sizes fix the batch size and the largest number of pages.
        paged_kv_indptr_buffer ``[batch_size + 1]``, paged_kv_indices_buffer ``[max_pages]``, paged_kv_last_page_len_buffer
            ``[batch_size]``: int32, needed with ``use_cuda_graph``.
        use_tensor_cores, backend: hints without effect, except ``backend="reference"`` (fp32 torch, exact and slow).
        jit_args: refused (CUDA source).
    """

    _buffers = {
        "_qo_indptr_buf": "qo_indptr_buffer",
        "_paged_kv_indptr_buf": "paged_kv_indptr_buffer",
        "_paged_kv_indices_buf": "paged_kv_indices_buffer",
        "_paged_kv_last_page_len_buf": "paged_kv_last_page_len_buffer",
    }
    _required_in_graph = ("_paged_kv_indptr_buf", "_paged_kv_indices_buf", "_paged_kv_last_page_len_buf")

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list | None = None,
        *,
        workspace_buffer: torch.Tensor | None = None,
    ) -> None:
        buffers = {
            "_paged_kv_indptr_buf": paged_kv_indptr_buffer,
            "_paged_kv_indices_buf": paged_kv_indices_buffer,
            "_paged_kv_last_page_len_buf": paged_kv_last_page_len_buffer,
        }
        super().__init__(float_workspace_buffer, workspace_buffer, kv_layout, use_cuda_graph, backend, buffers, jit_args)
        self._use_tensor_cores = use_tensor_cores
        self._q_len_per_req: int | None = None
        self._given: tuple | None = None  # plan()'s arguments but for the arrays, once they were checked
        self._described_batch: tuple | None = None
        self._fixed_batch_size = 0
        if use_cuda_graph:
            self._fixed_batch_size = len(self._paged_kv_last_page_len_buf)
            shape: dict[str, int | None] = {"batch_size + 1": self._fixed_batch_size + 1}
            check_tensor(type(self).__name__, "paged_kv_indptr_buffer", self._paged_kv_indptr_buf, shape)
            self._qo_indptr_buf = torch.arange(self._fixed_batch_size + 1, dtype=torch.int32, device=self.device)

    @property
    def use_tensor_cores(self) -> bool:
        """The constructor's argument; FlashInfer's users read it."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor | None,
        indices: torch.Tensor | None,
        last_page_len: torch.Tensor | None,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str | None = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        window_right: int = 0,
        *,
        head_dim_vo: int | None = None,
        validate: bool | None = None,
    ) -> None:
        """Describe the batch: its page table, and what run()'s inputs look like.

        Args:
            indptr: ``[batch_size + 1]`` int32, offsets of each request into ``indices``.
            indices: page ids, int32; may be longer than ``indptr[-1]``.
            last_page_len: ``[batch_size]`` int32, tokens in the last page, 1..page_size. All three on the CPU or the device; arrays on
                the device are kept, not copied (outside CUDA-graph mode), and read live by every run().
            block_tables, seq_lens: ``[batch_size, max_pages]`` page ids and ``[batch_size]`` lengths, used when the first three are None.
            q_data_type, kv_data_type, o_data_type: dtypes of q (default fp16), the cache (default q's) and the output (default q's);
                ``data_type`` stands for those of q and the cache that are None.
            pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta: as in single_decode_with_kv_cache.
            q_len_per_req: query tokens per request; their rows are consecutive in q and causal among themselves.
            head_dim_vo: V's head dimension, if it is not to be taken from V.
            validate: metadata on the CPU is always checked. On the GPU it is fetched in one copy and checked, unless this is False,
                ``CUTE_INFER_VALIDATE=0``, or a stream capture is under way; then nothing synchronises, and :meth:`check` reports
                page ids outside the cache.
            fixed_split_size (a positive number), disable_split_kv: either selects batch-invariant results. Results are always bitwise
                repeatable for one batch size and one class of lengths: where plan() can know the lengths without asking the device
                (metadata on the CPU, or fetched to be checked), their mean and their spread select the tile, and with it the order of
                sums. :meth:`explain` says which class that was. In batch-invariant mode a request's ``out`` and ``lse`` have the same
                bits whatever the batch size, its slot in the batch, its neighbours and their lengths, its page ids, and whether
                run() is eager or replayed from a graph. They depend on the request's own q, KV and length, the options, the model's
                shapes and dtypes, the GPU model and the version of this package. The kernel is then tiled for a batch that fills the
                device and KV is never split over partials in memory, so a batch of a few requests runs slower. The size itself is
                not used.
            non_blocking: accepted, without effect.

        Raises:
            PageTableError: the page table contradicts itself. ShapeError, DTypeError, LayoutError: an argument does not fit.
        """
        # Serving loops plan the same model over and over: what has been checked once, and described once, is not again.
        given = (num_qo_heads, num_kv_heads, head_dim, head_dim_vo, page_size, pos_encoding_mode, window_left, logits_soft_cap, q_data_type,
                 kv_data_type, o_data_type, data_type, sm_scale, rope_scale, rope_theta, fixed_split_size, disable_split_kv, q_len_per_req,
                 window_right)  # fmt: skip
        if self._given is None or not all(map(_same, given, self._given)):
            refuse("plan()", "window_right=0 is what decode has", window_right=window_right or None)
            check_positive("plan()", page_size=page_size, head_dim=head_dim)
            asked = Options(False, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
            self._given_options = check_options("plan()", asked, head_dim)
            self._given = given
        table, max_pages = page_table("plan()", indptr, indices, last_page_len, block_tables, seq_lens, page_size)
        host = host_view([table.indptr, table.last_page_len], validate)
        indptr_host, last_host = host or (None, None)
        page_ids = offsets = None
        if indptr_host is not None and last_host is not None:
            offsets, page_ids = look_at_table(indptr_host, last_host, table.indices, page_size, max_pages, validate)
        kv_lens = self._known_lengths(table, offsets, page_size, max_pages, self._given_options.window_left)
        batch = (self._given, table.last_page_len.shape[0], page_ids, kv_lens, self._device, self._q_len_per_req in (None, q_len_per_req))
        if batch != self._described_batch:
            self._description = self._describe(
                table.last_page_len.shape[0],
                (num_qo_heads, num_kv_heads),
                (head_dim, head_dim_vo),
                page_size,
                (q_data_type or data_type or "float16", kv_data_type or data_type, o_data_type),
                q_len_per_req,
                self._given_options,
                page_ids=page_ids,
                batch_invariant=is_batch_invariant(fixed_split_size, disable_split_kv),
                kv_lens=kv_lens,
            )
            self._described_batch = batch
        planned, options = self._description
        self._publish(planned, options, table, q_len_per_req, in_place=False)

    begin_forward = plan

    def _describe(
        self,
        batch_size: int,
        heads: tuple[int, int],
        head_dims: tuple[int, int | None],
        page_size: int,
        dtypes: tuple,
        q_len_per_req: int,
        options: Options,
        page_ids: tuple[int, int] | None = None,
        batch_invariant: bool = False,
        kv_lens: KvLens = UNKNOWN,
    ) -> tuple[Planned, Options]:
        check_positive("plan()", head_dim=head_dims[0], q_len_per_req=q_len_per_req)
        if head_dims[1] is not None:
            check_positive("plan()", head_dim_vo=head_dims[1])
        check_heads("plan()", *heads)
        if self._use_cuda_graph:
            if batch_size != self._fixed_batch_size:
                fail(
                    ShapeError,
                    f"plan(): the batch has {batch_size} requests, the CUDA-graph buffers hold {self._fixed_batch_size}",
                    expected=f"batch_size={self._fixed_batch_size}",
                    fix="pad the batch with empty requests, or make one wrapper per batch size",
                )
            if self._q_len_per_req not in (None, q_len_per_req):
                fail(
                    ConfigError,
                    f"plan(): q_len_per_req={q_len_per_req}, but this CUDA-graph wrapper was planned with {self._q_len_per_req}",
                    fix="make one wrapper per q_len_per_req",
                )
        q_dtype, kv_dtype, o_dtype = self._dtypes(*dtypes)
        planned = Planned(
            kind="decode" if q_len_per_req == 1 else "prefill",
            kv_layout="paged",
            batch_size=batch_size,
            num_qo_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim_qk=head_dims[0],
            head_dim_vo=head_dims[1],
            page_size=page_size,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            total_q=batch_size * q_len_per_req,
            page_ids=None if self._use_cuda_graph else page_ids,  # a graph's buffers change behind our back
            batch_invariant=batch_invariant,
            kv_lens=kv_lens,
        )
        return planned, options._replace(causal=q_len_per_req > 1)

    def _known_lengths(self, table: PageTable, pages: Offsets | None, page_size: int, max_pages: int | None, window_left: int) -> KvLens:
        """The class of the batch's lengths, in whole pages: exact where indptr is known, else from the sizes of the arrays.

        Of a CUDA-graph wrapper only the sizes of its buffers: a captured run() serves batches of other lengths.
        """
        batch_size = table.last_page_len.shape[0]
        if pages is not None and batch_size > 0 and not self._use_cuda_graph:
            mean, longest = (pages.last - pages.first) * page_size / batch_size, pages.largest * page_size
            if window_left >= 0:
                mean, longest = min(mean, window_left + 1), min(longest, window_left + 1)
            return KvLens.of(mean, longest)
        indices = self._paged_kv_indices_buf if self._use_cuda_graph else table.indices
        bound = indices.shape[0] * page_size
        if max_pages is not None and not self._use_cuda_graph:
            bound = min(bound, max_pages * page_size)
        return KvLens.at_most(bound if window_left < 0 else min(bound, window_left + 1))

    def _publish(self, planned: Planned, options: Options, table: PageTable, q_len_per_req: int, in_place: bool) -> None:
        names = ("_paged_kv_indptr_buf", "_paged_kv_indices_buf", "_paged_kv_last_page_len_buf")
        arrays = dict(zip(names, table))
        if q_len_per_req > 1:
            rows = torch.arange(planned.batch_size + 1, dtype=torch.int32, device=table.indptr.device)
            arrays["_qo_indptr_buf"] = rows * q_len_per_req
        self._finish_plan(planned, options, arrays, in_place)
        if in_place and q_len_per_req > 1 and self._use_cuda_graph and self._qo_indptr_buf is not None:
            self._qo_indptr_buf.copy_(arrays["_qo_indptr_buf"], non_blocking=True)
        self._q_len_per_req = q_len_per_req

    @overload
    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        *args: torch.Tensor,
        return_lse: Literal[False] = ...,
        **options: Unpack[DecodeRunOptions],
    ) -> torch.Tensor: ...
    @overload
    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        *args: torch.Tensor,
        return_lse: Literal[True],
        **options: Unpack[DecodeRunOptions],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @overload
    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        *args: torch.Tensor,
        return_lse: bool,
        **options: Unpack[DecodeRunOptions],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        *args: torch.Tensor,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: torch.Tensor | Sequence[torch.Tensor] | None = None,
        lse_base: str = "log2",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch.

        Args:
            q: ``[batch_size * q_len_per_req, num_qo_heads, head_dim]``, strides free.
            paged_kv_cache: ``(k, v)`` or one 5-D tensor, see ``paged.cache.split_kv_cache``; ``run(q, k, v)`` is welcome too.
            args: FlashInfer's ``scale_q, scale_k, scale_v``, if not given by keyword.
            q_scale, k_scale, v_scale: floats, or tensors on the device with 1 or num_kv_heads elements; never read on the host.
            out, lse: results to write into. window_left: overrides the plan's for this call. sinks: ``[num_qo_heads]`` fp32.
            enable_pdl: accepted, without effect. q_len_per_req: must agree with the plan.

        Returns:
            ``out`` ``[batch_size * q_len_per_req, num_qo_heads, head_dim]``; with ``return_lse`` also ``lse`` fp32, base 2
            (``lse_base="ln"``: natural). A request without tokens gives 0 and -inf.

        Raises:
            PlanError: no plan(). ShapeError, DTypeError, DeviceError: q or the cache is not what plan() was told.
        """
        usual = lse is None and window_left is None and q_len_per_req is None and len(args) == 0
        if usual and kv_cache_sf is None and skip_softmax_threshold_scale_factor is None:
            result = self._repeat(paged_kv_cache, q, q_scale, k_scale, v_scale, out, return_lse, sinks, lse_base)
            if result is not None:
                return result
        refuse_peer_options("run()", kv_cache_sf=kv_cache_sf, skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor)
        k, v, args = unpack_run_arguments("run()", paged_kv_cache, args, self._kv_layout)
        if q_len_per_req is not None and q_len_per_req != self._q_len_per_req:
            self._planned()
            fail(ShapeError, f"run(): q_len_per_req={q_len_per_req} but plan() was called with {self._q_len_per_req}", fix="plan() again")
        scales = scale_arguments("run()", args, q_scale, k_scale, v_scale)
        return self._execute(q, k, v, self._get_options(window_left), *scales, out, lse, return_lse, sinks, lse_base)

    def run_return_lse(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor | Sequence[torch.Tensor], *args: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`run` with ``return_lse=True``."""
        return self.run(q, paged_kv_cache, *args, **{**kwargs, "return_lse": True})

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        pos_encoding_mode: str = "NONE",
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """run() with the plan's options replaced by these (their defaults included), from this call on, as FlashInfer does."""
        self._override(self._causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        pos_encoding_mode: str = "NONE",
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`forward`, with the log-sum-exp (base 2)."""
        self._override(self._causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run_return_lse(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)

    def workspace_size(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        data_type: torch.dtype | str | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> tuple[int, int]:
        """``(float bytes, int bytes)`` of workspace a batch of this size needs, whatever its lengths. Arguments as in :meth:`plan`."""
        call = "workspace_size()"
        check_positive(call, page_size=page_size, head_dim=head_dim)
        dtypes = (q_data_type, kv_data_type if kv_data_type is not None else data_type, o_data_type)
        options = Options(False, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        options = check_options(call, options, head_dim)
        heads, dims = (num_qo_heads, num_kv_heads), (head_dim, None)
        invariant = is_batch_invariant(fixed_split_size, disable_split_kv)
        table, _ = page_table(call, indptr, indices, last_page_len, block_tables, seq_lens, page_size)
        batch_size = table.last_page_len.shape[0]
        described = self._describe(batch_size, heads, dims, page_size, dtypes, q_len_per_req, options, batch_invariant=invariant)
        return self._workspace_bytes(*described)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """:class:`BatchDecodeWithPagedKVCacheWrapper` with ``use_cuda_graph=True`` and its buffers as leading arguments."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor | None,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer,
            kv_layout=kv_layout,
            use_cuda_graph=True,
            use_tensor_cores=use_tensor_cores,
            paged_kv_indptr_buffer=indptr_buffer,
            paged_kv_indices_buffer=indices_buffer,
            paged_kv_last_page_len_buffer=last_page_len_buffer,
        )


BatchDecodeWrapper = BatchDecodeWithPagedKVCacheWrapper


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: torch.dtype | str | None = None,
    kv_data_type: torch.dtype | str | None = None,
    data_type: torch.dtype | str | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """plan() for engines that keep the metadata buffers up to date themselves: no value is copied, checked or waited for.

    In CUDA-graph mode the buffers are taken as they are; otherwise the three arrays replace the wrapper's. Arguments as in
    :meth:`BatchDecodeWithPagedKVCacheWrapper.plan`; ``global_override_indptr_cpu``, a copy of indptr on the CPU, is not needed, but tells
    which tile is best for these lengths.
    """
    call = "fast_decode_plan()"
    check_positive(call, page_size=page_size, head_dim=head_dim)
    q_dtype = q_data_type or data_type or "float16"
    options = Options(False, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
    options = check_options(call, options, head_dim)
    heads, dims, dtypes = (num_qo_heads, num_kv_heads), (head_dim, None), (q_dtype, kv_data_type or data_type, None)
    invariant = is_batch_invariant(fixed_split_size, disable_split_kv)
    table = csr_table(call, indptr, indices, last_page_len)
    indptr = table.indptr
    host = global_override_indptr_cpu if global_override_indptr_cpu is not None else indptr if indptr.device.type == "cpu" else None
    pages = offsets_of(host) if host is not None and not self.is_cuda_graph_enabled else None
    kv_lens = self._known_lengths(table, pages, page_size, None, options.window_left)
    planned, options = self._describe(
        table.last_page_len.shape[0], heads, dims, page_size, dtypes, q_len_per_req, options, batch_invariant=invariant, kv_lens=kv_lens
    )
    self._publish(planned, options, table, q_len_per_req, in_place=True)


@functools.lru_cache(maxsize=64)
def _same(one: Any, other: Any) -> bool:
    """Equal and of one type: 1, 1.0 and True are not the same argument, nor is a number and a tensor that holds it."""
    return one is other or (type(one) is type(other) and one == other)


def _range(length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int32, device=device)


def _get_range_buf(seq_len: int, device: torch.device | str) -> torch.Tensor:
    """``[seq_len]`` int32 0, 1, 2, ... from a cached power-of-two range; engines call it by this name."""
    return _range(1 << max(seq_len - 1, 0).bit_length(), torch.device(device))[:seq_len]


__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "single_decode_with_kv_cache",
]
