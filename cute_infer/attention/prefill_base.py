"""What the paged and the ragged prefill wrapper share."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import check_heads, check_positive
from ..errors import ShapeError, fail
from .mask_bits import mask_bit_indptr, pack_mask
from .options import Options
from .wrapper import BatchAttentionWrapper, Planned


class BatchPrefillBase(BatchAttentionWrapper):
    """Graph limits, the plan's facts and forward()'s overrides."""

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
        self._fixed_batch_size = len(self._qo_indptr_buf) - 1 if use_cuda_graph and self._qo_indptr_buf is not None else 0
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
        head_dim_qk, head_dim_vo = head_dims[0], head_dims[1] or head_dims[0]
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

    def _override(self, causal: bool, pos_encoding_mode: str, window_left: int, *rest: float | None) -> None:
        """forward()'s arguments replace the plan's options from this call on, as in FlashInfer."""
        options = Options(causal, pos_encoding_mode, window_left, *rest)  # type: ignore[arg-type]
        self._set_options(options._replace(fp8_fast_accumulation=self._fp8_fast_accumulation))


def mask_arrays(
    qo_indptr: torch.Tensor, kv_len: torch.Tensor, custom: torch.Tensor | None, packed: torch.Tensor | None, on_host: bool
) -> dict[str, torch.Tensor]:
    """A batch's mask as the buffers hold it. ``on_host``: the lengths are on the CPU, so the mask's size can be checked."""
    bit_indptr = mask_bit_indptr((qo_indptr[1:] - qo_indptr[:-1]).to(kv_len.device), kv_len)
    mask, mask_indptr = pack_mask("plan()", custom, packed, bit_indptr, int(bit_indptr[-1]) if on_host else None)
    return {"_custom_mask_buf": mask, "_mask_indptr_buf": mask_indptr}
