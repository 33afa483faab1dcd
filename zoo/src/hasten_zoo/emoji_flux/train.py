"""Train `emoji-flux` (CPU is enough; resumable).

    python -m hasten_zoo.emoji_flux.train --out runs/emoji-flux

Rectified flow: `x_t = (1 - t) x_0 + t eps`, target `eps - x_0`, mean squared error; times logit-normal, shifted as
the sampler shifts them. Most samples are spent at 32x32 pixels (8x8 tokens), the rest at 64x64 (16x16 tokens) with a
quarter of the batches still coarse. The transformer and both text encoders learn together; one caption in ten is
empty, so that classifier-free guidance works. The averaged (EMA) weights are what is shipped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxPipeline
from hasten.io import add_line, write_atomically, write_sealed
from torch import Tensor, nn

from hasten_zoo.command import told
from hasten_zoo.emoji_flux.data import load_emoji_set
from hasten_zoo.emoji_flux.model import TEXT_TOKENS, build_pipeline


@dataclass(frozen=True)
class Recipe:
    """One training run. `coarse`/`fine` count images, not batches."""

    coarse: int = 300_000
    fine: int = 60_000
    coarse_batch: int = 64
    fine_batch: int = 32
    lr: float = 2e-3
    warmup_steps: int = 200
    decay_share: float = 0.35
    ema: float = 0.999
    caption_dropout: float = 0.1
    seed: int = 0


def shifted_times(n: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Logit-normal times in (0, 1), shifted as `FluxPipeline` does for `tokens` tokens; a fifth uniform."""
    u = torch.sigmoid(torch.randn(n, generator=generator))
    uniform = torch.rand(n, generator=generator)
    u = torch.where(torch.rand(n, generator=generator) < 0.2, uniform, u)
    shift = math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
    return shift * u / (1 + (shift - 1) * u)


class Trainer:
    """Holds the pipeline, the optimizer and the running average; one call of `step` is one batch."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        data = load_emoji_set()
        self.pipe: FluxPipeline = build_pipeline(data.captions, data.images)
        vae = self.pipe.vae
        self.latents = {
            r: (vae.encode(data.at(r) * 2 - 1, return_dict=False)[0] - vae.config.shift_factor)
            * vae.config.scaling_factor
            for r in (32, 64)
        }
        texts = [*data.captions, ""]
        tokens = self.pipe.tokenizer(
            texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        self.ids = tokens.input_ids
        self.net = nn.ModuleDict(
            {name: getattr(self.pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
        )
        self.net.train()
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
        self.average = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.steps = 0
        self.seen = {32: 0, 64: 0}

    @property
    def progress(self) -> float:
        """Share of the compute done, a fine image counted as four coarse ones."""
        r = self.recipe
        return (min(self.seen[32], r.coarse) + 4 * min(self.seen[64], r.fine)) / (r.coarse + 4 * r.fine)

    @property
    def done(self) -> bool:
        return self.seen[64] >= self.recipe.fine

    def _learning_rate(self) -> float:
        r = self.recipe
        warm = min(1.0, (self.steps + 1) / r.warmup_steps)
        decay = min(1.0, max(0.02, (1 - self.progress) / r.decay_share))
        return r.lr * warm * decay

    def step(self) -> tuple[int, float]:
        """One optimizer step; returns (resolution, loss)."""
        r, g = self.recipe, self.generator
        fine = self.seen[32] >= r.coarse and self.steps % 4 != 3
        resolution, batch = (64, r.fine_batch) if fine else (32, r.coarse_batch)
        latents = self.latents[resolution]
        pick = torch.randint(len(latents), (batch,), generator=g)
        clean = FluxPipeline._pack_latents(latents[pick], batch, 12, resolution // 2, resolution // 2)
        noise = torch.randn(clean.shape, generator=g)
        t = shifted_times(batch, clean.shape[1], g)
        noisy = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        dropped = torch.rand(batch, generator=g) < r.caption_dropout
        ids = self.ids[torch.where(dropped, len(latents), pick)]

        loss = nn.functional.mse_loss(self.predict(noisy, t, ids, resolution), noise - clean)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(r.ema, (1 + self.steps) / (10 + self.steps))
        current = self.net.state_dict()
        names = [k for k, v in self.average.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in names], [current[k] for k in names], 1 - decay)
        self.steps += 1
        self.seen[resolution] += batch
        return resolution, float(loss.detach())

    def predict(self, noisy: Tensor, t: Tensor, ids: Tensor, resolution: int) -> Tensor:
        """The velocity for packed latents `[B, N, 48]` at times `t` in (0, 1) and caption ids `[B, 8]`."""
        side = resolution // 4
        text = self.net["text_encoder_2"](ids, output_hidden_states=False)[0]
        pooled = self.net["text_encoder"](ids, output_hidden_states=False).pooler_output
        image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, noisy.device, noisy.dtype)
        return self.net["transformer"](
            hidden_states=noisy,
            timestep=t,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def state(self) -> dict[str, object]:
        return {
            "recipe": asdict(self.recipe),
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "seen": self.seen,
        }

    def restore(self, state: dict[str, object]) -> None:
        self.net.load_state_dict(state["net"])  # type: ignore[arg-type]
        self.average = state["average"]  # type: ignore[assignment]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.generator.set_state(state["generator"])  # type: ignore[arg-type]
        self.steps, self.seen = state["steps"], state["seen"]  # type: ignore[assignment]


def export(state: dict[str, object], out: Path) -> None:
    """Write the averaged weights as a pipeline folder (`transformer/`, `text_encoder/`, ...), safetensors, sealed."""
    data = load_emoji_set()
    pipe = build_pipeline(data.captions, data.images)
    net = nn.ModuleDict({name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")})
    net.load_state_dict(state["average"])  # type: ignore[arg-type]

    def fill(folder: Path) -> None:
        for name in ("transformer", "text_encoder", "text_encoder_2", "vae", "scheduler", "tokenizer"):
            getattr(pipe, name).save_pretrained(folder / name)

    write_sealed(out, fill, "emoji-flux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-flux"))
    parser.add_argument("--coarse", type=int, default=Recipe.coarse, help="images to see at 32x32")
    parser.add_argument("--fine", type=int, default=Recipe.fine, help="images to see at 64x64")
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--export", type=Path, help="only write the averaged weights of the last checkpoint here")
    args = parser.parse_args()
    checkpoint = args.out / "checkpoint.pt"
    if args.export:
        export(torch.load(checkpoint, weights_only=True), args.export)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(Recipe(coarse=args.coarse, fine=args.fine))
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=True))
    log, started, saved = args.out / "log.jsonl", time.monotonic(), time.monotonic()
    running: dict[int, list[float]] = {32: [], 64: []}
    while not trainer.done:
        resolution, loss = trainer.step()
        running[resolution].append(loss)
        if trainer.steps % 50 == 0:
            losses = {f"loss{r}": round(sum(v) / len(v), 5) for r, v in running.items() if v}
            row = {"step": trainer.steps, "seen32": trainer.seen[32], "seen64": trainer.seen[64], **losses}
            row |= {"lr": trainer.optimizer.param_groups[0]["lr"], "seconds": round(time.monotonic() - started, 1)}
            add_line(log, json.dumps(row))
            running = {32: [], 64: []}
        if trainer.done or time.monotonic() - saved > 60 * args.checkpoint_minutes:
            write_atomically(checkpoint, partial(torch.save, trainer.state()))
            saved = time.monotonic()


if __name__ == "__main__":
    told(main)
