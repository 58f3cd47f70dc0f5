"""The paged KV cache: page-table arithmetic and appending tokens."""

from __future__ import annotations

from .append import append_paged_kv_cache, append_paged_mla_kv_cache
from .tables import PageTable, from_page_table, get_batch_indices_positions, get_seq_lens

__all__ = [
    "PageTable",
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "from_page_table",
    "get_batch_indices_positions",
    "get_seq_lens",
]
