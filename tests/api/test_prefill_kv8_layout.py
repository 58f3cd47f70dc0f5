"""16-bit queries over 8-bit K and V: the way of every code through the converting warps, simulated with the kernel's own offsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="the module defines device functions")

from cute_infer.attention.kernels import prefill_sm90_kv8_widen as widen  # noqa: E402

LANES = np.arange(32)
RNG = np.random.default_rng(0)


def wgmma_addresses(rows, columns):
    """Byte address of every fp16 element of a tile: blocks of 64 columns, rows of 128 bytes, address bits 4-6 XORed with bits 7-9."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    offset = column // 64 * rows * 128 + row * 128 + column % 64 * 2
    return offset ^ ((offset >> 7 & 7) << 4)


@pytest.mark.parametrize(("tile_kv", "head_dim"), [(128, 64), (128, 128), (128, 192), (64, 256)])
def test_every_code_arrives_where_wgmma_looks_for_it(tile_kv, head_dim):
    codes = RNG.integers(0, 256, (tile_kv, head_dim))
    memory = np.full(tile_kv * head_dim * 2, -1)
    slots = widen.Slots(tile_kv, head_dim)
    held = [warp * slots.share + widen.lane_row(LANES, slots.share) for warp in range(widen.WARPS)]  # row whose address a lane has
    for warp in range(widen.WARPS):
        for i in range(slots.count):
            turn, block = slots.place(i)
            row = held[warp][LANES // 4 * 4 + turn]  # shuffle among the four lanes of a row
            loaded = [codes[r, block * 64 + c * 16 : block * 64 + c * 16 + 16] for r, c in zip(row, LANES % 4, strict=True)]
            target = widen.lane_place(LANES) + warp * slots.share * widen.BLOCK_ROW
            for half in range(2):
                places = (target ^ 16 * half) + slots.offset(i)
                for eight in places.reshape(4, 8):  # a store of 16 bytes serves 8 lanes at a time
                    assert len(set(eight // 16 % 8)) == 8, "two lanes share banks"
                for place, values in zip(places, loaded, strict=True):
                    at = place + 2 * np.arange(8)
                    assert (memory[at] == -1).all(), "written twice"
                    memory[at] = values[8 * half : 8 * half + 8]
    assert np.array_equal(memory[wgmma_addresses(tile_kv, head_dim)], codes)


@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**-14, 1.0, 3.0, 65504.0, 2.0**100, torch.finfo(torch.bfloat16).max])
def test_bf16_rows_survive_as_fp16(magnitude):
    row = torch.randn(128, generator=torch.Generator().manual_seed(1))
    row = (row / row.abs().max() * magnitude).bfloat16()
    exponent = max(int(row.abs().view(torch.int16).max()) >> 7, widen.LEAST_EXPONENT)
    scale, inverse = widen.row_scales(exponent)
    scale = torch.tensor([scale], dtype=torch.int16).view(torch.bfloat16)
    inverse = torch.tensor([inverse], dtype=torch.int32).view(torch.float32)
    narrow = (row * scale).half()
    largest = float(narrow.abs().max())
    assert 2**14 <= largest < 2**15
    back = narrow.double() * inverse.double()
    assert float((back - row.double()).abs().max()) <= magnitude * 2.0**-39
    kept = row.abs() >= magnitude * 2.0**-20
    assert torch.equal(back[kept], row.double()[kept])


@pytest.mark.parametrize("exponent", [widen.LEAST_EXPONENT, 127, 255])
def test_both_powers_of_a_row_exist(exponent):
    scale, inverse = widen.row_scales(exponent)
    assert 1 <= scale >> 7 <= 254 and 1 <= inverse >> 23 <= 254
    assert (scale >> 7) - 127 + (inverse >> 23) - 127 == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp16_holds_every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(codes.half().float().nan_to_num(nan=7.5e4), codes.float().nan_to_num(nan=7.5e4))
