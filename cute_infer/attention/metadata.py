"""Index arrays on their way from the user to a kernel: brought to int32, looked at on the host when that is free or allowed, and moved.

Checking costs at most one device-to-host copy per plan(), however many arrays there are; see :func:`host_view`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import Offsets, check_page_table, check_tensor
from ..config import get_config
from ..errors import ConfigError, PageTableError, fail
from ..paged.tables import PageTable, csr_of

_INTS = (torch.int32, torch.int64)
_INT32 = torch.iinfo(torch.int32)


def index_array(call: str, name: str, array: torch.Tensor, length: int | None = None, meaning: str = "length") -> torch.Tensor:
    """``array`` is a 1-D integer tensor; int32 is kept as it is (and may be updated in place later), int64 is converted."""
    if type(array) is torch.Tensor and array.dtype is torch.int32 and array.dim() == 1 and array.is_contiguous():
        if length is None or array.shape[0] == length:  # the usual case, without the cost of describing what could be wrong
            return array
    check_tensor(call, name, array, {meaning: length}, dtypes=_INTS)
    if array.dtype is torch.int64 and array.device.type == "cpu" and array.numel():
        smallest, largest = (int(x) for x in array.aminmax())
        if smallest < _INT32.min or largest > _INT32.max:
            bad = smallest if smallest < _INT32.min else largest
            fail(PageTableError, f"{call}: {name} holds {bad}", expected="numbers that fit int32, which kernels count in")
    return array.to(torch.int32).contiguous()


def csr_table(call: str, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor) -> PageTable:
    """A page table of 1-D int32 arrays whose lengths fit each other."""
    pages = index_array(call, "last_page_len", last_page_len, meaning="batch_size")
    offsets = index_array(call, "indptr", indptr, pages.shape[0] + 1, "batch_size + 1")
    return PageTable(offsets, index_array(call, "indices", indices), pages)


def page_table(
    call: str,
    indptr: torch.Tensor | None,
    indices: torch.Tensor | None,
    last_page_len: torch.Tensor | None,
    block_tables: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    page_size: int,
) -> tuple[PageTable, int | None]:
    """The batch's page table from its CSR form or, where that is absent, from ``block_tables`` and ``seq_lens``.

    The second result is the number of pages a request can have: the width of ``block_tables``, None for CSR.
    """
    if indptr is not None and indices is not None and last_page_len is not None:
        return csr_table(call, indptr, indices, last_page_len), None
    if block_tables is None or seq_lens is None:
        fail(
            ConfigError,
            f"{call}: no page table",
            expected="indptr, indices and last_page_len (CSR), or block_tables [batch_size, max_pages] and seq_lens [batch_size]",
            fix="pass one of the two forms",
        )
    if isinstance(seq_lens, torch.Tensor):
        seq_lens = seq_lens.reshape(-1)  # some engines keep [batch_size, 1]
    return csr_of(call, "block_tables", block_tables, page_size, seq_lens), block_tables.shape[1]


def check_table_on_host(
    indptr: torch.Tensor,
    last_page_len: torch.Tensor,
    indices: torch.Tensor,
    page_size: int,
    max_pages: int | None,
    validate: bool | None,
) -> tuple[int, int] | None:
    """Check a page table as far as the host may look at it; the smallest and largest page id in use, if that is known for free."""
    return look_at_table(indptr, last_page_len, indices, page_size, max_pages, validate)[1]


def look_at_table(
    indptr: torch.Tensor,
    last_page_len: torch.Tensor,
    indices: torch.Tensor,
    page_size: int,
    max_pages: int | None,
    validate: bool | None,
) -> tuple[Offsets, tuple[int, int] | None]:
    """:func:`check_table_on_host`, with what it found out about ``indptr``."""
    found = check_page_table("plan()", indptr, indices.shape[0], last_page_len, page_size, max_pages)
    if indices.device.type != "cpu" or validate is False or found.first == found.last:
        return found, None
    smallest, largest = indices[found.first : found.last].aminmax()
    return found, (int(smallest), int(largest))


def host_view(arrays: Sequence[torch.Tensor], validate: bool | None) -> list[torch.Tensor] | None:
    """The int32 ``arrays`` on the CPU, or None when looking at them is not wanted or not possible.

    Arrays on the CPU are free to look at. Those on the GPU are fetched together in one blocking copy, unless ``validate`` is False,
    ``CUTE_INFER_VALIDATE=0`` (and ``validate`` is not True), or a stream capture or a trace is under way.
    """
    remote = [a for a in arrays if not a.is_cpu]
    if torch.compiler.is_compiling():
        return None
    if not remote:
        return list(arrays)
    wanted = get_config().validate if validate is None else validate
    if not wanted or any(not a.is_cuda for a in remote) or torch.cuda.is_current_stream_capturing():
        return None
    fetched = iter(torch.split_with_sizes(torch.cat(remote).cpu(), [a.shape[0] for a in remote]))
    return [a if a.is_cpu else next(fetched) for a in arrays]


def to_device(arrays: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """``arrays`` on ``device``; index arrays that come from the CPU travel in one copy. Arrays already there are not copied.

    That copy starts from pageable memory: so few bytes are taken over by the driver at once, nothing waits for the stream, and it costs
    the host 7 us where a copy by way of pinned memory costs 16 to 30 (an H200's machine, 2026-11-22).
    """
    together = [a for a in arrays if a.is_cpu and a.dtype is torch.int32] if device.type == "cuda" else []
    if not together:
        return [a if a.device == device else a.to(device, non_blocking=True) for a in arrays]
    moved = torch.cat(together).to(device, non_blocking=True)
    parts = iter(torch.split_with_sizes(moved, [a.shape[0] for a in together]))  # a third of the time of narrow() or Tensor.split()
    return [
        next(parts) if a.is_cpu and a.dtype is torch.int32 else a if a.device == device else a.to(device, non_blocking=True) for a in arrays
    ]
