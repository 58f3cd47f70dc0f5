"""Batches in which everything that must not be read is poison: NaN in unused slots and pages, INT_MAX in unused page ids.

The pages of a request are scattered over the cache, and tensors can be made non-contiguous; a result without NaN proves that only what
belongs to a request was read.
"""

from __future__ import annotations

import dataclasses

import torch

from tests.cases import Case

INT_MAX = 2**31 - 1


@dataclasses.dataclass
class Batch:
    """Inputs of one :class:`Case`: ragged K and V, and the same tokens in a poisoned paged cache."""

    q: torch.Tensor  # [sum of rows, Hq, D]
    k: torch.Tensor  # [sum of kv_lens, Hkv, D]
    v: torch.Tensor  # [sum of kv_lens, Hkv, Dv]
    k_pages: torch.Tensor  # [pages, page_size, Hkv, D]
    v_pages: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor  # in tokens
    page_indptr: torch.Tensor
    page_indices: torch.Tensor
    last_page_len: torch.Tensor

    @property
    def csr(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.page_indptr, self.page_indices, self.last_page_len

    def request(self, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v of one request."""
        rows = slice(int(self.qo_indptr[r]), int(self.qo_indptr[r + 1]))
        tokens = slice(int(self.kv_indptr[r]), int(self.kv_indptr[r + 1]))
        return self.q[rows], self.k[tokens], self.v[tokens]


def offsets(lengths: tuple[int, ...] | list[int]) -> torch.Tensor:
    """``[0, n0, n0 + n1, ...]`` int32."""
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of a wider tensor filled with NaN (16-byte aligned rows)."""
    wide = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 16), torch.nan).to(x.dtype)
    view = wide[..., : x.shape[-2], : x.shape[-1]]
    view.copy_(x)
    return view


def make_batch(case: Case, *, seed: int = 0, spare_pages: int = 3) -> Batch:
    """Random inputs of ``case`` on the CPU."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=gen).to(dtype)

    tokens = sum(case.kv_lens)
    k = randn(tokens, case.num_kv_heads, case.head_dim, dtype=case.kv)
    v = randn(tokens, case.num_kv_heads, case.dv, dtype=case.kv)
    pages = [-(-n // case.page_size) for n in case.kv_lens]
    used = sum(pages)
    ids = torch.randperm(used + spare_pages, generator=gen)[:used].to(torch.int32)
    indices = torch.cat([ids, torch.full((4,), INT_MAX, dtype=torch.int32)])
    batch = Batch(
        q=randn(sum(case.rows), case.num_qo_heads, case.head_dim, dtype=case.q_dtype),
        k=k,
        v=v,
        k_pages=torch.full((used + spare_pages, case.page_size, case.num_kv_heads, case.head_dim), torch.nan).to(case.kv),
        v_pages=torch.full((used + spare_pages, case.page_size, case.num_kv_heads, case.dv), torch.nan).to(case.kv),
        qo_indptr=offsets(case.rows),
        kv_indptr=offsets(case.kv_lens),
        page_indptr=offsets(pages),
        page_indices=indices,
        # what a request without pages says here must not matter
        last_page_len=torch.tensor([(n - 1) % case.page_size + 1 if n else INT_MAX for n in case.kv_lens], dtype=torch.int32),
    )
    for r, n in enumerate(case.kv_lens):
        first, begin = int(batch.page_indptr[r]), int(batch.kv_indptr[r])
        for token in range(n):
            page, slot = int(ids[first + token // case.page_size]), token % case.page_size
            batch.k_pages[page, slot] = k[begin + token]
            batch.v_pages[page, slot] = v[begin + token]
    return batch
