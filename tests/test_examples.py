"""Every example runs and prints what the quick start says it prints; the quick start's own example 4 is refused by name."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import cute_infer

OPTIONAL = {"10_transformers": "transformers"}
EXAMPLES = Path(__file__).parent.parent / "examples"
IDS_4 = r"tensor\(\[ *\d+, +\d+, +\d+, +\d+\].*\)"

# Regular expressions, one per printed line; a line must match as a whole.
EXPECTED = {
    "01_single_decode": [
        r"Input query shape: torch\.Size\(\[32, 128\]\)",
        r"KV cache shape: torch\.Size\(\[2048, 32, 128\]\)",
        r"Output shape: torch\.Size\(\[32, 128\]\)",
        r"Output dtype: torch\.float16",
    ],
    "02_single_prefill": [r"Query shape: torch\.Size\(\[512, 32, 128\]\)", r"Output shape: torch\.Size\(\[512, 32, 128\]\)"],
    "03_rope": [r"Output with RoPE: torch\.Size\(\[32, 128\]\)"],
    "04_batch_decode": [r"Batch queries shape: torch\.Size\(\[8, 32, 128\]\)", r"Batch output shape: torch\.Size\(\[8, 32, 128\]\)"],
    "05_generate": [
        r"Prefill completed for 5 tokens",
        *(rf"Step {i}: Generated token \d+" for i in range(1, 6)),
        r"",
        r"Generated tokens: \[\d+(, \d+){4}\]",
    ],
    "06_paged_kv": [
        r"Paged KV-Cache shape: torch\.Size\(\[128, 16, 32, 128\]\)",
        r"Page table shape: torch\.Size\(\[4, 8\]\)",
        r"Pages per sequence: tensor\(\[8, 6, 7, 8\].*\)",
        r"Attention output shape: torch\.Size\(\[4, 32, 128\]\)",
    ],
    "07_sampling": [
        rf"Top-P sampled tokens: {IDS_4}",
        rf"Top-K sampled tokens: {IDS_4}",
        rf"Combined sampled tokens: {IDS_4}",
        r"FlashInfer spelling: torch\.Size\(\[4\]\), all rows valid: True",
    ],
    "08_fp8_kv": [r"FP8 attention output: torch\.Size\(\[32, 128\]\)"],
    "09_cuda_graph": [r"CUDAGraph captured and replayed successfully!|CUDA graphs need a GPU; nothing to do here\."],
    "10_transformers": [
        r"Trained: loss 0\.\d\d",
        r"Beautiful is better than ugly\. .{29}",
        r"Flat is better than nested\. .{34}",
        r"Complex.{48}",
        r"The same tokens as eager attention: True",
    ],
    "complete_demo": [
        r"=" * 60,
        r"cute_infer Complete Demo",
        r"=" * 60,
        r"Backend: .+",
        r"",
        r"1\. Single Decode Attention",
        r"   Output shape: torch\.Size\(\[32, 128\]\)",
        r"",
        r"2\. Single Prefill Attention",
        r"   Output shape: torch\.Size\(\[512, 32, 128\]\)",
        r"",
        r"3\. Attention with RoPE",
        r"   Output shape: torch\.Size\(\[32, 128\]\)",
        r"",
        r"4\. Sampling",
        rf"   Sampled tokens: {IDS_4}",
        r"",
        r"=" * 60,
        r"Demo completed successfully!",
        r"=" * 60,
    ],
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device the examples choose: the CPU case hides a GPU that is there."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param


def run(name: str) -> None:
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code


def test_every_example_is_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example_prints_its_lines(name: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    run(name)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(EXPECTED[name]), printed
    for line, pattern in zip(printed, EXPECTED[name], strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} does not match {pattern!r}"


@pytest.mark.parametrize("name", EXPECTED)
def test_example_stays_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


def test_quick_start_example_4_as_written_is_refused(device: str) -> None:
    """Floor division makes indptr end at 578 pages while only 256 page ids are given (the quick start's own numbers)."""
    seq_lens = torch.tensor([128, 256, 512, 1024, 1500, 2000, 2048, 1800], device=device)
    batch_size, num_pages, page_size = 8, 256, 16
    wrapper = cute_infer.BatchDecodeWithPagedKVCacheWrapper(
        workspace_buffer=torch.empty(1024 * 1024, dtype=torch.uint8, device=device),
        kv_layout="NHD",
    )
    indptr = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
    indptr[1:] = torch.cumsum(seq_lens // page_size, dim=0)
    with pytest.raises(ValueError) as caught:
        wrapper.plan(
            indptr=indptr,
            indices=torch.arange(num_pages, dtype=torch.int32, device=device),
            last_page_len=torch.full((batch_size,), page_size, dtype=torch.int32, device=device),
            num_qo_heads=32,
            num_kv_heads=32,
            head_dim=128,
            page_size=page_size,
        )
    assert type(caught.value).__name__ == "PageTableError"
    assert "578" in str(caught.value) and "256" in str(caught.value)
