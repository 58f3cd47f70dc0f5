"""Appending to a paged cache on the CPU: every layout and dtype against a loop, what must not be written, and every refusal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cute_infer import errors
from cute_infer.jit import Target
from cute_infer.paged import append_paged_kv_cache, append_paged_mla_kv_cache, get_batch_indices_positions, get_seq_lens
from cute_infer.paged.reference import convert
from cute_infer.paged.variants import AppendSpec, choose, variants

PAGES, PAGE, HEADS, DIM = 9, 4, 3, 16
E4M3, E5M2, FP16, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16
FORMS = ["pair", "list", "combined", "permuted", "halves"]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Three requests of 6, 0 and 9 tokens own pages (7, 2), () and (4, 0, 8).
INDPTR, INDICES, LAST = ints(0, 2, 2, 5), ints(7, 2, 4, 0, 8, 5), ints(2, 0, 1)
LENGTHS = (6, 0, 9)


def new_cache(form: str, layout: str, dtype: torch.dtype = FP16, fill: float = 0.0) -> tuple[object, torch.Tensor, torch.Tensor]:
    """A cache as a user would pass it, and its (k, v) as ``[pages, page, heads, dim]`` views."""
    page = (PAGE, HEADS, DIM) if layout == "NHD" else (HEADS, PAGE, DIM)
    if form in ("pair", "list"):
        k, v = (torch.full((PAGES, *page), fill).to(dtype) for _ in range(2))
        cache: object = (k, v) if form == "pair" else [k, v]
    elif form == "halves":  # K and V are halves of the last axis
        both = torch.full((PAGES, *page[:-1], 2 * DIM), fill).to(dtype)
        k, v = both[..., :DIM], both[..., DIM:]
        cache = (k, v)
    elif form == "combined":
        cache = torch.full((PAGES, 2, *page), fill).to(dtype)
        k, v = cache[:, 0], cache[:, 1]
    else:  # a [pages, 2, ...] view of memory [2, pages, ...]
        cache = torch.full((2, PAGES, *page), fill).to(dtype).transpose(0, 1)
        k, v = cache[:, 0], cache[:, 1]
    return cache, *(x if layout == "NHD" else x.transpose(1, 2) for x in (k, v))


def new_rows(count: int, dtype: torch.dtype = FP16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(count, HEADS, DIM, generator=gen).to(dtype) for _ in range(2))
    return key, value


def expected(k: torch.Tensor, key: torch.Tensor, batch: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The loop: row t goes to token positions[t] of request batch[t], if it has a page there."""
    k = k.float().clone(memory_format=torch.contiguous_format)
    for row, request, position in zip(key, batch.tolist(), positions.tolist()):
        pages = INDICES[INDPTR[request] : INDPTR[request + 1]].tolist() if 0 <= request < 3 else []
        if 0 <= position < len(pages) * PAGE and 0 <= pages[position // PAGE] < PAGES:
            k[pages[position // PAGE], position % PAGE] = convert(row, E4M3).float() if row.dtype == E4M3 else row.float()
    return k


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", FORMS)
def test_every_cache_form(form: str, layout: str) -> None:
    cache, k, v = new_cache(form, layout)
    append_indptr = ints(0, 4, 4, 9)
    batch, positions = get_batch_indices_positions(append_indptr, get_seq_lens(INDPTR, LAST, PAGE), nnz=9)
    assert positions.tolist() == [2, 3, 4, 5, 4, 5, 6, 7, 8]
    key, value = new_rows(9)
    want_k, want_v = expected(k, key, batch, positions), expected(v, value, batch, positions)
    append_paged_kv_cache(key, value, batch, positions, cache, INDICES, INDPTR, LAST, layout)
    assert torch.equal(k.float(), want_k) and torch.equal(v.float(), want_v)
    assert k.ne(0).any(-1).any(-1).sum() == 9  # nine slots, no more


def test_page_size_one_without_the_page_axis() -> None:
    k, v = torch.zeros(PAGES, HEADS, DIM), torch.zeros(PAGES, HEADS, DIM)
    k, v = k.half(), v.half()
    key, value = new_rows(2)
    append_paged_kv_cache(key, value, ints(0, 2), ints(1, 0), (k, v), INDICES, INDPTR, ints(1, 0, 1))
    assert torch.equal(k[2], key[0]) and torch.equal(v[2], value[0])
    assert torch.equal(k[4], key[1]) and k.ne(0).any(-1).any(-1).sum() == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 4), st.integers(-3, 14)), max_size=12, unique=True), st.integers(0, 2**31))
