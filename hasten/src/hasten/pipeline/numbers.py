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
from hasten.models.forms import tensors_in
from hasten.pipeline.runs import StepInfo

__all__ = ["CHECK", "FiniteCheck", "check_step", "checks_all", "finite"]

CHECK = "HASTEN_CHECK"


def checks_all() -> bool:
    """Whether every forward is to be checked."""
    return os.environ.get(CHECK, "0") not in ("", "0")


def finite(*values: Any) -> Tensor:
    """Whether all numbers of tensors, or of lists of them, are finite: `[]` bool, on their device and not yet read."""
    tensors = [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]
    found = [tensor.isfinite().all() for tensor in tensors if isinstance(tensor, Tensor)]
    return found[0] if len(found) == 1 else torch.stack([flag.to(found[0].device) for flag in found]).all()


def check_step(method: str, step: int, prediction: Tensor, latents: Tensor, every: bool) -> None:
    """Look at a step of a solver, which waits for the device: the last one of a run, or every one.

    Args:
        method: its name.
        step: its number in the run.
        prediction: what the solver was given.
        latents: what it made of that.
        every: whether every step is checked, see `checks_all`; else a warning is all.

    Raises:
        NonFiniteError: if everything is checked and a number is not finite.
    """
    if bool(finite(prediction, latents)):
        return
    if every:
        whose = "the latents that it made are" if bool(finite(prediction)) else "the model's own prediction is"
        raise NonFiniteError(f"step {step}, with {method}: {whose} not finite; run the model in a wider precision")
    warnings.warn(_broken(method, f"step {step}, the last one"), HastenWarning, stacklevel=3)


def _broken(method: str, where: str) -> str:
    return (
        f"a run with {method} ended with latents that are not finite ({where}), so its image is broken; call it again "
        f"with {CHECK}=1 in the environment to be told the step, the pass and whether the model or a forecast did it"
    )


class FiniteCheck:
    """Looks at what a method's forwards take and give.

    Args:
        method: its name, for messages.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._last: Tensor | None = None
        self._where = ""
        self._all = checks_all()  # asked once per run, since looking into the environment takes longer than it seems

    def forward(self, info: StepInfo, computed: bool, hidden: Any, result: Any) -> None:
        """A forward has happened.

        Args:
            info: its label.
            computed: whether the model computed it; else it was forecast.
            hidden: the latents that it was given.
            result: the transformer's, in whatever form; looked into where it is checked.

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
            if not bool(finite(tensors_in(result))):
                whose = "the model's own prediction" if computed else f"the forecast of {self._method}"
                cure = "run the model in a wider precision" if computed else "compute more steps, or use a lower order"
                raise NonFiniteError(f"{where}: {whose} is not finite; {cure}")
        elif info.last:
            self._last, self._where = finite(hidden, tensors_in(result)), f"step {info.step}, the last one"

    def settle(self) -> None:
        """Read what the last forward of a run came to, unless that is done, and warn if its numbers are not finite."""
        last, self._last = self._last, None
        if last is not None and not bool(last):
            warnings.warn(_broken(self._method, self._where), HastenWarning, stacklevel=2)
