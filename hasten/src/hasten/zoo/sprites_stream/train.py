"""Train `sprites-stream` (resumable; a GPU is used if there is one).

    python -m hasten.zoo.sprites_stream.train --out runs/sprites_stream --minutes 60
    python -m hasten.zoo.sprites_stream.train --out runs/sprites_stream --export FOLDER

Rectified flow with teacher forcing: every chunk has a noise level of its own and sees clean copies of the chunks before
it, to which a little noise is added so that the model stands its own mistakes when it rolls out. A run that was cut off
goes on from its last checkpoint; `--minutes` ends it after a time. The averaged (EMA) weights are what is exported.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from hasten.zoo.sprites_stream.data import conditions, draw, random_world
from hasten.zoo.sprites_stream.model import CausalVideoTransformer, ModelConfig, save_model, teacher_mask
from hasten.zoo.sprites_stream.rollout import SHIFT

__all__ = ["Recipe", "Trainer", "main"]


@dataclass(frozen=True)
class Recipe:
    """One training run. Clips of `short` frames come first, then those of `long` frames."""

    short_clips: int = 60_000
    long_clips: int = 30_000
    short: int = 12
    long: int = 48
    short_batch: int = 32
    long_batch: int = 8
    lr: float = 1e-3
    warmup_steps: int = 200
    decay_share: float = 0.35
    history_noise: float = 0.1
    ema: float = 0.999
    seed: int = 0


class Trainer:
    """Holds the model, the optimizer and the running average; one call of `step` is one batch."""

    def __init__(self, recipe: Recipe, config: ModelConfig, device: str = "cpu") -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.config, self.device = recipe, config, torch.device(device)
        self.model = CausalVideoTransformer(config).to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.worlds = Random(recipe.seed)
        self.masks: dict[int, Tensor] = {}
        self.steps, self.seen = 0, {"short": 0, "long": 0}

    @property
    def progress(self) -> float:
        """Share of the work done, clips weighed by their frames."""
        r = self.recipe
        done = min(self.seen["short"], r.short_clips) * r.short + min(self.seen["long"], r.long_clips) * r.long
        return done / (r.short_clips * r.short + r.long_clips * r.long)

    @property
    def done(self) -> bool:
        return self.seen["short"] >= self.recipe.short_clips and self.seen["long"] >= self.recipe.long_clips

    def batch(self, clips: int, frames: int) -> tuple[Tensor, Tensor]:
        """Videos `[B, F, 3, side, side]` in [-1, 1] and words `[B, F, 5]`."""
        worlds = [random_world(self.worlds) for _ in range(clips)]
        videos = torch.stack([draw(world, frames) for world in worlds])
        return videos * 2 - 1, torch.stack([conditions(world, 0, frames) for world in worlds])

    def loss(self, clean: Tensor, words: Tensor) -> Tensor:
        """Mean squared error of the velocity, all chunks at once."""
        B, F = clean.shape[:2]
        per_chunk = torch.sigmoid(torch.randn(B, F // self.config.chunk, generator=self.generator))
        t = SHIFT * per_chunk / (1 + (SHIFT - 1) * per_chunk)
        t = t.repeat_interleave(self.config.chunk, 1).to(self.device)
        blur = self.recipe.history_noise * torch.rand(B, F // self.config.chunk, generator=self.generator)
        t_clean = blur.repeat_interleave(self.config.chunk, 1).to(self.device)
        noise, grain = (torch.randn(clean.shape, generator=self.generator).to(self.device) for _ in range(2))
        clean = clean.to(self.device)
        at, near = t[..., None, None, None], t_clean[..., None, None, None]
        if F not in self.masks:
            self.masks[F] = teacher_mask(F, self.config).to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            velocity = self.model.teach(
                (1 - near) * clean + near * grain,
                t_clean,
                (1 - at) * clean + at * noise,
                t,
                words.to(self.device),
                self.masks[F],
            )
        return mse_loss(velocity.float(), noise - clean)

    def step(self) -> tuple[str, float]:
        """One optimizer step; returns the kind of clips and the loss."""
        r = self.recipe
        kind = "short" if self.seen["short"] < r.short_clips else "long"
        clips, frames = (r.short_batch, r.short) if kind == "short" else (r.long_batch, r.long)
        loss = self.loss(*self.batch(clips, frames))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.steps + 1) / r.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = r.lr * warm * min(1.0, max(0.02, (1 - self.progress) / r.decay_share))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(r.ema, (1 + self.steps) / (10 + self.steps))
        current = self.model.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [current[k] for k in self.average], 1 - decay)
        self.steps += 1
        self.seen[kind] += clips
        return kind, float(loss.detach())

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs to go on as if nothing had happened."""
        return {
            "recipe": asdict(self.recipe),
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "worlds": self.worlds.getstate(),
            "steps": self.steps,
            "seen": self.seen,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.worlds.setstate(state["worlds"])
        self.steps, self.seen = state["steps"], state["seen"]


def export(state: dict[str, Any], folder: Path) -> None:
    """Write the averaged weights."""
    model = CausalVideoTransformer(ModelConfig(**state["config"]))
    model.load_state_dict(state["average"])
    save_model(model, folder)


def run(trainer: Trainer, out: Path, minutes: float, checkpoint_minutes: float = 4.0) -> None:
    """Train until the recipe is done or the time is up; writes `log.jsonl` and `checkpoint.pt`."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=False, map_location=trainer.device))
    started = saved = time.monotonic()
    losses: list[float] = []
    while not trainer.done and time.monotonic() - started < 60 * minutes:
        kind, loss = trainer.step()
        losses.append(loss)
        if trainer.steps % 50 == 0 or trainer.done:
            row = {
                "step": trainer.steps,
                "kind": kind,
                "seen": trainer.seen,
                "loss": round(sum(losses) / len(losses), 5),
            }
            row |= {"progress": round(trainer.progress, 4), "seconds": round(time.monotonic() - started, 1)}
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            losses = []
        if time.monotonic() - saved > 60 * checkpoint_minutes:
            _save(trainer, checkpoint)
            saved = time.monotonic()
    _save(trainer, checkpoint)


def _save(trainer: Trainer, checkpoint: Path) -> None:
    """Whole or not at all."""
    torch.save(trainer.state(), checkpoint.with_suffix(".tmp"))
    os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sprites_stream"))
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--short-clips", type=int, default=Recipe.short_clips)
    parser.add_argument("--long-clips", type=int, default=Recipe.long_clips)
    parser.add_argument("--short-batch", type=int, default=Recipe.short_batch)
    parser.add_argument("--long-batch", type=int, default=Recipe.long_batch)
    parser.add_argument("--width", type=int, default=ModelConfig.width)
    parser.add_argument("--layers", type=int, default=ModelConfig.layers)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export", type=Path, help="only write the averaged weights of the last checkpoint here")
    args = parser.parse_args(arguments)
    if args.export:
        export(torch.load(args.out / "checkpoint.pt", weights_only=False, map_location="cpu"), args.export)
        return
    recipe = Recipe(args.short_clips, args.long_clips, short_batch=args.short_batch, long_batch=args.long_batch)
    config = ModelConfig(width=args.width, heads=args.width // 32, layers=args.layers)
    run(Trainer(recipe, config, args.device), args.out, args.minutes)


if __name__ == "__main__":
    main()
