"""Train `emoji-styles-edit` from `emoji-styles` (resumable; CPU or GPU) or export its weights.

    python -m hasten_zoo.emoji_styles_edit.train --compile --minutes 120 --fall 0.3        # two hours on one core
    python -m hasten_zoo.emoji_styles_edit.train --device cuda --minutes 3 --batch 512 --fall 0.3
    python -m hasten_zoo.emoji_styles_edit.train --export zoo/src/hasten_zoo/emoji_styles_edit/weights

Rectified flow on the edited image, `x_t = (1 - t) x_0 + t eps` with target `eps - x_0`, given the clean source as
further tokens and the instruction; one instruction in ten is empty. Tokens in the corner of an added or removed object
count four times, because they are a seventh of the image. Most batches are of 128 pixels (64 + 64 tokens), some of 64
(16 + 16), so that coarse stages are in the distribution. What learns are low-rank differences from `emoji-styles` (see
`low_rank`), moved by AdamW, and tables of embeddings, norms and biases as a whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from hasten.errors import ModelError
from torch import Tensor, nn

from hasten_zoo.command import add_options, run_with, told
from hasten_zoo.emoji_styles import WEIGHTS as START
from hasten_zoo.emoji_styles.model import digest
from hasten_zoo.emoji_styles.model import load_pipeline as load_styles
from hasten_zoo.emoji_styles.train import image_positions, learning_parts, predict, shifted_times
from hasten_zoo.emoji_styles_edit import WEIGHTS
from hasten_zoo.emoji_styles_edit.data import CORNERS, SIZE, place, to_style
from hasten_zoo.emoji_styles_edit.latents import STEP, SceneLatents, load_scenes
from hasten_zoo.emoji_styles_edit.model import BASE, build_pipeline, learning
from hasten_zoo.low_rank import add_low_rank, save_differences, start_from_differences
from hasten_zoo.record import LOG
from hasten_zoo.swift import attention_for
from hasten_zoo.training import Loss, Settings, Training, read_checkpoint
from hasten_zoo.words import WordTokenizer, token_ids

SHARES = {SIZE: 0.82, SIZE // 2: 0.18}  # of the batches
STYLE_SHARE = 0.4  # of the edits are of the style
BACK_SHARE = 1 / 3  # of the others lead from the second image to the first
EMPTY_SHARE = 0.1  # of the instructions
EMPHASIS = 3.0  # extra weight of the tokens of an object
RANK = 24


class EditVelocity(nn.Module):
    """The velocity `[B, N, 64]` of noisy packed latents, given packed sources, times `[B]` and instructions."""

    def __init__(self, net: nn.ModuleDict, size: int = SIZE, device: str = "cpu") -> None:
        super().__init__()
        edited = image_positions(size, device)
        source = edited.clone()
        source[:, 0] = 1
        self.net, self.positions = net, torch.cat([edited, source])

    def forward(self, noisy: Tensor, source: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return predict(self.net, torch.cat([noisy, source], 1), t, text, self.positions)[:, : noisy.shape[1]]


class Edits:
    """All edits between the images of scenes, by numbers.

    Attributes:
        images: by size in pixels, `[2 N, (S/16)^2, 64]` int8 packed latents, first and second image of each scene.
        partners: `[N, P]` scenes of the same concept in other styles, of which the first `count` are meant; a concept
            of one style is its own partner.
        count: `[N]`, at least 1.
        style, there, back: `[N, 16]` token ids of the instructions that lead to a scene's first image from another
            style, to its second image, and back.
        empty: `[16]`.
        weight: by size, `[N, (S/16)^2]` of the tokens of edits between its two images.
    """

    def __init__(self, scenes: SceneLatents, tokenizer: Any, device: str = "cpu") -> None:
        n = len(scenes.style)
        self.images: dict[int, Tensor] = {}
        for size, values in scenes.values.items():
            latents, side = values.flatten(0, 1).to(device), size // 8
            self.images[size] = FluxKontextPipeline._pack_latents(latents, 2 * n, latents.shape[1], side, side)
        members: dict[str, list[int]] = {}
        for i, concept in enumerate(scenes.concept):
            members.setdefault(concept, []).append(i)
        others = [[j for j in members[concept] if j != i] or [i] for i, concept in enumerate(scenes.concept)]
        most = max(map(len, others))
        self.partners = torch.tensor([row + row[:1] * (most - len(row)) for row in others], device=device)
        self.count = torch.tensor([len(row) for row in others], device=device)

        def ids(texts: Sequence[str]) -> Tensor:
            return token_ids(tokenizer, texts).to(device)

        self.style = ids([to_style(style) for style in scenes.style])
        self.there, self.back, self.empty = ids(scenes.there), ids(scenes.back), ids([""])[0]
        corner = torch.tensor(scenes.corner, device=device)
        self.weight = {size: _weights(size).to(device)[corner] for size in self.images}

    def draw(self, n: int, generator: torch.Generator, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Targets and sources `[n, N, 64]`, token ids `[n, 16]` and weights of tokens `[n, N]` of random edits."""
        draw: dict[str, Any] = {"generator": generator, "device": generator.device}
        row = torch.randint(len(self.count), (n,), **draw)
        chosen = (torch.rand(n, **draw) * self.count[row]).long()
        partner = self.partners[row, chosen]
        restyled = torch.rand(n, **draw) < STYLE_SHARE
        back = ~restyled & (torch.rand(n, **draw) < BACK_SHARE)
        source = 2 * row + back.long()
        target = torch.where(restyled, 2 * partner, 2 * row + (~back).long())
        text = torch.where(back[:, None], self.back[row], self.there[row])
        text = torch.where(restyled[:, None], self.style[partner], text)
        text = torch.where((torch.rand(n, **draw) < EMPTY_SHARE)[:, None], self.empty, text)
        weight = torch.where(restyled[:, None], 1.0, self.weight[size][row])
        images = self.images[size]
        return images[target] * STEP, images[source] * STEP, text.long(), weight


