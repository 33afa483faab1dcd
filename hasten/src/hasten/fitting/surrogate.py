"""Where to evaluate, looked for on the reference trajectories alone: no model is run.

On the reference's own path the model's answers at all steps are known. How much of each state a list of steps leaves
out of what its answers span is a quadratic form in their Gram matrix, so thousands of lists can be looked at. In use
the answers are those on the solver's path, so the lists found here are starts, to be judged by the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.caching.schedule import spread
from hasten.fitting.references import References
from hasten.fitting.search import search_steps

__all__ = ["Surrogate"]

Steps = tuple[int, ...]
POWERS = (1.15, 1.0, 1.3)  # of the spreads that a search starts from
TRIALS = 600  # lists looked at from each start
FLOOR = 1e-13  # of the Gram matrix's diagonal, added to it


class Surrogate:
    """What lists of steps leave out of the reference trajectories.

    Args:
        references: the trajectories.
        width: columns per evaluation; 2 with the differences of the passes.
        roots: square roots of the weights of the images of each call, `[B]`.
    """

    def __init__(self, references: References, width: int, roots: Sequence[Tensor]) -> None:
        self.total, self._width = references.total, width
        gram = torch.zeros(1 + width * self.total, 1 + width * self.total, dtype=torch.float64)
        for call, path in enumerate(references.states):
            parts = [
                path[:1],
                references.outputs[call],
                *(references.differences[call : call + 1] if width == 2 else []),
            ]
            flat = torch.cat(parts).flatten(2).double().mul_(roots[call][:, None]).flatten(1)
            gram += flat @ flat.T
        rows = np.zeros((self.total, len(gram)))
        for k, row in enumerate(references.plain.rows):
            rows[k, : len(row)] = row
        self._gram: NDArray[np.float64] = gram.numpy()
        self._right = self._gram @ rows.T  # of all columns with all states
        self._sizes = np.einsum("kc,ck->k", rows, self._right)

    def left_out(self, steps: Sequence[int], weight: float) -> float:
        """The share of the final states, weighted, that is not spanned, and `weight` times that of those on the way.

        Args:
            steps: of the reference at which the model is evaluated.
            weight: of the states on the way.
        """
        goals = [*(step - 1 for step in steps[1:]), self.total - 1]
        chosen, lost = [0], 0.0
        for step, goal in zip(steps, goals, strict=True):
            chosen += [1 + step + i * self.total for i in range(self._width)]
            block = self._gram[np.ix_(chosen, chosen)]
            scale = 1 / np.sqrt(np.diagonal(block))
            block = block * scale[:, None] * scale + FLOOR * np.eye(len(chosen))
            right = self._right[chosen, goal] * scale
            share = max(0.0, 1 - float(right @ np.linalg.solve(block, right)) / self._sizes[goal])
            lost += share * (1.0 if goal == self.total - 1 else weight)
        return lost

    def best(self, count: int, weight: float, starts: Sequence[Steps] = ()) -> Steps:
        """A list that leaves out little, by local moves from spreads and other starts."""
        given = [*(spread(count, self.total, power) for power in POWERS), *starts]
        known: dict[Steps, float] = {}

        def loss(steps: Steps) -> float:
            if steps not in known:
                known[steps] = self.left_out(steps, weight)
            return known[steps]

        first = sorted(dict.fromkeys(given), key=loss)[:2]
        found = [search_steps(start, self.total, loss, trials=TRIALS) for start in first]
        return min(found, key=lambda one: one.loss).steps
