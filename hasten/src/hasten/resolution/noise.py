"""From coarse latents to fine ones at a noise level: how a jump in resolution keeps signal and noise in proportion.

`x = (1 - sigma) x0 + sigma eps`, `v = eps - x0`. Four fine latent pixels take the place of a coarse one; `Up` copies it
to them, `E` is unit noise on the fine grid and `E_L` on the coarse one. Three ways:

    x0-field    x' = (1 - sigma') Up(x0) + sigma' E,  x0 = x - sigma v;  any sigma'
    rewind      x' = beta (Up(x) - sigma Up(E_L)) + sigma' E,  beta = (1 - sigma') / (1 - sigma)
    fresh       x' = beta Up(x) + sigma' (n - (1 - sqrt(1 - 4/Z^2)) mean(n)),  n new unit noise, mean over the four

Copied noise is coherent over four pixels, which is too much at low frequencies: an exact jump of a state goes back in
time, to `sigma' = Z sigma / D` with `beta = 1 / D`, `D = Z sigma + 1 - sigma`, `Z >= 2`. With `Z = 2` and `E_L` the sum
of four `E` over two, the rewind is the orthonormal Hadamard transform of (2 x, sigma' e_1, sigma' e_2, sigma' e_3) with
the field's own details, up to `1 / (1 + sigma)`. Tokens that stay coarse, or are fine already, come to `sigma'` too.

Shapes: latent pixels `[B, C, H, W]`, float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from hasten.caching.methods.freqca import dct_matrix
from hasten.errors import ConfigError

__all__ = ["Rewind", "anchor_noise", "dct_enlarge", "dct_low", "fresh_children", "low_noise", "swap", "up"]


@dataclass(frozen=True)
class Rewind:
    """How far an exact jump of a state goes back.

    Args:
        sigma: noise level before it, above 0 and below 1.
        z: at least 2, the least that is exact.
    """

    sigma: float
    z: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma < 1:
            raise ConfigError(f"a jump needs a noise level above 0 and below 1, got {self.sigma}")
        if self.z < 2:
            raise ConfigError(f"an exact jump needs z of at least 2, got {self.z}")

    @property
    def _divisor(self) -> float:
        return self.z * self.sigma + 1 - self.sigma

    @property
    def beta(self) -> float:
        """What the state is multiplied with."""
        return 1 / self._divisor

    @property
    def level(self) -> float:
        """The noise level after it."""
        return self.z * self.sigma / self._divisor

    @property
    def staying(self) -> float:
        """Coefficient of fresh unit noise for pixels that do not change their size."""
        return float(self.level * (1 - 1 / self.z**2) ** 0.5)


def up(coarse: Tensor) -> Tensor:
    """Every latent pixel copied to 2x2."""
    return coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)


def low_noise(noise: Tensor) -> Tensor:
    """Unit noise of the coarse grid, the low-pass of the fine one: the sum of 2x2 over two."""
    return functional.avg_pool2d(noise, 2) * 2


def anchor_noise(noise: Tensor) -> Tensor:
    """Unit noise of the coarse grid, the top left one of 2x2."""
    return noise[..., ::2, ::2]


def swap(state: Tensor, own: Tensor, new: Tensor, sigma: float, level: float) -> Tensor:
    """Exchange a state's noise: with `own` in it at `sigma`, the result has `new` in it at `level`.

    A point of the straight path from the noise to the image comes to the straight path of the new noise exactly.

    Args:
        state: latents at `sigma`, enlarged if need be.
        own: unit noise that the state began with, enlarged the same way.
        new: unit noise.
        sigma: noise level of the state, below 1.
        level: noise level of the result.
    """
    beta = (1 - level) / (1 - sigma)
    return beta * state + level * new - beta * sigma * own


def fresh_children(state: Tensor, noise: Tensor, rewind: Rewind) -> Tensor:
    """An exact jump with independent noise.

    Args:
        state: coarse latents at `rewind.sigma`.
        noise: fresh unit noise on the fine grid.
        rewind: how far back.
    """
    coherent = 1 - (1 - 4 / rewind.z**2) ** 0.5
    details = noise - coherent * up(functional.avg_pool2d(noise, 2))
    return rewind.beta * up(state) + rewind.level * details


def dct_low(noise: Tensor) -> Tensor:
    """Unit noise of the coarse grid: the lower half of the fine noise's DCT-II coefficients along both axes."""
    spectrum = _dct(noise)
    return _inverse_dct(spectrum[..., : noise.shape[-2] // 2, : noise.shape[-1] // 2])


def dct_enlarge(state: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """An exact jump in the spectrum: coarse coefficients, and noise in the place of those that they do not have.

    Args:
        state: coarse latents at `sigma`.
        noise: unit noise of the fine grid, whose lower coefficients the state began with.
        sigma: noise level before; after it the state is at `2 sigma / (1 + sigma)`.
    """
    spectrum = sigma * _dct(noise)
    spectrum[..., : state.shape[-2], : state.shape[-1]] = _dct(state)
    return _inverse_dct(spectrum) * (2 / (1 + sigma))


def _dct(field: Tensor) -> Tensor:
    rows, columns = (dct_matrix(side).to(field) for side in field.shape[-2:])
    return rows @ field @ columns.T


def _inverse_dct(spectrum: Tensor) -> Tensor:
    rows, columns = (dct_matrix(side).to(spectrum) for side in spectrum.shape[-2:])
    return rows.T @ spectrum @ columns
