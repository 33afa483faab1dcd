"""Arms by their text, and what they draw and cost: for benchmarks that count operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten.bench.arms import Accelerated
from hasten.bench.plain import plain_samplers
from hasten.bench.requests import caching_method, parse_request
from hasten.bench.sampling import Attach, count_flops, draw_sample
from hasten.bench.subject import Subject
from torch import Tensor

STEPS = 50  # of the full run
BY_IMAGE = ("specedit", "dvg", "threshold=")  # in the texts of arms that compute less of one image than of another


def arm_of(text: str) -> tuple[Attach, int]:
    """What switches an arm on, and its sampler steps. `name@n`: a sampler of n steps or a cache of n computed ones."""
    name, _, count = text.partition("@")
    samplers = plain_samplers()
    if name in samplers:
        return samplers[name], int(count)
    request = parse_request(name)
    if request.resolution is not None:
        return Accelerated(request.caching, request.resolution), request.steps(STEPS)
    return Accelerated(caching_method(name).with_computed_steps(int(count), STEPS)), STEPS


def drawn(model: Subject, text: str, prompts: Sequence[str], call: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
    """Images `[3, H, W]` in [0, 1], prompt `i` from seed `i`, and the operations that were counted.

    Where what is computed does not depend on the image, it is counted once.
    """
    attach, steps = arm_of(text)
    images, flops = list[Tensor](), list[int]()
    for seed, prompt in enumerate(prompts):
        if flops and not any(name in text for name in BY_IMAGE):
            images.append(draw_sample(model, attach, steps, prompt, seed, call).image)
            continue
        counted, sample = count_flops(model, attach, steps, prompt, seed, call)
        flops.append(counted)
        images.append(sample.image)
    return images, flops
