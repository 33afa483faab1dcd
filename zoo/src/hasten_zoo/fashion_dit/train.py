"""Train `fashion-dit` (resumable; CPU or GPU) or export its weights.

    python -m hasten_zoo.fashion_dit.train --minutes 120                         # two hours on one core
    python -m hasten_zoo.fashion_dit.train --device cuda --minutes 4 --batch 1024
    python -m hasten_zoo.fashion_dit.train --export zoo/src/hasten_zoo/fashion_dit/weights

Noise prediction at uniform times, weighted as min-SNR-5 does (arXiv:2303.09556, equation 8 for noise prediction); one
label in ten is left out. No augmentation: the distribution is what is judged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiTPipeline
from torch import Tensor, nn

from hasten_zoo.command import add_options, run_with, told
from hasten_zoo.fashion_dit import WEIGHTS
from hasten_zoo.fashion_dit.data import load_fashion_data, scaled
from hasten_zoo.fashion_dit.model import NO_CLASS, build_pipeline, without_label_dropout
from hasten_zoo.record import LOG
from hasten_zoo.swift import attention_for
from hasten_zoo.training import Loss, Settings, Training, read_checkpoint, save_half

LABEL_LEFT_OUT = 0.1
SNR_CAP = 5.0


class Objective:
    """Draws a batch of images, labels and noise and gives the weighted error of the predicted noise.

    Args:
        pipe: whose transformer learns.
        images: `[N, 1, 32, 32]` uint8.
        labels: `[N]`.
        batch: images per step.
        device: where the images are kept.
    """

    def __init__(self, pipe: DiTPipeline, images: Tensor, labels: Tensor, batch: int, device: str = "cpu") -> None:
        self.transformer, self.vae, self.batch, self.device = pipe.transformer, pipe.vae, batch, device
        self.images, self.labels = images.to(device), labels.to(device)
        self.kept = pipe.scheduler.alphas_cumprod.to(device)

    def __call__(self, generator: torch.Generator) -> Loss:
        n, device = self.batch, self.device
        rows = torch.randint(len(self.images), (n,), generator=generator, device=device)
        left_out = torch.rand(n, generator=generator, device=device) < LABEL_LEFT_OUT
        labels = torch.where(left_out, NO_CLASS, self.labels[rows])
        (latents,) = self.vae.encode(scaled(self.images[rows]), return_dict=False)
        clean = latents * self.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator, device=device)
        times = torch.randint(len(self.kept), (n,), generator=generator, device=device)
        kept = self.kept[times].view(-1, 1, 1, 1)
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        with attention_for(device):
            predicted = self.transformer(noisy, timestep=times, class_labels=labels, return_dict=False)[0]
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        weight = (SNR_CAP * (1 - kept) / kept).clamp(max=1).flatten()  # min(snr, 5) / snr
        return Loss((weight * error).mean(), n, "32", {"unweighted": error.detach().mean()})


def export(state: dict[str, object], pipe: DiTPipeline, out: Path, log: Path | None = None) -> None:
    """Write the averaged weights as a pipeline folder in half precision, from which training can also go on."""
    others = {"vae": pipe.vae, "scheduler": pipe.scheduler}
    save_half({"transformer": pipe.transformer}, state, out, "fashion-dit", others, log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = Path("runs/fashion-dit")
    parser.add_argument("--data", type=Path, default=runs / "data")
    add_options(parser, runs / "noise", 3_000_000, 64, WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pipe = build_pipeline()
    if args.export:
        export(read_checkpoint(args.out), pipe, args.export, args.out / LOG)
        return
    data = load_fashion_data(args.data)
    parts = {"transformer": without_label_dropout(pipe.transformer)}
    objective = Objective(pipe, data.train, data.train_labels, args.batch, args.device)
    settings = Settings(lr=args.lr, bfloat16=not args.float32)
    training = Training(nn.ModuleDict(parts), objective, settings, args.device)
    run_with(args, training, parts, args.out, args.samples)


if __name__ == "__main__":
    told(main)
