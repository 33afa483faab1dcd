"""How many frames of the history each head may attend to.

Focused Forcing gives important heads more. With the importance `I` of each head (see `importance`):

    I^ = (I - min I) / (max I - min I)          b = round(b_min + I^^gamma (b_max - b_min))

Departure: before it is scaled, `I` is cut off at a quantile, because a single head may otherwise take it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten.errors import CalibrationError, ConfigError
from hasten.io import Kind, read_record, write_record
from hasten.parameters import Range, accepted

__all__ = ["HeadBudgets"]

MAX_GAMMA = 64.0


@dataclass(frozen=True)
class HeadBudgets:
    """Frames of history for each head of each layer.

    Attributes:
        table: `[layers][heads]`, 0 and more.
        facts: what they were made for, such as the model, the frames of a chunk and the window; another model is
            refused.

    Raises:
        ConfigError: for a table that is empty, ragged or has negative numbers.
    """

    table: tuple[tuple[int, ...], ...]
    facts: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = accepted("HeadBudgets", "table", tuple[tuple[Annotated[int, Range(0)], ...], ...], self.table)
        object.__setattr__(self, "table", table)
        accepted("HeadBudgets", "facts", Mapping, self.facts)
        widths = {len(row) for row in self.table}
        if len(widths) != 1:
            raise ConfigError(f"expected as many heads in every layer of the budgets, got {sorted(widths)}")

    @property
    def mean(self) -> float:
        """Frames a head, over all heads."""
        return sum(map(sum, self.table)) / sum(map(len, self.table))

    @classmethod
    def uniform(cls, layers: int, heads: int, frames: int, facts: Mapping[str, object] | None = None) -> HeadBudgets:
        """The same for all heads."""
        heads, layers = (
            accepted("HeadBudgets", name, Annotated[int, Range(1)], value)
            for name, value in (("heads", heads), ("layers", layers))
        )
        return cls(((frames,) * heads,) * layers, facts or {})

    @classmethod
    def from_importance(
        cls,
        importance: Tensor,
        b_min: int = 2,
        b_max: int = 9,
        gamma: float = 1.0,
        clip: float = 0.99,
        facts: Mapping[str, object] | None = None,
    ) -> HeadBudgets:
        """More frames for important heads; the rule at the head of this file.

        Args:
            importance: `[layers, heads]`, finite; equal importance gives all of them the middle of the range.
            b_min, b_max: least and largest budget; the defaults give the mean budget that the paper's speed-up implies.
            gamma: above 1 favours few heads, below 1 many.
            clip: quantile at which the importance is cut off, lower for models of few heads; 1 for the rule as printed.

        Raises:
            ConfigError: for values out of range.
        """
        accepted("HeadBudgets", "importance", Tensor, importance)
        least = Annotated[int, Range(0)]
        b_min, b_max = accepted("HeadBudgets", "b_min", least, b_min), accepted("HeadBudgets", "b_max", least, b_max)
        gamma = accepted("HeadBudgets", "gamma", Annotated[float, Range(above=0)], gamma)
        clip = accepted("HeadBudgets", "clip", Annotated[float, Range(above=0, most=1)], clip)
        if importance.ndim != 2 or not importance.numel() or not importance.isfinite().all():
            raise ConfigError(f"expected finite importance [layers, heads], got {list(importance.shape)}")
        if b_min > b_max:
            raise ConfigError(f"expected b_min of at most b_max, got {b_min} and {b_max}")
        scale = importance.double().cpu()
        scale = scale.clamp(max=scale.quantile(clip).item())
        spread = scale.max() - scale.min()
        unit = (scale - scale.min()) / spread if spread > 0 else torch.full_like(scale, 0.5 ** (1 / gamma))
        budgets = (b_min + unit**gamma * (b_max - b_min)).round().long()
        return cls(tuple(tuple(row) for row in budgets.tolist()), facts or {})

    @classmethod
    def with_mean(
        cls,
        importance: Tensor,
        mean: float,
        b_min: int = 2,
        b_max: int = 9,
        clip: float = 0.99,
        facts: Mapping[str, object] | None = None,
    ) -> HeadBudgets:
        """As `from_importance`, with the `gamma` whose mean budget is the largest that is no more than `mean`.

        Comparisons at equal cost need this.

        Raises:
            ConfigError: if no `gamma` in (1/64, 64) gives so small a mean.
        """
        mean = accepted("HeadBudgets", "mean", float, mean)
        low, high = 1 / MAX_GAMMA, MAX_GAMMA  # the mean falls as gamma grows
        best = cls.from_importance(importance, b_min, b_max, high, clip, facts)
        if best.mean > mean:
            raise ConfigError(
                f"no gamma gives a mean of {mean} frames or less, the least is {best.mean:.2f}; lower b_min"
            )
        for _ in range(30):
            gamma = (low * high) ** 0.5
            tried = cls.from_importance(importance, b_min, b_max, gamma, clip, facts)
            if tried.mean <= mean:
                best, high = tried, gamma
            else:
                low = gamma
        return best

    def check(self, layers: int, facts: Mapping[str, object]) -> None:
        """Refuse another model.

        Args:
            layers: of the model.
            facts: of the model; those that both sides name must agree.

        Raises:
            CalibrationError: naming what differs.
        """
        accepted("HeadBudgets.check", "facts", Mapping, facts)
        if len(self.table) != accepted("HeadBudgets.check", "layers", int, layers):
            raise CalibrationError(
                f"the budgets are for {len(self.table)} layers, the model has {layers}; make budgets for this model"
            )
        wrong = [name for name in self.facts if name in facts and self.facts[name] != facts[name]]
        if wrong:
            differences = ", ".join(f"{name} {self.facts[name]!r} instead of {facts[name]!r}" for name in wrong)
            raise CalibrationError(f"the budgets were made for {differences}; make budgets for this model")

    def of(self, layer: int, heads: int) -> tuple[int, ...]:
        """Budgets of one layer with that many heads.

        Raises:
            CalibrationError: if there are none.
        """
        layer = accepted("HeadBudgets.of", "layer", Annotated[int, Range(0)], layer)
        heads = accepted("HeadBudgets.of", "heads", int, heads)
        if layer >= len(self.table) or len(self.table[0]) != heads:
            raise CalibrationError(
                f"the budgets are for {len(self.table)} layers of {len(self.table[0])} heads, but layer {layer} with "
                f"{heads} heads asks for them; make budgets for this model"
            )
        return self.table[layer]

    def save(self, path: str | Path) -> Path:
        """Write JSON, atomically; returns the path.

        Raises:
            ConfigError: if the facts are no JSON.
            FileError: if it cannot be written.
        """
        return write_record(path, KIND, {"facts": dict(self.facts), "budgets": self.table})

    @classmethod
    def load(cls, path: str | Path) -> HeadBudgets:
        """Read what `save` wrote.

        Raises:
            CalibrationError: if the file is missing, damaged or something else.
        """
        content = read_record(path, KIND)
        try:
            return cls(content.budgets, content.facts)
        except ConfigError as error:
            raise CalibrationError(f"{path}: no usable head budgets ({error}). {KIND.remedy}") from error


@dataclass(frozen=True)
class _Content:
    """What a file of budgets holds."""

    facts: dict[str, Any]
    budgets: tuple[tuple[int, ...], ...]


KIND = Kind("head budgets", _Content, CalibrationError, "Make it again with HeadBudgets.save.", 16 << 20)
