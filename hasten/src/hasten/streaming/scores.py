"""How much a frame of the history matters: relevance to the queries, and diversity among the frames.

Focused Forcing, arXiv:2605.18346, as reported in a reading note; the exact constants of the paper are not known.

Shape legend: `B` batch, `q` query frames, `L` tokens of a frame, `S` of them by which frames are compared, `H` heads,
`D` width of a head, `F` frames held.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from hasten.errors import ConfigError

__all__ = ["UnitKeys", "attention_mass", "pooled_relevance", "relevance", "standardised"]

EPSILON = 1e-6


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
    sample = flat[:, positions].transpose(1, 2).float()  # [B, H, samples, D]
    attended = torch.cat([history.flatten(2, 3), keys.flatten(1, 2).transpose(1, 2)], 2).float()
    weights = (sample @ attended.mT / queries.shape[-1] ** 0.5).softmax(3)
    return weights[..., -last:].sum(3).mean((0, 2)).cpu()


class UnitKeys:
    """Keys of length one by which frames are compared, and the sum of the keys as they are.

    Frames are measured once, when they are first asked about. The similarity of all of them is one small product then.
    """

    def __init__(self) -> None:
        self._units: Tensor | None = None  # [B, H, F + room, S, D] float32
        self._sum: Tensor | None = None  # [B, H, S, D] float32
        self._held = 0

    def __len__(self) -> int:
        return self._held

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.untyped_storage().nbytes() for t in (self._units, self._sum) if t is not None)

    @torch.no_grad()
    def extend(self, plain_keys: Tensor) -> None:
        """Measure further frames.

        Args:
            plain_keys: `[B, H, F, S, D]`, `S` tokens of each; unrotated along time, or equal frames look different.
        """
        keys = plain_keys.float()
        units, added = _directions(keys), keys.sum(2)
        held, self._held = self._held, self._held + keys.shape[2]
        if self._units is None or self._sum is None:
            self._units, self._sum = units, added
            return
        self._sum += added
        if self._held > self._units.shape[2]:  # room is doubled, or every chunk would copy all that came before
            B, H, _, S, D = units.shape
            grown = units.new_empty(B, H, max(self._held, 2 * held), S, D)
            grown[:, :, :held] = self._units[:, :, :held]
            self._units = grown
        self._units[:, :, held : self._held] = units

    @torch.no_grad()
    def redundancy(self) -> Tensor:
        """Similarity of a frame to the mean of all: mean over tokens of the cosine with the mean key, `[B, H, F]`."""
        assert self._units is not None
        assert self._sum is not None
        B, H, _, S, _ = self._units.shape
        direction = _directions(self._sum)  # the mean points where the sum points
        units = self._units[:, :, : self._held].flatten(3).flatten(0, 1)
        # The vector stands on the left: on a CPU the product with a single column takes seven times as long.
        return (direction.view(B * H, 1, -1) @ units.mT).view(B, H, -1) / S


def _directions(keys: Tensor) -> Tensor:
    """Keys of length one; zero stays zero."""
    return keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_(min=EPSILON)


def standardised(scores: Tensor) -> Tensor:
    """Zero mean and unit (population) deviation over the last axis, the frames; zero where all are equal."""
    return layer_norm(scores, scores.shape[-1:], eps=EPSILON**2)