def _weights(size: int) -> Tensor:
    """`[corners + 1, (S/16)^2]` weights of tokens for an object in each corner, and for none."""
    side, token = size // 16, 16 * SIZE // size  # token: its side in pixels of the full size
    weights = torch.ones(len(CORNERS) + 1, side, side)
    for corner in range(len(CORNERS)):
        rows, columns = place(corner)
        down, across = (slice(s.start // token, -(-s.stop // token)) for s in (rows, columns))
        weights[corner, down, across] += EMPHASIS
    return weights.flatten(1)


class Objective:
    """Draws a batch of edits and gives the loss of the velocity."""

    def __init__(self, net: nn.ModuleDict, edits: Edits, batch: int, device: str = "cpu") -> None:
        self.edits, self.batch, self.device = edits, batch, device
        self.sizes = list(edits.images)
        self.shares = torch.tensor([SHARES[size] for size in self.sizes], device=device)
        self.velocities = {size: EditVelocity(net, size, device) for size in self.sizes}

    def __call__(self, generator: torch.Generator) -> Loss:
        size = self.sizes[int(torch.multinomial(self.shares, 1, generator=generator))]
        clean, source, text, weight = self.edits.draw(self.batch, generator, size)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        t = shifted_times(len(clean), clean.shape[1], generator)
        with attention_for(self.device):
            velocity = self.velocities[size](torch.lerp(clean, noise, t[:, None, None]), source, t, text)
        error = (velocity.float() - (noise - clean)).square().mean(-1)
        return Loss((weight * error).sum() / weight.sum(), len(clean), str(size))


def export(out: Path, net: nn.ModuleDict, base: str, tokenizer: WordTokenizer, folder: Path) -> None:
    """Write the averaged differences of the run in `out` into a folder.

    Args:
        out: of the run.
        net: what learns, as it was before; overwritten.
        base: `digest` of the `emoji-styles` that it is from.
        tokenizer: with the words of instructions.
        folder: to write.

    Raises:
        ModelError: if there is no checkpoint, or it started from other weights.
    """
    state = read_checkpoint(out)
    rank = state["terms"]["--rank"]
    if state["terms"]["weights it starts from"] != base:
        raise ModelError(f"the run in {out} started from other weights of emoji-styles; name their folder with --start")
    add_low_rank(net, rank)
    save_differences(folder, net, state, out / LOG, rank, base, "emoji-styles-edit", {"tokenizer": tokenizer})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = Path("runs/emoji-styles-edit")
    parser.add_argument("--start", type=Path, default=START, help="weights of emoji-styles")
    parser.add_argument("--latents", type=Path, default=runs / "latents")
    add_options(parser, runs, 2_000_000, 32, WEIGHTS, RANK)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    old = load_styles(args.start)
    pipe, base = build_pipeline(old), digest(old)
    net = learning(pipe)
    if args.export:
        export(args.out, net, base, pipe.tokenizer, args.export)
        return
    add_low_rank(net, args.rank)
    edits = Edits(load_scenes(args.latents), pipe.tokenizer, args.device)
    objective = Objective(net, edits, args.batch, args.device)
    settings = Settings(lr=args.lr, ema=0.995, bfloat16=not args.float32)
    terms = {"weights it starts from": base, "--rank": args.rank}
    training = Training(net, objective, settings, args.device, terms)
    read = partial(start_from_differences, module=net, rank=args.rank, base=base, name=BASE)
    run_with(args, training, learning_parts(pipe), args.out, args.samples, read)


if __name__ == "__main__":
    told(main)
