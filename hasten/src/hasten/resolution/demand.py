"""What a clip needs: how much it moves (frames) and how much fine texture it has (pixels).

`B` batch, `C` channels, `T` frames, `H`, `W` height and width of the latents. DVG, arXiv:2605.21042; the figures
were read in its code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["motion", "shares", "texture"]

FLAT = 1e-6  # least standard deviation and determinant
TEMPERATURE = 2.6  # of the softmax between the two demands
FINE = 0.5  # radius of the spectrum, as a part of the largest one, from which on detail counts as fine


def motion(clean: Tensor) -> float:
    """How far the image moves from frame to frame, in latent pixels: one Lucas-Kanade vector for each pair.

    Args:
        clean: estimate of the clean latents, `[B, C, T, H, W]`.

    Returns:
        the mean length of the vectors over pairs and batch; 0 for a clip of one frame.
    """
    frames = clean.float().mean(dim=1)
    if frames.shape[1] < 2:
        return 0.0
    std, mean = torch.std_mean(frames, dim=(-2, -1), keepdim=True, correction=0)
    frames = (frames - mean) / std.clamp(min=FLAT)
    earlier, change = frames[:, :-1].flatten(0, 1), (frames[:, 1:] - frames[:, :-1]).flatten(0, 1)
    sobel = clean.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float32) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None]
    gx, gy = functional.conv2d(earlier[:, None], kernels, padding=1).unbind(dim=1)

    def total(product: Tensor) -> Tensor:
        return product.sum(dim=(-2, -1))

    a11, a22, a12 = total(gx * gx), total(gy * gy), total(gx * gy)
    b1, b2 = -total(gx * change), -total(gy * change)
    det = (a11 * a22 - a12 * a12).clamp(min=FLAT)
    u, v = (b1 * a22 - b2 * a12) / det, (b2 * a11 - b1 * a12) / det
    return float((u * u + v * v).sqrt().mean())


def texture(clean: Tensor) -> float:
    """The share of a clip's power at fine spatial frequencies: 0.607 for white noise, near 0 for smooth images.

    Args:
        clean: estimate of the clean latents, `[B, C, T, H, W]`.
    """
    clean = clean.float()
    std, mean = torch.std_mean(clean, dim=(-3, -2, -1), keepdim=True, correction=0)
    spectrum = torch.fft.fft2((clean - mean) / std.clamp(min=FLAT), norm="ortho")
    power = torch.fft.fftshift(spectrum, dim=(-2, -1)).abs().square().sum(dim=(0, 1, 2))
    # The zero frequency of an even size lies half a bin beside the middle of this grid; DVG's does, too.
    fy, fx = (torch.linspace(-1, 1, size, device=clean.device) for size in power.shape)
    radius = (fy[:, None].square() + fx[None].square()).sqrt() / math.sqrt(2)
    return float(power[radius >= FINE].sum() / power.sum().clamp(min=FLAT))


def shares(fine: float, moved: float) -> tuple[float, float]:
    """Demands of space and of time, which add up to 1.

    Args:
        fine: as `texture` measures it; in `[0, 1]`.
        moved: bounded motion `m / (1 + m)`; in `[0, 1]`.
    """
    space = 1 / (1 + math.exp(TEMPERATURE * (moved - fine)))
    return space, 1 - space
