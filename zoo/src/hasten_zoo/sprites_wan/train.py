"""Train `sprites-wan` (CPU is enough; the same command goes on from the last checkpoint).

    python -m hasten_zoo.sprites_wan.train --out runs/sprites_wan
    python -m hasten_zoo.sprites_wan.train --out runs/sprites_wan --export zoo/src/hasten_zoo/sprites_wan/weights

Rectified flow: `x_t = (1 - t) x_0 + t eps`, target `eps - x_0`, mean squared error; times logit-normal with the
sampler's shift of 3; one caption in ten is empty. A level "SxF" is S x S pixels and F latent frames over the same
motion: coarse ones first, so that sampling in stages finds its coarse stages known.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import torch
from diffusers import WanPipeline
from torch import Tensor, nn
from torch.nn import functional

from hasten_zoo.fit import Fit, Level, Rates, averaged, logit_normal_times, run, save_half
from hasten_zoo.sprites_wan.data import all_clips, draw, jittered
from hasten_zoo.sprites_wan.model import LEARNED, TEXT_TOKENS, build_pipeline

__all__ = ["levels", "main", "make_fit"]

SHIFT, DROPOUT = 3.0, 0.1
SHARES = {"24x5": (1.0, 32, 1.0), "24x9": (0.2, 16, 1.9), "36x7": (0.2, 16, 3.6), "48x9": (0.5, 8, 10.0)}


def levels(samples: int, largest_batch: int = 32) -> list[Level]:
    """`samples` clips at the coarsest level, and fewer, by fixed shares, at the others."""
    return [
        Level(name, max(1, int(samples * share)), min(batch, largest_batch), cost)
        for name, (share, batch, cost) in SHARES.items()
    ]


class ClipLoss:
    """The loss of a fresh batch of clips."""

    def __init__(self, pipe: WanPipeline, net: nn.ModuleDict) -> None:
        self.net, self.tokenizer = net, pipe.tokenizer
        self.clips = [clip for clip in all_clips() if not clip.held_out]
        self.mean = torch.tensor(pipe.vae.config.latents_mean)[:, None, None, None]
        self.std = torch.tensor(pipe.vae.config.latents_std)[:, None, None, None]

    def __call__(self, level: str, batch: int, generator: torch.Generator) -> Tensor:
        side, frames = (int(part) for part in level.split("x"))
        rng = Random(int(torch.randint(2**62, (), generator=generator)))
        clips = [jittered(rng.choice(self.clips), rng) for _ in range(batch)]
        images = torch.stack([functional.interpolate(draw(c, frames), (side, side), mode="area") for c in clips])
        clean = ((images * 2 - 1).transpose(1, 2) - self.mean) / self.std
        noise = torch.randn(clean.shape, generator=generator)
        t = logit_normal_times(batch, SHIFT, generator)
        amount = t[:, None, None, None, None]
        captions = ["" if rng.random() < DROPOUT else clip.caption for clip in clips]
        velocity = self.predict((1 - amount) * clean + amount * noise, t, captions)
        return functional.mse_loss(velocity, noise - clean)

    def predict(self, noisy: Tensor, t: Tensor, captions: list[str]) -> Tensor:
        """The velocity for latents `[B, 3, F, H, W]` at times `t` in (0, 1)."""
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        )
        mask = tokens.attention_mask
        text = self.net["text_encoder"](tokens.input_ids, mask).last_hidden_state
        velocity: Tensor = self.net["transformer"](
            hidden_states=noisy,
            timestep=1000 * t,
            encoder_hidden_states=text * mask[..., None],  # `WanPipeline` puts zeros in the place of padding
            return_dict=False,
        )[0]
        return velocity


def make_fit(plan: list[Level], width: int = 192, depth: int = 5, seed: int = 0) -> Fit:
    """A training run that has not begun."""
    torch.manual_seed(seed)
    pipe = build_pipeline(width, depth)
    net = nn.ModuleDict({name: getattr(pipe, name) for name in LEARNED})
    return Fit(net, plan, ClipLoss(pipe, net), Rates(lr=1.5e-3), seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sprites_wan"))
    parser.add_argument("--samples", type=int, default=40_000, help="clips to see at the coarsest level")
    parser.add_argument("--batch", type=int, default=32, help="largest batch")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--export", type=Path, help="only write the averaged weights of the last checkpoint here")
    args = parser.parse_args(arguments)
    if args.export:
        save_half(build_pipeline(args.width, args.layers), LEARNED, averaged(args.out), args.export)
        return
    fit = make_fit(levels(args.samples, args.batch), args.width, args.layers)
    run(fit, args.out, args.checkpoint_minutes)


if __name__ == "__main__":
    main()
