"""What the methods with a gate have in common: a threshold in place of an interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from hasten.caching.method import CachingMethod, SiteName
from hasten.caching.predictors import Predictor, Taylor
from hasten.errors import ConfigError

__all__ = ["AdaptiveMethod"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveMethod(CachingMethod):
    """Base of the methods that measure before they skip.

    Args:
        threshold: largest measured value at which a step is still skipped; larger skips more.
        interval: longest distance from one computed step to the next; 1 computes every step.
        warmup: computed steps at the start.
        schedule: `"uniform"`, or `"last"` to compute the last step too.
        order: of the Taylor forecast of what is remembered; 0 is reuse, as the papers have it.
    """

    sites: ClassVar[tuple[SiteName, ...]] = ("hidden",)
    adaptive: ClassVar[bool] = True

    threshold: float = 0.1
    interval: int = 50
    order: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None or self.schedule not in ("uniform", "last"):
            raise ConfigError(
                f"{type(self).__name__} decides by its threshold, not by a list of steps; "
                "leave out steps= and use schedule='uniform' or 'last'"
            )
        if self.threshold < 0:
            raise ConfigError(f"threshold must not be negative, got {self.threshold}")
        self.predictors()  # validates the order

    @property
    def last(self) -> bool:
        """Whether the last step is computed."""
        return self.schedule == "last"

    def predictors(self) -> Mapping[str, Predictor]:
        return {"whole": Taylor(self.order)}

    def with_computed_steps(self, count: int, total: int) -> Self:
        raise ConfigError(
            f"how many steps {type(self).__name__} computes depends on the images; "
            "set its threshold, or let `hasten bench` find the one for a number of computed steps"
        )
