"""What each head is worth to a model: the offline part of Focused Forcing, arXiv:2605.18346, that budgets rest on.

A *rollout* is any function from gates `[layers, heads]`, by which every head's output is multiplied before the output
projection, to latents; it must use the same noise every time. Two ways to ask it:

* `masked_importance`: one rollout for each head, with that head's gate at 0, and the loss of what comes out. The
  paper's way.
* `first_order_importance`: the slope of the loss in each gate, from a few backward passes through the rollout.

Two losses: the distance to the untouched rollout (`None`, needs no other model), and the distribution-matching loss of
a teacher and a critic (`DistributionMatching`), which is the paper's.

Departures: the distance to the untouched rollout is ours, for models that come without a critic. It has slope zero at
the untouched rollout, so the first-order form there estimates the size of the change itself, by random projections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.errors import ConfigError

__all__ = ["DistributionMatching", "Loss", "Rollout", "first_order_importance", "masked_importance"]

Rollout = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents, noise level of each `[B]` in (0, 1)) to the clean latents that it expects."""


@dataclass(frozen=True, eq=False)
class DistributionMatching:
    """Half the mean square of the distribution-matching gradient, as Self-Forcing (arXiv:2506.08009) computes it.

        x_t = (1 - t) x + t eps        g = (fake(x_t) - real(x_t)) / mean |x - real(x_t)|        loss = mean g^2 / 2

    Args:
        real: clean latents by the teacher, guidance included.
        fake: clean latents by the critic, or by the generator itself where there is none.
        times: noise levels per call; noise and levels are the same in every call.
        shift: of the noise levels.
        seed: of the noise.
    """

    real: Denoiser
    fake: Denoiser
    times: int = 4
    shift: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.times < 1 or self.shift <= 0:
            raise ConfigError(f"expected times of at least 1 and a shift above 0, got {self.times} and {self.shift}")

    def __call__(self, latents: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        losses = []
        for _ in range(self.times):
            t = 0.02 + 0.96 * torch.rand(1, generator=generator).item()
            t = self.shift * t / (1 + (self.shift - 1) * t)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            noisy = (1 - t) * latents + t * noise
            level = latents.new_full((len(latents),), t)
            real = self.real(noisy, level)
            scale = (latents - real).abs().mean().detach()
            losses.append(((self.fake(noisy, level) - real) / scale).square().mean() / 2)
        return torch.stack(losses).mean()


def _gates(layers: int, heads: int) -> Tensor:
    if layers < 1 or heads < 1:
        raise ConfigError(f"expected at least one layer and one head, got {layers} and {heads}")
    return torch.ones(layers, heads)


@torch.no_grad()
def masked_importance(rollout: Rollout, layers: int, heads: int, loss: Loss | None = None) -> Tensor:
    """Loss without each head in turn, `[layers, heads]`: `layers * heads` rollouts, and one more without a loss.

    Average the result over prompts.

    Args:
        rollout: see the head of the file.
        loss: of latents; None for the mean squared distance to the untouched rollout.

    Raises:
        ConfigError: if the rollout is not the same twice or pays no heed to the gates.
    """
    gates = _gates(layers, heads)
    whole = rollout(gates)
    if not torch.equal(whole, rollout(gates)):
        raise ConfigError(
            "two rollouts with the same gates differ, so no head can be judged; seed the noise of every rollout alike"
        )
    distance: Loss = loss or (lambda latents: (latents - whole).square().mean())
    importance = torch.zeros(layers, heads)
    changed = False
    for layer in range(layers):
        for head in range(heads):
            masked = gates.clone()
            masked[layer, head] = 0
            latents = rollout(masked)
            changed |= not torch.equal(latents, whole)
            importance[layer, head] = float(distance(latents))
    if not changed:
        raise ConfigError("no gate changes the rollout; hand the gates to the model, as in KVStream.gates")
    return importance


def first_order_importance(
    rollout: Rollout, layers: int, heads: int, loss: Loss | None = None, probes: int = 4, seed: int = 0
) -> Tensor:
    """What a small change of each gate does, `[layers, heads]`, from backward passes through the rollout.

    With a loss: `|d loss / d gate|`, one pass. Without: an estimate of the mean square of `d latents / d gate`, which
    is the distance to the rollout without the head, to first order; one pass for each probe.

    Args:
        rollout: differentiable in the gates.
        loss: of latents.
        probes: random projections; more is less noisy.
        seed: of the projections.

    Raises:
        ConfigError: if no gradient reaches the gates.
    """
    gates = _gates(layers, heads).requires_grad_()
    with torch.enable_grad():
        latents = rollout(gates)
        if not latents.requires_grad:
            raise ConfigError(
                "no gradient reaches the gates; run the rollout without torch.no_grad() and hand the gates to the model"
            )
        if loss is not None:
            return torch.autograd.grad(loss(latents), gates)[0].abs().detach()
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(layers, heads)
        for probe in range(probes):
            direction = torch.randn(latents.shape, generator=generator).to(latents)
            slope = torch.autograd.grad((latents * direction).sum(), gates, retain_graph=probe < probes - 1)[0]
            total += slope.square()
    return total / (probes * latents.numel())
