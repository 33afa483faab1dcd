"""How much a pipeline's call guides, as far as it tells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from hasten.pipeline.caller import Caller

__all__ = ["SCALES", "denies_something", "mixing_scale", "one_number", "scales_beside"]

PROMPTS_AGAINST = ("negative_prompt", "negative_prompt_embeds")
SCALES = ("true_cfg_scale", "guidance_scale")  # arguments by which pipelines take guidance, the surer one first
# By which pipelines mix passes in besides, or in another way.
OTHER_SCALES = ("image_guidance_scale", "img_guidance_scale", "modality_scale", "pag_scale", "stg_scale")
# What else pipelines take that changes how passes are mixed.
BESIDE = ("guidance_scale_2", "guidance_rescale", *OTHER_SCALES)
# How the names of pipelines begin that count from 0: cond + scale (cond - uncond).
FROM_ZERO = ("Cosmos2", "CosmosTextToWorld", "CosmosVideoToWorld", "Kandinsky3", "Krea2", "ZImage")


def mixing_scale() -> float | None:
    """The scale of the guidance that mixes the passes of a step of the pipeline's call under way.

    Meant for calls that make several passes. Where a call has both `true_cfg_scale` and an embedded `guidance_scale`,
    the former counts. Of two experts each has its own.

    Returns:
        the scale, 1 being none; None where it does not show, or where the passes are mixed by something else.
    """
    caller = Caller()
    given = caller.arguments
    if any(one_number(given.get(name)) for name in OTHER_SCALES):
        return None
    # Wan and Lucy keep the scale of the expert under way; modular and some other pipelines have a guider.
    scales = [caller.local("current_guidance_scale"), *(given[name] for name in SCALES if name in given)]
    guider = getattr(caller.pipe, "guider", None)
    scales.append(getattr(guider, "guidance_scale", None))
    scale = one_number(next((value for value in scales if value is not None), None))
    if guider is None:
        from_zero = any(kind.__name__.startswith(FROM_ZERO) for kind in type(caller.pipe).__mro__)
    else:
        from_zero = getattr(guider, "use_original_formulation", False)
    if scale is not None and from_zero:
        scale += 1
    return scale if scale is not None and scale > 1 else None


def scales_beside(given: Mapping[str, Any]) -> dict[str, float | None]:
    """The scales of a call that stand beside the one by which it guides; None for what was not given.

    Args:
        given: all arguments of the call, those that were not given too.
    """
    return {name: one_number(given[name]) for name in BESIDE if name in given}


def denies_something(given: Mapping[str, Any]) -> bool | None:
    """Whether a call has a negative prompt, without which pipelines leave true guidance out; None if it cannot have."""
    against = [value is not None for name, value in given.items() if name in PROMPTS_AGAINST]
    return any(against) if against else None


def one_number(value: Any) -> float | None:
    """A finite number, perhaps in an array that has nothing else; None for anything that is not one."""
    if getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None
