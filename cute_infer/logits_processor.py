"""FlashInfer's ``logits_processor``: sampling as a list of steps, run as one kernel where the list allows it.

    pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), Sample()])
    ids = pipe(logits, temperature=0.8, top_k=50, top_p=0.9)          # one launch of cute_infer.sampling.sample

Every step maps logits or probabilities to one of logits, probabilities and indices. A chain whose types do not fit is refused when the pipe
is made. A chain that ends in Sample() and whose filters come in the order temperature, top-k, top-p, min-p, each at most once, is fused;
any other runs step by step with the same meaning.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from . import sampling
from .errors import ConfigError, UnsupportedConfigError, fail
from .sampling.params import check_rows, per_row


class TensorType(enum.Enum):
    """What the numbers of a tensor mean."""

    LOGITS = enum.auto()
    PROBS = enum.auto()
    INDICES = enum.auto()

    def __str__(self) -> str:
        return self.name


LOGITS, PROBS, INDICES = TensorType


class LegalizationError(ConfigError):
    """A processor got a type it does not take, or the input type cannot be told."""


class CompileError(ConfigError):
    """A validity check refused the chain."""


class LogitsProcessor:
    """One step. Subclass it for a step of your own: set ``TYPES`` and ``PARAMETER``, implement :meth:`apply`.

    TYPES      what it accepts -> what it makes of it.
    PARAMETER  the keyword of the call that it needs, or "".
    """

    TYPES: ClassVar[dict[TensorType, TensorType]] = {}
    PARAMETER: ClassVar[str] = ""

    def __init__(self, **params: Any) -> None:
        self.params = params

    @property
    def name(self) -> str:
        return type(self).__name__

    def output_type(self, kind: TensorType) -> TensorType:
        """The type of the result.

        Raises:
            LegalizationError: ``kind`` is not accepted.
        """
        if kind not in self.TYPES:
            raise LegalizationError(f"{self.name} can only be applied to {' or '.join(map(str, self.TYPES))}, got {kind}")
        return self.TYPES[kind]

    def apply(self, x: torch.Tensor, kind: TensorType, arguments: dict[str, Any]) -> torch.Tensor:
        """The step on ``x [rows, vocab]``; ``arguments`` are the keywords of the call."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.params.items())})"


class Temperature(LogitsProcessor):
    """logits / temperature, a number or ``[rows]``; at 0 or less only the first largest logit of the row is left."""

    TYPES = {LOGITS: LOGITS}
    PARAMETER = "temperature"

    def apply(self, x: torch.Tensor, kind: TensorType, arguments: dict[str, Any]) -> torch.Tensor:
        t = _column(arguments["temperature"], x)
        if not isinstance(t, torch.Tensor):
            return x / t if t > 0 else _greedy(x)
        greedy = t <= 0
        return torch.where(greedy, _greedy(x), x / torch.where(greedy, 1.0, t))


class Softmax(LogitsProcessor):
    """Probabilities in fp32."""

    TYPES = {LOGITS: PROBS}

    def __init__(self, enable_pdl: bool | None = None, **params: Any) -> None:
        super().__init__(enable_pdl=enable_pdl, **params)

    def apply(self, x: torch.Tensor, kind: TensorType, arguments: dict[str, Any]) -> torch.Tensor:
        return sampling.softmax(x)


class TopK(LogitsProcessor):
    """The top_k largest; of logits the others become -inf, of probabilities zero, and the rest is renormalized.

    joint_topk_topp: a TopP that follows counts the whole row's mass instead of what is left here, if the pipe is compiled.
    """

    TYPES = {LOGITS: LOGITS, PROBS: PROBS}
    PARAMETER = "top_k"

    def __init__(self, joint_topk_topp: bool = False, **params: Any) -> None:
        super().__init__(joint_topk_topp=joint_topk_topp, **params)

    def apply(self, x: torch.Tensor, kind: TensorType, arguments: dict[str, Any]) -> torch.Tensor:
        step = sampling.top_k_mask_logits if kind is LOGITS else sampling.top_k_renorm_probs
        return step(x, arguments["top_k"])


