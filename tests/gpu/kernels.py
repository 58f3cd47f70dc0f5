"""Which kernels this GPU has, and how a test insists on one of them."""

from __future__ import annotations

import pytest
import torch

from cute_infer.attention import launch, plan, tiles

FAMILIES = ["sm90", "sm80"] if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 else ["sm80"]


def only(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Let ``tiles.pick`` see the kernels of one family alone, so that the fallback is tested on a GPU that would not choose it."""
    keep = {kind: tuple(m for m in modules if family in m.__name__) for kind, modules in tiles.CANDIDATES.items()}
    monkeypatch.setattr(tiles, "CANDIDATES", keep)
    plan._bind.cache_clear()
    monkeypatch.setattr(plan, "_bind", plan._bind.__wrapped__)
    monkeypatch.setattr(launch, "_functional", {})  # the scratch of a stream remembers the kernel of its last call


def skip_if_refused(error: Exception) -> None:
    """A family may refuse a configuration with a reason; the other family's test covers it."""
    pytest.skip(str(error).splitlines()[2].strip() if len(str(error).splitlines()) > 2 else str(error))
