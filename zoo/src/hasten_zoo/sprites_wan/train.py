"""Train `sprites-wan` (resumable; CPU or GPU) or export its weights.

    python -m hasten_zoo.sprites_wan.train_vae                                       # the autoencoder comes first
    python -m hasten_zoo.sprites_wan.train --compile --minutes 180                   # three hours on one core
    python -m hasten_zoo.sprites_wan.train --compile --minutes 60 --mix fine --fall 1
    python -m hasten_zoo.sprites_wan.train --device cuda --compile --minutes 8 --batch 128
    python -m hasten_zoo.sprites_wan.train --export zoo/src/hasten_zoo/sprites_wan/weights

Rectified flow: `x_t = (1 - t) x_0 + t eps`, target `eps - x_0`, mean squared error; times logit-normal with the
sampler's shift; one caption in ten is empty, and motions that are learned last come up more often. Clips are drawn as
they are needed, each batch at a side and a number of latent frames of its own, over the same motion: sampling in stages
then finds its coarse stages known. All batches have about the same number of tokens. The mix `coarse` spends most of
its time on small and short clips, of which it sees many; `fine` on full ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor, nn
from torch.nn import functional

from hasten_zoo.command import add_options, run_with, told
from hasten_zoo.fit import logit_normal_times
from hasten_zoo.record import LOG
from hasten_zoo.sprites_wan import WEIGHTS
from hasten_zoo.sprites_wan.data import CANVAS, all_clips, draw_batch, jittered
from hasten_zoo.sprites_wan.model import LEARNED, SHIFT, build_pipeline
from hasten_zoo.sprites_wan.vae import DOWN, load_vae
from hasten_zoo.training import Loss, Settings, Training, read_checkpoint, save_half
from hasten_zoo.words import token_ids

__all__ = ["MIXES", "Mix", "Objective", "clips_of", "export", "learning_parts", "main"]

CAPTION_LEFT_OUT = 0.1
FULL = 17  # latent frames
PATCH = 2 * DOWN  # pixels a token covers, along each axis
MANY_TOKENS = 200
OFTEN = {"fast": 2, "circling": 3, "zooming in": 3, "falling and bouncing": 3}  # motions that are learned last

Mix = tuple[dict[int, float], dict[int, float]]  # shares of the batches: by side in pixels, by latent frames
MIXES: dict[str, Mix] = {
    "coarse": (
        {32: 0.35, 40: 0.05, 48: 0.15, 56: 0.05, 64: 0.4},
        {5: 0.2, 7: 0.15, 9: 0.3, 11: 0.05, 13: 0.1, 15: 0.05, 17: 0.15},
    ),
    "fine": (
        {32: 0.1, 40: 0.05, 48: 0.1, 56: 0.1, 64: 0.65},
        {7: 0.1, 9: 0.1, 11: 0.05, 13: 0.1, 15: 0.05, 17: 0.6},
    ),
}


def clips_of(batch: int, side: int, frames: int) -> int:
    """How many clips have about as many tokens as `batch` full ones."""
    full = FULL * (CANVAS.side // PATCH) ** 2
    return max(1, batch * full // (frames * (side // PATCH) ** 2))


class Objective:
    """Draws a batch of clips, captions, times and noise and gives the error of the predicted velocity.

    Args:
        pipe: whose transformer and text encoder learn; its autoencoder does not.
        batch: clips of the full size per step; of other sizes, as many as have the same number of tokens.
        mix: of sizes.
        device: where all is computed.
    """

    def __init__(self, pipe: WanPipeline, batch: int, mix: Mix, device: str = "cpu") -> None:
        self.net = nn.ModuleDict(learning_parts(pipe)).to(device)
        self.transformer, self.text_encoder = pipe.transformer, pipe.text_encoder
        self.vae = pipe.vae.to(device).eval().requires_grad_(False)
        self.batch, self.mix, self.device = batch, mix, device
        self.clips = [clip for clip in all_clips() if not clip.held_out]
        self.often = [
            max((share for words, share in OFTEN.items() if words in clip.caption), default=1) for clip in self.clips
        ]
        ids = token_ids(pipe.tokenizer, [*(clip.caption for clip in self.clips), ""]).long()
        self.ids, self.mask = ids.to(device), (ids != pipe.tokenizer.pad_token_id).long().to(device)
        shape = (1, -1, 1, 1, 1)
        self.mean = torch.tensor(pipe.vae.config.latents_mean, device=device).view(shape)
        self.std = torch.tensor(pipe.vae.config.latents_std, device=device).view(shape)

    def choose_attention(self, tokens: int) -> None:
        """For few keys plain products are faster on a CPU than the fused kernel, whose backward pass is slow."""
        if self.device != "cpu":
            return
        for block in self.transformer.blocks:
            block.attn1.set_attention_backend("_native_math" if tokens < MANY_TOKENS else "native")
            block.attn2.set_attention_backend("_native_math")

    def __call__(self, generator: torch.Generator) -> Loss:
        rng = Random(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        side, frames = (rng.choices(list(shares), list(shares.values()))[0] for shares in self.mix)
        count = clips_of(self.batch, side, frames)
        self.choose_attention(frames * (side // PATCH) ** 2)
        rows = rng.choices(range(len(self.clips)), self.often, k=count)
        clean = self.latents(rows, side, frames, rng)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        t = logit_normal_times(count, SHIFT, generator)
        left_out = [len(self.clips) if rng.random() < CAPTION_LEFT_OUT else row for row in rows]
        velocity = self.predict(torch.lerp(clean, noise, t[:, None, None, None, None]), t, torch.tensor(left_out))
        kind = "full" if (side, frames) == (CANVAS.side, FULL) else str(side)
        return Loss(functional.mse_loss(velocity.float(), noise - clean), count, kind)

    @torch.no_grad()
    def latents(self, rows: list[int], side: int, frames: int, rng: Random) -> Tensor:
        """Clean latents `[B, 8, F, side/4, side/4]` of some clips, each from a start of its own."""
        clips = [jittered(self.clips[row], rng) for row in rows]
        video = draw_batch(clips, torch.linspace(0, 1, frames), self.device).flatten(0, 1)
        if side != CANVAS.side:
            video = functional.interpolate(video, (side, side), mode="area")
        found = self.vae.encode_frames(video * 2 - 1).float().unflatten(0, (len(clips), frames)).transpose(1, 2)
        return (found - self.mean) / self.std

    def predict(self, noisy: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The velocity for latents `[B, 8, F, h, w]` at times `[B]` in (0, 1), as the pipeline asks for it.

        `rows` `[B]` are captions: those of `clips`, and after them the empty one.
        """
        rows = rows.to(self.device)
        mask = self.mask[rows]
        text = self.text_encoder(self.ids[rows], mask).last_hidden_state
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            timestep=1000 * t,
            encoder_hidden_states=text * mask[..., None],  # `WanPipeline` puts zeros in the place of padding
            return_dict=False,
        )[0]
        return velocity


