"""The plain samplers that every method has to win against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import UniPCMultistepScheduler

from hasten.bench.arms import Arm
from hasten.bench.sampling import Attach, plain
from hasten.errors import unknown

__all__ = ["plain_arms"]


@contextmanager
def _unipc(pipe: Any) -> Iterator[None]:
    """UniPC of order 2 in place of the pipeline's scheduler, with the same noise levels where the model is a flow."""
    original = pipe.scheduler
    flow = original.config.get("prediction_type") is None  # flow-matching schedulers have no prediction type
    extra = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": original.config.get("shift", 1.0),
    }
    pipe.scheduler = UniPCMultistepScheduler.from_config(original.config, solver_order=2, **(extra if flow else {}))
    try:
        yield
    finally:
        pipe.scheduler = original


_PLAIN: dict[str, Attach] = {"euler": plain, "unipc": _unipc}


def plain_arms(counts: Sequence[int], samplers: Sequence[str] = ("euler", "unipc")) -> list[Arm]:
    """The plain sampler with as many steps as the methods compute: the comparison that every method has to win.

    `"euler"` is the pipeline's own scheduler (Euler for flow-matching models), `"unipc"` a second-order multistep
    solver.

    Raises:
        UnknownNameError: for another sampler.
    """
    for name in samplers:
        if name not in _PLAIN:
            raise unknown("sampler", name, _PLAIN)
    return [Arm(f"{name}-{n}", name, "plain", {}, n, n, _PLAIN[name]) for n in counts for name in samplers]
