"""The same distributions, thresholds and random stream in torch: by sorting, one obvious step at a time. The oracle, and the CPU backend.

Where the kernels agree with this file, and how far:

* Philox words, masses of probabilities, sums, limits, thresholds, ties, ``valid`` and the order in which tokens are drawn: bit for bit,
  because they are integers (or one correctly rounded double product, or fp32 additions that both sides do in one order).
* Masses of logits: the hardware's exp2 is a few units in the last place off torch's, a relative 2**-22. So an id differs only when the
  draw falls that close to the border between two tokens, and top-p keeps one value more or less only when the sum passes p that closely.
* ``softmax`` and ``renorm`` outputs: to fp32 rounding.
"""

from __future__ import annotations

import torch

LOG2_E = 1.4426950408889634
ONE = float(1 << 31)  # the mass of the most likely token
WHOLE = float(1 << 23)
MASK32 = 0xFFFFFFFF
TINY = 1e-30  # a row of probabilities whose largest is below this is all zero


# ------------------------------------------------------------------------------------------------------------- random numbers
def uniform53(seed: torch.Tensor, offset: torch.Tensor, row: torch.Tensor, draw: int | torch.Tensor = 0) -> torch.Tensor:
    """53 random bits per element, as int64: Philox-4x32-10 with key = seed and counter = (offset low, offset high, row, draw)."""
    seed, offset, row, draw = torch.broadcast_tensors(seed, offset, row, torch.as_tensor(draw, device=seed.device))
    c0, c1, c2, c3 = offset & MASK32, (offset >> 32) & MASK32, row & MASK32, draw & MASK32
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products; the sign bit is only a bit
        c0, c1, c2, c3 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32, ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return (c0 << 21) | (c1 >> 11)