class TopP(LogitsProcessor):
    """The fewest largest probabilities that hold top_p of the mass, renormalized."""

    TYPES = {PROBS: PROBS}
    PARAMETER = "top_p"

    def apply(self, x: torch.Tensor, kind: TensorType, arguments: dict[str, Any]) -> torch.Tensor:
        return sampling.top_p_renorm_probs(x, arguments["top_p"])


class MinP(LogitsProcessor):
    """The probabilities of at least min_p times the largest, renormalized; from 1 on the largest alone."""

    TYPES = {PROBS: PROBS}
    PARAMETER = "min_p"

    def apply(self, x: torch.Tensor, kind: TensorType, arguments: dict[str, Any]) -> torch.Tensor:
        p = _column(arguments["min_p"], x)
        floor = (p.clamp(max=1.0) if isinstance(p, torch.Tensor) else min(p, 1.0)) * x.amax(-1, keepdim=True)
        kept = torch.where(x >= floor, x, 0.0)
        return kept / kept.sum(-1, keepdim=True)


class Sample(LogitsProcessor):
    """Draw a token per row. Keywords of the call: indices, generator, seed, offset."""

    TYPES = {LOGITS: INDICES, PROBS: INDICES}

    def __init__(self, deterministic: bool = True, **params: Any) -> None:
        super().__init__(deterministic=deterministic, **params)

    def apply(self, x: torch.Tensor, kind: TensorType, arguments: dict[str, Any]) -> torch.Tensor:
        draw = sampling.sampling_from_logits if kind is LOGITS else sampling.sampling_from_probs
        ids = draw(x, **{name: arguments[name] for name in DRAW if name in arguments})
        assert isinstance(ids, torch.Tensor)
        return ids


DRAW = ("indices", "generator", "seed", "offset")
FUSED_ORDER = (Temperature, TopK, TopP, MinP)  # Softmax anywhere between them: a filter means the same before and after it


def _column(value: float | torch.Tensor, x: torch.Tensor) -> float | torch.Tensor:
    """A parameter of a step as a number or ``[rows, 1]``, with the checks of the sampling functions."""
    rows, number = per_row(value, torch.float32, x.shape[0], x, None)
    if rows is not None:
        return rows[:, None]
    assert number is not None
    return number


def _greedy(x: torch.Tensor) -> torch.Tensor:
    """The first largest of every row, the others -inf."""
    first = torch.arange(x.shape[1], device=x.device) == x.argmax(-1, keepdim=True)
    return torch.where(first, x, -torch.inf)


