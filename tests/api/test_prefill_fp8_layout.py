"""FP8 prefill: V's transpose and P's operand registers, simulated byte by byte with the kernel's own offsets."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cutlass", reason="the layout module names the compiler's swizzles")

from cute_infer.attention.kernels import prefill_sm90_fp8_layout as layout  # noqa: E402

LANES = np.arange(32)
ROW, PAIR = LANES // 4, LANES % 4
RNG = np.random.default_rng(0)
# token of every slot of V^T: the order in which a thread holds its columns of the score accumulator
TOKEN_OF_SLOT = np.array([16 * (s // 16) + 8 * (s % 4 // 2) + 2 * (s % 16 // 4) + s % 2 for s in range(32)])


def addresses(rows, columns, width):
    """Byte address of every element as TMA and wgmma see a tile: blocks of ``width`` bytes, address bits 4.. XORed with bits 7.. ."""
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    offset = column // width * rows * width + row * width + column % width
    return offset ^ ((offset >> 7 & width // 16 - 1) << 4)


def store(tile, width):
    memory = np.zeros(tile.size, np.uint8)
    memory[addresses(*tile.shape, width)] = tile
    return memory


def assert_no_conflict(rows):
    assert len({int(a) // 16 % 8 for a in rows}) == 8, "two rows of 16 bytes share banks"


def ldmatrix(memory, address, transposed):
    registers = []
    for m in range(4):
        rows = address[8 * m : 8 * m + 8]
        assert_no_conflict(rows)
        matrix = np.stack([memory[a : a + 16].copy().view(np.uint16) for a in rows])
        matrix = matrix.T if transposed else matrix
        registers.append(np.stack([matrix[ROW, 2 * PAIR], matrix[ROW, 2 * PAIR + 1]], 1).copy().view(np.uint8).reshape(32, 4))
    return registers


def prmt(a, b, selector):
    both = np.concatenate([a, b], 1)
    return np.stack([both[lane, [int(selector[lane]) >> 4 * i & 7 for i in range(4)]] for lane in LANES])


def stmatrix(memory, address, registers):
    for m in range(4):
        assert_no_conflict(address[8 * m : 8 * m + 8])
        for lane in LANES:
            at = address[8 * m + lane // 4] + 4 * (lane % 4)
            memory[at : at + 4] = registers[m][lane]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("tile_kv", [64, 96, 128, 160, 192])
def test_transpose(head_dim, tile_kv, warps=2):
    v = RNG.integers(0, 256, (tile_kv, head_dim)).astype(np.uint8)
    v_width, vt_width = layout.block_bytes(head_dim), layout.block_bytes(tile_kv)
    source, target = store(v, v_width), np.zeros(v.size, np.uint8)
    read_lane, write_lane = layout.source_lane(LANES, v_width), layout.target_lane(LANES, vt_width)
    straight = np.where(LANES < 16, layout.EVEN, layout.ODD)
    crossed = np.where(LANES < 16, layout.ODD, layout.EVEN)
    for worker in range(warps):
        for i in range(head_dim // layout.CHUNK // warps):
            at = (i * warps + worker) * layout.CHUNK
            read = at // v_width * (v_width * tile_kv) + (read_lane ^ (at % v_width))
            for t in range(0, tile_kv, layout.STEP_TOKENS):
                a = ldmatrix(source, read + t * v_width, True)
                stored = [prmt(a[m], a[m + 1], selector) for m in (0, 2) for selector in (straight, crossed)]
                write = at * vt_width + (write_lane ^ (t % vt_width)) + t // vt_width * (vt_width * head_dim)
                stmatrix(target, write, stored)
    order = np.concatenate([begin + TOKEN_OF_SLOT for begin in range(0, tile_kv, 32)])
    assert np.array_equal(target[addresses(head_dim, tile_kv, vt_width)], v.T[:, order])


@pytest.mark.parametrize("keys", [32, 64, 96, 128, 192])
def test_p_lies_in_the_order_of_transposed_v(keys):
    """Word i of P, of the row r = i % 2, holds accumulator columns c .. c + 3 as ``round_p`` picks them."""
    for pair in range(4):
        for i in range(keys // 8):
            c = 4 * (i // 2)
            columns = [8 * (x // 2) + 2 * pair + x % 2 for x in range(c, c + 4)]
            slot = 32 * (i // 4) + 16 * (i // 2 % 2) + 4 * pair
            assert [slot // 32 * 32 + TOKEN_OF_SLOT[(slot + e) % 32] for e in range(4)] == columns
