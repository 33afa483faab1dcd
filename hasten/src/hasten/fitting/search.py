"""Search of the steps at which a model is evaluated: local moves from a start, each tried once.

The error of an image is a non-smooth function of the steps, without gradients, and each look at it costs a sampling.
Few moves of one or two steps from an even spread find what matters: where the trajectory bends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hasten.errors import ConfigError

__all__ = ["Search", "figures", "search_steps"]

Steps = tuple[int, ...]
MOVES = (-1, 1, -2, 2)


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        steps: the best list.
        loss: its loss.
        start_loss: the loss of the list that it started from.
        trials: how many lists were looked at.
        settled: whether no single move improves the list any more.
    """

    steps: Steps
    loss: float
    start_loss: float
    trials: int
    settled: bool


def figures(found: Search) -> dict[str, Any]:
    """A search as plain data, where the loss is a relative squared error."""
    return {
        "steps": list(found.steps),
        "relative_squared_error": found.loss,
        "at_the_start": found.start_loss,
        "trials": found.trials,
        "settled": found.settled,
    }


def _moves(steps: Steps, total: int, rng: random.Random) -> Iterator[Steps]:
    """Lists that differ in one step (never the first, which has to be 0), in random order; then in a pair."""
    count = len(steps)
    single = [(i, delta) for i in range(1, count) for delta in MOVES]
    rng.shuffle(single)
    for i, delta in single:
        yield from _valid((*steps[:i], steps[i] + delta, *steps[i + 1 :]), total)
    pairs = [(i, delta) for i in range(1, count - 1) for delta in MOVES]
    rng.shuffle(pairs)
    for i, delta in pairs:
        yield from _valid((*steps[:i], steps[i] + delta, steps[i + 1] + delta, *steps[i + 2 :]), total)


def _valid(steps: Steps, total: int) -> Iterator[Steps]:
    if steps[-1] < total and all(a < b for a, b in pairwise(steps)):
        yield steps


def search_steps(
    start: Sequence[int],
    total: int,
    loss: Callable[[Steps], float],
    *,
    trials: int = 80,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Search:
    """Improve a list of computed steps by local moves until none helps or the trials are used up.

    Args:
        start: computed steps to start from; the first is 0.
        total: steps of the sampler.
        loss: what to make small; called once for each list.
        trials: most lists to look at, the start included.
        seed: of the order of the moves.
        progress: called with (trials so far, trials, best loss).
    """
    best = tuple(start)
    if not best or best[0] != 0 or list(_valid(best, total)) != [best]:
        raise ConfigError(f"a search starts from increasing steps from 0 to {total - 1}, got {best}")
    if trials < 1:
        raise ConfigError(f"trials must be at least 1, got {trials}")
    rng, seen = random.Random(seed), {best: loss(best)}
    start_loss = seen[best]
    improved = True
    while improved:
        improved = False
        for steps in _moves(best, total, rng):
            if steps in seen:
                continue
            if len(seen) == trials:
                return Search(best, seen[best], start_loss, len(seen), settled=False)
            seen[steps] = loss(steps)
            if progress is not None:
                progress(len(seen), trials, min(seen[best], seen[steps]))
            if seen[steps] < seen[best]:
                best, improved = steps, True
                break
    return Search(best, seen[best], start_loss, len(seen), settled=True)
