"""Prompts that nothing learned from, their full runs, and the best plain sampler on them: for benchmarks of a model.

The image of held-out prompt `i` is drawn with seed `i`; what is fitted learns from the last prompts of the list, with
seeds from 1000.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hasten
import numpy as np
from hasten.bench.plain import plain_samplers
from hasten.bench.subject import Subject
from hasten.bench.tune import tuning_calls
from hasten.calibration import Trace
from hasten.errors import ConfigError
from hasten.io import write_atomically
from hasten.pipeline.guidance import SCALES
from hasten.pipeline.replay import Replay
from hasten.pipeline.view import denoisers
from hasten.quality.metrics import over_frames, psnr
from hasten.weights import spaced_digest
from safetensors.torch import load_file, save
from torch import Tensor

SEED = 1000
TRIED = 4  # held-out prompts on which the best plain sampler is chosen
FAILS = (ConfigError, ValueError, TypeError, ImportError, AssertionError)  # of schedulers that do not fit a pipeline

Calls = list[dict[str, Any]]


def weights_of(model: Subject) -> str:
    """A short name for the weights of a model's denoisers: what was measured with others does not count."""
    digests = [spaced_digest(part) for part in denoisers(model.pipe).values()]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:8]


def is_settled(row: Mapping[str, Any] | None, commit: str) -> bool:
    """Whether an arm is not to be measured again: its row has figures, or this same commit could not run it."""
    return row is not None and (row.keys().isdisjoint(("refused", "failed")) or row.get("commit") == commit)


def check_weights(known: dict[str, Any], model: Subject, file: Path) -> None:
    """End the program if results that are gone on with are of other weights, or do not say of which.

    Args:
        known: what the file has; empty if it is to be made.
        model: whose weights it has to have.
        file: to be named.
    """
    if known and "weights" not in known:
        raise SystemExit(f"{file} does not say of which weights of {model.name} it is: give another file")
    if known and known["weights"] != weights_of(model):
        raise SystemExit(f"{file} is of other weights of {model.name} than it has now: give another file")


def check_asked(known: dict[str, Any], asked: Mapping[str, Any], file: Path, option: str) -> None:
    """End the program if results that are gone on with were measured with something else.

    Args:
        known: what the file has, by name; what it does not have is as it is asked for.
        asked: what results depend on, by name.
        file: to be named.
        option: that gives the file.
    """
    if other := {name: known[name] for name in asked if known.get(name, asked[name]) != asked[name]}:
        raise SystemExit(f"{file} was measured with {other}, and {dict(asked)} is asked for: give another {option}")


@dataclass(frozen=True)
class HeldOut:
    """How the prompts of a model are drawn.

    Attributes:
        model: from `open_model`.
        steps: of the full run.
        learn: how many of the last prompts are learned from.
        many: how many of the first ones are held out.
        batch: prompts per call.
        work: the folder of the references.
    """

    model: Subject
    steps: int
    learn: int
    many: int
    batch: int
    work: Path

    def calls(self, scale: float | None, *, learn: bool = False, many: int | None = None) -> Calls:
        """Arguments of the held-out calls, or of those to learn from, at a scale of true guidance or without it."""
        prompts = self.model.prompts
        chosen = prompts[-self.learn :] if learn else prompts[: many or self.many]
        if scale is None:  # a scale of 1, where the model's own call has another
            guidance = {"true_cfg_scale": 1.0} if self.model.call.keys() & set(SCALES) else {}
        else:
            guidance = {"true_cfg_scale": scale, "negative_prompt": ""}
        return tuning_calls(self.model, chosen, SEED if learn else 0, self.steps, guidance, self.batch)

    def draw(self, calls: Calls, steps: int | None = None) -> list[Tensor]:
        """Images `[3, H, W]` or clips `[F, 3, H, W]` in [0, 1]."""
        given = {"output_type": "pt", "num_inference_steps": steps or self.steps}
        images: list[Tensor] = []
        with Replay(calls) as replay:  # a sampler that fails on the way leaves the noise to the next one as it was
            for arguments in replay:
                images += list(self.model.pipe(**{**arguments, **given})[0].float())
        return images

    def recorded(self, scale: float | None, *, learn: bool, site: str = "hidden", many: int | None = None) -> Trace:
        """What the transformer does in the calls to learn from or the held-out ones, or so many of them; all tokens."""
        replay = Replay(self.calls(scale, learn=learn))  # of calls that nobody else has
        return hasten.record(self.model.pipe, replay.runs(self.model.pipe)[:many], site=site, tokens=4096)

    def references(self, scale: float | None) -> list[Tensor]:
        """The plain sampler's images of the held-out prompts at all steps; drawn once."""
        file = self.work / f"reference-{self.steps}-{scale}-{self.many}-{weights_of(self.model)}.safetensors"
        if not file.exists():
            images = self.draw(self.calls(scale))
            write_atomically(file, save({f"{i:04d}": image.contiguous() for i, image in enumerate(images)}))
        return [image for _, image in sorted(load_file(file).items())]

    def quality(self, images: Sequence[Tensor], scale: float | None) -> list[float]:
        """PSNR to the full run of every image, in dB; of a clip the mean over its frames."""
        pairs = zip(images, self.references(scale), strict=False)
        return [round(over_frames(psnr, a, b), 3) for a, b in pairs]

    def best_plain(self, count: int, scale: float | None) -> tuple[str, dict[str, float]]:
        """The label of the best plain sampler with `count` steps, and mean PSNR on the first prompts of all of them."""
        samplers, tried = plain_samplers(), {}
        few = self.calls(scale, many=TRIED)
        for label, sampler in samplers.items():
            try:
                with sampler(self.model.pipe):
                    images = self.draw(few, count)
            except FAILS as error:
                print(label, "not for this model:", " ".join(str(error).split())[:80])
                continue
            tried[label] = round(float(np.mean(self.quality(images, scale))), 2)
        return max(tried, key=lambda label: tried[label]), tried

    def plain(self, label: str) -> Callable[[Calls, int], list[Tensor]]:
        """What draws with a plain sampler."""

        def draw(calls: Calls, count: int) -> list[Tensor]:
            with plain_samplers()[label](self.model.pipe):
                return self.draw(calls, count)

        return draw
