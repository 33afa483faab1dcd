"""Distil `emoji-styles` to 4 steps, guidance built in (resumable; CPU or GPU), or export the weights.

    python -m hasten_zoo.emoji_styles_turbo.train --compile --minutes 120 --fall 0.4       # two hours on one core
    python -m hasten_zoo.emoji_styles_turbo.train --device cuda --minutes 3 --batch 1024 --fall 0.4
    python -m hasten_zoo.emoji_styles_turbo.train --export zoo/src/hasten_zoo/emoji_styles_turbo/weights
    python -m hasten_zoo.emoji_styles_turbo.train --windows 8 --out runs/emoji-styles-turbo-8    # a student of 8 steps

Piecewise rectified flow (Yan et al., 2024, arXiv:2405.07510): the windows are the steps of the 4-step sampler, at every
size those of 128 pixels, so that a coarse stage hands over to a fine one at the border of a window. The teacher goes
through each with guidance in several substeps; the student, which starts as the teacher, learns the one velocity that
leads along the straight line from the window's start to its end, at the start (all that 4 steps need) and in between (8
steps and more). Other than in the paper, windows do not start from noised images but follow one another on the
teacher's own way from noise, so that the student learns the teacher's images, and no images are needed.

What learns are low-rank differences of the transformer, as in LCM-LoRA (Luo et al., 2023, arXiv:2311.05556); text
encoders stay the teacher's. AdamW moves the factors: Muon makes all singular values of a matrix's step alike, which
says nothing of the product of two factors, of which it would see one at a time.

The teacher's substeps are Adams-Bashforth steps of second order: with 16 of them it is nearer to the exact solution
than with 50 Euler steps. The student draws from a pool of such ways, of which the oldest are replaced all the time.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from hasten.errors import ConfigError, ModelError
from torch import Tensor, nn
from torch.nn import functional as F

from hasten_zoo.command import add_options, run_with, told
from hasten_zoo.emoji_styles import HERE
from hasten_zoo.emoji_styles import WEIGHTS as TEACHER
from hasten_zoo.emoji_styles.augment import COLOURED_SHARE, COLOURS, STYLE_LEFT_OUT, caption
from hasten_zoo.emoji_styles.data import Pair
from hasten_zoo.emoji_styles.judge import read_judge
from hasten_zoo.emoji_styles.model import TEXT_TOKENS, digest, load_pipeline, shift
from hasten_zoo.emoji_styles.train import SHARES, Velocity, image_positions, learning_parts, samples_of
from hasten_zoo.emoji_styles_turbo import WEIGHTS
from hasten_zoo.emoji_styles_turbo.model import BASE, learning
from hasten_zoo.low_rank import add_low_rank, save_differences, start_from_differences
from hasten_zoo.record import LOG
from hasten_zoo.swift import attention_for, compile_blocks
from hasten_zoo.training import Loss, Settings, Training, read_checkpoint
from hasten_zoo.words import token_ids

WINDOWS = 4  # steps of the sampler that the student is for
SUBSTEPS = 4  # of the teacher in a window of four; with more windows it takes as many on its whole way
GUIDANCE = 3.0
RANK = 32
AT_START = 0.5  # share of the student's samples that lie at the start of their window; others anywhere in it
POOL = 8  # batches of the teacher's ways that are kept for each size
STEPS_PER_WAY = 8  # the student's steps until one of these is replaced
SHIFT = shift(64)  # of times, at every size


def sigmas(steps: int) -> Tensor:
    """`[steps + 1]` noise levels from 1 to 0 of the student's sampler."""
    u = torch.linspace(1, 0, steps + 1)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def student_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler of the student's steps, whose levels are the same at every size."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def keep_times(transformer: nn.Module) -> None:
    """Embed times as they are given.

    The transformer rounds them to the type of its activations: in bfloat16 the start of a window would be another time
    in training than in use.
    """
    given: dict[str, Tensor] = {}

    def take(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        given["t"] = named["timestep"]

    transformer.register_forward_pre_hook(take, with_kwargs=True)
    embedding: Any = transformer.time_text_embed
    embedding.register_forward_pre_hook(lambda module, inputs: (given["t"].float() * 1000, *inputs[1:]))


class Captions:
    """Token ids of the captions of training pairs, on every colour, with and without their style.

    Attributes:
        ids: `[2, C, N, 16]`, without (0) and with (1) the style, for C colours, of which the first is white.
        empty: `[16]`, the empty caption.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: Any, device: str = "cpu") -> None:
        known = [pair for pair in pairs if pair.taught and not pair.held_out]
        texts = [caption(pair, colour, style) for style in (False, True) for colour in COLOURS for pair in known]
        self.ids = token_ids(tokenizer, texts).to(device).view(2, len(COLOURS), len(known), TEXT_TOKENS)
        self.empty = token_ids(tokenizer, [""])[0].to(device)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """`[n, 16]` random ones, styles left out and backgrounds coloured as often as in the teacher's training."""
        draw: dict[str, Any] = {"generator": generator, "device": generator.device}
        style = (torch.rand(n, **draw) >= STYLE_LEFT_OUT).long()
        colour = torch.randint(self.ids.shape[1], (n,), **draw)
        colour = torch.where(torch.rand(n, **draw) < COLOURED_SHARE, colour, 0)
        return self.ids[style, colour, torch.randint(self.ids.shape[2], (n,), **draw)]


class Teacher:
    """The model that is learned from, frozen; goes its way from noise to images with guidance.

    Args:
        net: its transformer and text encoders, by name.
        empty: `[16]` token ids of the caption that guidance leads away from.
    """

    def __init__(self, net: nn.ModuleDict, empty: Tensor, guidance: float = GUIDANCE) -> None:
        self.net, self.empty, self.guidance = net.requires_grad_(False), empty, guidance
        keep_times(net["transformer"])

    @torch.no_grad()
    def way(self, noise: Tensor, text: Tensor, size: int, windows: int = WINDOWS, substeps: int = SUBSTEPS) -> Tensor:
        """States `[windows + 1, B, N, 64]` at the borders of windows, from noise to clean, for captions `[B, 16]`.

        With one substep it takes plain Euler steps (to where second order needs a step before).
        """
        with torch.autocast(noise.device.type, enabled=False):
            return self._way(noise, text, size, windows, substeps)

    def _way(self, noise: Tensor, text: Tensor, size: int, windows: int, substeps: int) -> Tensor:
        n, transformer = len(noise), self.net["transformer"]
        dtype = next(transformer.parameters()).dtype
        both = torch.cat([text, self.empty.expand_as(text)]).long()
        pooled = self.net["text_encoder"](both, output_hidden_states=False).pooler_output
        states = self.net["text_encoder_2"](both, output_hidden_states=False)[0]
        fixed = {
            "pooled_projections": pooled,
            "encoder_hidden_states": states,
            "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=noise.device),
            "img_ids": image_positions(size, str(noise.device)),
            "return_dict": False,
        }
        levels = sigmas(windows * substeps)
        times = levels.to(noise.device)
        x, borders, before = noise, [noise], None
        lengths = [end - start for start, end in pairwise(levels.tolist())]
        for i, length in enumerate(lengths):
            both_states = torch.cat([x, x]).to(dtype)
            here: Tensor = transformer(hidden_states=both_states, timestep=times[i].expand(2 * n), **fixed)[0].float()
            with_text, without = here.chunk(2)
            velocity = torch.lerp(without, with_text, self.guidance)
            slope = velocity
            if before is not None and substeps > 1:
                slope = torch.lerp(velocity, before, -length / lengths[i - 1] / 2)
            x, before = x + length * slope, velocity
            if (i + 1) % substeps == 0:
                borders.append(x)
        return torch.stack(borders)


@dataclass
class Ways:
    """Ways of the teacher at one size: `[W + 1, P, N, 64]` borders of windows and `[P, 16]` captions."""

    borders: Tensor
    text: Tensor
    oldest: int = 0  # the first of the batch that is replaced next
    uses: int = 0  # since the latest batch came

    def replace(self, borders: Tensor, text: Tensor) -> None:
        """Put a batch of new ways in the place of the oldest."""
        place = slice(self.oldest, self.oldest + len(text))
        self.borders[:, place], self.text[place] = borders, text
        self.oldest = (self.oldest + len(text)) % len(self.text)
        self.uses = 0


class Objective:
    """The loss of the velocity that is constant in each window, on a fresh draw from the pool of the teacher's ways."""

    def __init__(
        self,
        net: nn.ModuleDict,
        teacher: Teacher,
        captions: Captions,
        batch: int,
        device: str = "cpu",
        sizes: Sequence[int] = tuple(SHARES),
        windows: int = WINDOWS,
    ) -> None:
        self.teacher, self.captions, self.batch, self.device = teacher, captions, batch, device
        self.sizes, self.windows = list(sizes), windows
        self.substeps = max(2, WINDOWS * SUBSTEPS // windows)  # with one it would fall back to plain Euler steps
        self.shares = torch.tensor([SHARES[size] for size in sizes], device=device)
        self.velocities = {size: Velocity(net, image_positions(size, device)) for size in sizes}
        self.levels = sigmas(windows).to(device)
        self.pools: dict[int, Ways] = {}

    def new_ways(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Let the teacher go a batch of ways from fresh noise, for fresh captions: borders and captions."""
        n, tokens = samples_of(self.batch, size), (size // 16) ** 2
        text = self.captions.draw(n, generator)
        noise = torch.randn(n, tokens, 64, generator=generator, device=self.device)
        return self.teacher.way(noise, text, size, self.windows, self.substeps), text

    def pool(self, size: int, generator: torch.Generator) -> Ways:
        """The ways of a size, with a new batch where it is time."""
        if size not in self.pools:
            borders, text = zip(*(self.new_ways(size, generator) for _ in range(POOL)), strict=True)
            self.pools[size] = Ways(torch.cat(borders, 1), torch.cat(text))
        pool = self.pools[size]
        if pool.uses == STEPS_PER_WAY:
            pool.replace(*self.new_ways(size, generator))
        pool.uses += 1
        return pool

    def __call__(self, generator: torch.Generator) -> Loss:
        with attention_for(self.device):
            size = self.sizes[int(torch.multinomial(self.shares, 1, generator=generator))]
            pool, n = self.pool(size, generator), samples_of(self.batch, size)
            draw: dict[str, Any] = {"generator": generator, "device": self.device}
            way, window = torch.randint(len(pool.text), (n,), **draw), torch.randint(self.windows, (n,), **draw)
            share = torch.rand(n, **draw) * (torch.rand(n, **draw) >= AT_START)
            start, end = pool.borders[window, way], pool.borders[window + 1, way]
            high, low = self.levels[window], self.levels[window + 1]
            there = torch.lerp(start, end, share[:, None, None])
            velocity = self.velocities[size](there, torch.lerp(high, low, share), pool.text[way].long())
            wanted = (start - end) / (high - low)[:, None, None]
            return Loss(F.mse_loss(velocity.float(), wanted), n, str(size))


def make_training(
    pipe: FluxPipeline,
    pairs: Sequence[Pair],
    batch: int,
    settings: Settings,
    device: str = "cpu",
    sizes: Sequence[int] = tuple(SHARES),
    windows: int = WINDOWS,
    rank: int = RANK,
) -> tuple[Training, Objective]:
    """A training that has not begun; `pipe` is the teacher, and its transformer becomes the student's."""
    terms: dict[str, str | float] = {
        "weights of the teacher": digest(pipe),
        "--windows": windows,
        "--rank": rank,
    }
    net = nn.ModuleDict(learning_parts(pipe)).to(device).requires_grad_(False)
    frozen = copy.deepcopy(net).to(device, torch.bfloat16 if settings.bfloat16 else torch.float32).eval()
    captions = Captions(pairs, pipe.tokenizer, device)
    objective = Objective(net, Teacher(frozen, captions.empty), captions, batch, device, sizes, windows)
    add_low_rank(net["transformer"].requires_grad_(True), rank)
    keep_times(net["transformer"])
    return Training(learning(pipe), objective, settings, device, terms), objective


def export(out: Path, pipe: FluxPipeline, folder: Path) -> None:
    """Write the averaged differences of the run in `out` from the teacher `pipe`, and the sampler, into a folder.

    Raises:
        ModelError: if there is no checkpoint, or it is of a student of another teacher.
    """
    state, base, net = read_checkpoint(out), digest(pipe), learning(pipe)
    terms = state["terms"]
    if terms["weights of the teacher"] != base:
        raise ModelError(f"the run in {out} had a teacher of other weights; name its folder with --teacher")
    add_low_rank(net, terms["--rank"])
    others = {"scheduler": student_scheduler()}
    log, windows = out / LOG, terms["--windows"]
    save_differences(folder, net, state, log, terms["--rank"], base, "emoji-styles-turbo", others, windows=windows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="weights of emoji-styles")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="steps that the student is for")
    add_options(parser, Path("runs/emoji-styles-turbo"), 3_000_000, 32, WEIGHTS, RANK)
    args = parser.parse_args(arguments)
    if args.windows < 1:
        raise ConfigError(f"--windows must be at least 1, got {args.windows}; 4 and 8 are usual")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pipe = load_pipeline(args.teacher)
    if args.export:
        export(args.out, pipe, args.export)
        return
    settings = Settings(lr=args.lr, warmup_steps=100, ema=0.995, bfloat16=not args.float32)
    training, objective = make_training(
        pipe, read_judge(HERE)[0], args.batch, settings, args.device, windows=args.windows, rank=args.rank
    )
    if args.compile:
        compile_blocks(objective.teacher.net["transformer"])
    base = str(training.terms["weights of the teacher"])
    read = partial(start_from_differences, module=training.net, rank=args.rank, base=base, name=BASE)
    run_with(args, training, learning_parts(pipe), args.out, args.samples, read)


if __name__ == "__main__":
    told(main)
