"""Boolean masks as packed bits: one bit per (query row, key), eight to a byte.

Attention reads a request's mask as little-endian bits, row-major ``[qo_len, kv_len]``, starting on a byte of its own. Packing needs no
device-to-host copy: the output is sized by a bound the host knows and the live offsets decide what goes where.
"""

from __future__ import annotations

import torch

from ..checks import check_choice, check_indptr, check_tensor, describe, dtype_name
from ..errors import DTypeError, PageTableError, ShapeError, fail

_BIT_ORDERS = ("big", "little")


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack a 1-D 0/1 array into bytes, as ``numpy.packbits``; the last byte is padded with zeros.

    Args:
        x: ``[n]`` bool, or any dtype with non-zero meaning 1.
        bitorder: ``"big"``: the first element is the highest bit. ``"little"``: the lowest (what attention masks use).

    Returns:
        ``[(n + 7) // 8]`` uint8.
    """
    check_tensor("packbits()", "x", x, {"n": None})
    check_choice("packbits()", "bitorder", bitorder, _BIT_ORDERS)
    padded = torch.nn.functional.pad((x != 0).to(torch.uint8), (0, -len(x) % 8))
    return _to_bytes(padded.view(-1, 8), bitorder)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each segment ``x[indptr[i]:indptr[i+1]]`` on its own, so that every segment starts on a byte.

    Args:
        x: ``[indptr[-1]]``, as in :func:`packbits`. indptr: ``[num_segments + 1]`` int32 | int64 offsets.

    Returns:
        ``(y, new_indptr)``: ``y`` uint8 ``[new_indptr[-1]]`` and the byte offsets int32 ``[num_segments + 1]``. The offsets
        are read from the device once, to check them and for the exact length of ``y``; :func:`pack_segments` avoids that.
    """
    check_choice("segment_packbits()", "bitorder", bitorder, _BIT_ORDERS)
    check_tensor("segment_packbits()", "x", x, {"n": None})
    check_tensor("segment_packbits()", "indptr", indptr, {"num_segments + 1": None}, dtypes=(torch.int32, torch.int64))
    host = indptr.cpu()
    last = check_indptr("segment_packbits()", "indptr", host).last
    if last > x.shape[0]:
        fail(PageTableError, f"segment_packbits(): indptr ends at {last} but x has {x.shape[0]} elements", expected="indptr[-1] <= len(x)")
    packed, new_indptr = pack_segments(x, indptr.to(x.device), bitorder)
    return packed[: int(byte_indptr(host)[-1]) if host.shape[0] else 0], new_indptr


def pack_segments(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "little") -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`segment_packbits` without a device-to-host copy: ``y`` may be longer than ``new_indptr[-1]``, its tail is zero."""
    bits = indptr.to(torch.int64)
    begins = byte_indptr(bits)
    num_segments = len(indptr) - 1
    num_bytes = (len(x) + 7 * num_segments) // 8  # sum of ceil(n_i / 8) <= (sum n_i + 7 * segments) / 8
    if num_segments < 1 or num_bytes == 0:
        return torch.zeros(0, dtype=torch.uint8, device=x.device), begins.to(torch.int32)
    byte = torch.arange(num_bytes, device=x.device)
    segment = (torch.searchsorted(begins, byte, right=True) - 1).clamp_(max=num_segments - 1)
    source = (bits[segment] + (byte - begins[segment]) * 8)[:, None] + torch.arange(8, device=x.device)
    inside = (source < bits[segment + 1][:, None]) & (source < len(x))
    chosen = (x != 0)[source.clamp(0, len(x) - 1)] & inside
    return _to_bytes(chosen.to(torch.uint8), bitorder), begins.to(torch.int32)


def byte_indptr(bit_indptr: torch.Tensor) -> torch.Tensor:
    """Byte offsets int64 of segments packed one by one, from their bit offsets."""
    return _offsets((bit_indptr[1:] - bit_indptr[:-1] + 7) // 8)


def mask_bit_indptr(qo_len: torch.Tensor, kv_len: torch.Tensor) -> torch.Tensor:
    """Offsets int64 ``[batch + 1]`` of each request's ``qo_len * kv_len`` mask elements."""
    return _offsets(qo_len.to(torch.int64) * kv_len.to(torch.int64))


def pack_mask(
    call: str, custom_mask: torch.Tensor | None, packed: torch.Tensor | None, bit_indptr: torch.Tensor, num_bits: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of a batch as attention reads it: ``(bytes uint8, byte offsets int32 [batch + 1])``.

    Args:
        custom_mask: bool, True = keep, the requests' ``[qo_len, kv_len]`` masks flattened one after the other.
        packed: the same packed with ``segment_packbits(..., bitorder="little")``; wins over custom_mask.
        num_bits: ``bit_indptr[-1]`` if the host knows it; the mask's length is then checked.
    """
    if packed is not None:
        check_tensor(call, "packed_custom_mask", packed, {"num_bytes": None}, dtypes=(torch.uint8,))
        offsets = byte_indptr(bit_indptr)
        if num_bits is not None and packed.shape[0] < int(offsets[-1]):
            fail(
                ShapeError,
                f"{call}: packed_custom_mask has {packed.shape[0]} bytes, the batch needs {int(offsets[-1])}",
                expected="sum of ceil(qo_len[i] * kv_len[i] / 8) bytes: every request starts on a byte of its own",
                fix='pack with segment_packbits(mask, indptr, bitorder="little")',
            )
        return packed.contiguous(), offsets.to(device=packed.device, dtype=torch.int32)
    check_mask(call, custom_mask)
    assert custom_mask is not None
    flat = custom_mask.reshape(-1)
    if num_bits is not None and len(flat) != num_bits:
        fail(
            ShapeError,
            f"{call}: custom_mask has {len(flat)} elements, the batch needs {num_bits}",
            expected="sum of qo_len[i] * kv_len[i] elements, True = keep",
            fix="flatten each request's [qo_len, kv_len] mask and concatenate them in request order",
        )
    return pack_segments(flat, bit_indptr.to(flat.device))


def check_mask(call: str, mask: torch.Tensor | None, device: torch.device | None = None) -> None:
    """A mask that says yes or no. An additive one (0 and -inf) would come out inverted."""
    check_tensor(call, "custom_mask", mask, device=device)
    if isinstance(mask, torch.Tensor) and (mask.is_floating_point() or mask.is_complex()):
        fail(
            DTypeError,
            f"{call}: custom_mask has dtype {dtype_name(mask.dtype)}",
            got=describe("custom_mask", mask),
            expected="bool, True = keep",
            fix="pass mask == 0 of an additive mask, mask.bool() of one with 1 = keep",
        )


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(torch.cumsum(lengths, 0), (1, 0))


def _to_bytes(bits: torch.Tensor, bitorder: str) -> torch.Tensor:
    """``[n, 8]`` of 0/1 uint8 -> ``[n]`` uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits << (7 - shifts if bitorder == "big" else shifts)).sum(1, dtype=torch.uint8)


__all__ = ["packbits", "segment_packbits"]
