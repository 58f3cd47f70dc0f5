"""Named attention shapes for tests: batches a server meets, and batches built to hit an edge."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch. ``qo_lens`` is None for decode (one query row per request)."""

    name: str
    kv_lens: tuple[int, ...]
    qo_lens: tuple[int, ...] | None = None
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    head_dim_vo: int | None = None
    page_size: int = 4
    q_dtype: torch.dtype = torch.float16
    kv_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def dv(self) -> int:
        return self.head_dim_vo or self.head_dim

    @property
    def kv(self) -> torch.dtype:
        return self.kv_dtype or self.q_dtype

    @property
    def rows(self) -> tuple[int, ...]:
        """Query rows of each request."""
        return self.qo_lens or (1,) * len(self.kv_lens)


DECODE = (
    Case("one-request", (9,)),
    Case("page-boundaries", (1, 3, 4, 5, 7, 8, 9)),
    Case("with-empty-requests", (0, 5, 0, 0, 12, 0)),
    Case("page-size-1", (1, 6, 13), page_size=1),
    Case("odd-page-size", (4, 5, 6, 11), page_size=5),
    Case("mha", (7, 2), num_qo_heads=3, num_kv_heads=3),
    Case("group-7", (7, 20), num_qo_heads=14, num_kv_heads=2),
    Case("bf16", (7, 20), q_dtype=torch.bfloat16),
    Case("fp8-kv", (7, 20), kv_dtype=torch.float8_e4m3fn),
    Case("e5m2-kv-bf16", (7, 20), q_dtype=torch.bfloat16, kv_dtype=torch.float8_e5m2),
    Case("wide-v", (7, 20), head_dim=8, head_dim_vo=24),
)

PREFILL = (
    Case("one-prompt", (9,), (9,)),
    Case("chunked", (9, 30, 4), (3, 7, 4)),
    Case("more-queries-than-keys", (2, 5), (6, 5)),
    Case("with-empty-requests", (0, 8, 5, 0), (0, 3, 0, 2)),
    Case("one-row-each", (9, 1, 17), (1, 1, 1)),
    Case("group-5", (11, 6), (4, 6), num_qo_heads=5, num_kv_heads=1),
    Case("fp8-kv", (11, 6), (4, 6), q_dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn),
    Case("narrow-v", (11, 6), (4, 6), head_dim=24, head_dim_vo=16),
)
