"""The benchmarks' plumbing on the CPU with tiny cases: candidates that run here agree with ours, tables say what was measured."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import append, decode, peers, prefill, protocol, publish, report, sampling, schedule, sweep, sweep_decode, sweep_prefill
from benchmarks.problems import DecodeProblem, PrefillProblem
from cute_infer.attention import tiles_decode_sm90, tiles_prefill_sm90


def wall_clock(call: protocol.Call, num_sets: int) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        call(0)
        return time.perf_counter() - start

    call(0)
    return sample


def timed(row: report.Row) -> set[str]:
    return {name for name, timing in row.timings.items() if isinstance(timing, protocol.Timing)}


def test_rotation_exceeds_the_cache() -> None:
    for size in (2**17, 2**21, 2**25, 2**29):
        count = protocol.num_sets(size)
        assert count == protocol.MAX_SETS or (count - 1) * size >= protocol.ROTATE_BYTES
    assert protocol.num_sets(2**31) == 1


def test_a_failing_candidate_is_a_reason_and_the_others_are_timed() -> None:
    def broken(i: int) -> None:
        raise ImportError("no such library\nmore")

    results = protocol.compare({"good": lambda i: None, "broken": broken}, 1, rounds=3, timer=wall_clock)
    assert list(results) == ["good", "broken"]
    assert results["broken"] == "ImportError: no such library"
    assert isinstance(results["good"], protocol.Timing) and results["good"].rounds == 3


def test_candidates_take_turns_in_changing_order() -> None:
    order: list[str] = []

    def timer(call: protocol.Call, num_sets: int) -> Callable[[], float]:
        return lambda: call(0) or 1.0

    protocol.compare({name: lambda i, name=name: order.append(name) for name in "abc"}, 1, rounds=20, timer=timer)
    turns = [order[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
def test_decode_candidates_agree(mixed: bool, kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "num_sets", lambda size: 2)
    case = decode.DecodeCase(8, 2, 3, 64, 16, kv_dtype, mixed)
    row = case.run(rounds=2, device="cpu", timer=wall_clock)
    assert peers.OURS in timed(row)
    assert all(difference < 0.02 for difference in row.notes.get("difference from ours", {}).values())


def test_decode_problem_gives_libraries_without_pages_the_same_tokens() -> None:
    torch.manual_seed(0)
    p = DecodeProblem([48, 48], 4, 2, 16, "bf16", 1, "cpu")
    ours = peers.decode_ours(p)(0)
    k, v = (x.repeat_interleave(2, dim=1) for x in p.dense[0])
    plain = torch.nn.functional.scaled_dot_product_attention(p.q.unsqueeze(2), k, v).squeeze(2)
    assert protocol.difference(ours, plain) < 0.02
    assert p.block_table.tolist() == [p.indices[:3].tolist(), p.indices[3:].tolist()]


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_candidates_agree(causal: bool) -> None:
    torch.manual_seed(0)
    p = PrefillProblem(2, 32, 4, 2, causal, "bf16", 1, "cpu")
    ours = peers.prefill_ours(p)(0).clone()
    assert protocol.difference(peers.prefill_ours_paged(p)(0), ours) < 0.02
    q, k, v = (x.transpose(1, 2) for x in p.batched(0))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    assert protocol.difference(plain.transpose(1, 2).flatten(0, 1), ours) < 0.02


@pytest.mark.parametrize("operation", peers.SAMPLERS)
def test_samplers_run(operation: str) -> None:
    row = sampling.SamplingCase(operation, 2, 1000, "peaked").run(1, device="cpu", timer=wall_clock)
    assert peers.OURS in timed(row), row.timings


def test_append_candidates_write_the_same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "num_sets", lambda size: 2)
    row = append.AppendCase(32, 2, 16).run(1, device="cpu", timer=wall_clock)
    assert {peers.OURS, "torch index_put_"} <= timed(row)

    p = append.AppendProblem(32, 2, 16, 1, "cpu")
    results = []
    for name in (peers.OURS, "torch index_put_"):
        for cache in p.caches[0]:
            cache.zero_()
        peers.APPEND[name](p)(0)
        results.append([cache.clone() for cache in p.caches[0]])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("module", [decode, prefill, sampling, append])
def test_cases_have_distinct_names_and_quick_ones_are_like_them(module) -> None:
    names = [case.name for case in module.cases()]
    assert len(names) == len(set(names)) > len(module.QUICK)
    assert {case.name for case in module.QUICK} <= set(names) | {"32/8 B64 L8192 p64 fp8"}


ABOUT = {
    "date": "2026-11-22T00:00:00+00:00", "commit": "0123456789abcdef", "dirty": True, "kernel_sources": "k",
    "gpu": {"name": "NVIDIA H200", "driver": "580"}, "versions": {"torch": "2.11.0"},
    "protocol": {"rounds": 9, "cases": 1, "cases_of_the_grid": 55},
    "ceilings": {"before": {"gemm_bf16_tflops": 700.0, "read_gbps": 4400.0, "copy_gbps": 4200.0, "gpu_state": "1980 MHz"}},
}  # fmt: skip


def test_markdown_marks_the_best_and_explains_the_dashes() -> None:
    about = ABOUT
    fast, slow = protocol.Timing(10.0, 9.0, 11.0, 5), protocol.Timing(20.0, 19.0, 21.0, 5)
    rows = [report.Row("case one", {"cute_infer": fast, "peer": slow, "absent": "ImportError: no"}, work=0.02)]
    content = report.result("decode", "GB/s", rows, about)
    table = report.markdown(content)
    assert "1 of 55 cases, medians of 9 rounds" in table and table.startswith("## decode [GB/s]")
    assert "| case one | **2000** | 1000 | - | 10.0 | 2.00x |" in table
    assert "commit 0123456789ab with local changes" in table and "- absent: ImportError: no" in table and "read 4400.0 GB/s" in table

    in_us = report.markdown(report.result("sampling", "us", [report.Row("s", {"cute_infer": slow, "peer": fast})], about))
    assert "| s | 20 | **10** | 20.0 | 0.50x |" in in_us


# ------------------------------------------------------------------------------------------------------------- charts and tables
def test_results_become_charts_and_tables(tmp_path: Path) -> None:
    """Into copies of the project's own pages, which therefore have the marks; twice gives the same text."""
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    root = Path(__file__).parent.parent
    for page in publish.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((root / page).read_text(encoding="utf-8"), encoding="utf-8")
    folder = tmp_path / "results"
    folder.mkdir()
    us = protocol.Timing(10.0, 9.0, 11.0, 5)
    for name, unit, work in (("decode", "GB/s", 0.04), ("prefill", "TFLOP/s", 0.005), ("sampling", "us", None), ("startup", "us", None)):
        cases = [case.name for case in (*decode.QUICK, *prefill.QUICK)] if work else ["one"]
        rows = [report.Row(case, {peers.OURS: us, "a peer": us, "absent": "ImportError: no"}, work) for case in cases]
        (folder / f"{name}.json").write_text(
            json.dumps(report.result(name, unit, [*rows, report.Row("another", {peers.OURS: us}, work)], ABOUT))
        )
    written = publish.publish(folder, tmp_path)
    charts = {path.name: path.stat().st_size for path in written if path.suffix == ".png"}
    assert set(charts) == {f"bench-{name}.png" for name in ("decode", "prefill", "sampling", "startup")} and min(charts.values()) > 5000
    docs, readme = ((tmp_path / page).read_text(encoding="utf-8") for page in ("docs/benchmarks.md", "README.md"))
    assert "(images/bench-decode.png)" in docs and "| another |" in docs and "cute-infer bench append` on a machine" in docs
    assert "(docs/images/bench-decode.png)" in readme and decode.QUICK[0].name in readme and "| another |" not in readme
    assert [path.suffix for path in publish.publish(folder, tmp_path)] == [".png"] * 4


