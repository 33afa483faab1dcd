"""How a feature is split before it is forecast, `F = sum_p P_p F`.

Shapes: a feature is any float tensor; features come newest first. Sums are in float32 whatever the feature's dtype
(`sums.py`). A projector keeps its tables on the device on which it has worked once, and computes by operations that a
compiler can trace: a skipped step copies nothing to the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from hasten.caching.sums import Weight, weighted_sum

__all__ = ["Projector", "Whole", "gap"]


class Projector(Protocol):
    """Splits a feature into named components, each with a predictor of its own."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components."""
        ...

    def combine(self, features: Sequence[Tensor], weights: Mapping[str, Sequence[Weight]]) -> Tensor:
        """`sum_p P_p sum_k w^p_k F_k` from the features of the stored steps and one list of weights per component."""
        ...


class Whole:
    """No split: one component, `"whole"`."""

    components: tuple[str, ...] = ("whole",)

    def combine(self, features: Sequence[Tensor], weights: Mapping[str, Sequence[Weight]]) -> Tensor:
        return weighted_sum(features, weights["whole"])


def gap(weights: Mapping[str, Sequence[Weight]], of: str, to: str) -> list[Weight]:
    """What the weights of one component are above those of another."""
    return [a - b for a, b in zip(weights[of], weights[to], strict=True)]
