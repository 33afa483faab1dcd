"""What forecasts the features of one cache key: a split, and a predictor for each component of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hasten.caching.predictors import GramPredictor, Predictor
from hasten.caching.projectors import Projector
from hasten.errors import ConfigError
from hasten.models import TokenLayout

__all__ = ["Components", "FeatureKey"]

MOST_WEIGHTS = 4096  # that are known at a time; a run has one for each skipped step


@dataclass(frozen=True)
class FeatureKey:
    """Where a feature comes from.

    Attributes:
        pass_name: the forward within a step, such as `"cond"`.
        cache_key: the site's name for the tensor, such as `"hidden"`.
        layout: where the tokens of the image lie in it; None where that is not known.
    """

    pass_name: str = "pass0"
    cache_key: str = "hidden"
    layout: TokenLayout | None = None


@dataclass(frozen=True)
class Components:
    """A split of features and one predictor for each component."""

    projector: Projector
    predictors: Mapping[str, Predictor]
    _known: dict[tuple[int, tuple[int, ...]], Mapping[str, Sequence[float]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if set(self.predictors) != set(self.projector.components):
            raise ConfigError(
                f"{type(self.projector).__name__} splits features into {sorted(self.projector.components)}, "
                f"but there are predictors for {sorted(self.predictors)}; give each component one predictor"
            )

    @cached_property
    def memory(self) -> int:
        """How many stored steps are used."""
        return max(predictor.memory for predictor in self.predictors.values())

    @cached_property
    def fitted(self) -> bool:
        """Whether a predictor fits its weights to the features at hand."""
        return any(isinstance(predictor, GramPredictor) for predictor in self.predictors.values())

    def weights(
        self, target: int, stored: tuple[int, ...], gram: npt.NDArray[np.float64]
    ) -> Mapping[str, Sequence[float]]:
        """Weights of each component on the stored steps, newest first, for a forecast at `target`.

        Where they depend on the steps alone they are worked out once, for all features and runs.

        Args:
            target: the step to forecast.
            stored: steps whose features are kept, newest first.
            gram: inner products of these features, for predictors that are fitted to them.
        """
        if self.fitted:
            return {
                name: predictor.fitted(target, stored, gram)
                if isinstance(predictor, GramPredictor)
                else predictor.weights(target, stored)
                for name, predictor in self.predictors.items()
            }
        weights = self._known.get((target, stored))
        if weights is None:
            if len(self._known) >= MOST_WEIGHTS:
                self._known.clear()
            weights = {name: predictor.weights(target, stored) for name, predictor in self.predictors.items()}
            self._known[target, stored] = weights
        return weights
