"""The Hopper prefill kernel's work queue, its real source run on the CPU: 32 numpy lanes stand in for the warp.

Every (request, query block, head, split) is handed out exactly once for any batch, in any interleaving of CTAs, whole or in all its parts.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).parents[2] / "cute_infer" / "attention" / "kernels" / "prefill_sm90_queue.py"
PAGE = 16


def is_vector(x: object) -> bool:
    return isinstance(x, np.ndarray)


def pick(vector, scalar):
    return lambda *a: vector(*a) if any(map(is_vector, a)) else scalar(a)


def popc(x):
    return np.array([bin(int(v) & 0xFFFFFFFF).count("1") for v in x]) if is_vector(x) else bin(int(x) & 0xFFFFFFFF).count("1")


def redux(lanes: np.ndarray, kind: str) -> int:
    assert lanes.shape == (32,)
    return int(lanes.sum() if kind == "add" else lanes.max())


@pytest.fixture(scope="module")
def queue():
    """The queue module on top of a stand-in for the compiler's language, which is put back afterwards."""
    language, cute = types.ModuleType("cutlass"), types.ModuleType("cutlass.cute")
    language.Int32, language.const_expr = int, lambda x: x
    language.max, language.min = pick(np.maximum, max), pick(np.minimum, min)
    language.range = lambda *a, unroll=1: range(*a)
    language.range_constexpr = range
    language.cute = cute
    cute.jit, cute.ceil_div = lambda f: f, lambda a, b: -(-a // b)
    cute.arch = types.SimpleNamespace(
        lane_idx=lambda: np.arange(32),
        sync_warp=lambda: None,
        warp_redux_sync=redux,
        vote_ballot_sync=lambda bits: int(sum(1 << i for i in range(32) if bits[i])),
        popc=popc,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cutlass", language)
        patch.setitem(sys.modules, "cutlass.cute", cute)
        found = importlib.util.spec_from_file_location("prefill_queue_on_numpy", SOURCE)
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)

    class Queue(module.PrefillQueue):
        def read_request(self, lengths, request, request_end):
            """The one function whose branch is taken lane by lane, here for a vector of lanes."""
            inside = request < request_end
            at = np.where(inside, request, 0)
            q_row, kv_begin = lengths.qo_indptr[at], lengths.kv_indptr[at]
            rows = np.maximum(0, np.minimum(lengths.qo_indptr[at + 1], lengths.total_q) - q_row) * self.pack
            kv_len, num_pages = lengths.kv_indptr[at + 1] - kv_begin, np.zeros(32, int)
            if self.page_size:
                num_pages = kv_len
                kv_len = np.where(num_pages > 0, (num_pages - 1) * self.page_size + lengths.kv_last_page_len[at], 0)
            return [np.where(inside, column, 0) for column in (rows, q_row, kv_begin, kv_len, num_pages)]

    module.Queue = Queue
    return module


def indptr(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(int)


def tickets(
    module,
    layout,
    qo,
    kv,
    kv_heads=2,
    group=1,
    *,
    causal=True,
    pack=False,
    splits=1,
    tile_q=128,
    ctas=132,
    budget=None,
    numbered=False,
    parts=1,
    cluster=1,
    rng,
):
    """{(request, block, head, split): ticket} of a batch, drawn by ``ctas`` CTAs in random interleaving; every item's words are checked.

    An item in parts has the ticket of the first; all tickets up to the last are taken, some by parts without rows. With ``cluster`` heads
    are pairs, and ``ctas`` counts clusters.
    """
    spec = types.SimpleNamespace(
        group_size=group, causal=causal, page_size=PAGE if layout == "paged" else 0, kv_layout=layout, head_dim_qk=128, head_dim_vo=128,
        custom_mask=numbered, pos_encoding="NONE", window=False,
    )  # fmt: skip
    queue = module.Queue(spec, types.SimpleNamespace(tile_q=tile_q, tile_kv=128, pack_heads=pack, split_kv=splits > 1), parts, cluster)
    if budget:
        queue.budget_tokens = budget
    rows_per_query = group if pack else 1
    heads = kv_heads * group // rows_per_query // cluster
    q_at, pages = indptr(qo), [-(-n // PAGE) for n in kv]
    kv_at = indptr(pages if layout == "paged" else kv)
    last_page = np.array([(n - 1) % PAGE + 1 if n else 0 for n in kv])
    q_ptr, kv_ptr = (None, None) if layout == "single" else (q_at, kv_at)
    lengths = module.Lengths(q_ptr, kv_ptr, last_page, int(q_at[-1]), sum(kv), heads, splits, ctas)
    tables = np.full((ctas, module.COLUMNS * module.WARP), -1)
    per_section = queue.section_sizes(lengths)
    owner = {int(q_at[r]) + t: r for r in range(len(qo)) for t in range(qo[r])}

    seen: dict = {}
    rows_of: dict = {}
    handed_out: set = set()
    cursors: dict = {}
    drawn = [(cta, cta) for cta in range(ctas)]  # (CTA, ticket): the first ticket is the CTA's index
    counter = ctas
    while drawn:
        cta, ticket = drawn.pop(rng.randrange(len(drawn)))
        cursor = cursors.get(cta) or queue.start(lengths, tables[cta], per_section[0])
        cursors[cta], item = queue.find(lengths, tables[cta], cursor, ticket, *per_section)
        if item.num_rows < 0:
            continue
        drawn.append((cta, counter))
        counter += 1
        handed_out.add(ticket)
        if item.num_rows == 0:  # a part past the end of its request
            assert queue.parts > 1
            continue
        r = owner[item.q_row]
        query = item.q_row - q_at[r]
        block, row = divmod(query * rows_per_query, tile_q)
        left = (qo[r] - query) * rows_per_query
        assert (item.kv_len, item.first_pos) == (kv[r], kv[r] - qo[r] + query)
        assert (item.query, item.request) == ((query, r) if numbered else (0, 0))
        if layout != "single":
            assert item.kv_begin == kv_at[r]
            assert item.num_pages == (pages[r] if layout == "paged" else 0)
        key = (r, block, item.head, item.split)
        if row or item.num_rows < left:  # a part
            part_rows = tile_q // queue.parts
            assert queue.parts > 1 and row % part_rows == 0 and item.num_rows == min(left, part_rows)
        else:
            assert item.num_rows == left
        rows_of.setdefault(key, []).append((row, item.num_rows))
        seen[key] = min(ticket, seen.get(key, ticket))
    for (r, block, *_), pieces in rows_of.items():
        rows = min(tile_q, qo[r] * rows_per_query - block * tile_q)
        covered = [row for first, count in sorted(pieces) for row in range(first, first + min(count, tile_q - first))]
        assert covered == list(range(rows)), f"rows {pieces} of {rows}"
    expected = {
        (r, block, head, split)
        for r in range(len(qo))
        for block in range(-(-qo[r] * rows_per_query // tile_q))
        for head in range(heads)
        for split in range(splits)
    }
    assert seen.keys() == expected
    assert handed_out == set(range(len(handed_out)))
    return seen


@pytest.mark.parametrize("layout", ["single", "ragged", "paged"])
@pytest.mark.parametrize("seed", range(8))
def test_every_item_once(queue, layout, seed):
    rng = random.Random(seed)
    for _ in range(2):
        batch = 1 if layout == "single" else rng.choice([1, 2, 5, 31, 32, 33, 70])
        longest = rng.choice([1, 130, 700]) if batch > 5 else rng.choice([1, 130, 700, 5000])
        qo = [rng.choice([0, rng.randint(0, longest), rng.randint(0, longest)]) for _ in range(batch)]
        kv = [rng.choice([n, n + rng.randint(0, 3000), rng.randint(0, 2 * longest)]) for n in qo]
        group, tile_q = rng.choice([1, 4, 8]), rng.choice([128, 192])
        tickets(
            queue, layout, qo, kv, rng.choice([1, 2, 3]), group, causal=rng.random() < 0.6, pack=rng.random() < 0.5,
            splits=rng.choice([1, 1, 3]), tile_q=tile_q, ctas=rng.choice([1, 3, 132]), budget=rng.choice([None, 100, 3000]),
            numbered=rng.random() < 0.5, parts=rng.choice([1, tile_q // 64]), rng=rng,
        )  # fmt: skip


@pytest.mark.parametrize("layout", ["single", "ragged"])
def test_last_round_in_parts(queue, layout):
    """Of 17 x 8 items 4 are left for a second round of 132 CTAs: 8 CTAs take half of one each. 70 left would not all find one."""
    for blocks, in_parts in ((17, 4), (25, 68)):
        rows = [128 * blocks - 80]  # of the last block the second half is empty; it is not in the last round
        seen = tickets(queue, layout, rows, rows, kv_heads=2, group=4, causal=False, parts=2, rng=random.Random(0))
        assert len(seen) == 8 * blocks
        whole = len(seen) - (in_parts if 2 * in_parts <= 132 else 0)
        assert sorted(seen.values()) == [*range(whole), *range(whole, whole + 2 * (len(seen) - whole), 2)]


@pytest.mark.parametrize("layout", ["single", "paged"])
def test_pairs_of_heads(queue, layout):
    """Clusters of two walk a batch of 8 heads in the order in which CTAs walk one of 4 heads, sections of heads included."""
    rows = [3000] if layout == "single" else [300, 0, 2000, 1000]
    args = dict(causal=True, ctas=66, budget=3000)
    pairs = tickets(queue, layout, rows, rows, 2, 4, cluster=2, rng=random.Random(0), **args)
    assert pairs == tickets(queue, layout, rows, rows, 2, 2, rng=random.Random(1), **args)


def test_runs_dry_on_cheap_items(queue):
    """Under a causal mask the last items, one per SM, cost a fraction of the dearest."""
    for qo in ([2048] * 8, [4096, 100, 3000, 700, 2500, 4000]):
        seen = tickets(queue, "ragged", qo, qo, kv_heads=16, rng=random.Random(0))
        cost = {ticket: block + 1 for (_, block, _, _), ticket in seen.items()}
        assert max(cost[t] for t in range(len(cost) - 132, len(cost))) <= max(cost.values()) / 4
        assert cost[0] == max(cost.values())


def test_single_agrees_with_ragged(queue):
    """One request has the same order with and without metadata."""
    for group, pack in ((1, False), (4, True)):
        args = ([5000], [6000], 4, group)
        one = tickets(queue, "single", *args, pack=pack, rng=random.Random(1))
        assert one == tickets(queue, "ragged", *args, pack=pack, rng=random.Random(2))


def test_full_attention_shares_keys(queue):
    """A long full request goes head section by head section; inside one all heads walk the query blocks together, so CTAs share K and V."""
    seen = tickets(queue, "single", [16384], [16384], 8, 4, causal=False, rng=random.Random(0))
    sections = (range(16), range(16, 32))  # four KV heads of 16k tokens fit the L2 budget
    expected = [(0, block, head, 0) for section in sections for block in reversed(range(128)) for head in section]
    assert sorted(seen, key=seen.get) == expected
