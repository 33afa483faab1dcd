"""MagCache: skip while the magnitude of the blocks' change is predictable. Ma et al., "MagCache: Fast Video Generation
with Magnitude-Aware Cache", arXiv:2506.09045.

    gamma_t = mean ||r_t|| / ||r_{t-1}||,  r = out - in over all blocks          measured once per model
    ratio <- ratio gamma_t;  error <- error + |1 - ratio|;  skip while error <= threshold; a computed step resets both
    out = in + r at the last computed step

Nothing is measured while the pipeline runs: the curve of ratios decides, mapped to other numbers of steps by the
nearest one.

Departures: norms are taken over all image tokens at once; the curve is that of the first pass of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from hasten.caching.adaptive import AdaptiveMethod
from hasten.caching.gates import Gate, ThresholdGate
from hasten.caching.method import Feature
from hasten.calibration import Calibration, Fit, Trace, declare_contents
from hasten.errors import CalibrationError
from hasten.io import Array
from hasten.parameters import Range
from hasten.registry import method

__all__ = ["MagCache"]


class MagnitudeGate(ThresholdGate):
    """Follows the curve of magnitudes since the last computed step."""

    def __init__(self, config: MagCache, ratios: list[float]) -> None:
        super().__init__(config.threshold, config.interval, config.warmup, config.last)
        self._first, self._retention, self._ratios = config.warmup, config.retention, ratios

    def begin(self, total: int | None) -> None:
        super().begin(total)
        self._warmup = max(self._first, round(self._retention * (total or len(self._ratios))))
        self.on_decision(True, None)

    def measure(self, step: int, observed: Tensor | None) -> float | None:
        total = self.total or len(self._ratios)
        nearest = round(step * (len(self._ratios) - 1) / max(total - 1, 1))
        self._ratio *= self._ratios[min(nearest, len(self._ratios) - 1)]
        self._error += abs(1 - self._ratio)
        return self._error

    def on_decision(self, computed: bool, observed: Tensor | None) -> None:
        if computed:
            self._ratio, self._error = 1.0, 0.0


declare_contents("magcache", {"ratios": Array("float", ("L",), low=0)})


@method("magcache", kind="caching", paper="MagCache, arXiv:2506.09045", needs_calibration=True)
@dataclass(frozen=True, kw_only=True)
class MagCache(AdaptiveMethod):
    """Skip while the magnitude of the blocks' change is predictable (MagCache)."""

    fewest_steps: ClassVar[int] = 2

    threshold: float = 0.06
    interval: int = 4
    warmup: int = 1
    retention: Annotated[float, Range(0, below=1), "share of the run that is computed at its start"] = 0.1
    calibration: Annotated[Calibration | str | None, "the model's curve of ratios, or its file"] = None

    def check(self) -> None:
        super().check()
        object.__setattr__(self, "calibration", Calibration.of("magcache", self.calibration))

    def feature(self) -> Feature:
        return Feature(change=True)

    def gate(self) -> Gate:
        assert isinstance(self.calibration, Calibration)
        return MagnitudeGate(self, self.calibration.tensors["ratios"].tolist())

    @staticmethod
    def fit(trace: Trace) -> Fit:
        """The curve of ratios, mean over the recorded runs; 1 at the first step."""
        features = trace.features[trace.passes[0]]
        change = (features["hidden"].float() - features["entry"].float()).flatten(2).norm(dim=2)  # [S, T]
        if not bool((change[:, :-1] > 0).all()):
            raise CalibrationError("the blocks change nothing at some step, so that MagCache has no ratios to follow")
        ratios = (change[:, 1:] / change[:, :-1]).double()
        curve = torch.cat([torch.ones(1, dtype=torch.float64), ratios.mean(0)])
        spread = ratios.std(0, correction=0)
        return Fit({"ratios": curve}, {"per_step": curve.tolist(), "largest_spread": float(spread.max())})
