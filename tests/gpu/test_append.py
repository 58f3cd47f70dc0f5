"""The append kernel against its reference on a GPU: layouts, dtypes, guards, rounding of every 16-bit value, caches beyond 2**31."""

from __future__ import annotations

import itertools

import pytest
import torch

from cute_infer import errors
from cute_infer.jit import Target, get_kernel
from cute_infer.paged import append_paged_kv_cache, append_paged_mla_kv_cache, get_batch_indices_positions, get_seq_lens, reference
from cute_infer.paged.variants import PATH, AppendSpec, AppendTile

pytestmark = pytest.mark.gpu

E4M3, E5M2, FP16, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16
INT_MAX = 2**31 - 1
LENGTHS = [6, 0, 33, 1, 16, 100]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def page_table(lengths: list[int], page_size: int, spare: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(indices, indptr, last_page_len, pages of the cache): pages in random order, unused entries of indices INT_MAX."""
    pages = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(pages) + spare)[: sum(pages)]
    indices = torch.cat([order, torch.full((5,), INT_MAX)]).to("cuda", torch.int32)
    indptr = ints(0, *itertools.accumulate(pages))
    return indices, indptr, ints(*((n - 1) % page_size + 1 if n else 0 for n in lengths)), sum(pages) + spare


def bits(t: torch.Tensor) -> torch.Tensor:
    """Compare caches bit by bit: poison is NaN."""
    return t.view(torch.uint8 if t.element_size() == 1 else torch.int16)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, torch.nan, device="cuda").to(dtype)


def check(
    caches: tuple[torch.Tensor, torch.Tensor],
    rows: tuple[torch.Tensor, torch.Tensor],
    where: tuple[torch.Tensor, torch.Tensor],
    cache: object,
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: str = "NHD",
) -> None:
    """Append with the kernel and compare every bit of ``caches`` (NHD views of ``cache``) with the reference on the CPU."""
    indices, indptr, last = table
    want = [c.cpu().clone(memory_format=torch.contiguous_format) for c in caches]
    for c, r in zip(want, rows):
        reference.append_rows(r.cpu(), c, where[0].cpu(), where[1].cpu(), indices.cpu(), indptr.cpu())
    append_paged_kv_cache(*rows, *where, cache, indices, indptr, last, layout)
    for name, got, w in zip(("k", "v"), caches, want):
        differs = (bits(got.cpu()) != bits(w)).nonzero()
        assert not len(differs), f"{name} differs at {len(differs)} places, first [page, slot, head, d] = {differs[0].tolist()}"


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["pair", "combined", "permuted", "halves"])
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_cache_forms(page_size: int, form: str, layout: str) -> None:
    heads, dim = 8, 128
    indices, indptr, last, pages = page_table(LENGTHS, page_size)
    page = (page_size, heads, dim) if layout == "NHD" else (heads, page_size, dim)
    if form == "halves":
        both = poisoned(pages, *page[:-1], 2 * dim, dtype=FP16)
        k, v = both[..., :dim], both[..., dim:]
        cache: object = (k, v)
    elif form == "pair":
        cache = k, v = poisoned(pages, *page, dtype=FP16), poisoned(pages, *page, dtype=FP16)
    else:
        cache = poisoned(pages, 2, *page, dtype=FP16) if form == "combined" else poisoned(2, pages, *page, dtype=FP16).transpose(0, 1)
        k, v = cache[:, 0], cache[:, 1]
    k, v = (x if layout == "NHD" else x.transpose(1, 2) for x in (k, v))
    appended = ints(0, *itertools.accumulate(min(n, 20) for n in LENGTHS))
    nnz = int(appended[-1]) + 7  # seven rows of padding
    where = get_batch_indices_positions(appended, get_seq_lens(indptr, last, page_size), nnz)
    rows = tuple(torch.randn(nnz, heads, dim, device="cuda").half() for _ in range(2))
    check((k, v), rows, where, cache, (indices, indptr, last), layout)
    assert (~k.isnan()).any(-1).any(-1).sum() == nnz - 7


@pytest.mark.parametrize("cache_dtype", [FP16, BF16, E4M3, E5M2])
@pytest.mark.parametrize("row_dtype", [FP16, BF16, E4M3, E5M2])
@pytest.mark.parametrize("dim", [8, 64, 72, 128, 256, 576])
def test_dtypes_and_head_dims(dim: int, row_dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    if row_dtype in (E4M3, E5M2) and row_dtype != cache_dtype:
        pytest.skip("refused: tests/api/test_append.py")
    indices, indptr, last, pages = page_table(LENGTHS, 4)
    k, v = poisoned(pages, 4, 3, dim, dtype=cache_dtype), poisoned(pages, 4, 3, dim, dtype=cache_dtype)
    nnz = sum(LENGTHS)
    where = get_batch_indices_positions(ints(0, *itertools.accumulate(LENGTHS)), ints(*LENGTHS), nnz)
    rows = tuple((30 * torch.randn(nnz, 3, dim, device="cuda")).to(row_dtype) for _ in range(2))
    check((k, v), rows, where, (k, v), (indices, indptr, last))


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (1, 576), (32, 128), (128, 128), (7, 192)])
def test_head_counts(heads: int, dim: int) -> None:
    indices, indptr, last, pages = page_table([70], 16)
    cache = poisoned(pages, 2, 16, heads, dim, dtype=BF16)
    where = torch.zeros(70, dtype=torch.int32, device="cuda"), torch.randperm(70, device="cuda").to(torch.int32)
    rows = tuple(torch.randn(70, heads, dim, device="cuda").bfloat16() for _ in range(2))
    check((cache[:, 0], cache[:, 1]), rows, where, cache, (indices, indptr, last))


@pytest.mark.parametrize("hardware", [False, True])
@pytest.mark.parametrize("row_dtype", [FP16, BF16])
@pytest.mark.parametrize("cache_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("vector", [8, 16])
def test_every_16_bit_value_rounds_to_fp8_as_the_reference(
    vector: int, cache_dtype: torch.dtype, row_dtype: torch.dtype, hardware: bool
) -> None:
    """The integer path of sm_80 runs everywhere, so one GPU tests both."""
    target = Target.detect()
    if hardware and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("sm_80 has no conversion to fp8")
    if hardware and target.arch == "sm_80":
        pytest.skip("8.x devices run sm_80 code")
    rows = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(row_dtype).view(512, 1, 128).cuda()
    cache = torch.zeros(512, 1, 1, 128, device="cuda").to(cache_dtype)
    spec = AppendSpec(str(row_dtype)[6:], str(cache_dtype)[6:], second=False)
    kernel = get_kernel(PATH, spec, AppendTile(vector, hardware), target)
    where = torch.zeros(512, dtype=torch.int32, device="cuda"), torch.arange(512, dtype=torch.int32, device="cuda")
    kernel(rows, None, *where, cache, None, where[1], ints(0, 512))
    want = reference.convert(rows.cpu(), cache_dtype).view(-1)
    got = cache.cpu().view(-1)
    nan = want.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    wrong = (got.view(torch.uint8) != want.view(torch.uint8)) & ~nan
    assert not wrong.any(), f"first wrong: {rows.view(-1)[wrong.nonzero()[0].item()].item()}"


@pytest.mark.parametrize(
    ("indices", "indptr"),
    [
        ((7, -1, 4, 9, INT_MAX), (0, 2, 2, 5)),  # page ids outside the cache
        ((7, 2, 4), (0, 2, 2, 5)),  # indptr past the end of indices
        ((7, 2, 4, 0, 8), (0, -5, -5, 0)),  # negative offsets
        ((7, 2, 4, 0, 8), (INT_MAX, -INT_MAX, INT_MAX, 5)),
        ((), (0, 2, 2, 5)),
        ((7, 2, 4, 0, 8), (0,)),
    ],
)
def test_broken_metadata_writes_nothing_out_of_range(indices: tuple, indptr: tuple) -> None:
    guard = torch.full((27, 2, 4, 3, 64), 7.0, device="cuda").half()
    cache = guard[9:18]
    batch = torch.tensor([0, 1, 2, -1, 3, INT_MAX, -INT_MAX], dtype=torch.int32, device="cuda").repeat_interleave(16)
    positions = ints(*range(-2, 12), INT_MAX, -INT_MAX).repeat(7)
    rows = tuple(torch.randn(len(batch), 3, 64, device="cuda").half() for _ in range(2))
    last = torch.zeros(len(indptr) - 1, dtype=torch.int32, device="cuda")
    check((cache[:, 0], cache[:, 1]), rows, (batch, positions), cache, (ints(*indices), ints(*indptr), last))
    assert guard[:9].eq(7).all() and guard[18:].eq(7).all()


def test_strided_rows_and_rows_that_vectors_cannot_read() -> None:
    indices, indptr, last, pages = page_table([40], 16)
    where = torch.zeros(40, dtype=torch.int32, device="cuda"), torch.arange(40, dtype=torch.int32, device="cuda")
    for fused in (torch.randn(40, 24, 64, device="cuda").half(), torch.randn(40, 24, 65, device="cuda").half()[..., 1:]):
        cache = poisoned(pages, 2, 16, 8, 64, dtype=FP16)
        check((cache[:, 0], cache[:, 1]), (fused[:, 8:16], fused[:, 16:]), where, cache, (indices, indptr, last))


def test_a_cache_that_vectors_cannot_write_is_refused() -> None:
    cache = torch.zeros(4, 2, 4, 2, 65, device="cuda").half()[..., 1:]
    rows = torch.zeros(1, 2, 64, device="cuda").half()
    with pytest.raises(errors.ShapeError, match="16-byte boundaries"):
        append_paged_kv_cache(rows, rows, ints(0), ints(0), cache, ints(0), ints(0, 1), ints(1))


def test_fp8_rows_of_72_use_narrow_vectors() -> None:
    cache = torch.zeros(4, 2, 4, 2, 72, device="cuda").to(E4M3)
    rows = torch.randn(1, 2, 72, device="cuda").to(E4M3)
    append_paged_kv_cache(rows, rows, ints(0), ints(3), cache, ints(2), ints(0, 1), ints(4))
    assert torch.equal(bits(cache[2, 0, 3]), bits(rows[0])) and torch.equal(bits(cache[2, 1, 3]), bits(rows[0]))


@pytest.mark.parametrize("dtype", [BF16, E4M3])
def test_mla(dtype: torch.dtype) -> None:
    indices, indptr, last, pages = page_table(LENGTHS, 64)
    buffer = poisoned(pages, 64, 576, dtype=dtype)
    nnz = sum(LENGTHS)
    where = get_batch_indices_positions(ints(0, *itertools.accumulate(LENGTHS)), ints(*LENGTHS), nnz + 3)
    rows = torch.randn(nnz + 3, 576, device="cuda").bfloat16()
    want = buffer.cpu().clone()
    reference.append_rows(rows.cpu().unsqueeze(1), want.unsqueeze(2), where[0].cpu(), where[1].cpu(), indices.cpu(), indptr.cpu())
    append_paged_mla_kv_cache(rows[:, :512], rows[:, 512:], *where, buffer[..., :512], buffer[..., 512:], indices, indptr, last)
    assert torch.equal(bits(buffer.cpu()), bits(want))
    only_kpe = torch.zeros(pages, 64, 64, device="cuda").bfloat16()
    append_paged_mla_kv_cache(rows[:, :512], rows[:, 512:], *where, None, only_kpe, indices, indptr, last)
    assert (only_kpe != 0).any(-1).sum() == nnz


def test_cuda_graph_reads_live_metadata() -> None:
    indices, indptr, last, pages = page_table([30, 20], 8)
    cache = torch.zeros(pages, 2, 8, 4, 64, device="cuda").half()
    rows = tuple(torch.randn(2, 4, 64, device="cuda").half() for _ in range(2))
    batch, positions = ints(0, 1), ints(29, 19)
    args = (*rows, batch, positions, cache, indices, indptr, last)
    append_paged_kv_cache(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_paged_kv_cache(*args)
    cache.zero_()
    positions.copy_(ints(3, 17))
    batch.copy_(ints(1, -1))
    indices.copy_(indices.flip(0).clamp(max=pages - 1))
    graph.replay()
    page = int(indices[int(indptr[1])])
    assert torch.equal(cache[page, 0, 3], rows[0][0]) and torch.equal(cache[page, 1, 3], rows[1][0])
    assert cache.ne(0).any(-1).any(-1).sum() == 2  # one row of K, one of V


def test_torch_compile_without_graph_breaks() -> None:
    cache = torch.zeros(4, 2, 4, 2, 64, device="cuda").half()
    rows = torch.randn(2, 2, 64, device="cuda").half()
    where, table = (ints(0, -1), ints(5, 0)), (ints(3, 1), ints(0, 2), ints(2))

    @torch.compile(fullgraph=True)
    def step(rows: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        append_paged_kv_cache(rows, 2 * rows, *where, cache, *table)
        return cache.float().sum()

    total = step(rows, cache)
    assert torch.equal(cache[1, 0, 1], rows[0]) and torch.equal(cache[1, 1, 1], 2 * rows[0])
    torch.testing.assert_close(total, 3 * rows[0].float().sum(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", [FP16, E4M3])
def test_cache_of_more_than_two_billion_elements(dtype: torch.dtype) -> None:
    """Addresses past 2**31 elements (and past 2**32 bytes), in one 5-D cache as engines allocate it."""
    page_size, heads, dim = 64, 8, 128
    pages = 2**31 // (2 * page_size * heads * dim) + 10
    cache_bytes = pages * 2 * page_size * heads * dim * torch.empty(0, dtype=dtype).element_size()
    if torch.cuda.mem_get_info()[0] < cache_bytes + (1 << 30):
        pytest.skip(f"needs {cache_bytes >> 30} GiB of free memory")
    cache = torch.zeros(pages, 2, page_size, heads, dim, dtype=torch.uint8 if dtype == E4M3 else dtype, device="cuda").view(dtype)
    rows = tuple(torch.randn(3, heads, dim, device="cuda").half() for _ in range(2))
    ids = [0, pages // 2, pages - 1]
    append_paged_kv_cache(*rows, ints(0, 1, 2), ints(63, 5, 0), cache, ints(*ids), ints(0, 1, 2, 3), ints(64, 6, 1))
    for row, (page, slot) in enumerate(zip(ids, (63, 5, 0))):
        for kv in (0, 1):
            assert torch.equal(bits(cache[page, kv, slot]), bits(reference.convert(rows[kv][row], dtype)))
    assert sum(int(bits(part).count_nonzero()) > 0 for part in cache.flatten(0, 1).split(64)) <= 6
