"""Train `sprites-stream` (the same command goes on from the last checkpoint; a GPU is used if there is one).

    python -m hasten_zoo.sprites_stream.train --out runs/sprites_stream
    python -m hasten_zoo.sprites_stream.train --out runs/sprites_stream --export FOLDER

Rectified flow with teacher forcing: every chunk has a noise level of its own and sees clean copies of the chunks before
it, to which a little noise is added so that the model stands its own mistakes when it rolls out. Levels are numbers of
frames: short clips come first, then longer ones, with every fourth batch short. Names are withheld after a random
number of frames, so that looking up the past is learned where it is cheap.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hasten_zoo.command import told
from hasten_zoo.fit import Fit, Level, Rates, averaged, run
from hasten_zoo.sprites_stream.data import NAMED, conditions, draw, random_world
from hasten_zoo.sprites_stream.model import CausalVideoTransformer, ModelConfig, save_model
from hasten_zoo.sprites_stream.rollout import SHIFT

__all__ = ["levels", "main", "make_fit"]

SHARES = {"6": (1.0, 16, 1.0), "12": (0.25, 8, 2.5), "48": (0.04, 4, 18.0)}  # frames: share of clips, batch, cost
LOW = 0.2  # noise level below which the loss counts the estimate of the image rather than the velocity
HISTORY_NOISE = 0.1  # at the most, in the clean copies


def levels(clips: int) -> list[Level]:
    """`clips` of the shortest, and fewer, by fixed shares, of the others."""
    return [Level(name, max(1, int(clips * share)), batch, cost) for name, (share, batch, cost) in SHARES.items()]


class ClipLoss:
    """The loss of a fresh batch of clips: mean squared error of the velocity, all chunks at once."""

    def __init__(self, model: CausalVideoTransformer, device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, level: str, batch: int, generator: torch.Generator) -> Tensor:
        frames = int(level)
        rng = Random(int(torch.randint(2**62, (), generator=generator)))
        worlds = [random_world(rng) for _ in range(batch)]
        clean = torch.stack([draw(world, frames) for world in worlds]) * 2 - 1
        chunk = self.model.config.chunk
        named = [chunk * rng.randint(1, min(frames, NAMED) // chunk) for _ in worlds]
        words = torch.stack([conditions(w, 0, frames, n) for w, n in zip(worlds, named, strict=True)])
        t = torch.sigmoid(torch.randn(batch, frames // chunk, generator=generator))
        t = self._by_frame(SHIFT * t / (1 + (SHIFT - 1) * t))
        near = self._by_frame(HISTORY_NOISE * torch.rand(batch, frames // chunk, generator=generator))
        noise, grain = (torch.randn(clean.shape, generator=generator).to(self.device) for _ in range(2))
        clean = clean.to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            velocity = self.model.teach(
                _mixed(clean, grain, near), near, _mixed(clean, noise, t), t, words.to(self.device)
            )
        # Samplers of few steps hardly visit the lowest levels, where a small error of the image is a large velocity.
        weight = (t / LOW).clamp(max=1)[..., None, None, None]
        return mse_loss(weight * velocity.float(), weight * (noise - clean))

    def _by_frame(self, chunks: Tensor) -> Tensor:
        """`[B, F]` from values of chunks."""
        return chunks.repeat_interleave(self.model.config.chunk, 1).to(self.device)


def _mixed(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`(1 - t) clean + t noise` for videos `[B, F, 3, H, W]` and times `[B, F]`."""
    return torch.lerp(clean, noise, t[..., None, None, None])


def make_fit(plan: list[Level], config: ModelConfig | None = None, device: str = "cpu", seed: int = 0) -> Fit:
    """A training run that has not begun."""
    torch.manual_seed(seed)
    model = CausalVideoTransformer(config).to(device)
    return Fit(nn.ModuleDict({"model": model}), plan, ClipLoss(model, torch.device(device)), Rates(lr=1.5e-3), seed)


def export(run_folder: Path, config: ModelConfig, folder: Path) -> None:
    """Write the averaged weights of the last checkpoint."""
    model = CausalVideoTransformer(config)
    nn.ModuleDict({"model": model}).load_state_dict(averaged(run_folder))
    save_model(model, folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sprites_stream"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--clips", type=int, default=8_000, help="clips of 6 frames to see; fixed shares are longer")
    parser.add_argument("--width", type=int, default=ModelConfig.width)
    parser.add_argument("--layers", type=int, default=ModelConfig.layers)
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export", type=Path, help="only write the averaged weights of the last checkpoint here")
    args = parser.parse_args(arguments)
    config = ModelConfig(width=args.width, heads=args.width // 32, layers=args.layers)
    if args.export:
        export(args.out, config, args.export)
        return
    fit = make_fit(levels(args.clips), config, args.device)
    run(fit, args.out, args.checkpoint_minutes, minutes=args.minutes)


if __name__ == "__main__":
    told(main)
