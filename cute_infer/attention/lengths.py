"""How long the KV of a batch is, as far as the host can say so without asking the device."""

from __future__ import annotations

from typing import NamedTuple

SHORT, LONG = 1024, 65536
MEANS = (SHORT, 4096, 16384, LONG)  # of KvLens.mean; the last stands for everything longer, too
EVEN, UNEVEN, MIXED = 1, 2, 4  # of KvLens.spread


class KvLens(NamedTuple):
    """What the host knows of a batch's KV lengths without asking the device, in so few classes that a tile rarely changes as they grow.

    mean     0: unknown. Else the mean is at most this, one of MEANS.
    spread   0: unknown. EVEN: no request has more than 1.5 times the mean (or 1536 tokens); MIXED: one has 4 times the mean (and 4096
             tokens) or more; UNEVEN: something between.
    """

    mean: int = 0
    spread: int = 0

    @classmethod
    def of(cls, mean: float, longest: int) -> KvLens:
        """The class of known lengths."""
        ratio = longest / max(mean, SHORT)
        spread = EVEN if ratio <= 1.5 else UNEVEN if ratio < 4.0 else MIXED
        return cls(next((limit for limit in MEANS if mean <= limit), LONG), spread)

    @classmethod
    def at_most(cls, longest: int) -> KvLens:
        """The class of lengths of which only a bound is known: it says something if all are short."""
        return cls(SHORT, EVEN) if longest <= SHORT else cls()

    def __str__(self) -> str:
        if not self.mean:
            return "unknown"
        spread = {EVEN: "even", UNEVEN: "uneven", MIXED: "mixed"}[self.spread]
        return f"{spread}, mean {f'<= {self.mean}' if self.mean < LONG else f'> {MEANS[-2]}'}"


UNKNOWN = KvLens()
CLASSES = (UNKNOWN, *(KvLens(mean, spread) for mean in MEANS for spread in (EVEN, UNEVEN, MIXED)))  # all there are
