"""Drawing images of clusters with a trained causal LM: temperature, top-k, top-p and classifier-free guidance.

Shapes: `B` images, `L` tokens, `k` clusters, `H` width of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.tokens.causal import CausalModel, Condition

__all__ = ["Sampling", "drawn_from", "filtered", "sample_clusters", "scaled_top_k"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next cluster is drawn.

    Attributes:
        temperature: divides the logits.
        top_k: only the likeliest so many clusters; 0 for all.
        top_p: only the likeliest clusters that reach this probability together.
        guidance: logits are `without + guidance (with - without)` the condition; 1 leaves the forward without out.

    Raises:
        ConfigError: if a value cannot work.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        finite = 0 < self.temperature < math.inf and 0 <= self.guidance < math.inf
        if not finite or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature must be positive, top_k and guidance not negative, top_p in (0, 1]; got {self}"
            )


def scaled_top_k(top_k: int, tokens: int, clusters: int) -> int:
    """The limit that a vocabulary of clusters needs instead of `top_k` tokens: times `k / N`, at least 1; 0 is none."""
    return 0 if top_k == 0 else max(1, round(top_k * clusters / tokens))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities `[B, k]` after temperature, top-k and top-p; the likeliest cluster always stays."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    chances = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, places = chances.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        chances = torch.zeros_like(chances).scatter(-1, places, ordered)
    return chances / chances.sum(-1, keepdim=True)


def drawn_from(chances: Tensor, generator: torch.Generator) -> Tensor:
    """One of `k` for each row of probabilities `[B, k]`, `[B]` int64.

    The likeliest after division by exponential noise: as often as `multinomial` draws it, but nothing waits for the
    device.
    """
    noise = torch.empty_like(chances).exponential_(1.0, generator=generator)
    return (chances / noise).argmax(dim=-1)


@torch.no_grad()
def sample_clusters(
    model: CausalModel,
    condition: Condition,
    length: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    without: Condition | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Clusters `[B, L]` for conditions, and the hidden states `[B, L, H]` that they were drawn from.

    Args:
        model: of the clusters.
        condition: of the images.
        length: clusters of an image.
        sampling: how to draw.
        seed: of the draws.
        without: the condition that stands for none, which guidance needs; one for all images, or one for each.

    Raises:
        ConfigError: if there is guidance without `without`, or a condition is unknown to the model.
    """
    sampling = sampling or Sampling()
    guided = sampling.guidance != 1.0
    if guided and without is None:
        raise ConfigError("guidance needs the condition that stands for none: give without=")
    images = len(condition)
    generator = torch.Generator(device=condition.ids.device).manual_seed(seed)
    if guided and without is not None:
        condition = condition.and_then(without.to(condition.ids.device).expanded(images))
    clusters: list[Tensor] = []
    states: list[Tensor] = []
    model.eval()
    decoding = model.decode(condition, length)
    prediction = next(decoding)
    while True:
        logits = prediction.logits.float()
        if guided:
            with_it, without_it = logits.chunk(2)
            logits = torch.where(with_it.isinf(), with_it, without_it + sampling.guidance * (with_it - without_it))
        drawn = drawn_from(filtered(logits, sampling), generator)
        clusters.append(drawn)
        if prediction.states is not None:
            states.append(prediction.states[:images])
        if len(clusters) == length:
            break
        prediction = decoding.send(torch.cat([drawn, drawn]) if guided else drawn)
    return torch.stack(clusters, dim=1), torch.stack(states, dim=1) if states else None
