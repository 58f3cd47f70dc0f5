"""Prefill attention of a batch whose K and V are ragged, like its queries: straight from a projection, before they are stored in pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..checks import check_indptr, check_positive, check_tensor, refuse
from .metadata import host_view, index_array
from .options import Options, Scale, check_options, scale_arguments
from .prefill_base import BatchPrefillBase, mask_arrays
from .wrapper import is_batch_invariant, refuse_multi_item_scoring, refuse_peer_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import RaggedRunOptions


class BatchPrefillWithRaggedKVCacheWrapper(BatchPrefillBase):
    """Attention of a ragged batch of query tokens over K and V that are ragged too: request r owns rows ``kv_indptr[r]:kv_indptr[r+1]``.

    Constructor arguments as in :class:`BatchPrefillWithPagedKVCacheWrapper`, without the page table.
    """

    _buffers = {
        "_qo_indptr_buf": "qo_indptr_buf",
        "_kv_indptr_buf": "kv_indptr_buf",
        "_custom_mask_buf": "custom_mask_buf",
        "_mask_indptr_buf": "mask_indptr_buf",
    }
    _required_in_graph = ("_qo_indptr_buf", "_kv_indptr_buf")

    _kv_indptr_buf: torch.Tensor

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
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
            "_kv_indptr_buf": kv_indptr_buf,
            "_custom_mask_buf": custom_mask_buf,
            "_mask_indptr_buf": mask_indptr_buf,
        }
        super().__init__(float_workspace_buffer, workspace_buffer, kv_layout, use_cuda_graph, backend, buffers, jit_args, jit_kwargs)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
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
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: torch.Tensor | None = None,
        o_indptr: torch.Tensor | None = None,
        *,
        validate: bool | None = None,
        fp8_fast_accumulation: bool = False,
    ) -> None:
        """Describe the batch. ``kv_indptr`` ``[batch_size + 1]`` int32 counts tokens of k and v; the rest as in the paged wrapper's plan().

        Note that window_left, logits_soft_cap and sm_scale stand in another order than there, as in FlashInfer. ``v_indptr`` and
        ``o_indptr`` are refused: v and out are laid out as k and q.
        """
        refuse_multi_item_scoring(
            prefix_len_ptr=prefix_len_ptr, token_pos_in_items_ptr=token_pos_in_items_ptr, max_item_len_ptr=max_item_len_ptr
        )
        refuse("plan()", "lay v out as k and out as q", v_indptr=v_indptr, o_indptr=o_indptr)
        check_positive("plan()", head_dim_qk=head_dim_qk)
        options = Options(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, fp8_fast_accumulation)
        options = check_options("plan()", options, head_dim_qk)
        qo_indptr = index_array("plan()", "qo_indptr", qo_indptr, meaning="batch_size + 1")
        batch_size = max(qo_indptr.shape[0] - 1, 0)
        kv_indptr = index_array("plan()", "kv_indptr", kv_indptr, batch_size + 1, "batch_size + 1")
        host = host_view([qo_indptr, kv_indptr], validate)
        if host is not None:
            check_indptr("plan()", "qo_indptr", host[0], zero_based=True)
            check_indptr("plan()", "kv_indptr", host[1])
        total_q = int(host[0][-1]) if host is not None else None
        self._check_graph_limits(batch_size, total_q)
        planned = self._describe(
            "ragged",
            batch_size,
            (num_qo_heads, num_kv_heads),
            (head_dim_qk, head_dim_vo),
            0,
            (q_data_type, kv_data_type, o_data_type),
            custom_mask is not None or packed_custom_mask is not None,
            total_q,
            total_kv=int(host[1][-1]) if host is not None else None,
            batch_invariant=is_batch_invariant(fixed_split_size, disable_split_kv),
        )
        arrays = {"_qo_indptr_buf": qo_indptr, "_kv_indptr_buf": kv_indptr}
        if custom_mask is not None or packed_custom_mask is not None:
            known = host or [qo_indptr, kv_indptr]
            arrays |= mask_arrays(known[0], known[1][1:] - known[1][:-1], custom_mask, packed_custom_mask, host is not None)
        self._finish_plan(planned, options, arrays)

    begin_forward = plan

    @overload
    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: torch.Tensor,
        return_lse: Literal[False] = ...,
        **options: Unpack[RaggedRunOptions],
    ) -> torch.Tensor: ...
    @overload
    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: torch.Tensor,
        return_lse: Literal[True],
        **options: Unpack[RaggedRunOptions],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @overload
    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: torch.Tensor, return_lse: bool, **options: Unpack[RaggedRunOptions]
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: torch.Tensor,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        o_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: Sequence[torch.Tensor] | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        lse_base: str = "log2",
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch.

        Args:
            q: ``[qo_indptr[-1], num_qo_heads, head_dim_qk]``. k, v: ``[kv_indptr[-1], num_kv_heads, head_dim]`` (``"NHD"``) or
                ``[num_kv_heads, kv_indptr[-1], head_dim]`` (``"HND"``). The rest as in the paged wrapper's run().
            o_scale: refused unless None or 1 (it quantises the output of another library's kernels).

        Returns:
            ``out`` ``[qo_indptr[-1], num_qo_heads, head_dim_vo]``; with ``return_lse`` also ``lse`` fp32, base 2 (``"ln"``: natural).
        """
        if lse is None and window_left is None and kv_cache_sf is None and o_scale is None and len(args) == 0:
            result = self._repeat((k, v), q, q_scale, k_scale, v_scale, out, return_lse, sinks, lse_base)
            if result is not None:
                return result
        refuse_peer_options("run()", kv_cache_sf=kv_cache_sf, o_scale=None if isinstance(o_scale, float) and o_scale == 1.0 else o_scale)
        for name, x in (("k", k), ("v", v)):
            check_tensor("run()", name, x, {"num_tokens": None, "num_kv_heads": None, "head_dim": None})
        if self._kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        options = self._get_options(window_left)
        scales = scale_arguments("run()", args, q_scale, k_scale, v_scale)
        return self._execute(q, k.unsqueeze(0), v.unsqueeze(0), options, *scales, out, lse, return_lse, sinks, lse_base)

    def run_return_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`run` with ``return_lse=True``."""
        return self.run(q, k, v, *args, **{**kwargs, "return_lse": True})

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """run() with the plan's options replaced by these (their defaults included), from this call on."""
        self._override(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, k, v)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`forward`, with the log-sum-exp (base 2)."""
        self._override(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run_return_lse(q, k, v)

    def _usual_views(self, cache: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        k, v = cache
        if type(k) is not torch.Tensor or type(v) is not torch.Tensor or k.dim() != 3 or v.dim() != 3:
            return None
        if self._kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        return k.unsqueeze(0), v.unsqueeze(0)

    def _kv_lens(self) -> torch.Tensor:
        indptr = self._kv_indptr_buf[: self._planned().batch_size + 1].cpu()
        return indptr[1:] - indptr[:-1]

    def _kv_metadata(self) -> dict[str, torch.Tensor]:
        return {"kv_indptr": self._kv_indptr_buf}


__all__ = ["BatchPrefillWithRaggedKVCacheWrapper"]
