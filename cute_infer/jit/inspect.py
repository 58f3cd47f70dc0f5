"""What the compiler made of a kernel, without a GPU: instructions, registers, spills, shared memory.

Sources: the PTX text (instructions), the report of the embedded ptxas (registers, stack, spills, static shared memory, warnings) and the
host half's LLVM IR (dynamic shared memory, which ptxas cannot see and the compiler does not check against the chip).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

INSTRUCTIONS = {
    "wgmma.mma_async": r"wgmma\.mma_async\b",
    "mma.sync": r"(?<!w)mma\.sync\b",
    "cp.async.bulk.tensor": r"cp\.async\.bulk\.tensor\b",
    "cp.async.bulk": r"cp\.async\.bulk\.(?!tensor|commit_group|wait_group|prefetch)",
    "cp.async": r"cp\.async\.c[ag]\b",
    "ldmatrix": r"ldmatrix\b",
    "stmatrix": r"stmatrix\b",
    "setmaxnreg": r"setmaxnreg\b",
    "atom": r"(?<![\w.])(?:atom|red)\.",
    "ld.local": r"ld\.local\b",
    "st.local": r"st\.local\b",
}


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """Facts of one compiled object; where it holds several kernels, the largest of each.

    arch              ".target" of the PTX.
    flavour           compiler flavour, "cu12" or "cu13": each embeds another ptxas, so registers may differ between them.
    registers         per thread, as allocated at launch.
    stack_bytes       local memory per thread (arrays indexed at run time); 0 in every kernel of this library.
    spill_bytes       spill stores plus spill loads; 0 in every kernel of this library.
    smem_bytes        static plus dynamic shared memory of a block.
    ptx_instructions  occurrences by name (``INSTRUCTIONS``), zeros left out.
    warnings          ptxas warnings C75xx: wgmma that had to be serialised.
    """

    arch: str
    flavour: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    smem_bytes: int
    ptx_instructions: dict[str, int]
    warnings: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """JSON data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_data(data: dict[str, Any]) -> KernelFacts:
        """The inverse of :meth:`to_data`."""
        return KernelFacts(**{**data, "warnings": tuple(data["warnings"])})

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.ptx_instructions.items())
        return (
            f"{self.arch}: {self.registers} registers, {self.spill_bytes} B spilled, {self.stack_bytes} B stack, "
            f"{self.smem_bytes} B shared memory; {counts}"
        )


def count_instructions(ptx: str) -> dict[str, int]:
    """Occurrences of the instructions in ``INSTRUCTIONS`` that occur."""
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()}
    return {name: count for name, count in counts.items() if count}


def dynamic_smem(llvm_ir: str) -> int:
    """Largest dynamic shared memory, in bytes, that the host half requests for a launch.

    A launch fills a struct {grid[3], block[3], i64 dynamic shared memory, stream, attributes, count}; the size is the store at byte 24.
    """
    sizes = [0]
    for function in llvm_ir.split("\ndefine ")[1:]:
        for config in re.findall(r"(%\S+) = alloca \{ \[3 x i32\], \[3 x i32\], i64, ptr, ptr, i32 \}", function):
            for slot in re.findall(rf"(%\S+) = getelementptr inbounds nuw i8, ptr {re.escape(config)}, i64 24\b", function):
                sizes += [int(size) for size in re.findall(rf"store i64 (\d+), ptr {re.escape(slot)},", function)]
    return max(sizes)


def kernel_facts(ptx: str, ptxas_report: str, llvm_ir: str, flavour: str) -> KernelFacts:
    """Read the facts from the three texts of one compilation.

    Raises:
        ValueError: the report has no register count, so nothing can be said about spills.
    """

    def largest(pattern: str) -> int:  # of the sums of a pattern's groups
        return max((sum(map(int, found.groups())) for found in re.finditer(pattern, ptxas_report)), default=0)

    registers = largest(r"Used (\d+) registers")
    if not registers:
        raise ValueError("the compiler's report has no register count")
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    return KernelFacts(
        arch=target[1] if target else "unknown",
        flavour=flavour,
        registers=registers,
        stack_bytes=largest(r"(\d+) bytes stack frame"),
        spill_bytes=largest(r"(\d+) bytes spill stores, (\d+) bytes spill loads"),
        smem_bytes=largest(r"(\d+) bytes smem") + dynamic_smem(llvm_ir),
        ptx_instructions=count_instructions(ptx),
        warnings=tuple(sorted(set(re.findall(r"\(?(C75\d\d)\)?", ptxas_report)))),
    )
