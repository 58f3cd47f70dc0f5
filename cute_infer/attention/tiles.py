"""Which kernel serves a spec, and with which tile: the first candidate that has no reason to refuse.

Host-only: each kernel keeps its tile table, its refusals and its choice in a ``tiles_<kernel>.py`` beside this file, so that a machine
without the compiler can still pick a prebuilt kernel.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UnsupportedConfigError, fail
from . import tiles_decode_sm80, tiles_decode_sm90, tiles_prefill_sm80, tiles_prefill_sm90, tiles_prefill_sm90_fp8, tiles_prefill_sm90_kv8
from .lengths import UNKNOWN, KvLens
from .spec import AttentionSpec

if TYPE_CHECKING:
    from ..jit import Target


INVARIANT_QUERIES = 64  # queries per request of the batch that batch-invariant prefill is tiled for: long enough to fill a tile


class Hints(NamedTuple):
    """What the host knows about a batch.

    batch_invariant   the tile and the number of splits must depend on nothing of the batch: see :meth:`settled`.
    kv_lens           the classes of its KV lengths, unless they are known on the device only.
    """

    batch_size: int
    num_kv_heads: int
    num_sms: int
    total_q: int = 0
    batch_invariant: bool = False
    kv_lens: KvLens = UNKNOWN

    def settled(self) -> Hints:
        """The hints that tile tables may look at.

        Batch-invariant mode shows them one and the same batch whatever the real one is: enough requests to fill the device twice, so
        that no table splits KV into partials for the merge kernel. Only the model and the device are left to depend on.
        """
        if not self.batch_invariant:
            return self
        batch_size = -(-2 * self.num_sms // max(1, self.num_kv_heads))
        return self._replace(batch_size=batch_size, total_q=batch_size * INVARIANT_QUERIES, kv_lens=UNKNOWN)


class Choice(NamedTuple):
    """A kernel ("module:Class", resolved only when it must be compiled), its tile, and among how many splits it deals a request's KV."""

    name: str
    path: str
    tile: Any
    num_splits: int = 1


# Newest architecture first: the SM80 kernels run on everything later and are the fallback for what the SM90 kernels refuse.
CANDIDATES: dict[str, tuple[ModuleType, ...]] = {
    "decode": (tiles_decode_sm90, tiles_decode_sm80),
    "prefill": (tiles_prefill_sm90, tiles_prefill_sm90_kv8, tiles_prefill_sm90_fp8, tiles_prefill_sm80),
}


def pick(spec: AttentionSpec, target: Target, hints: Hints) -> Choice:
    """The kernel and tile for ``spec`` on ``target``.

    Raises:
        UnsupportedConfigError: every candidate refused; the message lists each one's reason.
    """
    reasons = []
    hints = hints.settled()
    for candidate in CANDIDATES[spec.kind]:
        name = candidate.PATH.rpartition(".")[2].partition(":")[0]
        reason = candidate.why_not(spec, target)
        if reason is None:
            tile = candidate.choose(spec, target, hints)
            return Choice(name, candidate.PATH, tile, tile.num_splits(spec, hints))
        reasons.append(f"{name}: {reason}")
    fail(
        UnsupportedConfigError,
        f"no kernel for this attention on {target.arch}",
        got=spec,
        expected="\n            ".join(reasons),
        fix='pass backend="reference" (slow, exact) or change what the kernels name',
    )
