"""The closed form of LEAP: coefficients of a multistep formula by least squares.

    c = argmin || X_0 + sum_j c_j v_j - X_goal ||^2 + ridge * mean(diag G) * || c - c_prior ||^2,     G = V^T V

Shapes: states and velocities are `[B, ...]`; the sums run over everything, so that a fit may be fed batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["NormalEquations", "advance"]


class NormalEquations:
    """Accumulates `V^T V` and `V^T (goal - start)` over batches, in float64."""

    def __init__(self, size: int) -> None:
        self._gram = torch.zeros(size, size, dtype=torch.float64)
        self._right = torch.zeros(size, dtype=torch.float64)

    def add(self, start: Tensor, velocities: Sequence[Tensor], goal: Tensor) -> None:
        """Add a batch: what `start` has to become by moving along the velocities."""
        flat = torch.stack([v.double().flatten() for v in velocities])
        self._gram += (flat @ flat.T).cpu()
        self._right += (flat @ (goal.double() - start.double()).flatten()).cpu()

    def solve(self, prior: Sequence[float], ridge: float) -> list[float]:
        """The coefficients, drawn towards `prior` by `ridge`."""
        towards = torch.tensor(prior, dtype=torch.float64)
        pull = ridge * self._gram.diagonal().mean().clamp_min(1e-300)
        left = self._gram + pull * torch.eye(len(towards), dtype=torch.float64)
        right = (self._right + pull * towards)[:, None]
        return torch.linalg.lstsq(left, right, driver="gelsd").solution[:, 0].tolist()

    def damped(self, damping: float) -> list[float]:
        """The step of Levenberg and Marquardt: each coefficient is pulled to 0, by `damping` times its own weight."""
        scale = self._gram.diagonal().clamp_min(1e-300).sqrt()
        left = self._gram / scale[:, None] / scale + damping * torch.eye(len(scale), dtype=torch.float64)
        solution = torch.linalg.lstsq(left, (self._right / scale)[:, None], driver="gelsd").solution[:, 0]
        return (solution / scale).tolist()


def advance(
    state: Tensor, velocities: Sequence[Tensor | None], now: Sequence[float], before: Sequence[float]
) -> Tensor:
    """One step of the formula: `x_{k+1} = x_k + sum_j (c_kj - c_{k-1,j}) v_j`.

    The same as starting from `X_0`, but what somebody else does to the state between steps (inpainting, a callback) is
    kept. A coefficient that does not change costs nothing; velocities from before a later start are None, and their
    share goes to the oldest known one.

    Args:
        state: `x_k`.
        velocities: `v_0 .. v_k`.
        now: `c_k0 .. c_kk`.
        before: `c_{k-1,0} .. c_{k-1,k-1}`.
    """
    changes = [c - (before[j] if j < len(before) else 0.0) for j, c in enumerate(now)]
    known = next(j for j, velocity in enumerate(velocities) if velocity is not None)
    changes[known] += sum(changes[:known])
    result = state
    for velocity, change in zip(velocities[known:], changes[known:], strict=True):
        if change != 0.0:
            assert velocity is not None
            result = result + change * velocity
    return result
