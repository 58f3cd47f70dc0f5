"""What the paged and the ragged prefill wrapper share."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_heads, check_positive, check_tensor
from ..errors import ShapeError, fail
from .mask_bits import mask_bit_indptr, pack_mask
from .wrapper import BatchAttentionWrapper, Planned

# CUDA-graph buffers whose length follows from the batch size -> how many entries more they have
_PER_REQUEST = {"_paged_kv_indptr_buf": 1, "_kv_indptr_buf": 1, "_mask_indptr_buf": 1, "_paged_kv_last_page_len_buf": 0}


class BatchPrefillBase(BatchAttentionWrapper):
    """Graph limits and the plan's facts."""

    def __init__(
        self,
        workspace: torch.Tensor | None,
        workspace_alias: torch.Tensor | None,
        kv_layout: str,
        use_cuda_graph: bool,
        backend: str,
        buffers: dict[str, torch.Tensor | None],
        jit_args: Any,
        jit_kwargs: Any,
    ) -> None:
        super().__init__(workspace, workspace_alias, kv_layout, use_cuda_graph, backend, buffers, jit_args, jit_kwargs)
        self._fixed_batch_size = 0
        if use_cuda_graph and self._qo_indptr_buf is not None:
            self._fixed_batch_size = max(len(self._qo_indptr_buf) - 1, 0)
            for name, buffer in buffers.items():
                if buffer is not None and name in _PER_REQUEST:
                    extra = _PER_REQUEST[name]
                    shape = {f"batch_size{extra:+d}" if extra else "batch_size": self._fixed_batch_size + extra}
                    check_tensor(type(self).__name__, self._buffers[name], buffer, shape, because="as qo_indptr_buf says")
        self._max_total_num_rows: int | None = None
        self._graph_mask = use_cuda_graph and self._custom_mask_buf is not None and self._mask_indptr_buf is not None

    def _describe(
        self,
        kv_layout: str,
        batch_size: int,
        heads: tuple[int, int],
        head_dims: tuple[int, int | None],
        page_size: int,
        dtypes: tuple,
        custom_mask: bool,
        total_q: int | None,
        total_kv: int | None = None,
        page_ids: tuple[int, int] | None = None,
        batch_invariant: bool = False,
    ) -> Planned:
        head_dim_qk, head_dim_vo = head_dims[0], head_dims[1] if head_dims[1] is not None else head_dims[0]
        check_positive("plan()", head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo)
        check_heads("plan()", *heads)
        q_dtype, kv_dtype, o_dtype = self._dtypes(*dtypes)
        return Planned(
            kind="prefill",
            kv_layout=kv_layout,
            batch_size=batch_size,
            num_qo_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_vo,
            page_size=page_size,
            q_dtype=q_dtype,
            kv_dtype=kv_dtype,
            o_dtype=o_dtype,
            custom_mask=custom_mask or self._graph_mask,
            total_q=total_q,
            total_kv=None if self._use_cuda_graph else total_kv,
            page_ids=None if self._use_cuda_graph else page_ids,
            batch_invariant=batch_invariant,
        )

    def _check_graph_limits(self, batch_size: int, total_q: int | None) -> None:
        if not self._use_cuda_graph:
            return
        if batch_size != self._fixed_batch_size:
            fail(
                ShapeError,
                f"plan(): the batch has {batch_size} requests, the CUDA-graph buffers hold {self._fixed_batch_size}",
                expected=f"batch_size={self._fixed_batch_size}",
                fix="pad the batch with empty requests, or make one wrapper per batch size",
            )
        if total_q is not None:
            if self._max_total_num_rows is not None and total_q > self._max_total_num_rows:
                fail(
                    ShapeError,
                    f"plan(): {total_q} query rows exceed the {self._max_total_num_rows} of the first plan()",
                    expected=f"qo_indptr[-1] <= {self._max_total_num_rows}",
                    fix="make the first plan() of a CUDA-graph wrapper with the largest batch",
                )
            self._max_total_num_rows = self._max_total_num_rows or total_q


def mask_arrays(
    qo_indptr: torch.Tensor, kv_len: torch.Tensor, custom: torch.Tensor | None, packed: torch.Tensor | None, on_host: bool
) -> dict[str, torch.Tensor]:
    """A batch's mask as the buffers hold it. ``on_host``: the lengths are on the CPU, so the mask's size can be checked."""
    bit_indptr = mask_bit_indptr((qo_indptr[1:] - qo_indptr[:-1]).to(kv_len.device), kv_len)
    mask, mask_indptr = pack_mask("plan()", custom, packed, bit_indptr, int(bit_indptr[-1]) if on_host else None)
    return {"_custom_mask_buf": mask, "_mask_indptr_buf": mask_indptr}
