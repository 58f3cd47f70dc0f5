"""Every kernel feature compiles without a GPU, spills nothing, fits its chip, and is made of the instructions it was written for.

facts.json is a golden file: a helper that costs a register shows up in the diff. ``pytest tests/compile --update-facts`` rewrites it. Its
numbers belong to the compiler named in it; another version or flavour embeds another ptxas, so there registers may differ a little.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import filelock
import pytest

from cute_infer.jit import KernelFacts, Request, get_entry
from cute_infer.jit.sources import KERNEL_MODULES, PACKAGE
from cute_infer.jit.toolchain import toolchain
from tests.compile.cases import CASES, EXPECTED, Case

pytest.importorskip("cutlass", reason="needs the compiler")

GOLDEN = Path(__file__).parent / "facts.json"
SLACK_REGISTERS = 24  # between ptxas versions; a spill is never tolerated
COMPILER = {name: toolchain()[name] for name in ("dsl", "flavour")}


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"compiler": COMPILER, "kernels": {}}


def update(name: str, facts: dict[str, Any], scratch: Path) -> None:
    """Replace one kernel's facts; several pytest workers do this at once."""
    with filelock.FileLock(scratch / "facts.lock"):
        kernels = {**golden()["kernels"], name: facts}
        kept = {name: kernels[name] for name in CASES if name in kernels}
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in kept.items())
        GOLDEN.write_text(f'{{\n "compiler": {json.dumps(COMPILER)},\n "kernels": {{\n{rows}\n }}\n}}\n')


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel(case: Case, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    facts = get_entry(case.request).facts
    assert facts.arch == case.request.arch
    assert (facts.spill_bytes, facts.stack_bytes) == (0, 0), facts
    assert not {"ld.local", "st.local"} & set(facts.ptx_instructions), facts
    assert not facts.warnings, facts  # C75xx: wgmma serialised
    assert facts.smem_bytes <= case.smem_limit, facts
    assert_instructions(case, facts)

    found = {"registers": facts.registers, "smem_bytes": facts.smem_bytes, "ptx": facts.ptx_instructions}
    if request.config.getoption("--update-facts"):
        update(case.name, found, tmp_path_factory.getbasetemp().parent)
    expected = golden()["kernels"].get(case.name)
    assert expected is not None, f"{case.name} is not in facts.json: run with --update-facts and review the diff"
    if golden()["compiler"] == COMPILER:
        assert found == expected
    else:
        assert abs(found["registers"] - expected["registers"]) <= SLACK_REGISTERS
        assert found["smem_bytes"] == expected["smem_bytes"]
        assert found["ptx"].keys() == expected["ptx"].keys()


def assert_instructions(case: Case, facts: KernelFacts) -> None:
    required, forbidden = EXPECTED[case.kernel]
    counts = facts.ptx_instructions
    missing = {name: count for name, count in required.items() if counts.get(name, 0) < count}
    assert not missing, f"{case.name} should have at least {missing}: {counts}"
    unwanted = [name for name in forbidden if name in counts]
    assert not unwanted, f"{case.name} should not have {unwanted}: {counts}"


def test_the_golden_file_has_no_other_kernels():
    assert set(golden()["kernels"]) <= set(CASES)


def test_every_kernel_is_among_the_cases():
    files = [path for pattern in KERNEL_MODULES for path in PACKAGE.glob(pattern) if "@cute.kernel" in path.read_text()]
    names = {Request(".".join(path.relative_to(PACKAGE).with_suffix("").parts), None, None, "").name for path in files}
    assert names == {case.kernel for case in CASES.values()} == set(EXPECTED)
