"""What forecasts the features of one cache key: a split, and a predictor for each component of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.caching.predictors import Predictor
from hasten.caching.projectors import Projector
from hasten.errors import ConfigError
from hasten.models import TokenLayout

__all__ = ["Components", "FeatureKey"]


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

    def __post_init__(self) -> None:
        if set(self.predictors) != set(self.projector.components):
            raise ConfigError(
                f"{type(self.projector).__name__} splits features into {sorted(self.projector.components)}, "
                f"but there are predictors for {sorted(self.predictors)}; give each component one predictor"
            )
