"""Arguments of the sampling functions: shapes, per-row parameters, and where random numbers start."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.compiler import is_compiling

from ..checks import check_tensor, describe, dtype_name
from ..errors import ConfigError, DeviceError, DTypeError, ShapeError, fail
from .tiles import MAX_VOCAB

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NUMBERS = frozenset((*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64))
INT32_MAX = 2**31 - 1
Param = torch.Tensor | float | int | None


def check_rows(call: str, name: str, x: Any, check_nan: bool = False) -> None:
    """``x`` is ``[rows, vocab]`` in a float dtype, 1 <= vocab <= MAX_VOCAB; with ``check_nan`` it is also read (a device sync on CUDA).

    Raises:
        ShapeError, DTypeError; ConfigError ``Input <name> contains NaN.``
    """
    check_tensor(call, name, x, {"rows": None, "vocab": None}, dtypes=FLOATS)
    if not 1 <= x.shape[1] <= MAX_VOCAB:
        fail(ShapeError, f"{call}: vocab={x.shape[1]} is not in 1..{MAX_VOCAB}", got=describe(name, x))
    if check_nan and bool(torch.isnan(x).any()):
        raise ConfigError(f"Input {name} contains NaN.")


def is_traced(x: torch.Tensor) -> bool:
    """Whether the call must be an op in the dispatcher's eyes: while compiling, and for tensors that stand for others."""
    return is_compiling() or type(x) is not torch.Tensor


def check_indices(call: str, indices: torch.Tensor | None, x: torch.Tensor) -> int:
    """The number of output rows: ``x``'s, or ``indices``'s."""
    if indices is None:
        return x.shape[0]
    check_tensor(call, "indices", indices, {"slots": None}, dtypes=(torch.int32, torch.int64), device=x.device)
    if x.device.type == "cpu" and indices.shape[0] and not is_traced(x):
        low, high = indices.aminmax()
        if low < 0 or high >= x.shape[0]:
            bad = int(low) if low < 0 else int(high)
            fail(ConfigError, f"{call}: indices holds {bad}", expected=f"0 <= index < {x.shape[0]}, the number of rows")
    return indices.shape[0]


def check_generator(call: str, generator: Any, x: torch.Tensor) -> None:
    """``generator`` is None or a torch.Generator of the rows' kind of device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        fail(DTypeError, f"{call}: generator must be a torch.Generator", got=repr(generator)[:80], fix="an int is a seed: pass seed=")
    if generator.device.type != x.device.type:
        fix = f"torch.Generator({x.device.type!r})"
        fail(DeviceError, f"{call}: generator is on {generator.device} but the rows are on {x.device}", fix=fix)


def number(call: str, name: str, value: Any, is_float: bool) -> float | int:
    """A finite number; whole ones are brought into int32, where every value beyond any vocabulary means the same."""
    if not isinstance(value, (float, int)):
        try:
            value = value.__float__()  # NumPy's and other numbers; text has no such method
        except AttributeError:
            fail(DTypeError, f"{call}: {name} must be a number or a tensor", got=repr(value)[:80])
    if value - value != 0:
        fail(ConfigError, f"{call}: {name} is {value}", expected="a finite number", fix=f"leave {name} out to switch it off")
    return float(value) if is_float else min(max(int(value), -1), INT32_MAX)


def per_row(
    value: Param,
    dtype: torch.dtype,
    slots: int,
    x: torch.Tensor,
    indices: torch.Tensor | None,
    call: str = "sampling",
    name: str = "the parameter",
) -> tuple[torch.Tensor | None, float | int | None]:
    """A parameter as (tensor ``[slots]``, None), (None, number) or (None, None).

    With ``indices`` a tensor may have one value per output row or one per input row.

    Raises:
        ShapeError with FlashInfer's texts; DeviceError; DTypeError or ConfigError for what is no finite number.
    """
    if value is None:
        return None, None
    if not isinstance(value, torch.Tensor):
        return None, number(call, name, value, dtype.is_floating_point)
    what = "the sampling parameter"
    if value.dim() == 0:
        raise ShapeError(f"Expected a 1D tensor of shape (batch_size,) or scalar for {what}, but got a 0-dimensional tensor.")
    if value.dim() > 1:
        raise ShapeError(f"Expected a 1D tensor or scalar for {what}, but got a {value.dim()}D tensor.")
    if value.dtype not in NUMBERS:
        fail(DTypeError, f"{call}: {name} has dtype {dtype_name(value.dtype)}", got=describe(name, value), expected=dtype_name(dtype))
    if value.device != x.device:
        fail(DeviceError, f"{what} is on another device than the rows", got=f"{value.device}, {x.device}", fix="move it or pass a number")
    if indices is not None and value.shape[0] != slots and value.shape[0] == x.shape[0]:
        value = value[indices.long()]
    if value.shape[0] != slots:
        raise ShapeError(f"Sampling parameter tensor batch size mismatch: expected length {slots}, got {value.shape[0]}.")
    if value.dtype == torch.int64 and dtype == torch.int32:
        value = value.clamp(-1, INT32_MAX)
    return value.to(dtype), None


def random_start(
    call: str, value: int | torch.Tensor | None, name: str, slots: int, device: torch.device
) -> tuple[torch.Tensor | None, int | None, bool]:
    """A seed or an offset as (tensor ``[slots]`` int64 with any stride, None) or (None, int64), and whether it is one per row."""
    if value is None:
        return None, None, False
    if not isinstance(value, torch.Tensor):
        if not isinstance(value, int):
            try:
                value = operator.index(value)
            except TypeError:
                fail(DTypeError, f"{call}: {name} must be an int or an integer tensor", got=repr(value)[:80])
        return None, signed64(int(value)), False
    if value.dtype not in (torch.int32, torch.int64, torch.uint64):
        fail(DTypeError, f"{call}: {name} must be an integer tensor", got=describe(name, value), expected="int64 [1] or [rows]")
    if value.numel() not in (1, slots) or value.dim() > 1:
        what = f"{call}: {name} has {value.numel()} values for {slots} rows"
        fail(ShapeError, what, got=describe(name, value), expected="int64 [1] or [rows]")
    if value.device != device:
        fail(DeviceError, f"{call}: {name} is on another device than the rows", got=f"{value.device} and {device}")
    many = value.dim() == 1 and value.shape[0] == slots and slots > 1
    value = value.view(torch.int64) if value.dtype == torch.uint64 else value.to(torch.int64)
    return value.reshape(-1).expand(slots), None, many


def signed64(value: int) -> int:
    """The int64 with the same low 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def next_start(generator: torch.Generator | None, device: torch.device) -> tuple[torch.Tensor | int, int]:
    """(seed, offset) for one call without an explicit seed. Never waits for the device.

    CUDA: the generator's own Philox seed and offset; the offset moves on. During graph capture a captured kernel draws a seed into a
    tensor of one element, so that every replay gets a new one. CPU: a seed drawn from the generator.
    """
    if device.type != "cuda":
        return int(torch.randint(0, 2**63 - 1, (), generator=generator, device="cpu")), 0
    if torch.cuda.is_current_stream_capturing():
        return torch.randint(0, 2**63 - 1, (1,), generator=generator, device=device), 0
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return signed64(generator.initial_seed()), offset
