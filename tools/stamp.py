"""What a recorded number must carry to mean something later: which code, which machine, which versions, when."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu12", "nvidia-cutlass-dsl-libs-cu13", "apache-tvm-ffi")
PEERS = ("flashinfer-python", "flash-attn", "flash-attn-3", "flash-attn-4", "transformers")  # named when they are installed


def output_of(*command: str) -> str | None:
    """The command's output without surrounding space, or None when it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The commit and whether the checkout differs from it (None: unknown). COMMIT names it for a copy of a tree without its history."""
    head = os.environ.get("COMMIT")
    if head:
        return {"commit": head, "dirty": None}
    head = output_of("git", "rev-parse", "HEAD")
    changed = output_of("git", "status", "--porcelain", "--", ".", ":!reports", ":!benchmarks/results")
    return {"commit": head, "dirty": bool(changed) if changed is not None else None}


def kernel_sources() -> str:
    """The hash of every file that decides what machine code a kernel becomes."""
    from cute_infer.jit import kernel_sources_hash

    return kernel_sources_hash()


def gpu() -> dict[str, Any] | None:
    """The first CUDA device, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    facts = torch.cuda.get_device_properties(0)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "name": facts.name,
        "compute_capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_gib": round(facts.total_memory / 2**30, 1),
        "driver": driver,
    }


def versions() -> dict[str, str | None]:
    import torch

    import cute_infer

    return {
        "cute_infer": cute_infer.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        **{package: version_of(package) for package in PACKAGES},
        **{package: found for package in PEERS if (found := version_of(package))},
    }


def stamp() -> dict[str, Any]:
    """Date, commit, kernel sources, GPU and versions, as JSON-ready values."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": now, **commit(), "kernel_sources": kernel_sources(), "gpu": gpu(), "versions": versions()}


def report_dir(default: str) -> Path:
    """The folder for a command's output: REPORT_DIR, or ``default`` under the project's root. Made if missing."""
    folder = Path(os.environ.get("REPORT_DIR") or ROOT / default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
