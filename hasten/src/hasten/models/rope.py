"""Rotary factors of real positions, and Qwen-Image's position module replaced for the time of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from torch import Tensor

from hasten.errors import AdapterError, ConfigError
from hasten.models.blocks import swapped
from hasten.models.proxy import Here, Proxy

__all__ = ["PositionProxy", "position_proxy", "rotary", "use_positions"]


def rotary(positions: Tensor, axes: Sequence[int], theta: float) -> Tensor:
    """Rotary factors of real positions: `[S, A]` to complex64 `[S, sum(axes) / 2]`.

    Args:
        positions: one column per axis.
        axes: dimensions of a head that each axis has, even.
        theta: base of the frequencies, `theta ** (-2 k / dim)`.
    """
    if positions.dim() != 2 or positions.shape[1] != len(axes):
        raise ConfigError(f"positions for {len(axes)} axes are [S, {len(axes)}], got {list(positions.shape)}")
    angles = []
    for column, dim in zip(positions.float().unbind(1), axes, strict=True):
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device).div(dim)
        angles.append(torch.outer(column, 1.0 / torch.pow(theta, exponents)))
    angle = torch.cat(angles, 1)
    return torch.polar(torch.ones_like(angle), angle)


class PositionProxy(Proxy):
    """Stands for Qwen-Image's `pos_embed` and returns factors of the positions that it was given.

    Args:
        original: the module that it stands for.
        positions: `[S, 3]` of all image tokens.
        text_start: position at which the text begins.
        device: of the factors.
    """

    def __init__(self, original: QwenEmbedRope, positions: Tensor, text_start: int, device: torch.device) -> None:
        super().__init__(original, Here())
        self.image = rotary(positions, original.axes_dim, original.theta).to(device)
        self.text_start = text_start

    def respond(self, video_fhw: Any, device: torch.device | None = None, max_txt_seq_len: Any = None) -> Any:
        """The factors of the image tokens and of the text; `video_fhw` is not used."""
        if max_txt_seq_len is None:
            raise AdapterError("the transformer asked for positions without the length of its text (max_txt_seq_len)")
        first = self.text_start
        return self.image.to(device), self.original.pos_freqs[first : first + int(max_txt_seq_len)].to(device)


def position_proxy(transformer: Any, positions: Tensor, text_start: int, device: torch.device) -> PositionProxy:
    """What stands for `pos_embed` while the tokens have these positions; made once per token layout.

    Args:
        transformer: a Qwen-Image transformer.
        positions: `[S, 3]`, image number, row and column of each token.
        text_start: position at which the text begins.
        device: of the transformer's tokens.

    Raises:
        AdapterError: for a transformer whose positions are not made by `QwenEmbedRope(scale_rope=True)`.
    """
    own: Any = getattr(transformer, "pos_embed", None)
    if type(own) is not QwenEmbedRope or not own.scale_rope:
        raise AdapterError(
            f"{type(transformer).__name__} makes its positions with {type(own).__name__}, and mixed tokens are known "
            "for QwenEmbedRope(scale_rope=True) only (Qwen-Image, Qwen-Image-Edit and Edit-Plus; not layered models)"
        )
    return PositionProxy(own, positions, text_start, device)


def use_positions(transformer: Any, proxy: PositionProxy) -> AbstractContextManager[None]:
    """Put the proxy in the place of `pos_embed` until the end of the `with`, also if the forward fails.

    `img_shapes` is then used for one thing only: models that modulate the references apart (`zero_cond_t`) split the
    tokens by its products; give `[(1, 1, n), ...]` with the true number of tokens `n` of each image.
    """
    return swapped([(transformer, "pos_embed", proxy)], proxy.here)