def learning_parts(pipe: WanPipeline) -> dict[str, Any]:
    """The parts that learn, by name."""
    return {name: getattr(pipe, name) for name in LEARNED}


def export(state: dict[str, Any], pipe: WanPipeline, out: Path, log: Path | None = None) -> None:
    """Write the averaged weights as a pipeline folder in half precision, from which training can also go on."""
    others = {"vae": pipe.vae.half(), "scheduler": pipe.scheduler, "tokenizer": pipe.tokenizer}
    save_half(learning_parts(pipe), state, out, "sprites-wan", others, log)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = Path("runs/sprites-wan")
    parser.add_argument("--vae", type=Path, default=runs / "vae" / "weights")
    parser.add_argument("--mix", choices=list(MIXES), default="coarse", help="of sizes")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    add_options(parser, runs / "flow", 1_000_000, 6, WEIGHTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pipe = build_pipeline(load_vae(args.vae), args.width, args.layers)
    if args.export:
        export(read_checkpoint(args.out), pipe, args.export, args.out / LOG)
        return
    objective = Objective(pipe, args.batch, MIXES[args.mix], args.device)
    settings = Settings(lr=args.lr, bfloat16=not args.float32, muon=not args.adamw)
    training = Training(objective.net, objective, settings, args.device)
    run_with(args, training, learning_parts(pipe), args.out, args.samples)


if __name__ == "__main__":
    told(main)
