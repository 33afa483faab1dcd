"""A small VQ tokenizer: 64x64 pictures to 16x16 tokens of a codebook `[1024, 8]`, looked up by direction.

As LlamaGen's tokenizer, codes and latents are scaled to unit length before the nearest code is looked up (Yu et al.,
arXiv:2110.04627), so that trees are fitted with `normalize="unit"`. The codebook is learned by its own loss; codes
that have not been met for long are put onto latents of the batch.

Shapes: `B` pictures, `N` codes, `D` width of a code, tokens `[B, 256]` row by row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from hasten.errors import ConfigError, ModelError
from hasten.files import write_whole

__all__ = ["TokenizerConfig", "VQTokenizer"]

FORGOTTEN = 0.01  # a code met less often than this share of the even one is put elsewhere
DECAY = 0.95  # of the running usage: a code that is never met is put elsewhere after 90 steps


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

    codes: int = 1024
    code_width: int = 8
    channels: int = 96
    commitment: float = 0.25

    def __post_init__(self) -> None:
        if self.codes < 2 or self.code_width < 2 or self.channels < 8 or self.channels % 8 or self.commitment < 0:
            raise ConfigError(f"at least 2 codes of width 2 and channels in eights are needed, got {self}")


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
    """Pictures `[B, 3, H, W]` in [0, 1], sides divisible by 4, to tokens and back."""

    usage: Tensor

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
            nn.SiLU(),
            nn.ConvTranspose2d(c // 2, 3, 4, stride=2, padding=1),
        )
        self.codebook = nn.Parameter(normalize(torch.randn(config.codes, config.code_width), dim=-1))
        self.register_buffer("usage", torch.ones(config.codes))

    def latents(self, pictures: Tensor) -> Tensor:
        """Unit vectors `[B, h, w, D]`."""
        return normalize(self.encoder(pictures * 2 - 1).permute(0, 2, 3, 1), dim=-1)

    def lookup(self, latents: Tensor) -> Tensor:
        """Nearest codes `[B, h, w]`."""
        return (latents @ normalize(self.codebook, dim=-1).T).argmax(-1)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Tokens `[B, h w]` int64."""
        return self.lookup(self.latents(pictures)).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] of square grids of tokens `[B, h w]`.

        Raises:
            ConfigError: if the tokens are no square.
        """
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ConfigError(f"tokens must fill a square, got {tokens.shape[1]} of them")
        codes = normalize(self.codebook, dim=-1)[tokens].reshape(len(tokens), side, side, -1)
        return self._decoded(codes).clamp(0, 1)

    def _decoded(self, codes: Tensor) -> Tensor:
        return self.decoder(codes.permute(0, 3, 1, 2)) / 2 + 0.5

    def loss(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (absolute and squared error), codebook and commitment loss; and the mean squared error."""
        latents = self.latents(pictures)
        tokens = self.lookup(latents)
        codes = normalize(self.codebook, dim=-1)[tokens]
        matching = mse_loss(codes, latents.detach()) + self.config.commitment * mse_loss(latents, codes.detach())
        drawn = self._decoded(latents + (codes - latents).detach())  # gradients go straight through the lookup
        if self.training:
            self._note(tokens, latents)
        squared = mse_loss(drawn, pictures)
        return (drawn - pictures).abs().mean() + squared + self.config.code_width * matching, squared

    @torch.no_grad()
    def _note(self, tokens: Tensor, latents: Tensor) -> None:
        """Update the running usage, 1 for an even one, and move forgotten codes onto latents of the batch."""
        n = self.config.codes
        counts = torch.bincount(tokens.flatten(), minlength=n).float() * n / tokens.numel()
        self.usage.lerp_(counts, 1 - DECAY)
        forgotten = torch.nonzero(self.usage < FORGOTTEN).flatten()
        if len(forgotten):
            flat = latents.flatten(0, 2)
            self.codebook[forgotten] = flat[torch.randint(len(flat), (len(forgotten),))]
            self.usage[forgotten] = 1.0

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; returns its path."""
        path = Path(path)
        facts = {name: str(value) for name, value in asdict(self.config).items()}
        write_whole(path, save({k: v.contiguous() for k, v in self.state_dict().items()}, metadata=facts))
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelError: if the file is missing, damaged or no tokenizer.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            sizes = {name: int(facts[name]) for name in ("codes", "code_width", "channels")}
            tokenizer = cls(TokenizerConfig(**sizes, commitment=float(facts["commitment"])))
            tokenizer.load_state_dict(load_file(path))
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f"{path}: no usable tokenizer ({error}); train one again") from error
        return tokenizer.eval()
