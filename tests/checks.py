"""How close is close enough: an error budget measured on the inputs at hand, never a tolerance tuned by hand.

    max |out - ref|  <=  2 * max |same - ref| + ulp

``ref`` is exact (fp32 or better), ``same`` is plain torch in the dtypes of the inputs, ``ulp`` one unit in the last place of the output
at ref's largest magnitude. Being twice as wrong as plain torch is a bug; so is a NaN or an infinity where ref has none.
"""

from __future__ import annotations

import torch


def assert_attention_close(out: torch.Tensor, ref: torch.Tensor, same: torch.Tensor | None = None, *, what: str = "out") -> None:
    """``out`` is ``ref`` within the budget; the worst coordinate and both values are in the message.

    Args:
        ref: fp32 or fp64. same: the same attention by plain torch in the input dtypes; None: allow rounding of the output alone.
    """
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    ulp = torch.finfo(out.dtype).eps
    got, want = out.double(), ref.double()
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(got) != test(want)).nonzero()
        assert not len(wrong), f"{what}: {name} differs at {len(wrong)} places, first {wrong[0].tolist()}"
    finite = torch.isfinite(want)
    error = torch.where(finite, (got - want).abs(), 0.0)
    scale = torch.where(finite, want.abs(), 0.0).max() if want.numel() else torch.tensor(0.0)
    budget = ulp * float(scale)
    if same is not None and want.numel():
        budget += 2 * float(torch.where(finite, (same.double() - want).abs(), 0.0).max())
    if not want.numel() or float(error.max()) <= budget:
        return
    worst = torch.unravel_index(error.argmax(), error.shape)
    at = [int(i) for i in worst]
    raise AssertionError(
        f"{what}{at} = {float(got[worst]):.6g}, reference {float(want[worst]):.6g}: error {float(error.max()):.3g} > budget {budget:.3g}; "
        f"{int((error > budget).sum())} of {error.numel()} elements are outside"
    )


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, sm_scale: float | None = None
) -> torch.Tensor:
    """Plain torch attention of one request in q's dtype: ``q [n, Hq, D]``, ``k, v [L, Hkv, D]`` -> ``[n, Hq, Dv]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(q.dtype).repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("nhd,lhd->hnl", q, k) * (sm_scale if sm_scale is not None else q.shape[-1] ** -0.5)
    if causal:
        keep = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril(k.shape[0] - q.shape[0])
        logits = logits.masked_fill(~keep, -torch.inf)
    return torch.einsum("hnl,lhd->nhd", logits.softmax(-1), v)
