"""Train `emoji-kontext` (CPU is enough; the same command goes on from the last checkpoint).

    python -m hasten_zoo.emoji_kontext.train --out runs/kontext
    python -m hasten_zoo.emoji_kontext.train --out runs/kontext --export zoo/src/hasten_zoo/emoji_kontext/weights

Rectified flow on the edited image, `x_t = (1 - t) x_0 + t eps` with target `eps - x_0`, given the clean source as
extra tokens and the instruction; one instruction in ten is empty. Tokens under the edit mask count four times, because
a local edit changes a tenth of the image. First at 32x32 pixels (64 + 64 tokens), then at 64x64 (256 + 256).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor, nn
from torch.nn import functional

from hasten_zoo.command import told
from hasten_zoo.emoji_flux import WEIGHTS as EMOJI_FLUX
from hasten_zoo.emoji_flux.train import shifted_times
from hasten_zoo.emoji_kontext.data import EditPlan, draw_plan, painter
from hasten_zoo.emoji_kontext.model import LEARNED, TEXT_TOKENS, build_pipeline
from hasten_zoo.fit import Fit, Level, Rates, averaged, run, save_half

__all__ = ["levels", "main", "make_fit"]

SIDES = {"32": 32, "64": 64}  # pixels by level
TOKEN = 4  # pixels
EMPHASIS, DROPOUT = 3.0, 0.1  # extra weight of tokens under a local edit mask; share of empty instructions


def levels(coarse: int, fine: int, batch: int = 32) -> list[Level]:
    """`coarse` images at 32x32, then `fine` at 64x64, which cost about five times as much each."""
    return [Level("32", coarse, batch, 1.0), Level("64", fine, max(1, batch // 2), 5.0)]


def _training_plan(rng: Random, mains: Sequence[int]) -> EditPlan:
    plan = draw_plan(rng, mains)
    return plan if not plan.held_out else _training_plan(rng, mains)


class EditLoss:
    """The loss of a fresh batch of edits."""

    def __init__(self, pipe: FluxKontextPipeline, net: nn.ModuleDict) -> None:
        self.pipe, self.net, self.painter = pipe, net, painter()

    def __call__(self, level: str, batch: int, generator: torch.Generator) -> Tensor:
        side = SIDES[level]
        rng = Random(int(torch.randint(2**62, (), generator=generator)))
        plans = [_training_plan(rng, self.painter.mains) for _ in range(batch)]
        edits = [self.painter.edit(plan) for plan in plans]
        clean = self.pack(torch.stack([edit.target for edit in edits]), side)
        source = self.pack(torch.stack([edit.source for edit in edits]), side)
        mask = torch.stack([edit.mask for edit in edits]).float()[:, None]
        local = torch.tensor([edit.kind == "local" for edit in edits])
        in_edit = functional.max_pool2d(mask, 64 // (side // TOKEN)).flatten(1) * local[:, None]
        noise = torch.randn(clean.shape, generator=generator)
        t = shifted_times(batch, clean.shape[1], generator)
        noisy = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        prompts = ["" if rng.random() < DROPOUT else plan.prompt for plan in plans]
        error = (self.predict(noisy, source, t, prompts, side) - (noise - clean)).square().mean(-1)
        weight = 1 + EMPHASIS * in_edit
        return (weight * error).sum() / weight.sum()

    def pack(self, images: Tensor, side: int) -> Tensor:
        """Images `[B, 3, 64, 64]` in [0, 1] as packed latents `[B, (side / 4)**2, 48]`."""
        config = self.pipe.vae.config
        small = functional.avg_pool2d(images, 64 // side)
        latents = (self.pipe.vae.encode(small * 2 - 1).latents - config.shift_factor) * config.scaling_factor
        packed: Tensor = FluxKontextPipeline._pack_latents(latents, len(images), 12, side // 2, side // 2)
        return packed

    def predict(self, noisy: Tensor, source: Tensor, t: Tensor, prompts: list[str], side: int) -> Tensor:
        """The velocity for packed latents `[B, N, 48]` at times `t` in (0, 1), given the packed source."""
        ids = self.pipe.tokenizer(
            prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        grid = FluxKontextPipeline._prepare_latent_image_ids(1, side // TOKEN, side // TOKEN, "cpu", torch.float32)
        reference = grid.clone()
        reference[:, 0] = 1
        velocity: Tensor = self.net["transformer"](
            hidden_states=torch.cat([noisy, source], 1),
            timestep=t,
            pooled_projections=self.net["text_encoder"](ids).pooler_output,
            encoder_hidden_states=self.net["text_encoder_2"](ids)[0],
            txt_ids=torch.zeros(TEXT_TOKENS, 3),
            img_ids=torch.cat([grid, reference]),
            return_dict=False,
        )[0]
        return velocity[:, : noisy.shape[1]]


def make_fit(plan: list[Level], start: Path | None = EMOJI_FLUX, width: int = 128, seed: int = 0) -> Fit:
    """A training run that has not begun; `start` is a folder of `emoji-flux` weights, or None for random ones."""
    torch.manual_seed(seed)
    pipe = build_pipeline(start, width)
    net = nn.ModuleDict({name: getattr(pipe, name) for name in LEARNED})
    return Fit(net, plan, EditLoss(pipe, net), Rates(lr=1.5e-3), seed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kontext"))
    parser.add_argument("--coarse", type=int, default=40_000, help="edits to see at 32x32")
    parser.add_argument("--fine", type=int, default=12_000, help="edits to see at 64x64")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=128, help="other than 128: from random weights")
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--export", type=Path, help="only write the averaged weights of the last checkpoint here")
    args = parser.parse_args(arguments)
    if args.export:
        save_half(build_pipeline(width=args.width), LEARNED, averaged(args.out), args.export, "emoji-kontext")
        return
    start = EMOJI_FLUX if args.width == 128 else None
    run(make_fit(levels(args.coarse, args.fine, args.batch), start, args.width), args.out, args.checkpoint_minutes)


if __name__ == "__main__":
    told(main)
