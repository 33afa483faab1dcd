"""What one run saved: in steps, by a cache; in tokens, by coarse and fine stages; or both."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from hasten.pipeline.records import StepRecord

__all__ = ["Summary"]


@dataclass(frozen=True)
class Summary:
    """What one run saved.

    Attributes:
        method: names of the methods' classes.
        steps: sampler steps of the run.
        computed_steps: steps whose blocks ran.
        skipped_steps: steps whose features were forecast, or that a solver with steps of its own left out.
        passes: names of the forwards within a step; empty without a cache, which alone tells them apart.
        flops_ratio: `steps / computed_steps`, the figure that papers call the FLOPs ratio (it leaves out the
            embeddings and the final layer that a skipped step still runs); a step of a resolution method counts as much
            as its tokens cost, by estimate, relative to the full size.
        cache_bytes: most bytes of features held at once.
        computed_ms: median milliseconds of a computed forward, None where no cache measured any.
        skipped_ms: median milliseconds of a skipped forward, None if there was none.
        stages: steps and tokens of a resolution method's stages, as text; None without one.
        left_out: whether a solver took its computed steps in place of all of them, and forecast nothing.
        history: of a streaming model, what was read and held of the history, as text; None of others.
    """

    method: str
    steps: int
    computed_steps: int
    skipped_steps: int
    passes: tuple[str, ...]
    flops_ratio: float
    cache_bytes: int
    computed_ms: float | None
    skipped_ms: float | None
    stages: str | None = None
    left_out: bool = False
    history: str | None = None

    def __str__(self) -> str:
        if self.history is not None:
            return f"{self.method}: {self.history}"
        fewer = f" ({self.flops_ratio:.2f}x fewer)" if self.stages is None else ""
        text = f"{self.method}: {self.computed_steps} of {self.steps} steps computed"
        if self.passes:
            how = "left out" if self.left_out else "forecast"
            skipped = "-" if self.skipped_ms is None else f"{self.skipped_ms:.2f} ms"
            text += (
                f"{fewer}, {self.skipped_steps} {how}; computed {self.computed_ms or 0:.2f}"
                f" ms, skipped {skipped}; cache {self.cache_bytes / 2**20:.2f} MiB; passes {', '.join(self.passes)}"
            )
        if self.stages is None:
            return text
        return f"{text}; stages: {self.stages}; {self.flops_ratio:.2f}x fewer operations (estimated)"

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data."""
        return asdict(self)

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        rows = "".join(
            f"<tr><th style='text-align:left'>{name.replace('_', ' ')}</th><td>{html.escape(_cell(value))}</td></tr>"
            for name, value in self.to_dict().items()
            if value not in (None, (), False)
        )
        return f"<table>{rows}</table>"

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        cached: Mapping[str, Sequence[StepRecord]],
        staged: Sequence[Any],
        stages: str | None,
        replaced: int | None = None,
    ) -> Summary:
        """Sum up.

        Args:
            names: of the methods' classes.
            cached: a run's records of each transformer; their steps add up.
            staged: a run's records of the resolution method, each with `step` and `cost`, relative to the full size.
            stages: what the resolution method did, as text.
            replaced: steps that a solver took its own in place of.
        """
        steps: dict[tuple[str, int], bool] = {}
        held: defaultdict[str, int] = defaultdict(int)
        for name, records in cached.items():
            for record in records:
                # A pass that comes late has to run though the step is skipped; the step counts as skipped.
                steps[name, record.step] = steps.get((name, record.step), True) and record.computed
                held[name] = max(held[name], record.cache_bytes)
        every = [record for records in cached.values() for record in records]
        taken = len(steps) or len(staged)
        computed = sum(steps.values()) if steps else taken
        total = replaced or taken
        return cls(
            method=" + ".join(names),
            steps=total,
            computed_steps=computed,
            skipped_steps=total - computed,
            passes=tuple(dict.fromkeys(record.pass_name for record in every)),
            flops_ratio=total / (_work(steps, staged) or 1),
            cache_bytes=sum(held.values()),
            computed_ms=_median(record.ms for record in every if record.computed),
            skipped_ms=_median(record.ms for record in every if not record.computed),
            stages=stages,
            left_out=replaced is not None,
        )


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return median(values) if values else None


def _work(computed: Mapping[tuple[str, int], bool], staged: Sequence[Any]) -> float:
    """Computed steps, each as much as its tokens cost relative to the full size."""
    costs = {record.step: record.cost for record in staged}
    if not computed:
        return sum(costs.values())
    if len({name for name, _ in computed}) > 1 and costs:  # experts count their own steps
        return sum(computed.values()) * sum(costs.values()) / len(costs)
    return sum(costs.get(step, 1.0) for (_, step), yes in computed.items() if yes)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