def test_what_has_no_place_is_not_written(where: list[tuple[int, int]], seed: int) -> None:
    cache, k, v = new_cache("combined", "NHD", fill=7.0)
    key, value = new_rows(len(where), seed=seed)
    batch, positions = ints(*(r for r, _ in where)), ints(*(p for _, p in where))
    want_k, want_v = expected(k, key, batch, positions), expected(v, value, batch, positions)
    append_paged_kv_cache(key, value, batch, positions, cache, INDICES, INDPTR, LAST)
    assert torch.equal(k.float(), want_k) and torch.equal(v.float(), want_v)


@pytest.mark.parametrize(
    ("indices", "indptr"),
    [
        (ints(7, -1, 4, PAGES, 2**31 - 1), INDPTR),  # page ids outside the cache
        (INDICES[:3], INDPTR),  # indptr past the end of indices
        (INDICES, ints(0, -5, -5, 0)),  # negative offsets
        (INDICES[:0], INDPTR),
        (INDICES, ints(0)),
    ],
)
def test_broken_page_tables_write_nothing_out_of_range(indices: torch.Tensor, indptr: torch.Tensor) -> None:
    guard = torch.full((3 * PAGES, 2, PAGE, HEADS, DIM), 7.0).half()
    cache = guard[PAGES : 2 * PAGES]
    batch = torch.arange(3, dtype=torch.int32).repeat_interleave(12)
    key, value = new_rows(36)
    last = torch.zeros(len(indptr) - 1, dtype=torch.int32)
    append_paged_kv_cache(key, value, batch, ints(*range(12)).repeat(3), cache, indices, indptr, last)
    assert guard[:PAGES].eq(7).all() and guard[2 * PAGES :].eq(7).all()
    touched = {p for p in range(PAGES) if cache[p].ne(7).any()}
    assert touched <= set(indices.tolist())


def test_padding_of_get_batch_indices_positions_is_skipped() -> None:
    cache, k, _ = new_cache("pair", "NHD")
    batch, positions = get_batch_indices_positions(ints(0, 1, 1, 2), get_seq_lens(INDPTR, LAST, PAGE), nnz=6)
    assert batch.tolist() == [0, 2, -1, -1, -1, -1]
    append_paged_kv_cache(*new_rows(6), batch, positions, cache, INDICES, INDPTR, LAST)
    assert k.ne(0).any(-1).any(-1).sum() == 2


def test_padding_without_batch_indices_is_a_no_op() -> None:
    cache, k, v = new_cache("pair", "NHD", fill=7.0)
    append_paged_kv_cache(*new_rows(0), ints(), ints(), cache, INDICES, INDPTR, LAST)
    assert k.eq(7).all() and v.eq(7).all()


def test_appending_token_by_token_equals_all_at_once() -> None:
    once, k1, v1 = new_cache("combined", "HND")
    steps, k2, v2 = new_cache("combined", "HND")
    key, value = new_rows(9)
    batch, positions = ints(*[2] * 9), ints(*range(9))
    append_paged_kv_cache(key, value, batch, positions, once, INDICES, INDPTR, LAST, "HND")
    for t in torch.randperm(9).tolist():
        row = slice(t, t + 1)
        append_paged_kv_cache(key[row], value[row], batch[row], positions[row], steps, INDICES, INDPTR, LAST, "HND")
    assert torch.equal(k1, k2) and torch.equal(v1, v2)


