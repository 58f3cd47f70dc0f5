"""Argument checks of the public functions: the one place that raises shape, dtype, device and page-table errors.

Every message says what is wrong with which argument of which call, what came, what was expected and what to do. Checks of metadata
values take tensors that are already on the CPU; whether they are brought there is decided by ``attention/metadata.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from .errors import ConfigError, DeviceError, DTypeError, LayoutError, PageTableError, ShapeError, UnsupportedConfigError, fail

KV_LAYOUTS = ("NHD", "HND")
POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
SHORT = 64  # values that Python looks through faster than a handful of torch calls does

_HALF = (torch.float16, torch.bfloat16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def describe(name: str, tensor: Any) -> str:
    """``"q [7, 32, 128] bfloat16 cuda:0"``, or the type of what is not a tensor."""
    if not isinstance(tensor, torch.Tensor):
        return f"{name} of type {type(tensor).__name__}"
    return f"{name} {list(tensor.shape)} {dtype_name(tensor.dtype)} {tensor.device}"


def check_choice(call: str, name: str, value: Any, allowed: Collection[str]) -> None:
    """``value`` is one of the names ``allowed``; LayoutError (also a KeyError) otherwise."""
    if value not in allowed:
        fail(LayoutError, f"{call}: invalid {name} {value!r}", expected=" | ".join(map(repr, allowed)), fix=f"spell {name} as listed")


def check_tensor(
    call: str,
    name: str,
    tensor: Any,
    shape: Mapping[str, int | None] | None = None,
    *,
    dtypes: Collection[torch.dtype] = (),
    device: torch.device | None = None,
    because: str = "",
    fix: str | None = None,
) -> None:
    """``tensor`` is a tensor with the named extents of ``shape`` (``None``: any), one of ``dtypes``, on ``device``.

    Args:
        because: ends the first line of a shape error, e.g. ``"but plan() was called with num_qo_heads=64"``.
    """
    if not isinstance(tensor, torch.Tensor):
        fail(DTypeError, f"{call}: {name} must be a torch.Tensor", got=describe(name, tensor), fix=fix)
    if shape is not None:
        _check_shape(call, name, tensor, shape, because, fix)
    if dtypes and tensor.dtype not in dtypes:
        expected = " | ".join(dtype_name(d) for d in dtypes)
        fix = fix or f"convert it: {name}.to(torch.{dtype_name(next(iter(dtypes)))})"
        fail(DTypeError, f"{call}: {name} has dtype {dtype_name(tensor.dtype)}", got=describe(name, tensor), expected=expected, fix=fix)
    if device is not None and not same_device(tensor.device, device):
        fail(
            DeviceError,
            f"{call}: {name} is on {tensor.device} but the call runs on {device}",
            got=describe(name, tensor),
            expected=f"{name} on {device}",
            fix=f"move it: {name}.to({str(device)!r})",
        )


def same_device(a: torch.device, b: torch.device) -> bool:
    """Equal devices, ``cuda`` standing for any ``cuda:N``."""
    return a == b or (a.type == b.type and (a.index is None or b.index is None))


def _check_shape(call: str, name: str, tensor: torch.Tensor, shape: Mapping[str, int | None], because: str, fix: str | None) -> None:
    wanted = tuple(shape.values())
    if tensor.dim() == len(wanted) and all(w is None or w == s for s, w in zip(tensor.shape, wanted)):
        return
    expected = f"{name} [{', '.join(n if w is None else f'{n}={w}' for n, w in shape.items())}]"
    if tensor.dim() != len(wanted):
        what = f"{call}: {name} has {tensor.dim()} dimensions, expected {len(wanted)}"
    else:
        extent, got, want = next((n, s, w) for (n, w), s in zip(shape.items(), tensor.shape) if w is not None and w != s)
        what = f"{call}: {name} has {extent}={got}, expected {want}"
    fail(ShapeError, f"{what} {because}".rstrip(), got=describe(name, tensor), expected=expected, fix=fix)


def check_written(call: str, name: str, tensor: torch.Tensor) -> None:
    """Every element of a result has memory of its own (an expanded tensor's have not)."""
    if 0 in tensor.stride() and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        fail(
            ShapeError,
            f"{call}: {name} is expanded: several of its elements share one place in memory",
            got=f"{describe(name, tensor)}, strides {list(tensor.stride())}",
            expected=f"{name} with a place for every element",
            fix=f"allocate {name} with torch.empty",
        )


def check_heads(call: str, num_qo_heads: int, num_kv_heads: int) -> int:
    """Query heads per KV head."""
    if not (isinstance(num_qo_heads, int) and isinstance(num_kv_heads, int)):
        check_positive(call, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)  # says which
    if num_qo_heads <= 0 or num_kv_heads <= 0 or num_qo_heads % num_kv_heads:
        fail(
            ShapeError,
            f"{call}: num_qo_heads={num_qo_heads} is not a multiple of num_kv_heads={num_kv_heads}",
            expected="num_qo_heads % num_kv_heads == 0 (grouped-query attention), both positive",
            fix="check the head counts; in a [tokens, heads, dim] tensor heads come second (kv_layout='NHD')",
        )
    return num_qo_heads // num_kv_heads


def check_positive(call: str, **values: int) -> None:
    """Each keyword is a positive int."""
    for name, value in values.items():
        if not isinstance(value, int) or value <= 0:
            fail(ConfigError, f"{call}: {name} must be a positive int", got=repr(value))


def check_attention_dtypes(call: str, q: torch.dtype, kv: torch.dtype, o: torch.dtype, device_type: str | None) -> None:
    """fp16 and bf16 q go with KV of the same dtype or fp8; fp8 q with fp8 KV. fp32 runs on the reference only (CPU tensors)."""
    half = "float16 | bfloat16"
    if q not in (*_HALF, *_FP8, torch.float32):
        fail(DTypeError, f"{call}: q has dtype {dtype_name(q)}", expected=f"{half} | float8_e4m3fn | float8_e5m2", fix="use q.half()")
    if torch.float32 in (q, kv) and device_type not in (None, "cpu"):
        name = "q is" if q == torch.float32 else "k and v are"
        what = f"{call}: {name} float32, which no kernel computes"
        fail(DTypeError, what, expected=half, fix='use .half() or .bfloat16(), or backend="reference" for an exact but slow result')
    if kv != q and kv not in _FP8:
        fail(
            DTypeError,
            f"{call}: k and v have dtype {dtype_name(kv)} but q has {dtype_name(q)}",
            expected="KV of q's dtype, float8_e4m3fn or float8_e5m2",
            fix=f"convert k and v to torch.{dtype_name(q)}, or q to their dtype if it is one for q",
        )
    if o not in (*_HALF, *_FP8, torch.float32):
        fail(DTypeError, f"{call}: the output dtype {dtype_name(o)} is not supported", expected=f"{half} | float32 | fp8")


def check_planned_dtype(call: str, name: str, tensor: torch.Tensor, planned: torch.dtype, argument: str) -> None:
    """The dtype of an input of run() is the one plan() was told."""
    if tensor.dtype != planned:
        got, want = dtype_name(tensor.dtype), dtype_name(planned)
        fail(
            DTypeError,
            f"{call}: {name} is {got} but plan() was called with {argument}={want}",
            got=describe(name, tensor),
            expected=f"{name} {want}",
            fix=f"call plan(..., {argument}=torch.{got}), or convert {name}",
        )


class Offsets(NamedTuple):
    """What the checks of a CSR offset array look at: its ends, and the smallest and largest count between neighbours."""

    first: int
    last: int
    smallest: int
    largest: int


def offsets_of(indptr: torch.Tensor) -> Offsets:
    """The :class:`Offsets` of an array on the CPU; all zeros for an empty one."""
    if indptr.shape[0] <= SHORT:
        values = indptr.tolist() or [0]
        counts = list(map(operator.sub, values[1:], values)) or [0]
        return Offsets(values[0], values[-1], min(counts), max(counts))
    return Offsets(int(indptr[0]), int(indptr[-1]), *_extremes(indptr[1:] - indptr[:-1]))


def _extremes(values: torch.Tensor) -> tuple[int, int]:
    """The smallest and the largest of integers on the CPU."""
    if values.shape[0] <= SHORT:
        few = values.tolist() or [0]
        return min(few), max(few)
    smallest, largest = values.aminmax()
    return int(smallest), int(largest)


def check_indptr(call: str, name: str, indptr: torch.Tensor, *, zero_based: bool = False) -> Offsets:
    """A CSR offset array on the CPU: starts at (or above) zero and never decreases."""
    found = offsets_of(indptr)
    if found.first < 0 or (zero_based and found.first != 0):
        fail(PageTableError, f"{call}: {name}[0] is {found.first}", expected=f"{name}[0] == 0", fix="offsets start at 0")
    if found.smallest < 0:
        r = int((indptr[1:] < indptr[:-1]).nonzero()[0])
        fail(
            PageTableError,
            f"{call}: {name} decreases at request {r}",
            got=f"{name}[{r}] = {int(indptr[r])}, {name}[{r + 1}] = {int(indptr[r + 1])}",
            expected="non-decreasing offsets",
            fix=f"build {name} with torch.cumsum of per-request counts",
        )
    return found


def check_page_table(
    call: str, indptr: torch.Tensor, num_indices: int, last_page_len: torch.Tensor, page_size: int, max_pages: int | None = None
) -> Offsets:
    """indptr, the length of indices and last_page_len agree (CPU tensors). More indices than indptr uses are welcome.

    The last page of a request holds 1 to page_size tokens; the entry of a request without pages is not looked at. ``max_pages`` is the
    width of the block table that the rest was made of.
    """
    found = check_indptr(call, "kv_indptr", indptr)
    if max_pages is not None and found.largest > max_pages:
        fail(
            PageTableError,
            f"{call}: a request needs {found.largest} pages but block_tables has {max_pages} columns",
            expected=f"seq_lens <= {max_pages} * page_size = {max_pages * page_size}",
            fix="pass wider block_tables, or check seq_lens and page_size",
        )
    if found.last > num_indices:
        fail(
            PageTableError,
            f"{call}: indptr ends at {found.last} pages while indices has {num_indices} entries",
            got=f"indptr[-1] = {found.last}, len(indices) = {num_indices}",
            expected="indptr[-1] <= len(indices)",
            fix="give indices one page id per page (a larger cache if it lacks them); a request of n tokens needs "
            "(n + page_size - 1) // page_size pages",
        )
    shortest, longest = _extremes(last_page_len)
    if shortest < 1 or longest > page_size:
        wrong = ((indptr[1:] > indptr[:-1]) & ((last_page_len < 1) | (last_page_len > page_size))).nonzero()
        if wrong.numel():
            r = int(wrong[0])
            fail(
                PageTableError,
                f"{call}: last_page_len[{r}] = {int(last_page_len[r])} is outside 1..page_size={page_size}",
                expected="1 <= last_page_len <= page_size",
                fix="compute it as (seq_len - 1) % page_size + 1",
            )
    return found


def check_page_ids(call: str, smallest: int, largest: int, num_pages: int) -> None:
    """The page ids that are in use lie inside the cache."""
    if smallest < 0 or largest >= num_pages:
        bad = smallest if smallest < 0 else largest
        fail(
            PageTableError,
            f"{call}: page id {bad} is outside the cache of {num_pages} pages",
            expected=f"0 <= page id < {num_pages}",
            fix="check kv_indices, or allocate a larger cache",
        )


def refuse(call: str, fix: str, **options: Any) -> None:
    """Raise when an option that cannot be honoured is given (is neither ``None`` nor ``False``)."""
    for name, value in options.items():
        if value is not None and value is not False:
            fail(UnsupportedConfigError, f"{call}: {name} is not supported", got=f"{name}={_short(value)}", fix=fix)


def _short(value: Any) -> str:
    return describe("", value).strip() if isinstance(value, torch.Tensor) else repr(value)[:80]
