"""Numbers that are not finite: noticed at the end of every run, and named where they began if that is asked for.

With the environment variable `HASTEN_CHECK=1` every forward is checked, which waits for the device each time. Without
it a run costs one scalar, of its last forward, which is read once the pipeline's call is about to end: skipped steps
wait for nothing.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from hasten.errors import HastenWarning, NonFiniteError
from hasten.pipeline.runs import StepInfo

__all__ = ["CHECK", "FiniteCheck", "checks_all", "finite"]

CHECK = "HASTEN_CHECK"


def checks_all() -> bool:
    """Whether every forward is to be checked."""
    return os.environ.get(CHECK, "0") not in ("", "0")


def finite(*values: Any) -> Tensor:
    """Whether all numbers of tensors, or of lists of them, are finite: `[]` bool, on their device and not yet read."""
    tensors = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
    found = [tensor.isfinite().all() for tensor in tensors if isinstance(tensor, Tensor)]
    return found[0] if len(found) == 1 else torch.stack([flag.to(found[0].device) for flag in found]).all()


class FiniteCheck:
    """Looks at what a method's forwards take and give.

    Args:
        method: its name, for messages.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._last: Tensor | None = None
        self._all = checks_all()  # asked once per run, since looking into the environment takes longer than it seems

    def forward(self, info: StepInfo, computed: bool, hidden: Any, result: Any) -> None:
        """A forward has happened.

        Args:
            info: its label.
            computed: whether the model computed it; else it was forecast.
            hidden: the latents that it was given.
            result: the transformer's prediction.

        Raises:
            NonFiniteError: if everything is checked and a number is not finite, naming step, pass and method.
        """
        if info.first_step:
            self._all = checks_all()
        if self._all:
            where = f"step {info.step}, pass {info.pass_name!r}, with {self._method}"
            if not bool(finite(hidden)):
                raise NonFiniteError(
                    f"{where}: the latents that the sampler made of the step before are not finite; use fewer or other "
                    "steps of the sampler, or a wider precision"
                )
            if not bool(finite(result)):
                whose = "the model's own prediction" if computed else f"the forecast of {self._method}"
                cure = "run the model in a wider precision" if computed else "compute more steps, or use a lower order"
                raise NonFiniteError(f"{where}: {whose} is not finite; {cure}")
        elif info.last:
            self._last = finite(hidden, result)

    def settle(self) -> None:
        """Read what the last forward of a run came to, unless that is done, and warn if its numbers are not finite."""
        last, self._last = self._last, None
        if last is not None and not bool(last):
            warnings.warn(
                f"a run with {self._method} ended with latents that are not finite, so its image is broken; call it "
                f"again with {CHECK}=1 in the environment to be told the step, the pass and whether the model or a "
                "forecast did it",
                HastenWarning,
                stacklevel=2,
            )
