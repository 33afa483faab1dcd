"""Tokens as a image: where a token is made larger or smaller, or its noise is averaged, it has to be one.

A token is 2x2 latent pixels. A latent pixel of a learned VAE stands for a patch of the image, and four copies of it
for a larger one. A VAE that only rearranges pixels into channels (space-to-depth) makes latents of which that is not
true: a copied latent pixel repeats the pattern of its patch. There the image's own pixels are taken.

Shapes: tokens `[B, n, C]`, images `[B, C / (2 s)^2, 2 s h, 2 s w]` for a grid of `(h, w)` tokens and the factor `s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.nn import functional

from hasten.resolution.positions import pack, unpack

__all__ = ["LATENTS", "Canvas"]


@dataclass(frozen=True)
class Canvas:
    """How tokens become a image that can be resized pixel by pixel.

    Attributes:
        factor: pixels along each side that the VAE rearranged into the channels of a latent pixel; 1 for a VAE that
            was learned.
    """

    factor: int = 1

    @classmethod
    def of(cls, vae: Any) -> Self:
        """The canvas of a VAE, which says `space_to_depth` if it only rearranges pixels."""
        return cls(int(getattr(vae, "space_to_depth", 1)))

    def paint(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The image of tokens on a grid of `size`."""
        return functional.pixel_shuffle(unpack(tokens, size), self.factor)

    def read(self, image: Tensor) -> Tensor:
        """Undo `paint`."""
        return pack(functional.pixel_unshuffle(image, self.factor))

    def enlarge(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Every pixel copied to 2x2: `[B, n, C]` on a coarse grid of `size` to `[B, 4 n, C]`.

        Copying whole tokens instead would tile each token's pixels.
        """
        return self.read(self.paint(tokens, size).repeat_interleave(2, 2).repeat_interleave(2, 3))

    def shrink(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The mean of 2x2 pixels: `[B, 4 n, C]` on a fine grid of `size` to `[B, n, C]`."""
        return self.read(functional.avg_pool2d(self.paint(tokens, size), 2))


LATENTS = Canvas()
