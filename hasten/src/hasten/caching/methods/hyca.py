"""HyCa: channels that move similarly share the solver that forecasts them best. "HyCa: Hybrid feature caching",
ICLR 2026, arXiv:2510.04188.

Once for a model, on a probe run: describe each channel by how it moves (differences of first to third order, their
ratios, cosine of successive changes, energy, share of low frequencies, spectral flatness), cluster the channels by
k-means, and find for each cluster the solver with the least squared error (equation 4). Afterwards

    F^[..., d] = alpha_d(x) F0[..., d] + beta_d(x) F1[..., d] + gamma_d(x) F2[..., d]

with one coefficient vector of length D for each kept feature: one pass over memory, whatever the number of clusters.

The error of any solver on a cluster follows from the Gram matrix of the cluster's channels, which is what the
calibration keeps, so that solvers are chosen when the method is built, for the schedule in use. `criterion`:

* `"drift"`: what the errors of all skipped steps of the schedule in use add up to, each times the length of its step,
  as the sampler adds up velocities: errors of one sign lead the image away, others cancel;
* `"rollout"`: their mean square, at the true horizons; better with guidance, under which errors do not merely add up;
* `"one-step"`: the paper's, one step ahead from three successive steps.

`assigned` names the solver of each cluster instead, as `hasten tune --method hyca` finds it for a schedule by whole
runs.

Features are those behind the model's final norm where that is known (`domain`): the norm passes on the ratio of
channels alone, which solvers that differ from channel to channel would change.

Departures: solvers are built on computed steps alone, with their true spacing, because recursion on forecasts amplifies
errors; their differences begin, as TaylorSeer's do, at the last warm-up step; clusters are per cache key; indicators
are z-scored over channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from hasten.caching.calibrated import CalibratedMethod, Gram, forecast_error, gram_of
from hasten.caching.components import Components, FeatureKey
from hasten.caching.effects import Effects, With
from hasten.caching.multistep import SOLVERS, Multistep
from hasten.caching.predictors import Hermite, Predictor, Reuse, Taylor
from hasten.caching.projectors import Whole
from hasten.caching.sums import Weight, weighted_sum
from hasten.calibration import Calibration, Domain, Fit, Trace, declare_contents
from hasten.errors import CalibrationError, ConfigError
from hasten.io import Array, symmetric
from hasten.parameters import Names, Range
from hasten.registry import method

__all__ = ["CANDIDATES", "ChannelClusters", "HyCa", "candidate", "descriptors"]

CANDIDATES = ("hold", "taylor1", "taylor2", "hermite", *SOLVERS)


def candidate(name: str, first: int = 0) -> Predictor:
    """The solver called `name`, whose differences count from the computed step `first` on."""
    if name in SOLVERS:
        return Multistep(name, first)
    others: dict[str, Predictor] = {
        "hold": Reuse(),
        "taylor1": Taylor(1, first),
        "taylor2": Taylor(2, first),
        "hermite": Hermite(2, first, sigma=0.5),
    }
    return others[name]


class ChannelClusters:
    """Splits features by clusters of channels.

    Args:
        labels: `[D]`, the cluster of each channel.
        count: number of clusters.
    """

    def __init__(self, labels: Tensor, count: int) -> None:
        self._labels = labels
        self._members: dict[torch.device, Tensor] = {}  # [C, D] float32, 1 where a channel is in a cluster
        self.components: tuple[str, ...] = tuple(f"cluster{c}" for c in range(count))

    def combine(self, features: Sequence[Tensor], weights: Mapping[str, Sequence[Weight]]) -> Tensor:
        first = features[0]
        if first.shape[-1] != len(self._labels):
            raise CalibrationError(f"clusters are of {len(self._labels)} channels, got {tuple(first.shape)}")
        members = self._members.get(first.device)
        if members is None:
            clusters = torch.arange(len(self.components))[:, None]
            members = self._members[first.device] = (self._labels == clusters).float().to(first.device)
        # Numbers go to the device with the operations that take them, a table would have to be copied there.
        columns = zip(*(weights[name] for name in self.components), strict=True)
        return weighted_sum(features, [_by_channel(members, column) for column in columns])


def _by_channel(members: Tensor, weights: Sequence[Weight]) -> Tensor:
    """One weight for each channel, `[D]`, from one for each cluster."""
    vector = members[0] * weights[0]
    for row, weight in zip(members[1:], weights[1:], strict=True):
        vector = vector + row * weight if isinstance(weight, Tensor) else torch.add(vector, row, alpha=weight)
    return vector


def descriptors(steps: Tensor) -> Tensor:
    """How each channel moves, `[D, 10]`, z-scored over channels.

    Args:
        steps: `[S, T, N, D]`.
    """
    flat = steps.float().movedim(1, 0).flatten(1, 2)  # [T, S N, D]
    tiny = 1e-12

    def norm(x: Tensor) -> Tensor:
        return x.square().mean((0, 1)).sqrt()

    first, second, third = flat.diff(dim=0), flat.diff(dim=0, n=2), flat.diff(dim=0, n=3)
    d1, d2, d3, energy = norm(first), norm(second), norm(third), norm(flat)
    cosine = (first[1:] * first[:-1]).sum((0, 1)) / (first[1:].norm(dim=(0, 1)) * first[:-1].norm(dim=(0, 1)) + tiny)
    power = torch.fft.rfft(flat - flat.mean(0), dim=0).abs().square().mean(1)[1:] + tiny  # [f, D]
    low = power[: max(1, len(power) // 5)].sum(0) / power.sum(0)
    flatness = power.log().mean(0).exp() / power.mean(0)
    magnitudes = torch.stack([d1, d2, d3, energy], 1).add(tiny).log()
    ratios = torch.stack([d2 / (d1 + tiny), d3 / (d2 + tiny), cosine, d1 / (energy + tiny), low, flatness], 1)
    table = torch.cat([magnitudes, ratios], 1)
    return (table - table.mean(0)) / table.std(0).clamp_min(tiny)


def _one_step_errors(grams: Sequence[Gram], sizes: Sequence[int]) -> list[float]:
    """Relative error, one step ahead, of the best solver of each cluster; zero where there is no history yet."""
    errors, solvers = [0.0] * 3, [candidate(name) for name in CANDIDATES]
    for t in range(3, len(grams[0])):
        past = (t - 1, t - 2, t - 3)
        best = [min(forecast_error(g, t, past, s.weights(t, past)) for s in solvers) for g in grams]
        size = sum(n * g[t, t] for n, g in zip(sizes, grams, strict=True))
        errors.append(float(np.sqrt(sum(n * e for n, e in zip(sizes, best, strict=True)) / max(size, 1e-300))))
    return errors


def _check_clusters(calibration: Calibration) -> None:
    keys = {name.partition("/")[2] for name in calibration.tensors}
    for key in keys:
        labels, grams = (calibration.tensors.get(f"{kind}/{key}") for kind in ("clusters", "grams"))
        if labels is None or grams is None:
            raise ValueError(f"it lacks the clusters or the Gram matrices of {key!r}")
        if int(labels.max()) >= len(grams):
            raise ValueError(f"a channel of {key!r} is in cluster {int(labels.max())} of {len(grams)}")


declare_contents(
    "hyca",
    {"clusters/{key}": Array("integer", ("D",), low=0), "grams/{key}": Array("float", ("C", "L", "L"), (symmetric,))},
    _check_clusters,
)


@method("hyca", kind="caching", paper="HyCa, arXiv:2510.04188", needs_calibration=True)
@dataclass(frozen=True, kw_only=True)
class HyCa(CalibratedMethod):
    """Forecast each cluster of channels by the solver that suits it (HyCa)."""

    name: ClassVar[str] = "hyca"
    fewest_steps: ClassVar[int] = 4  # of a difference of third order
    effects: ClassVar[Effects] = {"criterion": (With("assigned", (None,)),)}

    site: Literal["hidden", "module"] = "hidden"
    criterion: Annotated[
        Literal["drift", "rollout", "one-step"] | None,
        "error by which a solver is chosen: of the sum over this schedule, its mean square, or one step ahead; None is "
        "drift where one pass was calibrated, else rollout",
    ] = None
    solvers: Annotated[
        tuple[str, ...] | None, Names(CANDIDATES), "solvers to choose from, also for a tuner; None is all"
    ] = None
    assigned: Annotated[
        tuple[str, ...] | None,
        Names(CANDIDATES),
        "the solver of each cluster, as `hasten tune --method hyca` finds them; None chooses by the criterion",
    ] = None
    domain: Domain | None = None

    def check(self) -> None:
        super().check()
        if self.assigned is None:
            return
        others = sorted(set(self.assigned) - set(self.solvers or CANDIDATES))
        if others:
            raise ConfigError(
                f"HyCa: assigned has {others[0]!r}, which is none of solvers={self.solvers}; leave out solvers, or "
                "assign one of them"
            )
        for key, grams in self._grams.items():
            if len(grams) != len(self.assigned):
                raise ConfigError(
                    f"HyCa: assigned names {len(self.assigned)} solvers, but {key!r} has {len(grams)} clusters; give "
                    "one for each"
                )

    def axes(self) -> Sequence[str]:
        """All clusters at once, for the best single solver to start from; then each cluster."""
        return ["every cluster", *map(str, range(len(next(iter(self.chosen.values())))))]

    def along(self, axis: str) -> list[Self]:
        now = next(iter(self.chosen.values()))
        names = [name for name in self.solvers or CANDIDATES if name != "hold"]
        if axis == "every cluster":
            return [self.changed(assigned=(name,) * len(now)) for name in names]
        i = int(axis)
        return [self.changed(assigned=(*now[:i], name, *now[i + 1 :])) for name in names]

    @property
    def _grams(self) -> dict[str, Tensor]:
        """The clusters' Gram matrices by cache key."""
        kind = "grams/"
        return {name.removeprefix(kind): t for name, t in self.fitted.tensors.items() if name.startswith(kind)}

    @cached_property
    def chosen(self) -> dict[str, tuple[str, ...]]:
        """The solver of each cluster, by cache key."""
        return {
            key: self.assigned or tuple(self._best(np.asarray(gram)) for gram in grams)
            for key, grams in self._grams.items()
        }

    def solver(self, name: str) -> Predictor:
        """A candidate as it serves this schedule."""
        return candidate(name, self.first_difference)

    def _best(self, gram: Gram) -> str:
        errors = {name: self._error(gram, self.solver(name)) for name in self.solvers or CANDIDATES}
        return min(errors, key=lambda name: errors[name])

    def _error(self, gram: Gram, solver: Predictor) -> float:
        criterion = self.criterion or ("drift" if len(self.fitted.fingerprint.passes) == 1 else "rollout")
        if criterion == "drift":
            return self.drift(gram, solver.weights)
        if criterion == "rollout":
            return self.mean_error(gram, solver.weights)
        last = len(gram)
        return sum(
            forecast_error(gram, t, (t - 1, t - 2, t - 3), solver.weights(t, (t - 1, t - 2, t - 3)))
            for t in range(3, last)
        )

    @cached_property
    def _by_key(self) -> dict[str, Components]:
        split = {}
        for key, solvers in self.chosen.items():
            labels = self.fitted.tensors[f"clusters/{key}"].long()
            predictors = {f"cluster{c}": self.solver(name) for c, name in enumerate(solvers)}
            split[key] = Components(ChannelClusters(labels, len(solvers)), predictors)
        return split

    def components(self, key: FeatureKey) -> Components:
        if key.cache_key in self._by_key:
            return self._by_key[key.cache_key]
        return Components(Whole(), {"whole": self.solver("taylor2")})

    @staticmethod
    def fit(
        trace: Trace,
        clusters: Annotated[int, Range(1), "how many clusters of channels"] = 4,
        seed: Annotated[int, Range(0), "of k-means"] = 0,
        site: Annotated[Literal["hidden", "module"], "whose features are clustered"] = "hidden",
        domain: Annotated[Domain | None, "plain or normed; None is normed where the final norm is known"] = None,
    ) -> Fit:
        """Clusters of channels and their Gram matrices; a trace of one run is enough."""
        tensors, report, domain = {}, {}, trace.domain(site, domain)
        for key in trace.cache_keys(site):
            steps = torch.cat([*trace.steps(key, domain).values()])
            table = descriptors(steps).double().numpy()
            if clusters > len(table):
                raise ConfigError(f"{key!r} has {len(table)} channels, which make no {clusters} clusters; use fewer")
            labels = np.zeros(len(table), dtype=np.int64)
            different = min(clusters, len(np.unique(table, axis=0)))  # channels that move alike cannot be told apart
            if different > 1:
                found = kmeans2(table, different, minit="++", seed=seed)[1]
                labels = np.unique(found, return_inverse=True)[1].astype(np.int64)  # an empty cluster is none
            grams = [gram_of(steps[..., torch.from_numpy(labels == c)]) for c in range(labels.max() + 1)]
            tensors[f"clusters/{key}"] = torch.from_numpy(labels).to(torch.int32)
            tensors[f"grams/{key}"] = torch.from_numpy(np.stack(grams))
            report[key] = {
                "channels": np.bincount(labels).tolist(),
                "one_step_error_per_step": _one_step_errors(grams, np.bincount(labels).tolist()),
            }
        return Fit(tensors, report, domain)
