"""What the passes of a step say each by itself: the difference of the two that guidance mixes.

Pipelines call the denoiser once per pass, or once for a batch of two. A hook on the denoiser hands each answer to
whoever watches the pipeline; when the scheduler gets the mixture, the answers are brought into its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.pipeline.caller import Caller, Owner, current_owner
from hasten.pipeline.hooks import Forward, Hook, Remove, attach
from hasten.pipeline.view import denoisers

__all__ = ["UNWATCHED", "Answers", "PassesHook", "difference", "mixture_of", "watch_passes"]

PASSES = 2  # of a step, that guidance mixes
UNWATCHED = (
    "LEAP was taken away in the middle of this call, of which it has to see both passes to the end, for the guidance; "
    "call the pipeline again"
)


def _tensor(answer: Any) -> Tensor | None:
    """The prediction in a denoiser's answer, with the batch first."""
    first = answer[0] if isinstance(answer, tuple | list) else getattr(answer, "sample", answer)
    if isinstance(first, list) and first and all(isinstance(one, Tensor) for one in first):
        return torch.stack(first) if len({one.shape for one in first}) == 1 else None
    return first if isinstance(first, Tensor) else None


def _aligned(answer: Tensor, like: Tensor) -> Tensor | None:
    """An answer in the shape of a mixture: without axes of length 1 and what the pipeline cuts off at the end."""
    if answer.ndim != like.ndim:
        squeezed = [size for size in answer.shape if size != 1]
        if squeezed != [size for size in like.shape if size != 1]:
            return None
        return answer.reshape(like.shape)
    for axis, (own, wanted) in enumerate(zip(answer.shape, like.shape, strict=True)):
        if own < wanted:
            return None
        answer = answer.narrow(axis, 0, wanted)
    return answer


def difference(answers: Sequence[Tensor], mixture: Tensor) -> Tensor | None:
    """The first pass minus the second, in float32; None where there are not two, or their shape is another one.

    Args:
        answers: of the denoiser since the last step, one per call.
        mixture: `[B, ...]`, what the pipeline made of them.
    """
    if len(answers) == 1 and len(answers[0]) == 2 * len(mixture):
        answers = answers[0].chunk(2)
    if len(answers) != 2:
        return None
    first, second = (_aligned(answer, mixture) for answer in answers)
    return None if first is None or second is None else first.float() - second.float()


def mixture_of(answers: Sequence[Tensor], mixture: Tensor, apart: Tensor) -> float:
    """The weight of the first pass: `w` in `second + w (first - second)`, by least squares.

    Args:
        answers: of the denoiser since the last step.
        mixture: what the pipeline made of them.
        apart: their `difference`.
    """
    second = answers[0].chunk(2)[1] if len(answers) == 1 else answers[1]
    aligned = _aligned(second, mixture)
    assert aligned is not None
    moved = mixture.double() - aligned.double()
    return float((moved * apart).sum() / apart.double().square().sum().clamp_min(1e-300))


class Answers:
    """What passes said since the last step, by whose they are: a step makes use of those of its own call or thread."""

    def __init__(self) -> None:
        self._found: dict[Owner, list[Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has none: no step of its own is under way."""
        return {"_found": {}}

    def add(self, answer: Tensor) -> None:
        """Keep an answer; of more than a step can make use of, none."""
        answers = self._found.setdefault(current_owner(), [])
        if len(answers) <= PASSES:
            answers.append(answer)

    def take(self) -> list[Tensor]:
        """The answers for the step that asks; nothing is left of any."""
        answers = self._found.pop(current_owner(), [])
        self._found.clear()
        return answers


class PassesHook(Hook):
    """Hands each answer of a denoiser to a function, for the calls of one pipeline.

    Args:
        pipe: the pipeline; for another one it goes to that one's scheduler, if it waits for it.
        observe: called with each answer.
        kind: what it is for.
    """

    kind: ClassVar[str] = "leap"
    level: ClassVar[int] = 1

    def __init__(self, pipe: Any, observe: Callable[[Tensor], None]) -> None:
        self._pipe, self._observe = pipe, observe

    def call(self, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = forward(*args, **kwargs)
        observe, found = self._observer(), _tensor(answer)
        if observe is not None and found is not None:
            observe(found.detach().clone())  # pipelines and captured graphs write into it
        return answer

    def _observer(self) -> Callable[[Tensor], None] | None:
        """Who wants to know: other pipelines may share the denoiser, and have such a scheduler of their own.

        A forward outside of any pipeline's call may be of a loop of the user's own: that shows when a step is taken.
        """
        found_by = Caller()
        caller = found_by.pipe
        if found_by.callback:
            return None
        if caller is None or caller is self._pipe:
            return self._observe
        scheduler = getattr(caller, "scheduler", None)
        found: Callable[[Tensor], None] | None = getattr(scheduler, "observe", None)
        return found if getattr(scheduler, "expects_passes", False) else None


def watch_passes(pipe: Any, observe: Callable[[Tensor], None]) -> tuple[list[PassesHook], Remove]:
    """Put a hook on every denoiser of a pipeline.

    Returns:
        the hooks, and what takes them away.

    Raises:
        AlreadyAcceleratedError: if there is such a hook.
    """
    hooks: list[PassesHook] = []
    removals: list[Remove] = []

    def remove() -> None:
        for one in removals:
            one()

    try:
        for module in {id(module): module for module in denoisers(pipe).values()}.values():
            hook = PassesHook(pipe, observe)
            removals.append(attach(module, hook))
            hooks.append(hook)
    except BaseException:
        remove()
        raise
    return hooks, remove
