"""The multistep formula of LEAP, and its coefficients by least squares.

    x_{k+1} = r_k x_0 + sum_{j<=k} a_kj g_j + b_kj d_j

`g_j` is what the pipeline made of the model's answer at evaluation `j` (guidance applied) and `d_j` the difference of
the two passes that it was made of, where they are known. A *row* lists the numbers of one `k` in the order of the
*columns* `x_0, g_0, (d_0,) g_1, (d_1,) ...`, so that each row goes on where the one before it ends.

Shapes: states and columns are `[B, ...]`; the sums run over everything, so that a fit may be fed batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["NormalEquations", "Row", "combine"]

Row = list[float]


class NormalEquations:
    """Accumulates `V^T V` and `V^T goal` over batches, in float64."""

    def __init__(self, size: int) -> None:
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self._right = torch.zeros(size, dtype=torch.float64)

    def add(self, columns: Sequence[Tensor], goal: Tensor, roots: Tensor | None = None) -> None:
        """Add a batch: what the columns have to be combined to.

        Args:
            columns: each `[B, ...]`.
            goal: likewise.
            roots: square roots of the weights of the images, `[B]`; 1 by default.
        """
        flat = torch.stack([_weighted(column, roots) for column in columns])
        self.gram += (flat @ flat.T).cpu()
        self._right += (flat @ _weighted(goal, roots)).cpu()

    def include(self, other: NormalEquations, shares: Sequence[float], weight: float) -> None:
        """Add equations in numbers that are each a sum of some of ours: `other` has one where we have a group.

        Args:
            other: equations in `n` numbers; here are `len(shares)` groups of `n`.
            shares: of the groups in that sum.
            weight: of the equations.
        """
        part = torch.tensor(shares, dtype=torch.float64)
        self.gram += weight * torch.kron(torch.outer(part, part), other.gram)
        self._right += weight * torch.kron(part, other._right)

    def is_finite(self) -> bool:
        """Whether all that was added is."""
        return bool(self.gram.isfinite().all() and self._right.isfinite().all())

    def solve(self, prior: Sequence[float], ridge: float) -> Row:
        """The coefficients, drawn towards `prior` by `ridge`."""
        towards = torch.tensor(prior, dtype=torch.float64)
        weight = ridge * self.gram.diagonal().mean().clamp_min(1e-300)
        left = self.gram + weight * torch.eye(len(towards), dtype=torch.float64)
        right = (self._right - self.gram @ towards)[:, None]
        return (towards + torch.linalg.lstsq(left, right, driver="gelsd").solution[:, 0]).tolist()

    def damped(self, damping: float) -> Row:
        """The step of Levenberg and Marquardt: each coefficient is drawn to 0, by `damping` times its own weight.

        None is taken where what was added is not finite.
        """
        if not self.is_finite():
            return [0.0] * len(self.gram)
        scale = self.gram.diagonal().clamp_min(1e-300).sqrt()
        left = self.gram / scale[:, None] / scale + damping * torch.eye(len(scale), dtype=torch.float64)
        solution = torch.linalg.lstsq(left, (self._right / scale)[:, None], driver="gelsd").solution[:, 0]
        return (solution / scale).tolist()


def _weighted(batch: Tensor, roots: Tensor | None) -> Tensor:
    numbers = batch.double()
    return (numbers if roots is None else numbers.flatten(1) * roots.to(batch.device)[:, None]).flatten()


def combine(columns: Sequence[Tensor], row: Sequence[float]) -> Tensor:
    """The state that a row makes of its columns; columns after its end are left out."""
    state = row[0] * columns[0]
    for column, coefficient in zip(columns[1 : len(row)], row[1:], strict=True):
        if coefficient != 0.0:
            state = state + coefficient * column
    return state
