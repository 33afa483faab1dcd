"""Training of a refiner on a frozen main model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch

from hasten.errors import ConfigError, NonFiniteError
from hasten.fitting.token_recipe import UNSOUND, Conditions, finite
from hasten.parameters import Range, accepted
from hasten.tokens.causal import CausalModel, evaluating
from hasten.tokens.refiner import Refiner
from hasten.tokens.shards import TokenShards

__all__ = ["train_refiner"]


def train_refiner(
    model: CausalModel,
    refiner: Refiner,
    shards: TokenShards,
    conditions: Conditions,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 2e-4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Train the refiner on fine tokens, in place; the main model is only run.

    Args:
        model: trained on the refiner's clusters.
        refiner: for the same map, with the model's width as `hidden`.
        shards: fine tokens with what they show.
        conditions: what the labels of the shards are to the model.
        steps, batch, lr: of AdamW.
        seed: of the images' order.
        progress: called with the steps done and the steps in all.

    Returns:
        The loss of each step, nats a position whose cluster has several members.

    Raises:
        ConfigError: if the shards have another vocabulary, the model does not tell its states, or a number is not
            positive.
        ModelError: if the shards are of another codebook.
        NonFiniteError: if the loss or a weight is no number.
    """
    for name, hint, value in (
        ("model", CausalModel, model),
        ("refiner", Refiner, refiner),
        ("shards", TokenShards, shards),
        ("conditions", Conditions, conditions),
        ("steps", Annotated[int, Range(1)], steps),
        ("batch", Annotated[int, Range(1)], batch),
        ("lr", Annotated[float, Range(above=0)], lr),
        ("seed", Annotated[int, Range(0)], seed),
    ):
        accepted("train_refiner", name, hint, value)
    shards.check(refiner.mapping)
    known = getattr(model, "vocabulary", None)
    if known is not None and not np.array_equal(known.labels, refiner.labels.cpu().numpy()):
        raise ConfigError(
            "the model was trained on another map than the refiner's; make the refiner of the model's map"
        )
    if model.clusters != len(refiner.sizes):
        raise ConfigError(f"the model predicts {model.clusters} clusters, the refiner knows {len(refiner.sizes)}")
    if not len(shards):
        raise ConfigError("the shards hold no image; give some to train on")
    device = refiner.labels.device
    optimizer = torch.optim.AdamW(refiner.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.05)
    rng = np.random.default_rng(seed)
    refiner.train()
    losses = []
    for step in range(steps):
        pick = rng.integers(len(shards), size=batch)
        tokens = torch.from_numpy(shards.take(pick)).to(device)
        condition = conditions.of(torch.from_numpy(shards.labels(pick))).to(device)
        with torch.no_grad(), evaluating(model):
            hidden = model(condition, refiner.labels[tokens][:, :-1]).states
        if hidden is None:
            raise ConfigError("the model's forward gives logits alone; a refiner needs the states, too")
        loss = refiner.loss(hidden, tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(refiner.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NonFiniteError(f"step {step + 1}: the loss of the refiner is {losses[-1]}; {UNSOUND}")
        if progress is not None:
            progress(step + 1, steps)
    if not finite(refiner):
        raise NonFiniteError(f"the refiner has weights that are not finite after its last step; {UNSOUND}")
    refiner.eval()
    return losses
