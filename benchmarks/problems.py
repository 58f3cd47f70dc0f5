"""The inputs of every benchmark: random, rotated past the cache, the same bytes for every candidate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


def randn(*shape: int, dtype: str, device: str) -> torch.Tensor:
    """Normal numbers in any dtype (torch.randn cannot draw float8)."""
    if dtype == "fp8":
        return torch.randn(*shape, dtype=torch.bfloat16, device=device).to(DTYPES[dtype])
    return torch.randn(*shape, dtype=DTYPES[dtype], device=device)


@dataclass
class DecodeProblem:
    """Paged decode: one query row per request, pages scattered at random over the cache (NHD).

    lens  KV tokens of each request.
    """

    lens: list[int]
    num_qo_heads: int
    num_kv_heads: int
    page_size: int
    kv_dtype: str
    num_sets: int
    device: str = "cuda"
    head_dim: int = 128

    def __post_init__(self) -> None:
        pages = [-(-n // self.page_size) for n in self.lens]
        total = sum(pages)
        int32 = {"dtype": torch.int32, "device": self.device}
        self.indptr = torch.tensor([0, *pages], **int32).cumsum(0, dtype=torch.int32)
        self.indices = torch.randperm(total, device=self.device).int()
        self.last_page_len = torch.tensor([(n - 1) % self.page_size + 1 for n in self.lens], **int32)
        self.seq_lens = torch.tensor(self.lens, **int32)
        self.q = randn(len(self.lens), self.num_qo_heads, self.head_dim, dtype="bf16", device=self.device)
        shape = (total, self.page_size, self.num_kv_heads, self.head_dim)
        self.kv = [tuple(randn(*shape, dtype=self.kv_dtype, device=self.device) for _ in "kv") for _ in range(self.num_sets)]

    @staticmethod
    def kv_bytes(lens: list[int], num_kv_heads: int, kv_dtype: str, head_dim: int = 128) -> int:
        """Bytes of K and V that one call must read."""
        return 2 * sum(lens) * num_kv_heads * head_dim * DTYPES[kv_dtype].itemsize

    @cached_property
    def block_table(self) -> torch.Tensor:
        """The page table as a padded matrix ``[batch, max pages]``."""
        starts = self.indptr.tolist()
        rows = [self.indices[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @cached_property
    def dense(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The same tokens as contiguous ``[batch, heads, kv_len, head_dim]`` K and V, for libraries without pages."""
        if len(set(self.lens)) > 1 or self.lens[0] % self.page_size:
            raise NotImplementedError("contiguous K and V need one length for all requests")
        if self.kv_dtype == "fp8":
            raise NotImplementedError("no FP8 K and V")

        def gather(cache: torch.Tensor) -> torch.Tensor:
            tokens = cache[self.indices.long()].view(len(self.lens), self.lens[0], self.num_kv_heads, self.head_dim)
            return tokens.transpose(1, 2)

        return [(gather(k), gather(v)) for k, v in self.kv]


@dataclass
class PrefillProblem:
    """Prefill of ``batch`` prompts of one length, K and V contiguous (ragged) and also in pages."""

    batch: int
    seq_len: int
    num_qo_heads: int
    num_kv_heads: int
    causal: bool
    dtype: str
    num_sets: int
    device: str = "cuda"
    head_dim: int = 128
    page_size: int = 16

    def __post_init__(self) -> None:
        tokens = self.batch * self.seq_len
        steps = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device)
        self.indptr = steps * self.seq_len

        def rows(heads: int) -> torch.Tensor:
            return randn(tokens, heads, self.head_dim, dtype=self.dtype, device=self.device)

        self.qkv = [(rows(self.num_qo_heads), rows(self.num_kv_heads), rows(self.num_kv_heads)) for _ in range(self.num_sets)]

    @staticmethod
    def set_bytes(batch: int, seq_len: int, num_qo_heads: int, num_kv_heads: int, dtype: str, head_dim: int = 128) -> int:
        return batch * seq_len * (num_qo_heads + 2 * num_kv_heads) * head_dim * DTYPES[dtype].itemsize

    @property
    def flops(self) -> float:
        """4 batch heads len^2 dim, half of it when causal (FlashAttention's convention)."""
        return 4 * self.batch * self.num_qo_heads * self.seq_len**2 * self.head_dim * (0.5 if self.causal else 1.0)

    def batched(self, i: int) -> tuple[torch.Tensor, ...]:
        """Set i as ``[batch, seq_len, heads, head_dim]`` views."""
        return tuple(x.view(self.batch, self.seq_len, x.shape[1], self.head_dim) for x in self.qkv[i])

    @cached_property
    def paged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """(kv_indptr, kv_indices, kv_last_page_len, caches): the K and V of every set in pages scattered at random."""
        assert self.seq_len % self.page_size == 0
        pages = self.batch * self.seq_len // self.page_size
        order = torch.randperm(pages, device=self.device)
        caches = []
        for _, k, v in self.qkv:
            cache = []
            for x in (k, v):
                # index_copy knows no float8: move its bytes
                source = x.view(torch.uint8) if self.dtype == "fp8" else x
                out = torch.empty_like(source).view(pages, self.page_size, *source.shape[1:])
                out[order] = source.view_as(out)
                cache.append(out.view(x.dtype))
            caches.append(tuple(cache))
        indptr = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * (self.seq_len // self.page_size)
        last = torch.full((self.batch,), self.page_size, dtype=torch.int32, device=self.device)
        return indptr, order.int(), last, caches


@dataclass
class SamplingProblem:
    """``[batch, vocab]`` fp32 logits, ``spread`` times normal: 3 gives a peaked distribution, 1 a flat one."""

    batch: int
    vocab: int
    spread: float
    num_sets: int
    device: str = "cuda"

    def __post_init__(self) -> None:
        self.logits = [self.spread * torch.randn(self.batch, self.vocab, device=self.device) for _ in range(self.num_sets)]

    @cached_property
    def probs(self) -> list[torch.Tensor]:
        return [x.softmax(-1) for x in self.logits]


@dataclass
class AppendProblem:
    """``tokens`` new K and V rows into a paged cache (page ids in random order), as many requests as pages."""

    tokens: int
    num_kv_heads: int
    page_size: int
    num_sets: int
    device: str = "cuda"
    head_dim: int = 128

    def __post_init__(self) -> None:
        assert self.tokens % self.page_size == 0
        pages = self.tokens // self.page_size
        int32 = {"dtype": torch.int32, "device": self.device}
        position = torch.arange(self.tokens, **int32)
        self.batch_indices, self.positions = position // self.page_size, position % self.page_size
        self.indptr = torch.arange(pages + 1, **int32)
        self.indices = torch.randperm(pages, device=self.device).int()
        self.last_page_len = torch.full((pages,), self.page_size, **int32)
        row = (self.num_kv_heads, self.head_dim)

        def pair(*shape: int) -> tuple[torch.Tensor, ...]:
            return tuple(randn(*shape, *row, dtype="bf16", device=self.device) for _ in "kv")

        self.rows = [pair(self.tokens) for _ in range(self.num_sets)]
        self.caches = [pair(pages, self.page_size) for _ in range(self.num_sets)]

    @property
    def bytes(self) -> int:
        """K and V, each read once and written once."""
        return 2 * 2 * self.tokens * self.num_kv_heads * self.head_dim * 2
