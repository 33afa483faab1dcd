"""SVD-Cache: forecast in the subspace that holds the energy, reuse the rest. "SVD-Cache", arXiv:2601.07396.

    F = F V V^T + R,   V = [D, k] leading right singular vectors of a probe run's features, k by their share of energy
    F^ = forecast(F V) V^T + R(a_0)

The singular values cancel, so a calibration is V alone, one for each pass. Because projection and forecasts are linear,
whole features are kept and a skipped step projects one tensor: `F^ = reuse + (forecast - reuse) V V^T`.

The paper speaks of an exponential moving average with weight 0.9 and of extrapolation. The readings, as `mode`:

* `"velocity"`: a moving average of the slopes between computed steps, extrapolated from the newest feature,
  `F0 + x c / g`, `c <- beta c + (1 - beta) (F0 - F1)`, `g <- beta g + (1 - beta) gap`;
* `"taylor"`: the Taylor forecast of order `order`;
* `"new-heavy"`: a moving average of features that gives the newest a weight of `beta`;
* `"literal"`: a moving average of features that gives the newest a weight of `1 - beta`, as printed: it lags.

Features are those behind the model's final norm where that is known (`domain`): the norm passes on the ratio of
channels alone, which a forecast of some of them would change. The basis is of features less their mean (`centred`),
which has no part in a forecast of changes, and else takes the first directions for itself.

Departures: both of these; averages run over the computed steps that are kept (`window`), started again at the oldest of
them; a slope weighs as long as it lasted, so that those of the first steps, one apart, do not lead long intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from hasten.caching.calibrated import CalibratedMethod
from hasten.caching.components import Components, FeatureKey
from hasten.caching.effects import Effects, With
from hasten.caching.multistep import Vector
from hasten.caching.predictors import Order, Predictor, Reuse, Taylor
from hasten.caching.projectors import Whole, gap
from hasten.caching.sums import Weight, finite, weighted_sum
from hasten.calibration import Domain, Fit, Trace, declare_contents
from hasten.errors import CalibrationError
from hasten.io import Array, orthonormal
from hasten.parameters import Range
from hasten.registry import method

__all__ = ["MovingAverage", "SVDCache", "Subspace"]

Mode = Literal["velocity", "taylor", "new-heavy", "literal"]


class Subspace:
    """Splits channels into a subspace and its complement.

    Args:
        basis: `[D, k]` with orthonormal columns.
    """

    components: tuple[str, ...] = ("principal", "residual")

    def __init__(self, basis: Tensor) -> None:
        self._basis = basis
        self._moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        # A coefficient is up to sqrt(D) times as large as the numbers that it is made of, which float16 may not hold.
        self._gain = math.sqrt(len(basis))

    def combine(self, features: Sequence[Tensor], weights: Mapping[str, Sequence[Weight]]) -> Tensor:
        width = features[0].shape[-1]
        if width != len(self._basis):
            raise CalibrationError(
                f"the basis is for features of {len(self._basis)} channels, got {tuple(features[0].shape)}"
            )
        place = (features[0].device, features[0].dtype)
        basis = self._moved.get(place)
        if basis is None:
            basis = self._moved[place] = self._basis.to(*place)
        # An infinity would come out of the products as NaN.
        whole = finite(weighted_sum(features, weights["residual"]))
        change = finite(weighted_sum(features, gap(weights, "principal", "residual")))
        if change.dtype is torch.float16:
            coefficients = change.view(-1, width) @ (basis / self._gain)
            whole.view(-1, width).addmm_(coefficients, basis.T, alpha=self._gain)
        else:
            whole.view(-1, width).addmm_(change.view(-1, width) @ basis, basis.T)
        return whole


@dataclass(frozen=True)
class MovingAverage:
    """The forecasts of `mode` that average over computed steps."""

    mode: Mode
    beta: float
    window: int

    @property
    def memory(self) -> int:
        return self.window

    def weights(self, target: int, stored: Sequence[int]) -> list[float]:
        unit = np.eye(len(stored))
        if self.mode == "velocity":
            if len(stored) < 2:
                return [1.0]
            lengths = -np.diff(np.asarray(stored, np.float64))
            slope = _average(-np.diff(unit, axis=0), 1 - self.beta) / _average(lengths, 1 - self.beta)
            return (unit[0] + (target - stored[0]) * slope).tolist()
        newest = self.beta if self.mode == "new-heavy" else 1 - self.beta
        return _average(unit, newest).tolist()


def _average(values: Vector, newest: float) -> Vector:
    """Exponential moving average of values, newest first, corrected for its start."""
    shares = newest * (1 - newest) ** np.arange(len(values))
    return np.asarray(np.tensordot(shares / shares.sum(), values, 1))


declare_contents("svdcache", {"basis/{pass_}/{key}": Array("float", ("D", "k"), (orthonormal,))})


@method("svdcache", kind="caching", paper="SVD-Cache, arXiv:2601.07396", needs_calibration=True)
@dataclass(frozen=True, kw_only=True)
class SVDCache(CalibratedMethod):
    """Forecast the principal subspace of the channels and reuse the rest (SVD-Cache)."""

    name: ClassVar[str] = "svdcache"
    tried: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "mode": ("velocity", "taylor"),
        "order": (1, 2),
        "beta": (0.3, 0.5, 0.7),
    }
    effects: ClassVar[Effects] = {
        **dict.fromkeys(("beta", "window"), (With("mode", ("velocity", "new-heavy", "literal")),)),
        "order": (With("mode", ("taylor",)),),
    }

    site: Literal["hidden", "module"] = "hidden"
    mode: Annotated[
        Mode, "forecast of the subspace: an averaged slope, Taylor's, or an average of features (new-heavy, literal)"
    ] = "velocity"
    beta: Annotated[float, Range(above=0, below=1), "weight of the past in the moving average"] = 0.5
    order: Annotated[Order, "of the Taylor forecast"] = 2
    window: Annotated[int, Range(2), "how many computed steps are kept for the average"] = 4
    domain: Domain | None = None

    def _principal(self) -> Predictor:
        if self.mode == "taylor":
            return Taylor(self.order, first=self.first_difference)
        return MovingAverage(self.mode, self.beta, self.window)

    def components(self, key: FeatureKey) -> Components:
        known = self.fitted.fingerprint.passes
        pass_name = key.pass_name if key.pass_name in known else known[0]
        basis = self.fitted.tensors.get(f"basis/{pass_name}/{key.cache_key}")
        if basis is None:  # a small tensor that was not worth a basis, such as one that a module returns once per run
            return Components(Whole(), {"whole": self._principal()})
        return Components(Subspace(basis), {"principal": self._principal(), "residual": Reuse()})

    @staticmethod
    def fit(
        trace: Trace,
        energy: Annotated[float, Range(above=0, most=1), "share of the energy that the subspace holds"] = 0.85,
        of: Annotated[Literal["features", "changes"], "the paper's, or changes, which a forecast follows"] = "features",
        centred: Annotated[bool, "whether the mean of all steps and tokens is taken away"] = True,
        site: Annotated[Literal["hidden", "module"], "whose features are decomposed"] = "hidden",
        domain: Annotated[Domain | None, "plain or normed; None is normed where the final norm is known"] = None,
    ) -> Fit:
        """A basis for each pass and cache key from all steps and tokens."""
        tensors, report, domain = {}, {}, trace.domain(site, domain)
        for key in trace.cache_keys(site):
            for pass_name, steps in trace.steps(key, domain).items():
                rows = (steps.diff(dim=1) if of == "changes" else steps).flatten(0, -2)
                if centred:
                    rows = rows - rows.mean(0)
                values, vectors = torch.linalg.eigh((rows.T @ rows).double())
                if not bool(values.max() > 0):
                    raise CalibrationError(f"the features of {key!r} do not vary, so that they have no subspace")
                shares = values.flip(0).clamp_min(0).cumsum(0) / values.clamp_min(0).sum()
                k = min(int((shares < energy - 1e-12).sum()) + 1, len(values))
                basis = tensors[f"basis/{pass_name}/{key}"] = vectors.flip(1)[:, :k].float().contiguous()
                changes = steps.diff(dim=1).movedim(1, 0).flatten(1, -2)  # [T - 1, S N, D]
                held = (changes @ basis).square().sum((1, 2)) / changes.square().sum((1, 2)).clamp_min(1e-30)
                report[f"{pass_name}/{key}"] = {
                    "k": k,
                    "width": len(values),
                    "energy": float(shares[k - 1]),
                    "share_of_change_per_step": held.tolist(),
                }
        return Fit(tensors, report, domain)
