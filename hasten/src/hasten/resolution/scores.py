"""Which coarse tokens to refine first: readings of how they converge, and of what the image shows there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from skimage.feature import canny
from torch import Tensor
from torch.nn import functional

from hasten.errors import ConfigError

__all__ = ["channel_variance", "edge_share", "first", "temporal_variance"]


def temporal_variance(snapshots: Sequence[Tensor]) -> Tensor:
    """Variance over the last steps, mean over the channels: `[B, n, C]` each to `[B, n]`.

    Raises:
        ConfigError: for fewer than two snapshots.
    """
    if len(snapshots) < 2:
        raise ConfigError(f"a variance over steps needs at least 2 coarse steps, got {len(snapshots)}")
    return torch.stack(list(snapshots)).var(0, unbiased=False).mean(-1)


def channel_variance(clean: Tensor) -> Tensor:
    """Variance over the channels of each clean token: `[B, n, C]` to `[B, n]`."""
    return clean.var(-1, unbiased=False)


def edge_share(pipe: Any, clean: Tensor) -> Tensor:
    """Share of edge pixels (Canny) under each token of the decoded estimate.

    Args:
        pipe: whose VAE decodes.
        clean: latent pixels `[B, C, H, W]` as the transformer knows them.

    Returns:
        `[B, H W / 4]`.
    """
    vae = pipe.vae
    scaled = clean / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    images = vae.decode(scaled.to(next(iter(vae.state_dict().values()))), return_dict=False)[0]
    grey = images.float().mean(1).cpu().numpy()
    edges = torch.stack([torch.from_numpy(canny(image)).float() for image in grey])
    size = (clean.shape[2] // 2, clean.shape[3] // 2)
    return functional.adaptive_avg_pool2d(edges[:, None], size).flatten(1).to(clean.device)


def first(scores: Tensor, count: int, taken: Tensor) -> Tensor:
    """The `count` tokens with the highest score that are not taken yet; of equal ones the earlier.

    Args:
        scores: `[B, n]`; a batch shares the choice, by its mean score.
        count: how many.
        taken: `[h, w]` bool.

    Returns:
        `[h, w]` bool.
    """
    order = scores.mean(0).masked_fill(taken.flatten(), -torch.inf).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(taken).flatten()
    chosen[order[:count]] = True
    return chosen.reshape(taken.shape)