def test_no_results_leave_the_pages_as_they_are(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    text = (root / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    recorded = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in (root / "benchmarks" / "results").glob("*.json")}
    assert publish.fill(text, recorded, "images/") == text, "run `make plots`"
    assert "Not recorded yet" in publish.fill(text, {}, "images/")


# ------------------------------------------------------------------------------------------------------------------------- schedule
def test_every_beginning_of_a_spread_is_an_even_sample() -> None:
    assert schedule.spread(list(range(8))) == [0, 4, 2, 6, 1, 5, 3, 7]
    for count in (1, 2, 55, 96):
        order = schedule.spread(list(range(count)))
        assert sorted(order) == list(range(count))
        if count > 8:
            begun = sorted(order[: count // 4])
            assert max(b - a for a, b in zip(begun, begun[1:])) <= 12


def test_a_budget_measures_the_quick_cases_first() -> None:
    chosen, of = schedule.select(decode, quick=False, only="", spread_out=True)
    assert [case.name for case in chosen[: len(decode.QUICK)]] == [case.name for case in decode.QUICK]
    assert of == len(list(decode.cases())) and len({case.name for case in chosen}) == len(chosen) >= of
    assert schedule.select(decode, quick=False, only="fp8", spread_out=False)[0] == [c for c in decode.cases() if "fp8" in c.name]


def test_deadlines_share_the_time() -> None:
    assert schedule.deadlines(["decode", "append"], 10.0, None) == {"decode": float("inf"), "append": float("inf")}
    found = schedule.deadlines(["decode", "prefill", "sampling", "append", "startup"], 50.0, 150.0)
    assert list(found.values()) == sorted(found.values()) and found["startup"] == 150.0 and 70 < found["decode"] < 90
    assert set(schedule.deadlines(["decode"], 50.0, 20.0).values()) == {50.0}  # late already: the first case only


@pytest.mark.gpu
def test_recording_names_the_kernels_of_the_cases() -> None:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        cases = [*decode.QUICK, *prefill.QUICK, *append.QUICK, *sampling.QUICK]
        requests = pool.submit(schedule.record, cases, startup=True).result()
    assert {"decode", "prefill", "paged_kernels", "sampling_kernels_rows"} <= {request.name.partition("_sm")[0] for request in requests}


def check_candidates(cases: list) -> None:
    """Names are distinct, the chosen tile comes first, and the sweep as a whole offers it competition."""
    assert len({case.name for case in cases}) == len(cases) > 0
    for case in cases:
        names = [candidate.name for candidate in case.candidates()]
        assert len(set(names)) == len(names) and case.candidates()[0].chosen and case.work > 0, case.name
    assert sum(len(case.candidates()) for case in cases) > len(cases)
    assert sweep.select(cases, [cases[0].section, cases[-1].name])[-1] == cases[-1]
    with pytest.raises(SystemExit, match="no such section"):
        sweep.select(cases, ["nothing"])


def test_decode_sweep_offers_tiles_that_fit() -> None:
    cases = list(sweep_decode.cases())
    check_candidates(cases)
    for case in cases:
        assert len(case.candidates()) > 3, case.name
        for c in case.candidates():
            assert sweep_decode.fits(c.spec, c.tile), c
            assert tiles_decode_sm90.smem_bytes(c.spec, c.tile) <= tiles_decode_sm90.SHARED_MEMORY_PER_CTA, c
            assert not (c.tile.early_metadata and c.tile.longest_first), c
            assert bool(c.splits) == c.tile.split_kv, c


def test_prefill_sweep_offers_tiles_that_fit() -> None:
    cases = list(sweep_prefill.cases())
    check_candidates(cases)
    for case in cases:
        assert set(case.peers) <= set(sweep_prefill.PEERS), case.name
        assert case.equal or sweep_prefill.CUDNN not in case.peers, case.name
        for c in case.candidates():
            assert c.tile.shared_bytes(case.head_dim, case.head_dim) <= tiles_prefill_sm90.MAX_SHARED_BYTES, c
            assert bool(c.splits) == c.tile.split_kv, c


def test_sweep_tables_mark_what_is_chosen_and_what_is_wrong() -> None:
    def call(i: int) -> torch.Tensor:
        return torch.ones(2)

    calls = {"first": call, "wrong": lambda i: 2 * torch.ones(2), "broken": lambda i: torch.ones(2) @ torch.ones(3)}
    facts = sweep.compare(calls, 1, True, {"rested": {"rounds": 3, "timer": wall_clock}})
    assert facts["first"]["repeatable"] and facts["wrong"]["difference"] == 1.0 and "error" in facts["broken"]
    rows = [{"candidate": name, "chosen": name == "first", **fact} for name, fact in facts.items()]
    lines = sweep.table("case", 1.0, rows, "GB/s", "rested").splitlines()
    assert any("* first" in line and "!" not in line for line in lines)
    assert any("  wrong" in line and "! differs by 1.0e+00" in line for line in lines)
    assert "broken" in lines[-1] and "RuntimeError" in lines[-1]
