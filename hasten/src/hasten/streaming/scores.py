"""How much a frame of the history matters: relevance to the queries, and diversity among the frames.

Focused Forcing, arXiv:2605.18346, as reported in a reading note; the exact constants of the paper are not known.

Shape legend: `B` batch, `q` query frames, `L` tokens of a frame, `H` heads, `D` width of a head, `F` frames held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.errors import ConfigError

__all__ = ["pooled_relevance", "redundancy", "relevance", "standardised"]

EPSILON = 1e-6


def relevance(queries: Tensor, means: Tensor) -> Tensor:
    """Mean logit between a query frame and a history frame, from the means of both: `[B, q, H, F]`, float32.

    The mean over all pairs of tokens of `<Q, K> / sqrt(D)` is the product of the mean query and the mean key, so
    nothing larger is needed.

    Args:
        queries: `[B, q, L, H, D]`, rotated like the keys.
        means: mean key of each frame, `[B, H, F, D]`.
    """
    mean_queries = queries.mean(2, dtype=torch.float32).transpose(1, 2)  # [B, H, q, D]
    return (mean_queries @ means.float().transpose(2, 3)).transpose(1, 2) / queries.shape[-1] ** 0.5


def pooled_relevance(queries: Tensor, keys: Tensor, pools: int) -> Tensor:
    """The same as the paper writes it: the mean over all pairs of `pools` pooled groups of tokens in each frame.

    For groups of equal size it does not depend on `pools`; `relevance` is what runs.

    Args:
        queries: `[B, q, L, H, D]`.
        keys: `[B, F, L, H, D]`.

    Raises:
        ConfigError: if `pools` does not divide `L`.
    """
    L = queries.shape[2]
    if pools < 1 or L % pools:
        raise ConfigError(f"expected a number of pools that divides the {L} tokens of a frame, got {pools}")
    pooled = [t.float().unflatten(2, (pools, -1)).mean(3) for t in (queries, keys)]
    return torch.einsum("bquhd,bfvhd->bqhf", *pooled) / (pools**2 * queries.shape[-1] ** 0.5)


def redundancy(plain_keys: Tensor, lengths: Tensor) -> Tensor:
    """How alike a frame is to the mean of all: mean over tokens of the cosine with the mean key there, `[B, H, F]`.

    Args:
        plain_keys: `[B, H, F, L, D]`; unrotated along time, or equal frames look different.
        lengths: Euclidean norm of each key, `[B, H, F, L]`, float32; no rotation changes it.
    """
    keys = plain_keys.float()
    mean = keys.mean(2, keepdim=True)
    product = (keys * mean).sum(-1)
    return (product / (lengths * mean.norm(dim=-1)).clamp(min=EPSILON)).mean(-1)


def standardised(scores: Tensor) -> Tensor:
    """Zero mean and unit (population) deviation over the last axis, the frames; zero where all are equal."""
    deviation, mean = torch.std_mean(scores, -1, correction=0, keepdim=True)
    return (scores - mean) / (deviation + EPSILON)