def draw_below(bits: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """floor(bits / 2**53 * total), in 0 .. total - 1."""
    return torch.minimum((bits.double() * 2.0**-53 * total.double()).long(), total - 1)


# ------------------------------------------------------------------------------------------------------------------- masses
def row_masses(x: torch.Tensor, is_probs: bool, temperature: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(real masses in units of 2**-31 of the largest, fp32; which rows are valid). Invalid rows get zeros.

    Args:
        x: ``[rows, vocab]`` fp32. temperature: ``[rows]`` fp32 or None; not positive counts as 1.
    """
    top = x.amax(-1, keepdim=True)
    valid = torch.isfinite(top) & ((top >= TINY) if is_probs else True)
    x = torch.where(valid, x, 0.0)
    top = torch.where(valid, top, 1.0 if is_probs else 0.0)
    if is_probs:
        real = (x * (ONE / top)).clamp_min(0)
    else:
        inverse_t = torch.full_like(top, LOG2_E)
        if temperature is not None:
            t = temperature.float()[:, None]
            inverse_t = torch.where(t > 0, inverse_t / torch.where(t > 0, t, 1.0), inverse_t)
        real = torch.exp2((x - top) * inverse_t) * ONE
    return torch.where(valid, real, 0.0), valid[:, 0]


def whole(real: torch.Tensor) -> torch.Tensor:
    """Whole numbers near the real masses, by adding 2**23 and taking it away in fp32, as the kernels do."""
    return ((real + WHOLE) - WHOLE).long()


def nucleus_limit(p: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Smallest integer >= p * total, at least 1; unreachable where p >= 1."""
    limit = torch.ceil(p.double() * total.double()).long().clamp_min(1)
    return torch.where(p < 1, limit, torch.iinfo(torch.int64).max)


def thresholds(x: torch.Tensor, mass: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None, k_first: bool) -> torch.Tensor:
    """Smallest value that top-k and top-p keep, per row: keep iff count(> x) < k and mass(> x) < p * total. Ties are kept.

    Args:
        x: ``[rows, vocab]`` without NaN. mass: int64, non-decreasing in x. k: ``[rows]`` or None, off where k < 1 or k >= vocab.
        p: ``[rows]`` or None, off where p >= 1. k_first: p is a share of the mass that top-k keeps.
    """
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    position = torch.arange(x.shape[1], device=x.device)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(starts, position, 0).cummax(-1).values  # first of the equal values = how many are greater
    mass = mass.gather(-1, order)
    mass_above = (mass.cumsum(-1) - mass).gather(-1, first)
    keep = torch.ones_like(starts)
    if k is not None:
        keep &= (first < k[:, None]) | (k < 1)[:, None]
    if p is not None:
        total = torch.where(keep, mass, 0).sum(-1) if k_first else mass.sum(-1)
        keep &= mass_above < nucleus_limit(p, total)[:, None]
    threshold = torch.where(keep, ordered, torch.inf).amin(-1)
    return torch.where(keep.all(-1), -torch.inf, threshold)


# ---------------------------------------------------------------------------------------------------------------------- ids
def sample_rows(
    x: torch.Tensor,
    is_probs: bool,
    *,
    indices: torch.Tensor | None,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seed: torch.Tensor,
    offset: torch.Tensor,
    row_in_counter: bool,
    k_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per slot: ``(ids int32, valid bool, log-probability fp32)``, each ``[slots]``.

    The id is the first token at which the running sum of the kept masses, in index order, exceeds draw_below(random, their total).
    temperature <= 0 takes the first of the largest. Invalid rows give (0, False, -inf).

    Args:
        x: ``[rows, vocab]``. indices: ``[slots]`` or None: slot i reads row indices[i]. All parameters: ``[slots]`` or None.
        row_in_counter: slots differ by their position in the random stream; False when every slot has its own seed.
    """
    slots = x.shape[0] if indices is None else indices.shape[0]
    bits = uniform53(seed, offset, torch.arange(slots, device=x.device) * int(row_in_counter)).expand(slots)
    shared = indices is not None and all(v is None or v.stride(0) == 0 for v in (temperature, top_k, top_p, min_p))
    if not shared:  # else one distribution per input row serves all its slots
        x = x if indices is None else x[indices.long()]
        indices = None
    x = x.float()
    rows = x.shape[0]
    if rows == 0 or slots == 0:
        return bits.int(), bits > 0, bits.float()
    temperature, top_k, top_p, min_p = (v if v is None else v[:1].expand(rows) if shared else v for v in (temperature, top_k, top_p, min_p))

    real, valid = row_masses(x, is_probs, temperature)
    x = torch.where(valid[:, None], x, 0.0)
    mass = whole(real)
    if top_k is not None or top_p is not None:
        mass = torch.where(x >= thresholds(x, mass, top_k, top_p, k_first)[:, None], mass, 0)
    if min_p is not None:
        fraction = min_p.float().clamp_max(1)[:, None]
        keep = x >= fraction * x.amax(-1, keepdim=True) if is_probs else real >= fraction * ONE
        mass = torch.where(keep, mass, 0)
    greedy = torch.zeros_like(valid) if temperature is None else temperature <= 0
    mass = torch.where(greedy[:, None] & (x < x.amax(-1, keepdim=True)), 0, mass)

    running = mass.cumsum(-1)
    row = torch.arange(rows, device=x.device) if indices is None else indices.long()
    total = running[:, -1][row]
    target = torch.where(greedy[row], 0, draw_below(bits, total))
    if indices is None:
        ids = torch.searchsorted(running, target[:, None], right=True)[:, 0]
    else:
        ids = torch.zeros_like(row)
        for r in row.unique().tolist():
            ids[row == r] = torch.searchsorted(running[r], target[row == r], right=True)
    valid = valid[row]
    ids = torch.where(valid, ids, 0)
    logprob = torch.log(mass[row, ids].double() / total.double()).float()
    return ids.int(), valid, torch.where(valid, logprob, -torch.inf)


# --------------------------------------------------------------------------------------------------------------- whole rows
def rewrite_rows(
    x: torch.Tensor,
    output: str,
    is_probs: bool,
    *,
    temperature: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
) -> torch.Tensor:
    """``output`` "softmax" (fp32), "renorm" (kept probabilities over their sum) or "mask" (dropped logits become -inf).

    Rows that are all -inf or all zero become zeros; NaN rows become NaN ("mask" leaves both alone).
    """
    dtype = torch.float32 if output == "softmax" else x.dtype
    original, x = x, x.float()
    if x.numel() == 0:
        return original.to(dtype)
    real, valid = row_masses(x, is_probs, temperature)
    clean = torch.where(valid[:, None], x, 0.0)
    keep = torch.ones_like(x, dtype=torch.bool)
    if top_k is not None or top_p is not None:
        keep = clean >= thresholds(clean, whole(real), top_k, top_p, k_first=False)[:, None]
    if output == "mask":
        return torch.where(keep | ~valid[:, None], original, -torch.inf)
    if temperature is not None:
        keep &= (temperature > 0)[:, None] | (clean == clean.amax(-1, keepdim=True))
    kept = torch.where(keep, real, 0.0).double()
    out = kept / kept.sum(-1, keepdim=True)
    nothing = torch.where(x.isnan().any(-1), torch.nan, 0.0)[:, None]
    return torch.where(valid[:, None], out, nothing).to(dtype)


# ------------------------------------------------------------------------------------------------------------- speculative
def chain_speculative(
    draft: torch.Tensor, draft_ids: torch.Tensor, target: torch.Tensor, *, seed: torch.Tensor, offset: torch.Tensor, row_in_counter: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(ids [batch, n + 1] int32 padded with -1, accepted [batch] int32, emitted [batch] int32)``; see ``chain_speculative_sampling``."""
    batch, n, vocab = draft.shape
    row = torch.arange(batch, device=draft.device) * int(row_in_counter)
    position = torch.arange(n, device=draft.device)
    ids = draft_ids.long()
    inside = (ids >= 0) & (ids < vocab)
    token = torch.where(inside, ids, 0)[..., None]
    p, q = draft.gather(-1, token)[..., 0].double(), target[:, :n].gather(-1, token)[..., 0].double()
    u = uniform53(seed[:, None], offset[:, None], row[:, None], position[None] + 1).double() * 2.0**-53
    accept = inside & (u * p < q)
    emitted = accept.long().cumprod(-1).sum(-1)

    b = torch.arange(batch, device=draft.device)
    q_row = target[b, emitted]
    p_row = torch.cat([draft, torch.zeros_like(target[:, :1])], 1)[b, emitted]
    unit = float(1 << 40)
    mass = ((q_row - p_row).clamp_min(0) * unit).nan_to_num(0).long()
    whole = (q_row.clamp_min(0) * unit).nan_to_num(0).long()
    mass = torch.where((mass.sum(-1) > 0)[:, None], mass, whole)
    running = mass.cumsum(-1)
    goal = draw_below(uniform53(seed, offset, row), running[:, -1])
    own = torch.searchsorted(running, goal[:, None], right=True)[:, 0]
    own = torch.where(running[:, -1] > 0, own, 0)

    out = torch.full((batch, n + 1), -1, dtype=torch.int32, device=draft.device)
    out[:, :n] = torch.where(position < emitted[:, None], ids, -1).int()
    out[b, emitted] = own.int()
    return out, accept.sum(-1).int(), emitted.int()
