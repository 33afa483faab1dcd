"""Drawing images of clusters with a trained causal LM: temperature, top-k, top-p and classifier-free guidance.

Shapes: `B` images, `L` tokens, `k` clusters, `H` width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import ConfigError

__all__ = ["Sampling", "filtered", "sample_clusters", "scaled_top_k"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next cluster is drawn.

    Attributes:
        temperature: divides the logits.
        top_k: only the likeliest so many clusters; 0 for all.
        top_p: only the likeliest clusters that reach this probability together.
        guidance: logits are `none + guidance (class - none)`; 1 leaves the forward without a class out.

    Raises:
        ConfigError: if a value cannot work.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.guidance < 0:
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


@torch.no_grad()
def sample_clusters(
    model: Any, classes: Tensor, k: int, length: int, sampling: Sampling | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Clusters `[B, L]` for classes `[B]`, and the hidden states `[B, L, H]` that they were drawn from.

    Args:
        model: Hugging Face causal LM with rows `k + class`, the last row for "no class", as `train.build_model` makes.
        classes: int64.
        k: clusters.
        length: tokens of an image.
        sampling: how to draw.
        seed: of the draws.

    Raises:
        ConfigError: if a class is unknown to the model.
    """
    sampling = sampling or Sampling()
    known = int(model.config.vocab_size) - k - 1
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < known:
        raise ConfigError(f"classes must be in 0 .. {known - 1}, got {classes.unique().tolist()}")
    guided = sampling.guidance != 1.0
    generator = torch.Generator(device=classes.device).manual_seed(seed)
    inputs = (k + classes)[:, None]
    if guided:
        inputs = torch.cat([inputs, torch.full_like(inputs, k + known)])
    cache, clusters, states = None, [], []
    model.eval()
    for _ in range(length):
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache = output.past_key_values
        logits = output.logits[:, -1, :k].float()
        if guided:
            with_class, without = logits.chunk(2)
            logits = without + sampling.guidance * (with_class - without)
        drawn = torch.multinomial(filtered(logits, sampling), 1, generator=generator)
        clusters.append(drawn)
        states.append(output.hidden_states[-1][: len(classes), -1])
        inputs = torch.cat([drawn, drawn]) if guided else drawn
    return torch.cat(clusters, dim=1), torch.stack(states, dim=1)
