"""Which kernel serves a spec, and with which tile: the first candidate that has no reason to refuse.

Host-only: each kernel keeps its tile table, its refusals and its choice in a ``tiles_<kernel>.py`` beside this file, so that a machine
without the compiler can still pick a prebuilt kernel.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UnsupportedConfigError, fail
from . import tiles_decode_sm80, tiles_decode_sm90, tiles_prefill_sm80, tiles_prefill_sm90
from .spec import AttentionSpec

if TYPE_CHECKING:
    from ..jit import Target


class Hints(NamedTuple):
    """What the host knows about a batch. Lengths are not among it: they stay on the device."""

    batch_size: int
    num_kv_heads: int
    num_sms: int
    total_q: int = 0


class Choice(NamedTuple):
    """A kernel ("module:Class", resolved only when it must be compiled) and its tile."""

    name: str
    path: str
    tile: Any


# Newest architecture first: the SM80 kernels run on everything later and are the fallback for what the SM90 kernels refuse.
CANDIDATES: dict[str, tuple[ModuleType, ...]] = {
    "decode": (tiles_decode_sm90, tiles_decode_sm80),
    "prefill": (tiles_prefill_sm90, tiles_prefill_sm80),
}


def pick(spec: AttentionSpec, target: Target, hints: Hints) -> Choice:
    """The kernel and tile for ``spec`` on ``target``.

    Raises:
        UnsupportedConfigError: every candidate refused; the message lists each one's reason.
    """
    reasons = []
    for candidate in CANDIDATES[spec.kind]:
        reason = candidate.why_not(spec, target)
        if reason is None:
            return Choice(candidate.PATH.rpartition(".")[2].partition(":")[0], candidate.PATH, candidate.choose(spec, target, hints))
        reasons.append(f"{candidate.PATH.rpartition('.')[2].partition(':')[0]}: {reason}")
    fail(
        UnsupportedConfigError,
        f"no kernel for this attention on {target.arch}",
        got=spec,
        expected="\n            ".join(reasons),
        fix='pass backend="reference" (slow, exact) or change what the kernels name',
    )
