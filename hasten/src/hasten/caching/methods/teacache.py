"""TeaCache: skip while the accumulated change of the first block's modulated input is small. Liu et al., "Timestep
Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv:2411.19108.

    sum <- sum + p(mean|m_t - m_{t-1}| / mean|m_{t-1}|),   m = modulated input of the first block's attention
    skip while sum <= threshold; a computed step resets the sum
    out = in + (out - in at the last computed step)

`p` is a polynomial that turns a change of the input into an expected change of the output. The published ones are known
by name; `hasten calibrate` fits one to a model; `"identity"` takes the input's change as it is. They hold for one
model and one number of steps: at 50 steps.

Departures: the change is that of the image tokens alone; the modulated input is taken from the call of the first
block's attention, whatever the family.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hasten.caching.adaptive import AdaptiveMethod
from hasten.caching.gates import Gate, ThresholdGate, relative_change
from hasten.caching.method import Feature
from hasten.caching.sums import magnitude
from hasten.calibration import Calibration, Fit, Trace, declare_contents
from hasten.io import Array
from hasten.parameters import Names, Range
from hasten.registry import method

__all__ = ["COEFFICIENTS", "TeaCache"]

# Highest power first, from the method's repository.
COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "identity": (1.0, 0.0),
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "wan-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan-14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan-1.3b-retention": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
    "wan-14b-retention": (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),
}
DEGREE = 4


class AccumulatingGate(ThresholdGate):
    """Adds up expected changes since the last computed step."""

    def __init__(self, config: TeaCache, polynomial: tuple[float, ...]) -> None:
        super().__init__(config.threshold, config.interval, config.warmup, config.last)
        self._polynomial = np.asarray(polynomial)
        self._per_sample = config.per_sample

    def begin(self, total: int | None) -> None:
        super().begin(total)
        self._previous: Tensor | None = None
        self._size: Tensor | None = None  # of the previous one
        self._sum = 0.0

    def measure(self, step: int, observed: Tensor | None) -> float | None:
        previous, self._previous = self._previous, observed
        size, self._size = self._size, None if observed is None else magnitude(observed, self._per_sample)
        if previous is None or observed is None or previous.shape != observed.shape:
            return None
        change = relative_change(observed, previous, self.reduce, self._per_sample, size)
        self._sum += float(np.polyval(self._polynomial, change))
        return self._sum

    def on_decision(self, computed: bool, observed: Tensor | None) -> None:
        if computed:
            self._sum = 0.0

    def held(self) -> Iterable[Tensor]:
        return () if self._previous is None else (self._previous,)


declare_contents("teacache", {"coefficients": Array("float", ("P",))})


@method("teacache", kind="caching", paper="TeaCache, arXiv:2411.19108")
@dataclass(frozen=True, kw_only=True)
class TeaCache(AdaptiveMethod):
    """Skip while the accumulated change of the first block's input is small (TeaCache)."""

    fewest_steps: ClassVar[int] = 2

    threshold: float = 0.25
    warmup: int = 1
    schedule: Literal["uniform", "last"] = "last"
    coefficients: Annotated[
        str | tuple[float, ...],
        Names(COEFFICIENTS),
        "name of a published polynomial, or its coefficients, highest power first",
    ] = "identity"
    calibration: Annotated[
        Calibration | str | None, "what was fitted to the model, or its file; takes precedence over `coefficients`"
    ] = None
    per_sample: Annotated[bool, "let the image of a batch that changed most decide, not the batch's mean"] = False

    def check(self) -> None:
        super().check()
        if self.calibration is not None:
            object.__setattr__(self, "calibration", Calibration.of("teacache", self.calibration))

    def feature(self) -> Feature:
        return Feature(change=True, gate_input="modulated")

    def polynomial(self) -> tuple[float, ...]:
        """The coefficients in use, highest power first."""
        if isinstance(self.calibration, Calibration):
            return tuple(self.calibration.tensors["coefficients"].tolist())
        return COEFFICIENTS[self.coefficients] if isinstance(self.coefficients, str) else self.coefficients

    def gate(self) -> Gate:
        return AccumulatingGate(self, self.polynomial())

    @staticmethod
    def fit(trace: Trace, degree: Annotated[int, Range(1), "of the polynomial"] = DEGREE) -> Fit:
        """A polynomial from the change of the modulated input to the change of the blocks' result, step to step."""
        xs, ys = [], []
        for features in trace.features.values():
            for before, output in zip(features["modulated"], features["hidden"], strict=True):
                xs += _changes(before)
                ys += _changes(output)
        x, y = np.asarray(xs), np.asarray(ys)
        polynomial = np.polyfit(x, y, min(degree, len(set(xs)) - 1))
        residual = y - np.polyval(polynomial, x)
        goodness = float(1 - residual.var() / max(y.var(), 1e-30))
        report = {"r2": goodness, "pairs": len(x), "largest_input_change": float(x.max())}
        return Fit({"coefficients": torch.from_numpy(polynomial)}, report)


def _changes(steps: Tensor) -> list[float]:
    """Relative changes from step to step of `[T, ...]`."""
    return [relative_change(b, a, lambda sums: sums) for a, b in pairwise(steps)]
