"""Drawing images of clusters with a trained causal LM: temperature, top-k, top-p and classifier-free guidance.

Shapes: `B` images, `L` tokens, `k` clusters, `H` width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from hasten.errors import ConfigError, NonFiniteError
from hasten.parameters import Declared, Range, accepted
from hasten.tokens.causal import CausalModel, Condition, evaluating

MOST_SEED = 2**63 - 1

__all__ = ["MOST_SEED", "Sampling", "drawn_from", "filtered", "refuse_lost", "sample_clusters", "scaled_top_k"]


@dataclass(frozen=True, kw_only=True)
class Sampling(Declared):
    """How the next cluster is drawn.

    Raises:
        ConfigError: if a value cannot work.
    """

    temperature: Annotated[float, Range(above=0), "divides the logits"] = 1.0
    top_k: Annotated[int, Range(0), "only the likeliest so many clusters; 0 for all"] = 0
    top_p: Annotated[
        float, Range(above=0, most=1), "only the likeliest clusters that reach this probability together"
    ] = 1.0
    guidance: Annotated[
        float,
        Range(0),
        "logits are `without + guidance (with - without)` the condition; 1 leaves the forward without out",
    ] = 1.0


def scaled_top_k(top_k: int, tokens: int, clusters: int) -> int:
    """The limit that a vocabulary of clusters needs instead of `top_k` tokens: times `k / N`, at least 1; 0 is none."""
    return 0 if top_k == 0 else max(1, round(top_k * clusters / tokens))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities `[B, k]` after temperature, top-k and top-p; the likeliest cluster always stays, and of equal ones
    at most top-k."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1)  # not all of those that are as likely as the last of them
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
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
        NonFiniteError: if probabilities are no numbers (NaN); found out at the end, since the device is not waited for.
    """
    for name, hint, value in (
        ("model", CausalModel, model),
        ("condition", Condition, condition),
        ("length", Annotated[int, Range(1)], length),
        ("sampling", Sampling | None, sampling),
        ("seed", Annotated[int, Range(0, MOST_SEED)], seed),
        ("without", Condition | None, without),
    ):
        accepted("sample_clusters", name, hint, value)
    sampling = sampling or Sampling()
    if not len(condition):
        raise ConfigError("there is no condition to draw an image for; give one for each image")
    guided = sampling.guidance != 1.0
    if guided and without is None:
        raise ConfigError("guidance needs the condition that stands for none: give without=")
    images = len(condition)
    generator = torch.Generator(device=condition.ids.device).manual_seed(seed)
    if guided and without is not None:
        condition = condition.and_then(without.to(condition.ids.device).expanded(images))
    clusters: list[Tensor] = []
    states: list[Tensor] = []
    lost = torch.zeros(images, dtype=torch.bool, device=condition.ids.device)
    with evaluating(model):
        decoding = model.decode(condition, length)
        prediction = next(decoding)
        while True:
            logits = prediction.logits.float()
            if guided:
                with_it, without_it = logits.chunk(2)
                logits = torch.where(with_it.isinf(), with_it, without_it + sampling.guidance * (with_it - without_it))
            chances = filtered(logits, sampling)
            lost = lost | chances.isnan().any(-1)
            drawn = drawn_from(chances, generator)
            clusters.append(drawn)
            if prediction.states is not None:
                states.append(prediction.states[:images])
            if len(clusters) == length:
                break
            prediction = decoding.send(torch.cat([drawn, drawn]) if guided else drawn)
    refuse_lost(lost, "images")
    return torch.stack(clusters, dim=1), torch.stack(states, dim=1) if states else None


def refuse_lost(lost: Tensor, what: str) -> None:
    """Refuse probabilities that are no numbers, of which something would be drawn all the same.

    Args:
        lost: bool, for which of the images or positions they are none.
        what: these are.

    Raises:
        NonFiniteError: if there is any.
    """
    count = int(lost.sum())  # the device is waited for here
    if count:
        raise NonFiniteError(
            f"the logits of {count} of {lost.numel()} {what} are no numbers (NaN), or infinite; look for weights that "
            "are not finite, compute in float32, or, with guidance, leave out minus infinity"
        )