@pytest.mark.parametrize("cache_dtype", [FP16, BF16, E4M3, E5M2])
@pytest.mark.parametrize("row_dtype", [FP16, BF16, E4M3, E5M2])
def test_dtypes(row_dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    cache, k, v = new_cache("combined", "NHD", cache_dtype)
    key, value = (x.to(row_dtype) for x in new_rows(2))
    call = (key, value, ints(0, 2), ints(5, 3), cache, INDICES, INDPTR, LAST)
    if row_dtype in (E4M3, E5M2) and row_dtype != cache_dtype:
        with pytest.raises(errors.DTypeError, match="append_key is float8"):
            append_paged_kv_cache(*call)
        return
    append_paged_kv_cache(*call)
    assert torch.equal(k[2, 1].float(), key[0].to(cache_dtype).float()) and torch.equal(v[4, 3].float(), value[1].to(cache_dtype).float())


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_fp8_saturates_and_keeps_nan(dtype: torch.dtype, largest: float) -> None:
    rows = torch.tensor([1e5, -1e5, torch.inf, -torch.inf, torch.nan, largest, 2.0**-30, 0.0])
    got = convert(rows.bfloat16(), dtype).float()
    assert got[:4].tolist() == [largest, -largest, largest, -largest]
    assert got[4].isnan() and got[5:].tolist() == [largest, 0.0, 0.0]


def test_strided_rows() -> None:
    cache, k, v = new_cache("pair", "NHD")
    fused = torch.randn(4, 3 * HEADS, DIM).half()  # q, k and v of one projection
    key, value = fused[:, HEADS : 2 * HEADS], fused[:, 2 * HEADS :]
    append_paged_kv_cache(key, value, ints(0, 0, 2, 2), ints(0, 1, 7, 8), cache, INDICES, INDPTR, LAST)
    assert torch.equal(k[7, 0], fused[0, HEADS : 2 * HEADS]) and torch.equal(v[8, 0], fused[3, 2 * HEADS :])


def test_int64_indices_are_welcome() -> None:
    cache, k, _ = new_cache("pair", "NHD")
    key, value = new_rows(1)
    append_paged_kv_cache(key, value, *(t.long() for t in (ints(2), ints(8))), cache, *(t.long() for t in (INDICES, INDPTR, LAST)))
    assert torch.equal(k[8, 0], key[0])


# ------------------------------------------------------------------------------------------------------------------ MLA
@pytest.mark.parametrize("dtype", [FP16, E4M3])
def test_mla(dtype: torch.dtype) -> None:
    buffer = torch.zeros(PAGES, PAGE, 48).to(dtype)
    ckv, kpe = buffer[..., :32], buffer[..., 32:]
    rows = torch.randn(3, 48).half()
    append_paged_mla_kv_cache(rows[:, :32], rows[:, 32:], ints(0, -1, 2), ints(5, 0, 8), ckv, kpe, INDICES, INDPTR, LAST)
    assert torch.equal(buffer[2, 1].float(), rows[0].to(dtype).float()) and torch.equal(buffer[8, 0].float(), rows[2].to(dtype).float())
    assert buffer.float().ne(0).any(-1).sum() == 2


@pytest.mark.parametrize("missing", ["ckv", "kpe"])
def test_mla_with_one_cache(missing: str) -> None:
    ckv, kpe = torch.zeros(PAGES, PAGE, 32).half(), torch.zeros(PAGES, PAGE, 16).half()
    rows = torch.randn(1, 32).half(), torch.randn(1, 16).half()
    append_paged_mla_kv_cache(
        *rows, ints(0), ints(0), None if missing == "ckv" else ckv, None if missing == "kpe" else kpe, INDICES, INDPTR, LAST
    )
    assert torch.equal(ckv[7, 0], torch.zeros(32).half() if missing == "ckv" else rows[0][0])
    assert torch.equal(kpe[7, 0], torch.zeros(16).half() if missing == "kpe" else rows[1][0])


def test_mla_caches_of_two_dtypes() -> None:
    ckv, kpe = torch.zeros(PAGES, PAGE, 32).to(E4M3), torch.zeros(PAGES, PAGE, 16).bfloat16()
    rows = torch.randn(1, 32).bfloat16(), torch.randn(1, 16).bfloat16()
    append_paged_mla_kv_cache(*rows, ints(2), ints(4), ckv, kpe, INDICES, INDPTR, LAST)
    assert torch.equal(ckv[0, 0].float(), rows[0][0].to(E4M3).float()) and torch.equal(kpe[0, 0], rows[1][0])


def test_mla_without_caches() -> None:
    rows = torch.randn(1, 32).half(), torch.randn(1, 16).half()
    with pytest.raises(errors.ConfigError, match="both None"):
        append_paged_mla_kv_cache(*rows, ints(0), ints(0), None, None, INDICES, INDPTR, LAST)


# -------------------------------------------------------------------------------------------------------------- tracing
def test_torch_compile_without_graph_breaks() -> None:
    cache, k, v = new_cache("combined", "NHD")
    key, value = new_rows(2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        append_paged_kv_cache(key, value, ints_0_2, positions, cache, INDICES, INDPTR, LAST)
        return cache.float().sum()

    ints_0_2, positions = ints(0, 2), ints(5, 3)
    total = step(cache, key, value)
    assert torch.equal(k[2, 1], key[0]) and torch.equal(v[4, 3], value[1])
    assert total.item() == pytest.approx((key.float().sum() + value.float().sum()).item(), abs=1e-3)


def test_op_registration() -> None:
    _, k, v = new_cache("pair", "NHD")
    args = (*new_rows(2), ints(0, 2), ints(5, 3), k, v, INDICES, INDPTR)
    torch.library.opcheck(torch.ops.cute_infer.append_paged_.default, args, test_utils=("test_schema", "test_faketensor"))


# ------------------------------------------------------------------------------------------------------------- refusals
KEY, VALUE = new_rows(2)
WHERE = ints(0, 2), ints(5, 3)
TABLE = INDICES, INDPTR, LAST


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"key": KEY[:, :2]}, errors.ShapeError, "append_key has num_kv_heads=2"),
        ({"value": VALUE[:1]}, errors.ShapeError, "append_value has nnz=1"),
        ({"value": VALUE[..., :8]}, errors.ShapeError, "head_dim"),
        ({"key": KEY.float()}, errors.DTypeError, "float32"),
        ({"batch": ints(0)}, errors.ShapeError, "batch_indices"),
        ({"positions": torch.zeros(2)}, errors.DTypeError, "positions"),
        ({"last": ints(2, 0)}, errors.ShapeError, "kv_last_page_len"),
        ({"indices": INDICES.to("meta")}, errors.DeviceError, "kv_indices"),
        ({"layout": "NDH"}, errors.LayoutError, "kv_layout"),
        ({"cache": torch.zeros(PAGES, 3, PAGE, HEADS, DIM).half()}, errors.ShapeError, "2"),
        ({"cache": [torch.zeros(n, PAGE, HEADS, DIM).half() for n in (PAGES, PAGES - 1)]}, errors.ShapeError, "num_pages"),
        ({"cache": torch.zeros(PAGES, 2, PAGE, HEADS, DIM)}, errors.DTypeError, "float32"),
        ({"cache": {"k": 1}}, errors.DTypeError, "paged_kv_cache"),
    ],
)
def test_refusals(change: dict, error: type[Exception], words: str) -> None:
    args = {"key": KEY, "value": VALUE, "batch": WHERE[0], "positions": WHERE[1], "cache": new_cache("combined", "NHD")[0]}
    args |= {"indices": INDICES, "indptr": INDPTR, "last": LAST, "layout": "NHD"} | change
    with pytest.raises(error, match=words):
        append_paged_kv_cache(*args.values())


def test_head_dim_that_no_vector_fits() -> None:
    cache = torch.zeros(PAGES, 2, PAGE, HEADS, 12).half()
    with pytest.raises(errors.ShapeError, match="multiple of 8"):
        append_paged_kv_cache(KEY[..., :12], VALUE[..., :12], *WHERE, cache, *TABLE)


# ---------------------------------------------------------------------------------------------------------------- tiles
def test_tiles_follow_the_dtype_and_the_chip() -> None:
    sm80, sm90 = Target.parse("sm_80"), Target.parse("sm_90a")
    to_fp8 = AppendSpec("bfloat16", "float8_e4m3fn")
    assert choose(to_fp8, sm90, rows_of_16=True).hardware_fp8 and not choose(to_fp8, sm80, rows_of_16=True).hardware_fp8
    assert choose(to_fp8, sm90, rows_of_16=True).vector == 16 and choose(to_fp8, sm90, rows_of_16=False).vector == 8
    assert choose(AppendSpec("float16", "float16"), sm90, rows_of_16=True).vector == 8
    assert len({(path, spec, tile) for path, spec, tile in variants(sm90)}) == len(list(variants(sm90)))
