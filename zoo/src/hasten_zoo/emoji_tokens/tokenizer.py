"""A small VQ tokenizer: 32x32 images to 8x8 tokens of a codebook `[2048, 8]`, looked up by direction.

As LlamaGen's tokenizer, codes and latents are scaled to unit length before the nearest code is looked up (Yu et al.,
arXiv:2110.04627), so that trees are fitted with `normalize="unit"`. Codes are running means of the latents that they
stand for (van den Oord et al., arXiv:1711.00937, appendix A.1); codes that are met too rarely are put onto latents of
the batch.

Shapes: `B` images, `N` codes, `D` width of a code, tokens `[B, 64]` row by row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from hasten.errors import ConfigError, ModelError
from hasten.io import Kind
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from hasten_zoo.weights import read_weights, write_weights

__all__ = ["TokenizerConfig", "VQTokenizer"]

DECAY = 0.98  # of the running means: about 50 steps
RARE = 0.1  # a code met less often than this share of the even one is put elsewhere


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Size of a tokenizer.

    Attributes:
        codes: `N`.
        code_width: `D`.
        channels: of the widest layers.
        commitment: weight of the loss that keeps latents near their codes.

    Raises:
        ConfigError: if a size cannot work.
    """

    codes: int = 2048
    code_width: int = 8
    channels: int = 96
    commitment: float = 0.25

    def __post_init__(self) -> None:
        if self.codes < 2 or self.code_width < 2 or self.channels < 8 or self.channels % 16 or self.commitment < 0:
            raise ConfigError(f"at least 2 codes of width 2 and channels in sixteens are needed, got {self}")


KIND = Kind("tokenizer", TokenizerConfig, ModelError, "Reinstall hasten-zoo, or train one again.")


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class VQTokenizer(nn.Module):
    """Images `[B, 3, H, W]` in [0, 1], sides divisible by 4, to tokens and back."""

    codebook: Tensor  # rows of length 1
    sums: Tensor  # running sums of the latents of each code
    usage: Tensor  # running share of each code, 1 for an even one

    def __init__(self, config: TokenizerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TokenizerConfig()
        c = config.channels
        self.encoder = nn.Sequential(
            nn.Conv2d(3, c // 2, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(c // 2, c, 4, stride=2, padding=1),
            Residual(c),
            Residual(c),
            nn.Conv2d(c, config.code_width, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_width, c, 3, padding=1),
            Residual(c),
            Residual(c),
            nn.ConvTranspose2d(c, c // 2, 4, stride=2, padding=1),
            Residual(c // 2),
            nn.SiLU(),
            nn.ConvTranspose2d(c // 2, 3, 4, stride=2, padding=1),
        )
        codes = normalize(torch.randn(config.codes, config.code_width), dim=-1)
        self.register_buffer("codebook", codes)
        self.register_buffer("sums", codes.clone(), persistent=False)
        self.register_buffer("usage", torch.ones(config.codes), persistent=False)

    def latents(self, images: Tensor) -> Tensor:
        """Unit vectors `[B, h, w, D]`."""
        return normalize(self.encoder(images * 2 - 1).permute(0, 2, 3, 1), dim=-1)

    def lookup(self, latents: Tensor) -> Tensor:
        """Nearest codes `[B, h, w]`."""
        return (latents @ self.codebook.T).argmax(-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens `[B, h w]` int64."""
        return self.lookup(self.latents(images)).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] of square grids of tokens `[B, h w]`.

        Raises:
            ConfigError: if the tokens are no square.
        """
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ConfigError(f"tokens must fill a square, got {tokens.shape[1]} of them")
        codes = self.codebook[tokens].reshape(len(tokens), side, side, -1)
        return self._decoded(codes).clamp(0, 1)

    def _decoded(self, codes: Tensor) -> Tensor:
        return self.decoder(codes.permute(0, 3, 1, 2)) / 2 + 0.5

    def loss(self, images: Tensor, quantized: bool = True) -> tuple[Tensor, Tensor]:
        """Reconstruction (absolute and squared error) and commitment loss; and the mean squared error.

        In training mode the codes are moved, too. Without `quantized` it is the loss of a plain autoencoder, with
        which training begins, so that the first codes lie where latents are.
        """
        latents = self.latents(images)
        if not quantized:
            drawn = self._decoded(latents)
            squared = mse_loss(drawn, images)
            return (drawn - images).abs().mean() + squared, squared
        tokens = self.lookup(latents)
        codes = self.codebook[tokens]
        commitment = self.config.commitment * self.config.code_width * mse_loss(latents, codes)
        drawn = self._decoded(latents + (codes - latents).detach())  # gradients go straight through the lookup
        if self.training:
            self._move(tokens, latents)
        squared = mse_loss(drawn, images)
        return (drawn - images).abs().mean() + squared + commitment, squared

    def perplexity(self) -> float:
        """Of the running usage: as many evenly used codes would be as uncertain."""
        share = self.usage / self.usage.sum()
        return float(torch.special.entr(share).sum().exp())

    @torch.no_grad()
    def begin(self, images: Tensor) -> None:
        """Put every code onto a latent of the images, which have to have at least as many tokens as there are codes.

        Raises:
            ConfigError: if they have fewer.
        """
        latents = self.latents(images).flatten(0, 2)
        if len(latents) < self.config.codes:
            raise ConfigError(f"{self.config.codes} codes need as many latents, the images have {len(latents)}")
        self._put(torch.arange(self.config.codes), latents[torch.randperm(len(latents))[: self.config.codes]])

    @torch.no_grad()
    def _move(self, tokens: Tensor, latents: Tensor) -> None:
        """Codes become running means of their latents; those met too rarely are put onto latents of the batch."""
        n, flat, index = self.config.codes, latents.flatten(0, 2), tokens.flatten()
        even = n / len(index)  # so that a usage of 1 is an even one
        self.usage.lerp_(even * torch.bincount(index, minlength=n).float(), 1 - DECAY)
        self.sums.lerp_(even * torch.zeros_like(self.sums).index_add_(0, index, flat), 1 - DECAY)
        self.codebook.copy_(normalize(self.sums, dim=-1))
        rare = torch.nonzero(self.usage < RARE).flatten()
        if len(rare):
            self._put(rare, flat[torch.randint(len(flat), (len(rare),))])

    def _put(self, codes: Tensor, latents: Tensor) -> None:
        self.codebook[codes], self.sums[codes], self.usage[codes] = latents, latents, 1.0

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file in half precision; returns its path."""
        return write_weights(path, KIND, self, asdict(self.config))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelError: if the file is missing, damaged or no tokenizer.
        """
        tokenizer = read_weights(path, KIND, cls).eval().requires_grad_(False)
        tokenizer.codebook.copy_(normalize(tokenizer.codebook, dim=-1))  # half precision rounds
        return tokenizer
