"""What the methods with a gate have in common: a threshold in place of a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from hasten.caching.method import CachingMethod
from hasten.caching.predictors import Order, Predictor, Taylor
from hasten.errors import ConfigError
from hasten.parameters import Range

__all__ = ["AdaptiveMethod"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveMethod(CachingMethod):
    """Base of the methods that measure before they skip."""

    adaptive: ClassVar[bool] = True

    site: Literal["hidden"] = "hidden"
    threshold: Annotated[float, Range(0), "largest measured value at which a step is still skipped"] = 0.1
    interval: Annotated[int, Range(1), "most steps from one computed step to the next; 1 computes every step"] = 50
    schedule: Annotated[Literal["uniform", "last"], "whether the last step is computed besides"] = "uniform"
    order: Annotated[Order, "of the Taylor forecast of what is remembered; 0 is reuse, as the papers have it"] = 0

    @property
    def last(self) -> bool:
        """Whether the last step is computed."""
        return self.schedule == "last"

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": Taylor(self.order)}

    @property
    def saves(self) -> bool:
        return self.interval > 1

    def with_computed_steps(self, count: int, total: int) -> Self:
        raise ConfigError(
            f"how many steps {type(self).__name__} computes depends on the images; "
            "set its threshold, or let `hasten bench` find the one for a number of computed steps"
        )
