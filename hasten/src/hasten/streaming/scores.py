"""How much a frame of the history matters: relevance to the queries, and diversity among the frames.

Focused Forcing, arXiv:2605.18346, as reported in a reading note; the exact constants of the paper are not known.

Shape legend: `B` batch, `q` query frames, `L` tokens of a frame, `S` of them by which frames are compared, `H` heads,
`D` width of a head, `F` frames held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from hasten.errors import ConfigError

__all__ = ["LEAST_RELEVANCE", "attention_mass", "pooled_relevance", "redundancy", "relevance", "standardised"]

EPSILON = 1e-6
LEAST = 2.0**-13  # deviation as a part of the largest score; below it would be rounding that is told apart
LEAST_RELEVANCE = 2.0**-10  # the same for mean logits, in which most of what is summed cancels


def relevance(queries: Tensor, means: Tensor) -> Tensor:
    """Mean logit between a query frame and a history frame, from the means of both: `[B, q, H, F]`, float32.

    The mean over all pairs of tokens of `<Q, K> / sqrt(D)` is the product of the mean query and the mean key, so
    nothing larger is needed.

    Args:
        queries: `[B, q, L, H, D]`, rotated like the keys.
        means: mean key of each frame, `[B, H, F, D]`, float32.
    """
    B, q, L, H, D = queries.shape
    sums = queries.sum(2, dtype=torch.float32).transpose(1, 2)  # [B, H, q, D]
    logits = (sums.reshape(B * H, q, D) @ means.flatten(0, 1).mT) / (L * D**0.5)
    return logits.view(B, H, q, -1).transpose(1, 2)


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


def attention_mass(queries: Tensor, keys: Tensor, history: Tensor, last: int, samples: int) -> Tensor:
    """Attention that each head pays to the last tokens, of the history and the current chunk together: `[H]`.

    Args:
        queries, keys: of the current chunk, `[B, q, L, H, D]`.
        history: keys `[B, H, F, L, D]`.
        last: how many tokens; the chunk's own are the very last.
        samples: queries to measure with, evenly spread, at the most.

    Returns:
        float32 on the CPU, the mean over the batch and the samples.
    """
    flat = queries.flatten(1, 2)
    positions = torch.linspace(0, flat.shape[1] - 1, min(samples, flat.shape[1]), device=flat.device).long()
    sample = flat[:, positions].transpose(1, 2)  # [B, H, samples, D]; products in its dtype, keys are not copied
    logits = [sample @ part.mT for part in (history.flatten(2, 3), keys.flatten(1, 2).transpose(1, 2))]
    weights = (torch.cat(logits, 3).float() / queries.shape[-1] ** 0.5).softmax(3)
    return weights[..., -last:].sum(3).mean((0, 2)).cpu()


def redundancy(keys: Tensor, parts: Sequence[int] = ()) -> Tensor:
    """Similarity of a frame to the mean of all: mean over tokens of the cosine with the mean key, `[B, H, F]` float32.

    Args:
        keys: `[B, H, F, S, D]`, `S` tokens of each frame; without their rotation along time, or equal frames look
            different.
        parts: numbers of frames of several histories, one after another, each with a mean of its own; one by default.
    """
    if keys.dtype == torch.float64:
        keys = keys.float()
    if len(parts) > 1:
        of = torch.repeat_interleave(torch.tensor(parts)).to(keys.device)
        total = keys.new_zeros(*keys.shape[:2], len(parts), *keys.shape[3:], dtype=torch.float32)
        total.index_add_(2, of, keys.float())
        direction = _directions(total).index_select(2, of)
    else:
        direction = _directions(keys.sum(2, keepdim=True, dtype=torch.float32))  # the mean points where the sum points
    lengths = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).clamp_(min=EPSILON)
    return ((keys * direction).sum(-1) / lengths).mean(-1)


def _directions(keys: Tensor) -> Tensor:
    """Keys of length one; zero stays zero."""
    return keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_(min=EPSILON)


def standardised(scores: Tensor, least: float = LEAST) -> Tensor:
    """Zero mean and unit (population) deviation over the last axis, the frames; zero where all are equal.

    Args:
        scores: `[..., F]`.
        least: deviation, as a part of the largest score, from which on it is brought to one.
    """
    largest = torch.linalg.vector_norm(scores, torch.inf, dim=-1, keepdim=True).clamp_min_(EPSILON**2)
    return layer_norm(scores / largest, scores.shape[-1:], eps=least**2)
