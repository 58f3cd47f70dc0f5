"""What the decode and the paged prefill wrapper share: where their KV is."""

from __future__ import annotations

import torch

from ..paged.tables import get_seq_lens
from .wrapper import BatchAttentionWrapper


class PagedWrapper(BatchAttentionWrapper):
    """The page table among the metadata buffers."""

    _paged_kv_indptr_buf: torch.Tensor
    _paged_kv_indices_buf: torch.Tensor
    _paged_kv_last_page_len_buf: torch.Tensor

    def _kv_lens(self) -> torch.Tensor:
        plan = self._planned()
        indptr, last = self._paged_kv_indptr_buf[: plan.batch_size + 1].cpu(), self._paged_kv_last_page_len_buf[: plan.batch_size].cpu()
        return get_seq_lens(indptr, last, plan.page_size)

    def _kv_metadata(self) -> dict[str, torch.Tensor]:
        return {
            "kv_indptr": self._paged_kv_indptr_buf,
            "kv_indices": self._paged_kv_indices_buf,
            "kv_last_page_len": self._paged_kv_last_page_len_buf,
        }


__all__ = ["PagedWrapper"]
