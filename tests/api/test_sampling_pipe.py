"""LogitsPipe: fused and step-by-step chains agree with the functions they are made of, and wrong chains are refused."""

from __future__ import annotations

import pytest
import torch

from cute_infer import sampling
from cute_infer.logits_processor import (
    CompileError,
    LegalizationError,
    LogitsPipe,
    LogitsProcessor,
    MinP,
    Sample,
    Softmax,
    Temperature,
    TensorType,
    TopK,
    TopP,
)

LOGITS = 3 * torch.randn(5, 200, generator=torch.Generator().manual_seed(2))
SEED = dict(seed=torch.arange(5), offset=4)


def test_one_kernel_is_the_fused_call() -> None:
    pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), MinP(), Sample()])
    assert pipe.fused and pipe.initial_type is TensorType.LOGITS and "one kernel" in repr(pipe)
    values = dict(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05)
    assert torch.equal(pipe(LOGITS, **values, **SEED), sampling.sample(LOGITS, **values, **SEED))


def test_joint_differs_from_top_k_first() -> None:
    values = dict(top_k=5, top_p=0.6)
    many = dict(seed=1, indices=torch.zeros(2000, dtype=torch.int32))
    flat = torch.linspace(0, 1, 200)[None]
    first = LogitsPipe([Softmax(), TopK(), TopP(), Sample()])(flat, **values, **many)
    joint = LogitsPipe([Softmax(), TopK(joint_topk_topp=True), TopP(), Sample()])(flat, **values, **many)
    assert len(first.unique()) == 3 and len(joint.unique()) == 5


def test_from_probs() -> None:
    probs = LOGITS.softmax(-1)
    top = LogitsPipe([TopK(), Sample()], input_type=TensorType.PROBS)
    assert top.fused
    assert torch.equal(top(probs, top_k=3, **SEED), sampling.top_k_sampling_from_probs(probs, 3, **SEED))
    assert torch.equal(LogitsPipe([MinP(), Sample()])(probs, min_p=0.2, **SEED), sampling.min_p_sampling_from_probs(probs, 0.2, **SEED))


@pytest.mark.parametrize("chain", [[Temperature(), Softmax(), TopK(), TopP(), MinP()], [TopK(), Softmax()], [Softmax(), MinP(), TopP()]])
def test_steps_return_what_the_functions_return(chain: list[LogitsProcessor]) -> None:
    x = LOGITS
    for step in chain:
        x = {
            "Temperature": lambda x: x / 0.5,
            "Softmax": sampling.softmax,
            "TopK": lambda x: sampling.top_k_mask_logits(x, 9) if x is LOGITS else sampling.top_k_renorm_probs(x, 9),
            "TopP": lambda x: sampling.top_p_renorm_probs(x, 0.7),
            "MinP": lambda x: torch.where(x >= 0.1 * x.amax(-1, keepdim=True), x, 0) / x[x >= 0.1 * x.amax(-1, keepdim=True)].sum(),
        }[step.name](x)
        if step.name == "MinP":
            x = x / x.sum(-1, keepdim=True)
    pipe = LogitsPipe(chain, input_type=TensorType.LOGITS)
    assert not pipe.fused
    torch.testing.assert_close(pipe(LOGITS, temperature=0.5, top_k=9, top_p=0.7, min_p=0.1), x, rtol=1e-5, atol=1e-7)


def test_steps_and_the_kernel_draw_from_the_same_support() -> None:
    values = dict(temperature=torch.full((5,), 0.9), top_k=torch.full((5,), 4, dtype=torch.int32), top_p=0.9)
    chain = [Temperature(), TopK(), Softmax(), TopP()]
    kept = LogitsPipe(chain)(LOGITS, **values) > 0
    for compiled in (True, False):
        pipe = LogitsPipe([*chain, Sample()], compile=compiled)
        assert pipe.fused == compiled
        for seed in range(20):
            assert kept.gather(1, pipe(LOGITS, **values, seed=seed).long()[:, None]).all()


def test_order_that_changes_the_meaning_is_not_fused() -> None:
    assert not LogitsPipe([Softmax(), TopP(), TopK(), Sample()]).fused
    assert not LogitsPipe([Temperature(), Temperature(), Sample()]).fused


class Shift(LogitsProcessor):
    """logits + bias: a step of a user's own."""

    TYPES = {TensorType.LOGITS: TensorType.LOGITS}
    PARAMETER = "bias"

    def apply(self, x, kind, arguments):
        return x + arguments["bias"]


def test_own_processor() -> None:
    pipe = LogitsPipe([Shift(), Sample()])
    bias = torch.full((200,), -torch.inf)
    bias[17] = 0
    assert not pipe.fused and pipe(LOGITS, bias=bias).tolist() == [17] * 5


def test_refusals() -> None:
    for chain, text in (
        ([TopP(), Sample()], None),
        ([Temperature(), TopP()], "Failed to legalize processor 1 .TopP.: TopP can only be applied to PROBS, got LOGITS"),
        ([Softmax(), Softmax()], "Softmax can only be applied to LOGITS, got PROBS"),
        ([Softmax(), Sample(), TopK()], "got INDICES"),
        ([TopK(), Sample()], "Cannot infer input type: TopK can accept both LOGITS and PROBS"),
        ([], "Pipeline cannot be empty"),
    ):
        if text is None:
            LogitsPipe(chain)
            continue
        with pytest.raises(ValueError, match=text) as caught:
            LogitsPipe(chain)
        assert isinstance(caught.value, LegalizationError)
    with pytest.raises(ValueError, match=r"operator 0 \(Temperature\): temperature is required"):
        LogitsPipe([Temperature(), Sample()])(LOGITS)

    def never(processors: list[LogitsProcessor]) -> None:
        raise CompileError("not today")

    with pytest.raises(CompileError, match="Pipeline creation failed: not today"):
        LogitsPipe([Softmax()], custom_validity_checks=[never])
    with pytest.raises(ValueError, match="custom_fusion_rules"):
        LogitsPipe([Softmax()], custom_fusion_rules=[object()])
