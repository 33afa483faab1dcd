"""Which run, which step, which pass: `StepTracker` labels every forward of a transformer.

A *run* is one call of a pipeline, a *step* one step of its sampler, a *pass* one forward within a step (conditional,
unconditional, ...). Three sources are used, the best one that is there:

* the pipeline's scheduler: a run starts when its `timesteps` tensor is another object than before;
* the pipeline's cache context, if it sets one: it names the pass;
* the timestep argument itself: another value is another step, the same value again is the next pass of the same step
  (unless it comes with other latents: stages of several sizes may meet the same value twice), and a value that goes
  back against the direction of travel is a new run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass

from torch import Tensor

__all__ = ["StepInfo", "StepRecord", "StepTracker"]


@dataclass(frozen=True)
class StepInfo:
    """The label of one forward.

    Attributes:
        run: counts runs from 0.
        step: counts sampler steps from 0 within the run.
        pass_name: the cache context's name, or `"pass0"`, `"pass1"`, ... in order of appearance.
        first_pass: whether this is the first forward of the step.
        first_step: whether this is the first forward of the run.
        total: steps of the run, where the scheduler tells; None where only the transformer is known.
    """

    run: int
    step: int
    pass_name: str
    first_pass: bool
    first_step: bool
    total: int | None


@dataclass(frozen=True)
class StepRecord:
    """What was decided for one forward, and what it cost.

    Attributes:
        timestep: the value that the transformer was called with, in the model's own unit.
        computed: True if the blocks ran, False if their result was forecast.
        reason: why, in words, such as `"warm-up"`, `"interval"` or `"forecast"`.
        ms: wall-clock milliseconds of the forward as seen by the host (asynchronous devices may still be computing).
        cache_bytes: bytes of features held after this forward, for all passes together.
        indicator: the number that an adaptive gate went by; None where the schedule was known beforehand.
    """

    run: int
    step: int
    pass_name: str
    timestep: float
    computed: bool
    reason: str
    ms: float
    cache_bytes: int
    indicator: float | None = None

    def to_dict(self) -> dict[str, object]:
        """The record as plain data."""
        return asdict(self)


class StepTracker:
    """Labels forwards with run, step and pass. One tracker serves one transformer.

    Args:
        timesteps: returns the `timesteps` tensor of the pipeline's scheduler, or None if there is no pipeline.
        begin_index: returns the index in that tensor at which the run starts (image-to-image), or None.
        mine: picks, of a run's timesteps, those of this transformer (one of two experts).
    """

    def __init__(
        self,
        timesteps: Callable[[], Tensor | None] | None = None,
        begin_index: Callable[[], int | None] | None = None,
        mine: Callable[[Tensor], Tensor] = lambda timesteps: timesteps,
    ) -> None:
        self._timesteps = timesteps or (lambda: None)
        self._begin_index = begin_index or (lambda: None)
        self._mine = mine
        self._total: int | None = None
        self._run = -1
        self.finish()

    def finish(self) -> None:
        """Forget the current run: the next forward starts a new one."""
        self._running = False
        self._step = -1
        self._value: float | None = None
        self._direction = 0.0
        self._names: list[str] = []
        # Holding the tensor keeps its identity from being given to another one.
        self._sampler_timesteps: Tensor | None = None
        self._shape: Hashable = None
        self._sample: Hashable = None

    def begin(
        self, timestep: float, shape: Hashable, name: str | None = None, sample: Hashable | None = None
    ) -> StepInfo:
        """Label the forward that is about to run.

        Args:
            timestep: the timestep argument as a number; only differences matter.
            shape: whatever identifies the shape of the image tokens; without a pipeline another shape is a new run.
            name: the pass, if the pipeline names it.
            sample: `shape` of one image of the batch; the passes of a step may differ in their batch, not in this.
        """
        first_step = self._starts_run(timestep, shape)
        if first_step:
            self.finish()
            self._run += 1
            self._running = True
            self._sampler_timesteps = self._timesteps()
            self._total = None if self._sampler_timesteps is None else len(self.timesteps() or ())
        repeated = timestep == self._value and sample == self._sample and name not in self._names
        if not repeated:
            if self._value is not None and self._direction == 0.0:
                self._direction = timestep - self._value
            self._step += 1
            self._names = []
        pass_name = name if name is not None else f"pass{len(self._names)}"
        first_pass = not self._names
        self._names.append(pass_name)
        self._value, self._sample = timestep, sample
        if first_pass:
            self._shape = shape
        return StepInfo(self._run, self._step, pass_name, first_pass, first_step, self._total)

    def _starts_run(self, timestep: float, shape: Hashable) -> bool:
        if not self._running:
            return True
        timesteps = self._timesteps()
        if timesteps is not None:
            return timesteps is not self._sampler_timesteps
        if shape != self._shape and timestep != self._value:
            return True
        assert self._value is not None
        return (timestep - self._value) * self._direction < 0

    def timesteps(self) -> tuple[float, ...] | None:
        """The timesteps of the run under way, where the scheduler tells."""
        if self._sampler_timesteps is None:
            return None
        return tuple(self._mine(self._sampler_timesteps[self._begin_index() or 0 :]).tolist())
