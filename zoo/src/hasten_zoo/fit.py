"""The training loop of the small models: levels from coarse to fine, a running average, log and checkpoints.

A *level* is a size of image or video. Levels are worked through in order; once past the first, every fourth batch
comes from an earlier level, so that the coarse sizes stay native to the model. Running the same command again goes on
from the last checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hasten.errors import ConfigError, ModelError
from hasten.io import add_line, write_atomically, write_sealed
from torch import Tensor, nn

__all__ = ["Fit", "Level", "Rates", "averaged", "logit_normal_times", "run", "save_half"]

REPLAY = 4  # every fourth batch comes from an earlier level


@dataclass(frozen=True)
class Level:
    """How many samples of one size to see, in batches of how many, at what relative cost each."""

    name: str
    samples: int
    batch: int
    cost: float

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1 or self.cost <= 0:
            raise ConfigError(f"samples, batch and cost of a level must be positive, got {self}")


@dataclass(frozen=True)
class Rates:
    """Learning rate, its warm-up in steps, the share of the run over which it falls to a fiftieth, and averaging."""

    lr: float = 2e-3
    warmup_steps: int = 200
    decay_share: float = 0.35
    ema: float = 0.999


def logit_normal_times(n: int, shift: float, generator: torch.Generator) -> Tensor:
    """`[n]` times in (0, 1), logit-normal (a fifth uniform), moved towards noise by `shift` as the sampler does."""
    device = generator.device
    u = torch.sigmoid(torch.randn(n, generator=generator, device=device))
    uniform = torch.rand(n, generator=generator, device=device)
    u = torch.where(torch.rand(n, generator=generator, device=device) < 0.2, uniform, u)
    return shift * u / (1 + (shift - 1) * u)


class Fit:
    """Optimizer, running average and position in the levels.

    Args:
        net: the modules that learn.
        levels: in the order in which they are worked through.
        loss: from the name of a level, the size of a batch and a generator to a scalar loss.
        rates: learning rate and its course.
        seed: of the generator that `loss` draws from.
    """

    def __init__(
        self,
        net: nn.ModuleDict,
        levels: Sequence[Level],
        loss: Callable[[str, int, torch.Generator], Tensor],
        rates: Rates | None = None,
        seed: int = 0,
    ) -> None:
        self.net, self.levels, self.loss, self.rates = net.train(), list(levels), loss, rates or Rates()
        parameters = [p for p in net.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rates.lr, betas=(0.9, 0.98), fused=True)
        self.average = {k: v.detach().clone() for k, v in net.state_dict().items()}
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self.seen = {level.name: 0 for level in self.levels}

    @property
    def progress(self) -> float:
        """Share of the work done, each level weighted by its cost."""
        total = sum(level.cost * level.samples for level in self.levels)
        return sum(level.cost * min(self.seen[level.name], level.samples) for level in self.levels) / total

    @property
    def done(self) -> bool:
        return all(self.seen[level.name] >= level.samples for level in self.levels)

    def _next_level(self) -> Level:
        current = next((i for i, lv in enumerate(self.levels) if self.seen[lv.name] < lv.samples), len(self.levels) - 1)
        if current > 0 and self.steps % REPLAY == REPLAY - 1:
            current = int(torch.randint(current, (1,), generator=self.generator))
        return self.levels[current]

    def _learning_rate(self) -> float:
        r = self.rates
        warm = min(1.0, (self.steps + 1) / r.warmup_steps)
        return r.lr * warm * min(1.0, max(0.02, (1 - self.progress) / r.decay_share))

    def step(self) -> tuple[str, float]:
        """One optimizer step; returns the level's name and the loss."""
        level = self._next_level()
        loss = self.loss(level.name, level.batch, self.generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.rates.ema, (1 + self.steps) / (10 + self.steps))
        current = self.net.state_dict()
        names = [k for k, v in self.average.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in names], [current[k] for k in names], 1 - decay)
        self.steps += 1
        self.seen[level.name] += level.batch
        return level.name, float(loss.detach())

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on as if nothing had happened."""
        return {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "seen": self.seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state; levels may have been added or resized since."""
        self.net.load_state_dict(state["net"])
        self.average = {k: v.to(self.average[k].device) for k, v in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.steps = state["steps"]
        self.seen |= state["seen"]


def averaged(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run's last checkpoint.

    Raises:
        ModelError: if there is none yet.
    """
    checkpoint = folder / "checkpoint.pt"
    if not checkpoint.exists():
        raise ModelError(f"no checkpoint in {folder}; run the training script with --out {folder} first")
    average: dict[str, Tensor] = torch.load(checkpoint, weights_only=True, map_location="cpu")["average"]
    return average


def save_half(pipe: Any, names: Sequence[str], average: dict[str, Tensor], out: Path, of: str) -> None:
    """Write a folder of the model `of`: the modules `names` with averaged weights in half precision; small parts."""
    nn.ModuleDict({name: getattr(pipe, name) for name in names}).load_state_dict(average)

    def fill(folder: Path) -> None:
        for name in (*names, "vae", "scheduler", "tokenizer"):
            part = getattr(pipe, name)
            (part.half() if name in names else part).save_pretrained(folder / name)

    write_sealed(out, fill, of)


def run(
    fit: Fit, folder: Path, checkpoint_minutes: float = 4.0, log_every: int = 50, minutes: float = math.inf
) -> None:
    """Train to the end or for a time, or go on from `folder/checkpoint.pt`; writes `folder/log.jsonl` as it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        fit.restore(torch.load(checkpoint, weights_only=True, map_location="cpu"))
    started = saved = time.monotonic()
    losses: dict[str, list[float]] = {}
    while not fit.done and time.monotonic() - started < 60 * minutes:
        name, loss = fit.step()
        losses.setdefault(name, []).append(loss)
        if fit.steps % log_every == 0 or fit.done:
            row: dict[str, object] = {"step": fit.steps, "seen": fit.seen}
            row["loss"] = {k: round(sum(v) / len(v), 5) for k, v in losses.items()}
            row |= {"lr": fit.optimizer.param_groups[0]["lr"], "seconds": round(time.monotonic() - started, 1)}
            add_line(folder / "log.jsonl", json.dumps(row))
            losses = {}
        if time.monotonic() - saved > 60 * checkpoint_minutes:
            _save(fit, checkpoint)
            saved = time.monotonic()
    _save(fit, checkpoint)


def _save(fit: Fit, checkpoint: Path) -> None:
    write_atomically(checkpoint, partial(torch.save, fit.state()))
