"""`emoji-kontext`: FLUX.1-Kontext in small, edits images of emoji at 64x64 (256 + 256 tokens) or 32x32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from hasten.bench.subject import Subject
from hasten.errors import ConfigError
from torch import Tensor
from torch.nn import functional

from hasten_zoo.emoji_kontext.data import BACKGROUNDS, EFFECTS, ITEMS, TINTS, EditPlan, held_out_plans, painter
from hasten_zoo.emoji_kontext.model import load_pipeline

__all__ = ["call_arguments", "is_done", "load_emoji_kontext"]

WEIGHTS = Path(__file__).parent / "weights"
LEAP = Path(__file__).parent / "leap.safetensors"  # 4 to 16 evaluations, without guidance
EDITS = 64
KEPT = 0.01  # mean squared error to the source outside the mask, 20 dB


def _alternatives(plan: EditPlan) -> list[EditPlan]:
    """The same edit with every other outcome that an instruction of its kind could have."""
    after, changed = plan.after, plan.changed
    if changed is None:
        outcomes = [replace(plan.before, effect=name) for name in EFFECTS]
        outcomes += [replace(plan.before, background=colour) for colour in BACKGROUNDS]
    elif changed not in after.items:
        outcomes = [after]
    else:
        rest = tuple(placed for placed in after.items if placed != changed)
        if changed.tint is not None:
            others = [replace(changed, tint=tint) for tint in TINTS]
        else:
            others = [replace(changed, item=item) for item in range(len(ITEMS))]
        outcomes = [replace(after, items=(other, *rest)) for other in others]
    return [replace(plan, after=scene) for scene in outcomes]


def is_done(plan: EditPlan, image: Tensor) -> bool:
    """Whether an image is what the instruction asked for.

    It is if, under the edit mask, the right outcome is nearer (mean squared error) than the source and every other
    outcome of an instruction of that kind, and if the rest of the image is kept (20 dB to the source).

    Args:
        plan: the edit.
        image: `[3, R, R]` in [0, 1], R a divisor of 64.
    """
    brush, shrink = painter(), 64 // image.shape[-1]
    candidates = [plan.before, *(alternative.after for alternative in _alternatives(plan))]
    drawn = functional.avg_pool2d(torch.stack([brush.draw(scene) for scene in candidates]), shrink)
    mask = functional.max_pool2d(brush.mask(plan)[None].float(), shrink)[0] > 0
    errors = (drawn - image.float().cpu()).square().mean(1)
    right = [scene == plan.after for scene in candidates]
    outside = errors[0][~mask]
    return right[int(errors[:, mask].mean(1).argmin())] and (not len(outside) or float(outside.mean()) < KEPT)


def call_arguments(side: int = 64) -> dict[str, object]:
    """What `FluxKontextPipeline` has to be told to stay at `side` x `side` pixels, apart from prompt and image."""
    return {
        "height": side,
        "width": side,
        "max_area": side * side,
        "_auto_resize": False,
        "num_inference_steps": 50,
        "max_sequence_length": 12,
    }


def load_emoji_kontext(weights: Path = WEIGHTS) -> Subject:
    """The trained pipeline with held-out edits; `weights` may be a folder written by the training script's `--export`.

    Raises:
        ModelError: if the files are missing or damaged.
    """
    pipe = load_pipeline(weights)
    plans = {plan.prompt: plan for plan in held_out_plans(EDITS)}

    def grade(images: Tensor, prompts: list[str]) -> list[bool]:
        missing = [prompt for prompt in prompts if prompt not in plans]
        if missing:
            raise ConfigError(f"no held-out edit has the prompt {missing[0]!r}; use the prompts of the model's edits")
        return [is_done(plans[prompt], image) for prompt, image in zip(prompts, images, strict=True)]

    return Subject(
        name="emoji-kontext",
        pipe=pipe,
        prompts=list(plans),
        call=call_arguments(),
        grade=grade,
        edits=[painter().edit(plan) for plan in plans.values()],
        fitted={"leap": LEAP} if weights == WEIGHTS else {},
        sizes=((64, 64), (32, 32)),
        about="FLUX.1-Kontext in small: edits images of emoji",
    )
