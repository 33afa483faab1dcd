"""Whether a difference is more than chance: intervals by a bootstrap over walks and seeds, paired where two are
compared.

A value is known for each seed and walk. A draw takes as many seeds and as many walks again, with replacement, the
same ones for both sides of a comparison; the interval holds the middle 95 % of the draws' means (Efron 1979,
"Bootstrap Methods: Another Look at the Jackknife", Ann. Statist. 7; Owen 2007, "The Pigeonhole Bootstrap", Ann. Appl.
Stat. 1, for two ways). Where several textures are judged on the same walks, most of an interval is how much walks
differ, which all textures share; `within` takes that off (Cousineau 2005, "Confidence intervals in within-subject
designs", Tutor. Quant. Methods Psychol. 1, with the factor of Morey 2008, same journal, 4).

Shapes: `N` seeds, `W` walks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drape.errors import ConfigError

__all__ = ["Interval", "interval", "paired", "within"]

DRAWS = 4000
LEVEL = 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean, and the lower and upper end of its interval."""

    mean: float
    low: float
    high: float

    def apart(self, other: Interval) -> bool:
        """Whether the two intervals have nothing in common."""
        return self.high < other.low or other.high < self.low

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def table(values: Sequence[Sequence[float]] | Floats) -> Floats:
    """Values by seed and walk, `[N, W]`."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape or not np.isfinite(array).all():
        raise ConfigError(
            f"values have shape {array.shape}; expected finite numbers [seeds, walks], one at least of each."
        )
    return array


def interval(values: Sequence[Sequence[float]] | Floats, seed: int = 0) -> Interval:
    """The mean over seeds and walks `[N, W]`, with its interval."""
    array = table(values)
    rng = np.random.default_rng(seed)
    seeds, walks = array.shape
    drawn = (rng.multinomial(count, np.full(count, 1 / count), DRAWS) / count for count in (seeds, walks))
    means = np.einsum("ds,sw,dw->d", next(drawn), array, next(drawn), optimize=True)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def paired(
    first: Sequence[Sequence[float]] | Floats, second: Sequence[Sequence[float]] | Floats, seed: int = 0
) -> Interval:
    """The mean of first - second over the same seeds and walks, with its interval.

    A side with one seed, such as a control, is compared with every seed of the other.
    """
    a, b = table(first), table(second)
    if a.shape[1] != b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ConfigError(
            f"values of shapes {a.shape} and {b.shape}; expected the same walks, and the same seeds or one."
        )
    return interval(a - b, seed)


def within(groups: Mapping[str, Sequence[Sequence[float]] | Floats], seed: int = 0) -> dict[str, Interval]:
    """Intervals of several groups on the same walks, without what makes walks differ for all of them.

    From every value its walk's mean over all groups is taken, the mean of all walks added, and what is left widened by
    sqrt(C / (C - 1)) for C groups.

    Args:
        groups: values by seed and walk `[N, W]`, N of its own for each group.
    """
    tables = {name: table(values) for name, values in groups.items()}
    if len(tables) < 2 or len({values.shape[1] for values in tables.values()}) != 1:
        raise ConfigError(f"{len(tables)} groups; expected two or more on the same walks.")
    by_walk = np.mean([values.mean(axis=0) for values in tables.values()], axis=0)
    factor = np.sqrt(len(tables) / (len(tables) - 1))
    result = {}
    for name, values in tables.items():
        left = values - by_walk + by_walk.mean()
        result[name] = interval(left.mean() + factor * (left - left.mean()), seed)
    return result
