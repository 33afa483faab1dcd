"""Train the video autoencoder of `sprites-wan` and write it as a folder that diffusers loads.

    python -m hasten_zoo.sprites_wan.train_vae                      # writes runs/sprites-wan/vae/weights
    python -m hasten_zoo.sprites_wan.train_vae --decoder            # from those, runs/sprites-wan/vae/decoder/weights

L1 and squared error of three neighbouring frames, of which the outer two are encoded. Noise on the latents teaches the
decoder to forgive a sampler's errors, and in a part of the batches latents of half the size are decoded against frames
of half the size: coarse stages, which resize latents, then see what a large model's autoencoder shows them. Clips are
those that the transformer trains on, at all its sizes.

With `--decoder` the encoder stays as it was exported, and with it the latents and every transformer that learned them:
the decoder, and with it the predictor of the latents of the frames between, goes on, at less noise, for sharper
pictures.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from random import Random

import torch
from hasten.errors import ConfigError, ModelError
from hasten.io import write_atomically, write_sealed
from torch import Tensor
from torch.nn import functional as F

from hasten_zoo.command import told
from hasten_zoo.sprites_wan.data import CANVAS, all_clips, draw, draw_batch, jittered
from hasten_zoo.sprites_wan.vae import SpriteVAE, load_vae
from hasten_zoo.training import CHECKPOINT, Loss, Settings, Training, read_checkpoint, run

__all__ = ["Objective", "export", "main", "round_trip"]

SIDES = {64: 0.6, 56: 0.1, 48: 0.1, 40: 0.1, 32: 0.1}  # pixels, and their shares of the batches
LATENT_NOISE, DECODER_NOISE = 0.2, 0.08  # largest standard deviations, against the latents' one
HALF_SHARE = 0.25  # of the batches also decode half-size latents
SQUARED, HALF = 2.0, 0.5  # weights against L1


class Objective:
    """Draws three neighbouring frames of `batch` clips and gives the loss of their round trip."""

    def __init__(self, vae: SpriteVAE, batch: int, device: str = "cpu", noise: float = LATENT_NOISE) -> None:
        self.vae, self.batch, self.device, self.noise = vae, batch, device, noise
        self.clips = [clip for clip in all_clips() if not clip.held_out]

    def __call__(self, generator: torch.Generator) -> Loss:
        rng = Random(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        side = rng.choices(list(SIDES), list(SIDES.values()))[0]
        clips = [jittered(rng.choice(self.clips), rng) for _ in range(self.batch)]
        firsts = torch.tensor([rng.randrange(0, CANVAS.frames - 2, 2) for _ in clips])
        times = (firsts[:, None] + torch.arange(3)) / (CANVAS.frames - 1)
        three = draw_batch(clips, times, self.device).flatten(0, 1)
        frames = F.interpolate(three, (side, side), mode="area") * 2 - 1
        frames = frames.unflatten(0, (len(clips), 3))
        outer: Tensor = self.vae.encode_frames(torch.cat([frames[:, 0], frames[:, 2]]))
        sigma = self.noise * torch.rand(len(outer), 1, 1, 1, generator=generator, device=self.device)
        noisy = outer + sigma * torch.randn(outer.shape, generator=generator, device=self.device)
        before, after = noisy.chunk(2)
        latents = torch.cat([before, self.vae.middle(before, after), after])
        wanted = frames.transpose(0, 1).flatten(0, 1)
        decoded = self.vae.decode_frames(latents).float()
        parts = {"l1": F.l1_loss(decoded, wanted), "mse": F.mse_loss(decoded, wanted)}
        value = parts["l1"] + SQUARED * parts["mse"]
        if side % 16 == 0 and rng.random() < HALF_SHARE:
            small = self.vae.decode_frames(F.avg_pool2d(outer.float(), 2)).float()
            parts["half"] = F.l1_loss(small, F.avg_pool2d(torch.cat([frames[:, 0], frames[:, 2]]), 2))
            value = value + HALF * parts["half"]
        return Loss(value, len(wanted), str(side), parts)


@torch.no_grad()
def round_trip(vae: SpriteVAE, clips: int = 24) -> dict[str, float]:
    """Mean PSNR in dB of the frames of held-out clips: the encoded ones, and those between them."""
    vae.eval()
    chosen = [clip for clip in all_clips() if clip.held_out]
    chosen = chosen[:: max(1, len(chosen) // clips)][:clips]
    video = torch.stack([draw(clip, CANVAS.frames) for clip in chosen]).transpose(1, 2) * 2 - 1
    decoded = vae.decode(vae.encode(video, return_dict=False)[0], return_dict=False)[0].clamp(-1, 1)
    decibels = -10 * ((decoded - video) / 2).square().mean((1, 3, 4)).log10()
    return {
        "psnr_encoded": round(float(decibels[:, ::2].mean()), 2),
        "psnr_between": round(float(decibels[:, 1::2].mean()), 2),
    }


@torch.no_grad()
def export(average: dict[str, Tensor], vae: SpriteVAE, out: Path, same_latents: bool = False) -> dict[str, float]:
    """Write the averaged weights in half precision, with the latents' statistics; returns what was measured.

    With `same_latents` the statistics are those that the autoencoder came with.
    """
    vae.load_state_dict(average)
    if not same_latents:
        _measure_latents(vae)
    vae.eval()
    measured = round_trip(vae)

    def fill(folder: Path) -> None:
        vae.half().save_pretrained(folder)
        write_atomically(folder / "round_trip.json", json.dumps(measured) + "\n")

    write_sealed(out, fill)
    return measured


def _measure_latents(vae: SpriteVAE) -> None:
    """Take mean and deviation of the latents anew; the average of what training saw lags behind the weights."""
    rng = Random(0)
    clips = [jittered(clip, rng) for clip in all_clips()[::5] if not clip.held_out]
    video = torch.stack([draw(clip, 9) for clip in clips]).transpose(1, 2) * 2 - 1
    vae.norm.reset_running_stats()
    vae.norm.momentum = None
    vae.train().encode(video)
    vae.eval()
    z = vae.encode(video, return_dict=False)[0].transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=z.mean(1).tolist(), latents_std=z.std(1).tolist())


def _check_encoder(vae: SpriteVAE, folder: Path) -> None:
    """Refuse a checkpoint of a decoder whose encoder is not that of `vae`."""
    if not (folder / CHECKPOINT).is_file():
        return
    learned = read_checkpoint(folder)["net"]
    kept = {name: value for name, value in vae.state_dict().items() if name.startswith(("encoder.", "norm."))}
    if not all(name in learned and torch.equal(learned[name], value) for name, value in kept.items()):
        raise ModelError(
            f"the checkpoint in {folder} is of another encoder than the exported one, expected the same; "
            "delete the folder to start from the exported weights"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sprites-wan/vae"))
    parser.add_argument("--samples", type=int, default=60_000, help="frames to see, in total")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--batch", type=int, default=16, help="clips, three frames of each")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoder", action="store_true", help="the encoder stays as it was exported")
    parser.add_argument("--export", action="store_true", help="only write the averaged weights of the last checkpoint")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    out = args.out / "decoder" if args.decoder else args.out
    vae = load_vae(args.out / "weights") if args.decoder else SpriteVAE()
    if args.decoder:
        _check_encoder(vae, out)
    if args.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {args.samples}")
    if not args.export:
        cooldown = (round(0.5 * args.samples), max(1, round(0.5 * args.samples)))
        settings = Settings(lr=args.lr, cooldown=cooldown, ema=0.995, bfloat16=True)
        vae.encoder.requires_grad_(not args.decoder)
        vae = vae.to(memory_format=torch.channels_last)  # a third less time
        noise = DECODER_NOISE if args.decoder else LATENT_NOISE
        training = Training(vae, Objective(vae, args.batch, args.device, noise), settings, args.device)
        vae.norm.train(not args.decoder)
        run(training, out, args.samples, args.minutes, checkpoint_minutes=2)
    state = read_checkpoint(out)
    vae = load_vae(args.out / "weights") if args.decoder else SpriteVAE()
    print(json.dumps(export(state["average"], vae, out / "weights", args.decoder)))


if __name__ == "__main__":
    told(main)
