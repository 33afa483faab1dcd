"""What a resolution method did: a record per sampler step, and a report per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

__all__ = ["ForwardSize", "ResolutionRecord", "ResolutionReport", "StageReport"]


@dataclass(frozen=True)
class ForwardSize:
    """Sequence lengths of one forward, per image.

    Attributes:
        tokens: of the generated image (or clip).
        full_tokens: the same at full size.
        sequence: all tokens, those of text and references included.
        full_sequence: the same at full size.
    """

    tokens: int
    full_tokens: int
    sequence: int
    full_sequence: int

    def cost(self, module: Any) -> float:
        """Operations of the forward over those at full size, see `ResolutionReport`."""
        config = getattr(module, "config", None)
        width = getattr(config, "num_attention_heads", 0) * getattr(config, "attention_head_dim", 0)
        own, full = (
            length * (6 * width + length) if width else length for length in (self.sequence, self.full_sequence)
        )
        return own / full


@dataclass(frozen=True, kw_only=True)
class ResolutionRecord:
    """One sampler step.

    Attributes:
        run: counts runs from 0.
        step: counts steps from 0.
        sigma: noise level before the step.
        next_sigma: noise level after it, that of a change of resolution included.
        switched: whether the resolution changed at the end of the step.
        tokens: tokens of the generated image (or clip) that the transformer ran on, per image and pass.
        full_tokens: what they are at full size.
        cost: operations of the step over those of the same step at full size, as `ResolutionReport` estimates them.
    """

    run: int
    step: int
    sigma: float
    next_sigma: float
    switched: bool
    tokens: int
    full_tokens: int
    cost: float

    @property
    def stage_name(self) -> str:
        """The stage that the step belongs to."""
        raise NotImplementedError


@dataclass(frozen=True)
class StageReport:
    """Consecutive steps of one stage.

    Attributes:
        name: such as `"coarse"`, `"mixed"`, `"full"`, or frames, rows and columns of the latents.
        steps: how many.
        tokens: of the generated image (or clip) in the last of them, per image and pass.
    """

    name: str
    steps: int
    tokens: int


@dataclass(frozen=True)
class ResolutionReport:
    """What one run saved.

    Attributes:
        method: name of the method's class.
        run: counts runs from 0.
        steps: sampler steps of the run.
        full_tokens: tokens of the generated image (or clip) at full size, per image and pass.
        stages: in order.
        flops_ratio: operations of the run at full size over those of this run. Estimated from the sequence lengths: a
            transformer of width `D` does `24 D^2` operations per token in its projections and its MLP, and `4 S D` in
            attention over `S` tokens (text and references included), `S (6 D + S)` for all up to a factor.
    """

    method: str
    run: int
    steps: int
    full_tokens: int
    stages: tuple[StageReport, ...]
    flops_ratio: float

    @classmethod
    def of(cls, method: str, records: Sequence[ResolutionRecord]) -> Self:
        """The report of one run.

        Args:
            method: name of the method's class.
            records: of all steps of the run, in order.
        """
        stages: list[StageReport] = []
        for record in records:
            if stages and stages[-1].name == record.stage_name:
                stages[-1] = replace(stages[-1], steps=stages[-1].steps + 1, tokens=record.tokens)
            else:
                stages.append(StageReport(record.stage_name, 1, record.tokens))
        return cls(
            method=method,
            run=records[0].run,
            steps=len(records),
            full_tokens=records[0].full_tokens,
            stages=tuple(stages),
            flops_ratio=len(records) / sum(record.cost for record in records),
        )

    def __str__(self) -> str:
        return (
            f"{self.method}: {self.steps} steps: {self.described}; {self.flops_ratio:.2f}x fewer operations (estimated)"
        )

    @property
    def described(self) -> str:
        """Stages and tokens as text."""
        return ", ".join(f"{stage.steps} {stage.name} ({stage.tokens} tokens)" for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)
