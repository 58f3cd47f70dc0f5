"""Cascade attention: requests that share prefixes read each prefix once.

    level 0        one (or a few) entries: the system prompt, shared by every request
    level 1..n-2   shared by fewer
    level n-1      one entry per request: its own suffix, the only level where a causal mask applies

Each level is a batch of its own, with its own offsets into the same queries and the same paged cache; each gives a state (out, lse) of
every query row, and one merge over the levels gives attention over the concatenated KV.

    out = merge_states(level 0, ..., level n-1)          lse base 2

Source: Ye et al., "Cascade Inference: Memory Bandwidth Efficient Shared Prefix Batch Decoding" (2024); FlashInfer ``cascade.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..checks import check_positive, check_tensor
from ..errors import ConfigError, PlanError, ShapeError, UnsupportedConfigError, fail
from .merge import merge_into, merge_state, merge_state_in_place, merge_states
from .options import Scale
from .prefill import BatchPrefillWithPagedKVCacheWrapper
from .wrapper import make_outputs


def _level(arrays: Sequence[torch.Tensor | None] | None, level: int) -> torch.Tensor | None:
    return None if arrays is None else arrays[level]


class MultiLevelCascadeAttentionWrapper:
    """Attention over KV that is shared in levels.

        wrapper = MultiLevelCascadeAttentionWrapper(2)
        wrapper.plan(
            [torch.tensor([0, batch_size]), torch.arange(batch_size + 1)],       # every row sees the prefix; one row per request
            [prefix_indptr, suffix_indptr], [prefix_indices, suffix_indices], [prefix_last_page_len, suffix_last_page_len],
            num_qo_heads, num_kv_heads, head_dim, page_size,
        )
        out = wrapper.run(q, (k_cache, v_cache))                                 # once per layer

    Args:
        num_levels: from the root (shared by all) to the leaves (one entry per request).
        float_workspace_buffer (alias ``workspace_buffer``): uint8 scratch, of any content; optional.
        kv_layout: ``"NHD"`` or ``"HND"``.
        use_cuda_graph: plan() copies into the buffers below, which fix the batch size of each level.
        qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr: one int32 buffer per level,
            as in :class:`BatchPrefillWithPagedKVCacheWrapper`; needed with ``use_cuda_graph``.
        backend: hint without effect, except ``"reference"``.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor | None = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: Sequence[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[torch.Tensor] | None = None,
        *,
        workspace_buffer: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        call = type(self).__name__
        check_positive(call, num_levels=num_levels)
        self._num_levels = num_levels
        self._use_cuda_graph = use_cuda_graph
        buffers = {
            "qo_indptr_buf_arr": qo_indptr_buf_arr,
            "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
            "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
            "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
        }
        for name, arrays in buffers.items():
            if arrays is not None:
                self._check_levels(call, name, arrays)
        self._batch_prefill_wrappers = [
            BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer,
                kv_layout,
                use_cuda_graph,
                _level(qo_indptr_buf_arr, level),
                _level(paged_kv_indptr_buf_arr, level),
                _level(paged_kv_indices_buf_arr, level),
                _level(paged_kv_last_page_len_buf_arr, level),
                backend=backend,
                workspace_buffer=workspace_buffer,
            )
            for level in range(num_levels)
        ]
        self._shape: tuple[int, int] | None = None
        self._o_dtype: torch.dtype | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plan() copies into the buffers given to the constructor."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: Sequence[torch.Tensor | None] | None = None
    ) -> None:
        """Use another workspace from the next run() on. There are no integer workspaces; they are only kept."""
        if int_workspace_buffers is not None:
            self._check_levels("reset_workspace_buffer()", "int_workspace_buffers", int_workspace_buffers)
        for level, wrapper in enumerate(self._batch_prefill_wrappers):
            wrapper.reset_workspace_buffer(float_workspace_buffer, _level(int_workspace_buffers, level))

    def plan(
        self,
        qo_indptr_arr: Sequence[torch.Tensor],
        paged_kv_indptr_arr: Sequence[torch.Tensor],
        paged_kv_indices_arr: Sequence[torch.Tensor],
        paged_kv_last_page_len: Sequence[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
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
        *,
        validate: bool | None = None,
    ) -> None:
        """Describe the batch of every level.

        Args:
            qo_indptr_arr: per level ``[entries + 1]`` int32; entry e of the level is read by rows ``[e]:[e+1]`` of q. Every level covers
                all rows, so all of them end with the same number.
            paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len: per level the page table (CSR) of its entries.
            causal: applies to the last level alone, aligned bottom-right with each request's suffix.
            pos_encoding_mode, window_left, rope_scale, rope_theta: need positions in the whole sequence, which a level does not know:
                refused with more than one level (FlashInfer counts positions from the start of each level).
            validate: as in the decode wrapper's plan().
            The rest as in :meth:`BatchPrefillWithPagedKVCacheWrapper.plan`.

        Raises:
            ShapeError: not one array per level. UnsupportedConfigError: an option that depends on positions.
            PageTableError, DTypeError, LayoutError: the metadata of a level contradicts itself.
        """
        levels = {
            "qo_indptr_arr": qo_indptr_arr,
            "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        for name, arrays in levels.items():
            self._check_levels("plan()", name, arrays)
        self._shape = None  # a plan that is refused halfway leaves none
        if self._num_levels > 1 and (pos_encoding_mode != "NONE" or window_left >= 0):
            fail(
                UnsupportedConfigError,
                "plan(): a level of a cascade does not know where it stands in the sequence",
                got=f"pos_encoding_mode={pos_encoding_mode!r}, window_left={window_left}",
                expected="pos_encoding_mode='NONE' and window_left=-1 with more than one level",
                fix="apply RoPE before attention; use BatchPrefillWithPagedKVCacheWrapper over the whole sequence for windows and ALiBi",
            )
        for level, (wrapper, *arrays) in enumerate(zip(self._batch_prefill_wrappers, *levels.values())):
            wrapper.plan(
                *arrays,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
                causal=causal and level == self._num_levels - 1,
                pos_encoding_mode=pos_encoding_mode,
                use_fp16_qk_reduction=use_fp16_qk_reduction,
                sm_scale=sm_scale,
                window_left=window_left,
                logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale,
                rope_theta=rope_theta,
                q_data_type=q_data_type,
                kv_data_type=kv_data_type,
                validate=validate,
            )
        plans = [wrapper._plan_info for wrapper in self._batch_prefill_wrappers]
        rows = [plan.total_q for plan in plans if plan is not None]
        if None not in rows and len(set(rows)) > 1:
            fail(
                ShapeError,
                "plan(): the levels do not cover the same rows of q",
                got=f"qo_indptr_arr[i][-1] = {', '.join(map(str, rows))}",
                expected="one number: every level covers every row",
            )
        planned = plans[0]
        assert planned is not None
        self._shape, self._o_dtype = (num_qo_heads, head_dim), planned.o_dtype

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | Sequence[torch.Tensor],
        *,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of every row over all its levels.

        Args:
            q: ``[rows, num_qo_heads, head_dim]``.
            paged_kv_cache: one cache for all levels, ``[num_pages, 2, ...]`` or ``(k_cache, v_cache)``.
            out: ``[rows, num_qo_heads, head_dim]`` to write into.
            q_scale, k_scale, v_scale: as in :meth:`BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns:
            ``out``; with ``return_lse`` also ``lse`` ``[rows, num_qo_heads]`` fp32, **base 2**. A row without any key gives 0 and -inf.

        Raises:
            PlanError: plan() has not been called.
        """
        if self._shape is None or self._o_dtype is None:
            fail(PlanError, "run(): the wrapper has not been planned", fix="call plan() first")
        scales: dict[str, Any] = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        if self._num_levels == 1:
            return self._batch_prefill_wrappers[0].run(q, paged_kv_cache, out=out, return_lse=return_lse, **scales)
        check_tensor("run()", "q", q, {"num_tokens": None, "num_qo_heads": self._shape[0], "head_dim": self._shape[1]})
        out, _ = make_outputs("run()", q, (q.shape[0], *self._shape), self._o_dtype, out, None, want_lse=False)
        states = q.new_empty((self._num_levels, q.shape[0], *self._shape), dtype=self._o_dtype)
        lses = q.new_empty(states.shape[:-1], dtype=torch.float32)
        for wrapper, level_out, level_lse in zip(self._batch_prefill_wrappers, states, lses):
            wrapper.run(q, paged_kv_cache, out=level_out, lse=level_lse, return_lse=True, **scales)
        lse = torch.empty_like(lses[0]) if return_lse else None
        merge_into(states, lses, out, lse)
        return out if lse is None else (out, lse)

    forward = run

    def end_forward(self) -> None:
        """Does nothing; FlashInfer once needed it."""

    def _check_levels(self, call: str, name: str, arrays: Sequence[torch.Tensor | None]) -> None:
        if isinstance(arrays, torch.Tensor) or not isinstance(arrays, Sequence):
            fail(ConfigError, f"{call}: {name} must be a list with one tensor per level", got=type(arrays).__name__)
        if len(arrays) != self._num_levels:
            fail(
                ShapeError,
                f"{call}: {name} has {len(arrays)} arrays for {self._num_levels} levels",
                expected=f"{self._num_levels} arrays, from the root level to the leaves",
                fix="give one array per level, or construct the wrapper with another num_levels",
            )


__all__ = ["MultiLevelCascadeAttentionWrapper", "merge_state", "merge_state_in_place", "merge_states"]
