"""Train `emoji-styles` (resumable; CPU or GPU) or export its weights.

    python -m hasten_zoo.emoji_styles.train --minutes 120                        # two hours on one core
    python -m hasten_zoo.emoji_styles.train --device cuda --minutes 8 --batch 512
    python -m hasten_zoo.emoji_styles.train --export zoo/src/hasten_zoo/emoji_styles/weights
    python -m hasten_zoo.emoji_styles.train --cooldown 100000                    # the last decay of the rate, on a copy

Rectified flow: `x_t = (1 - t) x_0 + t eps`, target `eps - x_0`, mean squared error; times logit-normal (a tenth
uniform), shifted as the sampler shifts them. Most batches are of 128 pixels (64 tokens), some of 64 (16 tokens) and of
192 (144 tokens), so that coarse and fine stages are in the distribution. Transformer and text encoders learn together.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from hasten.errors import ModelError
from hasten.io import write_atomically
from torch import Tensor, nn
from torch.nn import functional as F

from hasten_zoo.command import add_options, at_least_one, run_with, told
from hasten_zoo.emoji_styles.augment import CAPTION_LEFT_OUT, COLOURS, STYLE_LEFT_OUT, caption
from hasten_zoo.emoji_styles.data import PACKAGES, EmojiStyles, load_emoji_styles_data
from hasten_zoo.emoji_styles.latents import Latents, load_latents, vae_folder
from hasten_zoo.emoji_styles.model import LEARNING, TEXT_TOKENS, build_pipeline, build_tokenizer, shift
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.record import LOG
from hasten_zoo.swift import attention_for
from hasten_zoo.training import CHECKPOINT, Loss, Settings, Training, read_checkpoint, save_half
from hasten_zoo.words import token_ids

WEIGHTS = Path(__file__).parent / "weights"
SHARES = {64: 0.12, 128: 0.8, 192: 0.08}  # of the batches
UNIFORM = 0.1  # of the times


def shifted_times(n: int, tokens: int, generator: torch.Generator) -> Tensor:
    """`[n]` times in (0, 1): logit-normal, a tenth uniform, shifted as the sampler does for `tokens` image tokens."""
    device = generator.device
    u = torch.sigmoid(torch.randn(n, generator=generator, device=device))
    uniform = torch.rand(n, generator=generator, device=device)
    u = torch.where(torch.rand(n, generator=generator, device=device) < UNIFORM, uniform, u)
    s = shift(tokens)
    return s * u / (1 + (s - 1) * u)


def samples_of(batch: int, size: int) -> int:
    """How many samples a batch has at a size in pixels: where there are more tokens, fewer."""
    return batch if size <= 128 else -(-batch // 2)


class Captions:
    """Token ids of every caption that training can ask for.

    Attributes:
        ids: by size, `[V, N, 2, 16]` for the views of `Latents`, without (0) and with (1) the style.
        empty: `[16]`, the empty caption.

    Raises:
        ModelError: if the latents are not those of the training pairs.
    """

    def __init__(self, data: EmojiStyles, latents: dict[int, Latents], tokenizer: Any) -> None:
        pairs = [data.pairs[i] for i in data.taught(held_out=False).tolist()]
        names = list(COLOURS)
        for size, views in latents.items():
            if views.colours.shape[1] != len(pairs):
                raise ModelError(
                    f"the latents of {size} pixels are of {views.colours.shape[1]} images, and {len(pairs)} are "
                    "trained on; make them again with python -m hasten_zoo.emoji_styles.latents"
                )
        self.empty = token_ids(tokenizer, [""])[0]
        self.ids = {}
        for size, views in latents.items():
            rows = [
                caption(pair, names[colour], style)
                for view in views.colours.tolist()
                for pair, colour in zip(pairs, view, strict=True)
                for style in (False, True)
            ]
            self.ids[size] = token_ids(tokenizer, rows).view(*views.colours.shape, 2, TEXT_TOKENS)


class Objective:
    """Draws a batch of latents and captions and gives the loss of the velocity."""

    def __init__(
        self, net: nn.ModuleDict, latents: dict[int, Latents], captions: Captions, batch: int, device: str = "cpu"
    ) -> None:
        self.net, self.batch = net, batch
        self.values = {size: found.values.to(device) for size, found in latents.items()}
        self.ids = {size: ids.to(device) for size, ids in captions.ids.items()}
        self.empty = captions.empty.to(device)
        self.sizes = sorted(self.values)
        self.shares = torch.tensor([SHARES[size] for size in self.sizes], device=device)
        self.velocities = {size: Velocity(net, image_positions(size, device)) for size in self.sizes}
        self.ahead: list[int] = []
        self.device = device

    def next_size(self, generator: torch.Generator) -> int:
        """Of the next batch. A GPU draws many at a time: reading what it drew waits for it."""
        if not self.ahead:
            count = 1 if self.device == "cpu" else 256
            self.ahead = torch.multinomial(self.shares, count, replacement=True, generator=generator).tolist()
        return self.sizes[self.ahead.pop()]

    def __call__(self, generator: torch.Generator) -> Loss:
        size = self.next_size(generator)
        values, ids = self.values[size], self.ids[size]
        n = samples_of(self.batch, size)
        draw: dict[str, Any] = {"generator": generator, "device": self.device}
        view = torch.randint(len(values), (n,), **draw)
        row = torch.randint(values.shape[1], (n,), **draw)
        with_style = (torch.rand(n, **draw) >= STYLE_LEFT_OUT).long()
        dropped = torch.rand(n, **draw) < CAPTION_LEFT_OUT
        text = torch.where(dropped[:, None], self.empty, ids[view, row, with_style]).long()
        side = size // 8
        clean = FluxPipeline._pack_latents(values[view, row].float(), n, values.shape[2], side, side)
        noise = torch.randn(clean.shape, **draw)
        t = shifted_times(n, clean.shape[1], generator)
        noisy = torch.lerp(clean, noise, t[:, None, None])
        with attention_for(self.device):
            velocity = self.velocities[size](noisy, t, text)
        return Loss(F.mse_loss(velocity.float(), noise - clean), n, str(size))


class Velocity(nn.Module):
    """`predict` for one size."""

    def __init__(self, net: nn.ModuleDict, positions: Tensor) -> None:
        super().__init__()
        self.net, self.positions = net, positions

    def forward(self, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return predict(self.net, noisy, t, text, self.positions)


def image_positions(size: int, device: str = "cpu") -> Tensor:
    """`[tokens, 3]` positions of the image tokens at a size in pixels."""
    positions: Tensor = FluxPipeline._prepare_latent_image_ids(
        1, size // 16, size // 16, torch.device(device), torch.float32
    )
    return positions


def predict(net: nn.ModuleDict, noisy: Tensor, t: Tensor, text: Tensor, positions: Tensor) -> Tensor:
    """The velocity `[B, N, 64]` for packed latents at times `[B]` and captions `[B, 16]`, as the pipeline calls it."""
    velocity: Tensor = net["transformer"](
        hidden_states=noisy,
        timestep=t,
        pooled_projections=net["text_encoder"](text, output_hidden_states=False).pooler_output,
        encoder_hidden_states=net["text_encoder_2"](text, output_hidden_states=False)[0],
        txt_ids=torch.zeros(TEXT_TOKENS, 3, device=noisy.device),
        img_ids=positions,
        return_dict=False,
    )[0]
    return velocity


def fresh_pipeline(data: EmojiStyles, vae: Path) -> FluxPipeline:
    """An untrained pipeline with the vocabulary of the data and a trained autoencoder."""
    return build_pipeline(build_tokenizer(list(PACKAGES), data.concepts), EmojiVAE.from_pretrained(vae))


def learning_parts(pipe: FluxPipeline) -> dict[str, Any]:
    """The parts that learn, by name."""
    return {name: getattr(pipe, name) for name in LEARNING}


def export(state: dict[str, Any], pipe: FluxPipeline, out: Path, log: Path | None = None) -> None:
    """Write the averaged weights as a pipeline folder in half precision, from which training can also go on."""
    others = {"vae": pipe.vae.half(), "scheduler": pipe.scheduler, "tokenizer": pipe.tokenizer}
    save_half(learning_parts(pipe), state, out, "emoji-styles", others, log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = Path("runs/emoji-styles")
    parser.add_argument("--data", type=Path, default=runs / "data")
    parser.add_argument("--vae", type=Path, help="default: the folder of train_vae, else the committed one")
    parser.add_argument("--latents", type=Path, default=runs / "latents")
    parser.add_argument(
        "--cooldown", type=at_least_one, metavar="SAMPLES", help="let the rate fall to zero, in OUT/cooldown"
    )
    add_options(parser, runs / "flow", 1_500_000, 32, WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data = load_emoji_styles_data(args.data)
    pipe = fresh_pipeline(data, args.vae or vae_folder(runs, args.committed))
    folder = args.out / "cooldown" if args.cooldown else args.out
    if args.export:
        furthest = max((args.out, args.out / "cooldown"), key=_samples_in)
        export(read_checkpoint(furthest), pipe, args.export, furthest / LOG)
        return
    cooldown, total = None, args.samples
    if args.cooldown:
        total, cooldown = start_cooldown(args.out, args.cooldown)
    parts = learning_parts(pipe)
    net = nn.ModuleDict(parts)
    latents = load_latents(args.latents)
    objective = Objective(net, latents, Captions(data, latents, pipe.tokenizer), args.batch, args.device)
    settings = Settings(lr=args.lr, cooldown=cooldown, bfloat16=not args.float32, muon=not args.adamw)
    training = Training(net, objective, settings, args.device)
    run_with(args, training, parts, folder, total)


def start_cooldown(trunk: Path, samples: int) -> tuple[int, tuple[int, int]]:
    """Copy the trunk's checkpoint and log unless a cooldown is under way; returns its end and (start, length).

    All in samples.

    Raises:
        ModelError: if one of another length is under way, or is over and the trunk has not moved on since; or if the
            trunk has no checkpoint.
    """
    folder = trunk / "cooldown"
    plan = folder / "plan.json"
    planned = json.loads(plan.read_text()) if plan.exists() else None
    if planned is not None and _samples_in(folder) < planned["start"] + planned["length"]:
        if planned["length"] != samples:
            raise ModelError(
                f"a cooldown of {planned['length']} samples is under way in {folder}, not of {samples}; go on with "
                "that one, or remove the folder"
            )
    elif planned is None or planned["start"] != _samples_in(trunk):
        read_checkpoint(trunk)  # there has to be one
        plan.unlink(missing_ok=True)  # comes last again: a copy that was cut short must not go on with an old start
        for name in (LOG, CHECKPOINT):
            if (trunk / name).is_file():
                with (trunk / name).open("rb") as file:
                    write_atomically(folder / name, partial(shutil.copyfileobj, file))
        planned = {"start": _samples_in(folder), "length": samples}  # the trunk may have moved on since
        write_atomically(plan, json.dumps(planned) + "\n")
    elif planned["length"] != samples:
        raise ModelError(
            f"the cooldown of {planned['length']} samples in {folder} is over, and {trunk} has not moved on since it "
            f"began; remove that folder for a cooldown of {samples} from there, or train on without --cooldown first"
        )
    return planned["start"] + planned["length"], (planned["start"], planned["length"])


def _samples_in(folder: Path) -> int:
    """How many samples the checkpoint of a folder has seen; 0 without one."""
    return int(read_checkpoint(folder)["position"][1]) if (folder / CHECKPOINT).is_file() else 0


if __name__ == "__main__":
    told(main)
