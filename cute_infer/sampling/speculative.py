"""Chain speculative sampling: verify a draft model's tokens against the target model."""

from __future__ import annotations

import torch

from ..checks import check_tensor
from . import ops as _ops  # noqa: F401  (registers the torch op)
from .params import check_generator, random_start

FP32 = (torch.float32,)
INTS = (torch.int32, torch.int64)


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: torch.Tensor | None = None,
    maybe_output_emitted_draft_token_num: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept draft token i with probability min(1, q_i / p_i); at the first rejection draw from max(q - p, 0), after the last from q.

    The emitted tokens are distributed as the target model's, whatever the draft.

    Args:
        draft_probs: ``[batch, n, vocab]`` fp32, p. draft_token_ids: ``[batch, n]`` int32 | int64, drawn from p.
        target_probs: ``[batch, n + 1, vocab]`` fp32, q.
        maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num: ``[batch]`` int32 | int64; the counts are **added** to them
            in place, in their own dtype.
        deterministic: accepted; it always is. generator, seed, offset: as in :mod:`cute_infer.sampling.samplers`.

    Returns:
        ``(ids [batch, n + 1] int32, accepted [batch], emitted [batch])``. ids: the accepted draft tokens, one token drawn here, then -1.
        accepted counts draft tokens that pass the test, each on its own; emitted counts those before the first rejection.
        The counts are the arguments when given, else new int32 tensors.

    Source: Chen et al., arXiv:2302.01318; Leviathan et al., ICML 2023.
    """
    call = "chain_speculative_sampling()"
    check_tensor(call, "draft_probs", draft_probs, {"batch": None, "num_draft": None, "vocab": None}, dtypes=FP32)
    batch, n, vocab = draft_probs.shape
    device = draft_probs.device
    check_tensor(call, "draft_token_ids", draft_token_ids, {"batch": batch, "num_draft": n}, dtypes=INTS, device=device)
    check_tensor(call, "target_probs", target_probs, {"batch": batch, "num_draft + 1": n + 1, "vocab": vocab}, dtypes=FP32, device=device)
    counters = {
        "maybe_output_accepted_token_num": maybe_output_accepted_token_num,
        "maybe_output_emitted_draft_token_num": maybe_output_emitted_draft_token_num,
    }
    for name, counter in counters.items():
        if counter is not None:
            check_tensor(call, name, counter, {"batch": batch}, dtypes=INTS, device=device)
    check_generator(call, generator, target_probs)
    seed_rows, seed_value, seed_per_row = random_start(call, seed, "seed", batch, device)
    offset_rows, offset_value, _ = random_start(call, offset, "offset", batch, device)
    random = (seed_rows, seed_value, offset_rows, offset_value, not seed_per_row, generator)
    ids, *counts = torch.ops.cute_infer.chain_speculative(draft_probs, draft_token_ids.to(torch.int32), target_probs, *random)
    given = counters.values()
    accepted, emitted = (new if counter is None else counter.add_(new) for counter, new in zip(given, counts))
    return ids, accepted, emitted