class LogitsPipe:
    """A chain of processors.

    Args:
        processors: applied in this order.
        compile: fuse what can be fused; :meth:`compile` does it later.
        input_type: ``TensorType.LOGITS`` or ``PROBS``; needed when the first processor takes both.
        custom_fusion_rules: refused; there is nothing to add.
        custom_validity_checks: functions of the list of processors that raise CompileError.

    Raises:
        ValueError: LegalizationError or CompileError, ``Pipeline creation failed: ...``.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        compile: bool = True,
        input_type: TensorType | None = None,
        custom_fusion_rules: Sequence[Any] | None = None,
        custom_validity_checks: Sequence[Callable[[list[LogitsProcessor]], None]] | None = None,
    ) -> None:
        if isinstance(processors, LogitsProcessor) or not processors:
            raise LegalizationError("Pipeline cannot be empty" if not processors else "Pipeline must be a list of processors")
        self.processors = list(processors)
        for i, processor in enumerate(self.processors):
            if not isinstance(processor, LogitsProcessor):
                raise LegalizationError(f"Processor {i} is {processor!r}, not a LogitsProcessor such as TopK()")
        self.fused = False
        try:
            self.initial_type = input_type or _only_input_type(self.processors[0])
            self._types = _check_types(self.processors, self.initial_type)
            if compile:
                self.compile(custom_fusion_rules, custom_validity_checks)
        except (LegalizationError, CompileError) as error:
            raise type(error)(f"Pipeline creation failed: {error}") from error

    def compile(
        self,
        custom_fusion_rules: Sequence[Any] | None = None,
        custom_validity_checks: Sequence[Callable[[list[LogitsProcessor]], None]] | None = None,
    ) -> None:
        """Run the checks and decide whether one kernel does it all."""
        if custom_fusion_rules:
            fail(UnsupportedConfigError, "LogitsPipe: custom_fusion_rules are not supported", fix="write a LogitsProcessor of your own")
        for check in custom_validity_checks or ():
            check(self.processors)
        filters = [type(p) for p in self.processors[:-1] if not isinstance(p, Softmax)]
        in_order = filters == [kind for kind in FUSED_ORDER if kind in filters]
        self.fused = type(self.processors[-1]) is Sample and in_order and self._one_kernel_exists(filters)

    def _one_kernel_exists(self, filters: list[type[LogitsProcessor]]) -> bool:
        """From logits always; from probabilities min-p stands alone."""
        return self.initial_type is LOGITS or MinP not in filters or filters == [MinP]

    def __call__(self, x: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Run on ``x [rows, vocab]``; keywords: temperature, top_k, top_p, min_p, indices, generator, seed, offset.

        Raises:
            ValueError: a keyword that a step needs is missing.
        """
        check_rows("LogitsPipe", str(self.initial_type).lower(), x)
        for i, processor in enumerate(self.processors):
            if processor.PARAMETER and arguments.get(processor.PARAMETER) is None:
                raise ConfigError(f"Error executing operator {i} ({processor.name}): {processor.PARAMETER} is required")
        if self.fused:
            return self._draw(x, arguments)
        for processor, kind in zip(self.processors, self._types):
            x = processor.apply(x, kind, arguments)
        return x

    def _draw(self, x: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        """The whole chain in one launch. A keyword without its processor has no effect, as in a chain of steps."""
        names = {p.PARAMETER for p in self.processors}
        values = {name: arguments[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in names}
        draw = {name: arguments[name] for name in DRAW if name in arguments}
        joint = any(isinstance(p, TopK) and p.params["joint_topk_topp"] for p in self.processors)
        order = "joint" if joint else "top_k_first"
        if self.initial_type is LOGITS:
            ids = sampling.sample(x, **values, **draw, filter_apply_order=order)
        elif "min_p" in names:
            ids = sampling.min_p_sampling_from_probs(x, **values, **draw)
        else:
            limits = {"top_k": 0, "top_p": 1.0} | values
            ids = sampling.top_k_top_p_sampling_from_probs(x, **limits, **draw, filter_apply_order=order)
        assert isinstance(ids, torch.Tensor)
        return ids

    def __repr__(self) -> str:
        how = "one kernel" if self.fused else "step by step"
        return f"LogitsPipe([{' -> '.join(p.name for p in self.processors)}], {how})"


def _only_input_type(processor: LogitsProcessor) -> TensorType:
    kinds = list(processor.TYPES)
    if len(kinds) == 1:
        return kinds[0]
    raise LegalizationError(
        f"Cannot infer input type: {processor.name} can accept both LOGITS and PROBS. "
        "Please specify input_type explicitly when creating the LogitsPipe."
    )


def _check_types(processors: list[LogitsProcessor], kind: TensorType) -> list[TensorType]:
    """The input type of every processor."""
    types = []
    for i, processor in enumerate(processors):
        types.append(kind)
        try:
            kind = processor.output_type(kind)
        except LegalizationError as error:
            raise LegalizationError(f"Failed to legalize processor {i} ({processor.name}): {error}") from error
    return types


__all__ = [
    "CompileError",
    "LegalizationError",
    "LogitsPipe",
    "LogitsProcessor",
    "MinP",
    "Sample",
    "Softmax",
    "Temperature",
    "TensorType",
    "TopK",
    "TopP",
]
