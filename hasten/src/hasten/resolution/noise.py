"""Noise of two resolutions: how a jump from coarse latents to fine ones keeps signal and noise in proportion.

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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigError
from hasten.pipeline.transforms import dct, inverse_dct

__all__ = [
    "Rewind",
    "anchor_noise",
    "dct_enlarge",
    "dct_low",
    "descend",
    "exchange_noise",
    "fresh_children",
    "fresh_noise",
    "image_generators",
    "low_noise",
    "up",
]


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


# --- from coarse to fine


def up(coarse: Tensor) -> Tensor:
    """Every latent pixel copied to 2x2."""
    return coarse.repeat_interleave(2, -2).repeat_interleave(2, -1)


def low_noise(noise: Tensor) -> Tensor:
    """Unit noise of the coarse grid, the low-pass of the fine one: the sum of 2x2 over two."""
    return functional.avg_pool2d(noise, 2) * 2


def anchor_noise(noise: Tensor) -> Tensor:
    """Unit noise of the coarse grid, the top left one of 2x2."""
    return noise[..., ::2, ::2]


def exchange_noise(state: Tensor, own: Tensor, new: Tensor, sigma: float, level: float) -> Tensor:
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
    return inverse_dct(dct(noise)[..., : noise.shape[-2] // 2, : noise.shape[-1] // 2])


def dct_enlarge(state: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """An exact jump in the spectrum: coarse coefficients, and noise in the place of those that they do not have.

    Args:
        state: coarse latents at `sigma`.
        noise: unit noise of the fine grid, whose lower coefficients the state began with.
        sigma: noise level before; after it the state is at `2 sigma / (1 + sigma)`.
    """
    spectrum = sigma * dct(noise)
    spectrum[..., : state.shape[-2], : state.shape[-1]] = dct(state)
    return inverse_dct(spectrum) * (2 / (1 + sigma))


# --- noise of an image's own


def image_generators(noise: Tensor, offset: int = 0) -> list[torch.Generator]:
    """One generator per image, seeded with the image's own initial noise.

    What an image draws later then depends on its own seed alone: a seeded call can be repeated, and an image is the
    same whatever else is in the batch.

    Args:
        noise: unit noise that the images begin with, `[B, ...]`; one number per image is read from the device.
        offset: added to the seeds.
    """
    seeds = noise.flatten(1)[:, 0].float().cpu().view(torch.int32).tolist()
    return [torch.Generator().manual_seed(seed + offset) for seed in seeds]


def fresh_noise(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Unit noise `[B, *shape]` in float32, each image's from its own generator (on the host)."""
    return torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators]).to(device)


# --- noise levels


def descend(start: float, end: float, steps: int, shift: float) -> Tensor:
    """`[steps + 1]` noise levels from `start` to `end`, even in `t` of `sigma = h t / (1 + (h - 1) t)`, `h` the shift.

    Args:
        start: up to 1.
        end: from 0, below `start`.
        steps: at least 1.
        shift: above 0.
    """
    first, last = (level / (shift - (shift - 1) * level) for level in (start, end))
    t = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return (shift * t / (1 + (shift - 1) * t)).float()
