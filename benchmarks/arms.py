"""Arms by their text, and what they draw and cost: for benchmarks that count operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten.bench.arms import Accelerated, Arm
from hasten.bench.plain import plain_samplers
from hasten.bench.requests import caching_method, parse_request
from hasten.bench.sampling import Attach, count_flops
from hasten.bench.subject import Subject
from hasten.bench.tune import tuning_calls
from torch import Tensor

STEPS = 50  # of the full run
# In the texts of arms that decide image by image what they compute; in a batch they would decide for all at once.
BY_IMAGE = ("specedit", "dvg", "threshold=", "peer:")
BATCH = 8  # of the others: half the time per image


def arm_of(text: str, total: int = STEPS) -> tuple[Attach, int]:
    """What switches an arm on, and its sampler steps. `name@n`: a sampler of n steps or a cache of n computed ones of
    the `total` of a full run."""
    name, _, count = text.partition("@")
    samplers = plain_samplers()
    if name in samplers:
        return samplers[name], int(count)
    request = parse_request(name)
    if request.resolution is not None:
        return Accelerated(request.caching, request.resolution), request.steps(total)
    return Accelerated(caching_method(name).with_computed_steps(int(count), total)), total


def drawn(
    model: Subject, text: str, prompts: Sequence[str], call: dict[str, Any], arm: Arm | None = None
) -> tuple[list[Tensor], list[int]]:
    """Images `[3, H, W]` in [0, 1], prompt `i` from seed `i`, and the operations that were counted.

    Where what is computed does not depend on the image, it is counted once, and the other images come in batches.
    """
    attach, steps = arm_of(text) if arm is None else (arm.attach, arm.steps)
    alone = prompts if any(name in text for name in BY_IMAGE) else prompts[:1]
    images, flops = list[Tensor](), list[int]()
    for seed, prompt in enumerate(alone):
        counted, sample = count_flops(model, attach, steps, prompt, seed, call)
        flops.append(counted)
        images.append(sample.image)
    for arguments in tuning_calls(model, prompts[len(alone) :], len(alone), steps, call, BATCH):
        with attach(model.pipe):
            images += list(model.pipe(**arguments | {"output_type": "pt"})[0].float().cpu())
    return images, flops
