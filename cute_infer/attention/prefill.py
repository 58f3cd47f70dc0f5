"""Prefill (and append) attention: many query tokens per request.

    single_prefill_with_kv_cache                one request, K and V as plain tensors
    BatchPrefillWithPagedKVCacheWrapper         a ragged batch of queries over a paged cache
    BatchPrefillWithRaggedKVCacheWrapper        a ragged batch of queries over ragged K and V (ragged.py)

Query row i of a request with kv_len keys and qo_len rows stands at position ``kv_len - qo_len + i``: causal is aligned bottom-right.
Names, argument order and semantics are FlashInfer's. The log-sum-exp is **base 2** unless ``lse_base="ln"``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..checks import check_indptr, check_positive, check_tensor, offsets_of
from ..errors import ConfigError, fail
from ..paged.cache import unpack_run_arguments
from ..paged.tables import get_seq_lens
from .mask_bits import check_mask, packbits
from .metadata import check_table_on_host, host_view, index_array, page_table
from .options import Options, Scale, check_options, parse_dtype, scale_arguments
from .paged_wrapper import PagedWrapper
from .prefill_base import BatchPrefillBase, mask_arrays
from .ragged import BatchPrefillWithRaggedKVCacheWrapper
from .single import attend
from .wrapper import is_batch_invariant, refuse_multi_item_scoring, refuse_peer_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import PrefillRunOptions, SinglePrefillOptions


@overload
def single_prefill_with_kv_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[SinglePrefillOptions]
) -> torch.Tensor: ...
@overload
def single_prefill_with_kv_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True], **options: Unpack[SinglePrefillOptions]
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def single_prefill_with_kv_cache(*args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: torch.Tensor | None = None,
    scale_k: torch.Tensor | None = None,
    scale_v: torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Sequence[torch.Tensor] | None = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    *,
    sinks: torch.Tensor | None = None,
    lse_base: str = "log2",
    fp8_fast_accumulation: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """All query tokens of one request over its KV.

    Args:
        q: ``[qo_len, num_qo_heads, head_dim_qk]``. k: ``[kv_len, num_kv_heads, head_dim_qk]``, v: ``[.., head_dim_vo]`` (``"NHD"``), or
            ``[num_kv_heads, kv_len, ..]`` (``"HND"``).
        scale_q, scale_k, scale_v: device tensors with 1 or num_kv_heads elements, scale_q of 8-bit q also num_qo_heads. k_scale, v_scale:
            the same, or floats.
        custom_mask: ``[qo_len, kv_len]`` bool, True = keep; overrides ``causal``. packed_custom_mask: the same through
            ``packbits(mask.flatten(), bitorder="little")``; overrides both.
        causal: key j is visible to row i iff ``j <= i + kv_len - qo_len``.
        use_fp16_qk_reduction: accepted, without effect: scores are accumulated in fp32.
        o_dtype: default q's, bfloat16 for 8-bit q. The rest as in single_decode_with_kv_cache.
        fp8_fast_accumulation: for 8-bit q: the output is summed up in the tensor core's short accumulator, as FlashAttention-3 and
            FlashInfer do. Faster; sums of one sign lose about 4e-4 of their value per 32 keys, 23 % in 16,384. Off, the error does not
            grow with the number of keys. Signed, centred V loses nothing either way.

    Returns:
        ``out`` ``[qo_len, num_qo_heads, head_dim_vo]``; with ``return_lse`` also ``lse`` ``[qo_len, num_qo_heads]`` fp32, base 2. A row
        that sees no key gives 0 and -inf.

    Raises:
        ShapeError, DTypeError, DeviceError, LayoutError: an argument does not fit. UnsupportedConfigError: no kernel for it.
    """
    call = "single_prefill_with_kv_cache()"
    refuse_peer_options(call, kv_cache_sf=kv_cache_sf)
    check_tensor(call, "q", q, {"qo_len": None, "num_qo_heads": None, "head_dim": None})
    o_dtype = None if o_dtype is None else parse_dtype(call, "o_dtype", o_dtype)
    mask, mask_indptr = _single_mask(call, q, k, kv_layout, custom_mask, packed_custom_mask)
    options = Options(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, fp8_fast_accumulation)
    out, lse = attend(
        call,
        "prefill",
        q,
        k,
        v,
        kv_layout,
        options,
        scale_q,
        _either(call, "scale_k", scale_k, "k_scale", k_scale),
        _either(call, "scale_v", scale_v, "v_scale", v_scale),
        o_dtype,
        mask,
        mask_indptr,
        sinks,
        return_lse,
        lse_base,
        backend,
    )
    return (out, lse) if lse is not None else out


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)


def _either(call: str, name: str, one: Scale, other_name: str, other: Scale) -> Scale:
    if one is not None and other is not None:
        fail(ConfigError, f"{call}: {name} and {other_name} are two names of one scale", fix="pass one of them")
    return one if one is not None else other


def _single_mask(
    call: str, q: torch.Tensor, k: torch.Tensor, kv_layout: str, custom: torch.Tensor | None, packed: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Packed bytes and their offsets ``[0, num_bytes]``, made on the device."""
    if custom is None and packed is None:
        return None, None
    check_tensor(call, "k", k, {"kv_len": None, "num_kv_heads": None, "head_dim": None})
    qo_len, kv_len = q.shape[0], k.shape[1 if kv_layout == "HND" else 0]
    if packed is None:
        check_mask(call, custom, q.device)
        assert custom is not None
        if custom.dim() != 1 or custom.shape[0] != qo_len * kv_len:
            check_tensor(call, "custom_mask", custom, {"qo_len": qo_len, "kv_len": kv_len})
        packed = packbits(custom.reshape(-1), bitorder="little")
    num_bytes = (qo_len * kv_len + 7) // 8
    check_tensor(call, "packed_custom_mask", packed, {"num_bytes": num_bytes}, dtypes=(torch.uint8,), device=q.device)
    return packed.contiguous(), torch.arange(2, dtype=torch.int32, device=q.device) * num_bytes


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper, BatchPrefillBase):
    """Attention of a ragged batch of query tokens over a paged KV cache.

        wrapper = BatchPrefillWithPagedKVCacheWrapper()
        wrapper.plan(qo_indptr, kv_indptr, kv_indices, kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, causal=True)
        out = wrapper.run(q, (k_cache, v_cache))            # once per layer

    Args:
        float_workspace_buffer (alias ``workspace_buffer``): uint8 scratch, of any content; optional.
        kv_layout: ``"NHD"`` or ``"HND"``.
        use_cuda_graph: plan() copies into the buffers below, which fix the batch size; the first plan() fixes the number of query rows.
        qo_indptr_buf, paged_kv_indptr_buf ``[batch_size + 1]``, paged_kv_indices_buf ``[max_pages]``, paged_kv_last_page_len_buf
            ``[batch_size]``: int32, needed with ``use_cuda_graph``; custom_mask_buf uint8 and mask_indptr_buf int32
            ``[batch_size + 1]`` too if masks are used, and then every run() uses a mask.
        backend: hint without effect, except ``"reference"``. jit_args, jit_kwargs: refused (CUDA source).
    """

    _buffers = {
        "_qo_indptr_buf": "qo_indptr_buf",
        "_paged_kv_indptr_buf": "paged_kv_indptr_buf",
        "_paged_kv_indices_buf": "paged_kv_indices_buf",
        "_paged_kv_last_page_len_buf": "paged_kv_last_page_len_buf",
        "_custom_mask_buf": "custom_mask_buf",
        "_mask_indptr_buf": "mask_indptr_buf",
    }
    _required_in_graph = ("_qo_indptr_buf", "_paged_kv_indptr_buf", "_paged_kv_indices_buf", "_paged_kv_last_page_len_buf")

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list | None = None,
        jit_kwargs: dict | None = None,
        *,
        workspace_buffer: torch.Tensor | None = None,
    ) -> None:
        buffers = {
            "_qo_indptr_buf": qo_indptr_buf,
            "_paged_kv_indptr_buf": paged_kv_indptr_buf,
            "_paged_kv_indices_buf": paged_kv_indices_buf,
            "_paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
            "_custom_mask_buf": custom_mask_buf,
            "_mask_indptr_buf": mask_indptr_buf,
        }
        super().__init__(float_workspace_buffer, workspace_buffer, kv_layout, use_cuda_graph, backend, buffers, jit_args, jit_kwargs)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor | None,
        paged_kv_indices: torch.Tensor | None,
        paged_kv_last_page_len: torch.Tensor | None,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        *,
        validate: bool | None = None,
        fp8_fast_accumulation: bool = False,
    ) -> None:
        """Describe the batch.

        Args:
            qo_indptr: ``[batch_size + 1]`` int32; request r owns rows ``qo_indptr[r]:qo_indptr[r+1]`` of q.
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len: the page table (CSR) as in the decode wrapper's plan(), or None
                and ``block_tables`` with ``seq_lens`` instead.
            custom_mask: bool, True = keep, each request's ``[qo_len, kv_len]`` flattened and concatenated; overrides causal.
                packed_custom_mask: the same through ``segment_packbits(..., bitorder="little")``; overrides both.
            q_data_type, kv_data_type, o_data_type: default fp16, q's, and q's (bfloat16 for 8-bit q).
            validate: as in the decode wrapper's plan().
            fp8_fast_accumulation: as in single_prefill_with_kv_cache.
            fixed_split_size, disable_split_kv: batch-invariant results as in the decode wrapper's plan(); a request's own number of
                query rows is among what they may depend on.
            use_fp16_qk_reduction, non_blocking, seq_lens_q, max_token_per_sequence, max_sequence_kv: accepted, without effect.
            prefix_len_ptr, token_pos_in_items_ptr, max_item_len_ptr: refused (multi-item scoring).

        Raises:
            PageTableError, ShapeError, DTypeError, LayoutError: the metadata contradicts itself or an argument does not fit.
        """
        refuse_multi_item_scoring(
            prefix_len_ptr=prefix_len_ptr, token_pos_in_items_ptr=token_pos_in_items_ptr, max_item_len_ptr=max_item_len_ptr
        )
        check_positive("plan()", page_size=page_size, head_dim_qk=head_dim_qk)
        options = Options(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, fp8_fast_accumulation)
        options = check_options("plan()", options, head_dim_qk)
        table, max_pages = page_table(
            "plan()", paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, block_tables, seq_lens, page_size
        )
        batch_size = len(table.last_page_len)
        qo_indptr = index_array("plan()", "qo_indptr", qo_indptr, batch_size + 1, "batch_size + 1")
        host = host_view([qo_indptr, table.indptr, table.last_page_len], validate)
        total_q = page_ids = None
        if host is not None:
            check_indptr("plan()", "qo_indptr", host[0], zero_based=True)
            page_ids = check_table_on_host(host[1], host[2], table.indices, page_size, max_pages, validate)
            total_q = int(host[0][-1])
        self._check_graph_limits(batch_size, total_q)
        planned = self._describe(
            "paged",
            batch_size,
            (num_qo_heads, num_kv_heads),
            (head_dim_qk, head_dim_vo),
            page_size,
            (q_data_type, kv_data_type, o_data_type),
            custom_mask is not None or packed_custom_mask is not None,
            total_q,
            page_ids=page_ids,
            batch_invariant=is_batch_invariant(fixed_split_size, disable_split_kv),
        )
        arrays = {
            "_qo_indptr_buf": qo_indptr,
            "_paged_kv_indptr_buf": table.indptr,
            "_paged_kv_indices_buf": table.indices,
            "_paged_kv_last_page_len_buf": table.last_page_len,
        }
        if custom_mask is not None or packed_custom_mask is not None:
            known = host or [qo_indptr, table.indptr, table.last_page_len]
            kv_len = get_seq_lens(known[1], known[2].to(known[1].device), page_size)
            arrays |= mask_arrays(known[0], kv_len, custom_mask, packed_custom_mask, host is not None)
        self._finish_plan(planned, options, arrays)

    begin_forward = plan

    @overload
    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        *args: torch.Tensor,
        return_lse: Literal[False] = ...,
        **options: Unpack[PrefillRunOptions],
    ) -> torch.Tensor: ...
    @overload
    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        *args: torch.Tensor,
        return_lse: Literal[True],
        **options: Unpack[PrefillRunOptions],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @overload
    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        *args: torch.Tensor,
        return_lse: bool,
        **options: Unpack[PrefillRunOptions],
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
        kv_cache_sf: torch.Tensor | Sequence[torch.Tensor] | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
        lse_base: str = "log2",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch.

        Args:
            q: ``[qo_indptr[-1], num_qo_heads, head_dim_qk]``; in CUDA-graph mode it may be longer, rows beyond are not computed.
            The rest as in the decode wrapper's run().

        Returns:
            ``out`` ``[qo_indptr[-1], num_qo_heads, head_dim_vo]``; with ``return_lse`` also ``lse`` ``[qo_indptr[-1], num_qo_heads]``
            fp32, base 2 (``lse_base="ln"``: natural). A row that sees no key gives 0 and -inf.
        """
        usual = lse is None and window_left is None and use_fp16_softmax is None and uses_spcompress is None and len(args) == 0
        if usual and kv_cache_sf is None and skip_softmax_threshold_scale_factor is None:
            result = self._repeat(paged_kv_cache, q, q_scale, k_scale, v_scale, out, return_lse, sinks, lse_base)
            if result is not None:
                return result
        refuse_peer_options(
            "run()",
            kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )
        k, v, args = unpack_run_arguments("run()", paged_kv_cache, args, self._kv_layout)
        options = self._get_options(window_left)
        scales = scale_arguments("run()", args, q_scale, k_scale, v_scale)
        return self._execute(q, k, v, options, *scales, out, lse, return_lse, sinks, lse_base)

    def run_return_lse(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor | Sequence[torch.Tensor], *args: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`run` with ``return_lse=True``."""
        return self.run(q, paged_kv_cache, *args, **{**kwargs, "return_lse": True})

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """run() with the plan's options replaced by these (their defaults included), from this call on."""
        self._override(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`forward`, with the log-sum-exp (base 2)."""
        self._override(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run_return_lse(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)

    def workspace_size(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: torch.dtype | str = "float16",
        kv_data_type: torch.dtype | str | None = None,
        o_data_type: torch.dtype | str | None = None,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> tuple[int, int]:
        """``(float bytes, int bytes)`` of workspace a batch of this many query rows needs. Arguments as in :meth:`plan`."""
        check_positive("workspace_size()", page_size=page_size, head_dim_qk=head_dim_qk)
        options = Options(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        options = check_options("workspace_size()", options, head_dim_qk)
        qo_indptr = index_array("workspace_size()", "qo_indptr", qo_indptr, meaning="batch_size + 1")
        planned = self._describe(
            "paged",
            max(qo_indptr.shape[0] - 1, 0),
            (num_qo_heads, num_kv_heads),
            (head_dim_qk, head_dim_vo),
            page_size,
            (q_data_type, kv_data_type, o_data_type),
            custom_mask is not None or packed_custom_mask is not None,
            offsets_of(qo_indptr.cpu()).last,
            batch_invariant=is_batch_invariant(fixed_split_size, disable_split_kv),
        )
        return self._workspace_bytes(planned, options)


BatchPrefillWrapper = BatchPrefillWithPagedKVCacheWrapper


__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "BatchPrefillWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]
