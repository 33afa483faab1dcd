"""`emoji-tokens`: a small VQ tokenizer of emoji scenes, and autoregressive models under four vocabularies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hasten_zoo.emoji_tokens.tokenizer import VQTokenizer

__all__ = ["WEIGHTS", "VQTokenizer", "decode", "load_tokenizer", "swatches"]

WEIGHTS = Path(__file__).parent / "weights"
SWATCH = 3  # tokens a side


def load_tokenizer() -> VQTokenizer:
    """The trained tokenizer that comes with the package.

    Raises:
        ModelError: if its file is missing or damaged.
    """
    return VQTokenizer.load(WEIGHTS / "tokenizer.safetensors")


def swatches(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """What tokens `[n]` look like: `[n, 12, 12, 3]` in [0, 1], each a decoded square of 3x3 of the same token.

    For `hasten tokens inspect --decoder hasten_zoo.emoji_tokens:swatches`.
    """
    with torch.no_grad():
        grids = torch.as_tensor(tokens)[:, None].expand(-1, SWATCH * SWATCH)
        return load_tokenizer().decode(grids).permute(0, 2, 3, 1).numpy()


def decode(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Images `[n, 32, 32, 3]` in [0, 1] of the tokens `[n, 64]` of images.

    For `hasten tokens sample --decoder hasten_zoo.emoji_tokens:decode`.
    """
    with torch.no_grad():
        return load_tokenizer().decode(torch.as_tensor(tokens)).permute(0, 2, 3, 1).numpy()
