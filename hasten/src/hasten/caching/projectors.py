"""How a feature is split before it is forecast, `F = sum_p P_p F`, and the one place where forecasts are summed.

Shapes: a feature is any float tensor; features come newest first. Sums are in float32 whatever the feature's dtype,
because the weights of a forecast cancel: in bfloat16 most bits of the difference of two near-equal features are lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Projector", "Whole", "weighted_sum"]


def weighted_sum(features: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_k w_k F_k` in float32, as a new tensor of the features' dtype; features of weight 0 are not read."""
    terms = [(f, w) for f, w in zip(features, weights, strict=True) if w != 0.0]
    if not terms:
        return torch.zeros_like(features[0])
    (first, weight), *rest = terms
    total = torch.mul(first.float(), weight)
    for feature, weight in rest:
        total.add_(feature, alpha=weight)
    return total.to(first.dtype)


class Projector(Protocol):
    """Splits a feature into named components, each with a predictor of its own."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components."""
        ...

    def combine(self, features: Sequence[Tensor], weights: Mapping[str, Sequence[float]]) -> Tensor:
        """`sum_p P_p sum_k w^p_k F_k` from the features of the stored steps and one list of weights per component."""
        ...


class Whole:
    """No split: one component, `"whole"`."""

    components: tuple[str, ...] = ("whole",)

    def combine(self, features: Sequence[Tensor], weights: Mapping[str, Sequence[float]]) -> Tensor:
        return weighted_sum(features, weights["whole"])
