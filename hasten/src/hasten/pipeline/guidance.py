"""How much a pipeline's call guides, as its arguments tell."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from hasten.pipeline.caller import call_arguments, current_owner

__all__ = ["PROMPTS_AGAINST", "SCALES", "denies_something", "mixing_scale", "one_number"]

PROMPTS_AGAINST = ("negative_prompt", "negative_prompt_embeds")
SCALES = ("true_cfg_scale", "guidance_scale")  # arguments by which pipelines take guidance, the surer one first


def mixing_scale() -> float | None:
    """The scale by which the pipeline's call under way mixes the passes of a step; None where it does not show.

    Of a call that makes several passes. Where it has a scale of true guidance and one that its model is told, the first
    one counts if the call makes use of it.
    """
    given = call_arguments(current_owner())
    true, other = (one_number(given.get(name)) for name in SCALES)
    return true if true is not None and true > 1 and denies_something(given) is not False else other


def denies_something(given: Mapping[str, Any]) -> bool | None:
    """Whether a call has a negative prompt, without which pipelines leave true guidance out; None if it cannot have."""
    against = [value is not None for name, value in given.items() if name in PROMPTS_AGAINST]
    return any(against) if against else None


def one_number(value: Any) -> float | None:
    """A number, perhaps in an array that has nothing else; None for anything that is not one."""
    if getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1):
        value = value.item()
    return float(value) if isinstance(value, Real) else None
