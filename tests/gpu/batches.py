"""Random batches on the GPU, poisoned where nothing may be read: NaN in unused page slots and pages, INT_MAX in unused page ids."""

from __future__ import annotations

import dataclasses

import torch

INT_MAX = 2**31 - 1


@dataclasses.dataclass
class PagedBatch:
    """A paged KV cache in one of its memory forms, with the metadata that addresses it.

    ``cache`` is what a user passes to ``run``: a (k, v) tuple, or one 5-D tensor; ``indptr``/``indices``/``last_page_len`` are CSR.
    """

    cache: object
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    kv_lens: list[int]
    page_size: int
    kv_layout: str


def paged_batch(
    kv_lens: list[int],
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    kv_dtype: torch.dtype,
    *,
    head_dim_vo: int | None = None,
    kv_layout: str = "NHD",
    form: str = "separate",
    seed: int = 0,
    spare_pages: int = 3,
) -> PagedBatch:
    """``form``: "separate" K and V, "combined" 5-D, or "permuted" (5-D, in another order in memory than its shape, as vLLM passes)."""
    gen = torch.Generator("cuda").manual_seed(seed)
    head_dim_vo = head_dim_vo or head_dim
    pages_of = [-(-n // page_size) for n in kv_lens]
    used, total = sum(pages_of), sum(pages_of) + spare_pages
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:used].to(torch.int32)
    indptr = torch.tensor([0, *torch.tensor(pages_of).cumsum(0).tolist()], dtype=torch.int32)
    last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in kv_lens], dtype=torch.int32)

    valid = torch.zeros(total, page_size, dtype=torch.bool)
    for r, n in enumerate(kv_lens):
        for i, page in enumerate(order[indptr[r] : indptr[r + 1]].tolist()):
            valid[page, : min(page_size, n - i * page_size)] = True
    valid = valid.cuda()[:, :, None, None]

    def pool(dim: int) -> torch.Tensor:
        x = torch.randn(total, page_size, num_kv_heads, dim, device="cuda", generator=gen)
        return torch.where(valid, x, torch.nan).to(kv_dtype)

    k, v = pool(head_dim), pool(head_dim_vo)
    if kv_layout == "HND":
        k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    if form == "combined":
        cache: object = torch.stack([k.view(torch.uint8), v.view(torch.uint8)], dim=1).view(kv_dtype)
    elif form == "permuted":  # memory [2, pages, ...], shape [pages, 2, ...]
        cache = torch.stack([k.view(torch.uint8), v.view(torch.uint8)], dim=0).view(kv_dtype).transpose(0, 1)
    else:
        cache = (k, v)
    indices = torch.cat([order, torch.full((5,), INT_MAX, dtype=torch.int32)])
    return PagedBatch(cache, indptr.cuda(), indices.cuda(), last.cuda(), kv_lens, page_size, kv_layout)


def queries(rows: int, num_heads: int, head_dim: int, dtype: torch.dtype, *, strided: bool = False, seed: int = 1) -> torch.Tensor:
    """``[rows, num_heads, head_dim]``; ``strided`` makes it a slice of a wider tensor, as a fused QKV projection does."""
    gen = torch.Generator("cuda").manual_seed(seed)
    width = 3 * num_heads if strided else num_heads
    return torch.randn(rows, width, head_dim, device="cuda", generator=gen).to(dtype)[:, :num_heads]


def assert_close(out: torch.Tensor, ref: torch.Tensor, *, dtype: torch.dtype, what: str = "out") -> None:
    """Compare with an fp32 oracle of the same rounded inputs: NaN and inf must coincide, the rest within a few roundings of dtype.

    The kernel rounds p to 16 bits before P V and its output to ``dtype``; each adds at most half an ulp relative to the largest value seen
    in a row, so the bound is 4 ulp of the row's largest magnitude.
    """
    out, ref = out.float(), ref.float()
    assert torch.equal(out.isnan(), ref.isnan()), f"{what}: NaN at {(out.isnan() != ref.isnan()).nonzero()[:5].tolist()}"
    assert torch.equal(out.isinf(), ref.isinf()), f"{what}: inf differs at {(out.isinf() != ref.isinf()).nonzero()[:5].tolist()}"
    finite = ref.isfinite()
    error = torch.where(finite, (out - ref).abs(), 0.0)
    scale = torch.where(finite, ref.abs(), 0.0).amax(-1, keepdim=True).clamp_min(1e-2)
    bound = 4 * torch.finfo(dtype).eps * scale
    worst = (error - bound).flatten().argmax().item()
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    assert bool((error <= bound).all()), (
        f"{what}: worst at {index}: got {out.flatten()[worst].item():.6g}, reference {ref.flatten()[worst].item():.6g}, "
        f"error {error.flatten()[worst].item():.3g} > {bound.expand_as(error).flatten()[worst].item():.3g}; "
        f"{int((error > bound).sum())} of {error.numel()} wrong"
    )


def assert_lse_close(lse: torch.Tensor, ref: torch.Tensor) -> None:
    """LSE in base 2: fp32 sums over 16-bit inputs and approximate exp2/log2."""
    assert torch.equal(lse.isinf(), ref.isinf()), f"lse: inf differs at {(lse.isinf() != ref.isinf()).nonzero()[:5].tolist()}"
    finite = ref.isfinite()
    torch.testing.assert_close(lse[finite], ref[finite], rtol=2e-3, atol=5e-3)
