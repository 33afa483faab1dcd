"""Which run, which step, which pass: `Runs` labels every forward of a transformer, and alone decides when a run begins.

A *run* is one call of a pipeline, a *step* one step of its sampler, a *pass* one forward within a step (conditional,
unconditional, ...). Each owner (see `view`) has at most one run under way. A run begins

* with an owner's first forward;
* when the scheduler's `timesteps` is another object than before, or the scheduler went back;
* when the timestep goes back to the start of the run, whoever owns the scheduler (a loop of the user's own, sections of
  a long video with copied schedulers); where no list of timesteps is known, when it goes back at all, or when
  the latents have another shape.

Where the scheduler counts its steps, a step is one of its counts: nothing is read from the device. Elsewhere the
timestep argument tells: another value is another step, the same value again is the next pass of the same step, unless
it comes with other latents or under a name that the step had already. A timestep that is an entry of the scheduler's
list, as the one that a UNet gets, is known by its place there; any other has to be read.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hasten.errors import AdapterError, HastenWarning
from hasten.pipeline.caller import Caller, Owner, alive, current_owner
from hasten.pipeline.view import PipelineView, same_memory

__all__ = ["Run", "Runs", "StepInfo", "sample_shape", "signature"]

MOST_PASSES = 64  # of one step where nobody counts the steps: a model that is always asked at one time has no steps
NEAR = 0.01  # relative distance at which two timesteps are the same, since pipelines cast them to half precision

IN_TURN = (
    "a pipeline's call that is a generator was left in the middle of a run while another run began on its thread, and "
    "is computed in full where it goes on, as calls that take turns are: let each come to its end before the next one, "
    "or give each a thread"
)


class StepInfo(NamedTuple):
    """The label of one forward.

    Attributes:
        run: counts runs from 0.
        step: counts sampler steps from 0 within the run.
        pass_name: the cache context's name, or `"pass0"`, `"pass1"`, ... in order of appearance.
        first_pass: whether this is the first forward of the step.
        first_step: whether this is the first forward of the run.
        last: whether this is the last forward of the run, as far as can be told.
        total: steps of the run, where the scheduler tells; None where only the transformer is known.
        timestep: that the transformer was called with, in the model's own unit.
        unsure: whether the step before had fewer passes, none of them named: which one it left out nobody knows.
        grown: whether this is the first pass without a name that the step before did not have: which one is new nobody
            knows.
    """

    run: int
    step: int
    pass_name: str
    first_pass: bool
    first_step: bool
    last: bool
    total: int | None
    timestep: float
    unsure: bool = False
    grown: bool = False


def sample_shape(hidden: Any) -> Hashable:
    """The shape of one image's latents, whatever the batch; some models take a list of latents."""
    if isinstance(hidden, (list, tuple)):
        return sample_shape(hidden[0]) if hidden else None
    return hidden.shape[1:] if isinstance(hidden, Tensor) else None


def signature(hidden: Any) -> Hashable:
    """Shape, dtype and device of the latents: what has to stay the same for features to be of use."""
    if isinstance(hidden, Tensor):
        return (hidden.shape, hidden.dtype, hidden.device)
    if isinstance(hidden, (list, tuple)):
        return tuple(map(signature, hidden))
    return None


class Run:
    """One run under way.

    Args:
        number: counts runs from 0.
        owner: whose it is.
        view: of the pipeline whose call it is; None where only the transformer is known.
        module: the transformer.
        loop: the list of timesteps that the pipeline's call goes through, if it has one.

    Attributes:
        total: steps of the run, where the scheduler tells.
        timesteps: of these steps, as the scheduler's list had them at the start.
        part: the first of these steps and the steps of the pipeline's run, if two experts share it.
        late: whether it began in the middle of a pipeline's call, as far as the scheduler tells.
        state: whatever the caller remembers of the run.
        hook: what the run began with, and goes on with.
        suspended: whether its pipeline's call is a generator, which waits while others run.
    """

    def __init__(
        self, number: int, owner: Owner, view: PipelineView | None, module: nn.Module, loop: Any = None
    ) -> None:
        self.number, self.owner, self.view = number, owner, view
        # Holding the tensor keeps its identity from being given to another one.
        self.sampler_timesteps = None if view is None else view.timesteps
        self.timesteps = None if view is None else view.timesteps_of(module, loop)
        self.total = None if self.timesteps is None else len(self.timesteps)
        self.part = None if view is None else view.part_of(module, loop)
        self._entries: list[float] | None = None  # of the scheduler's list, once they are asked for
        self.guidance = None if view is None else view.guidance
        self.late = view is not None and owner.frame is not None and not view.at_start
        self.state: Any = None
        self.hook: Any = None
        self.suspended = False
        self._step = -1
        self._index: int | None = None
        self._counted: bool | None = None  # whether the scheduler counts the steps; None until the first step ends
        self._first = self._value = self._mean = float("nan")
        self._direction = 0.0
        self._names: dict[str | None, int] = {}  # forwards of this step by name
        self._passes_now = 0  # of this step
        self._passes = 0  # of the step before
        self._alike = False  # whether unnamed passes of a step have latents that look the same
        self._shape: Hashable = None
        self._sample: Hashable = None

    def _count(self) -> int | None:
        """Where the scheduler stands. In a loop of the user's own, another thread may be moving it."""
        return self.view.step_index if self.view is not None and self.owner.frame is not None else None

    def goes_on(self, timestep: Any, hidden: Any) -> bool:
        """Whether a forward that is about to happen is of this run."""
        if self.view is not None and self.view.timesteps is not self.sampler_timesteps:
            return False
        index = self._count()
        if self._counted:
            return index is not None and self._index is not None and index >= self._index
        if self.total is not None and self._direction == 0.0 and self._passes_now < MOST_PASSES:
            return True  # one value alone has no direction to go back from
        value, mean = self._numbers(timestep)
        moved = (value, mean) != (self._value, self._mean)
        if self.total is None and self._other_latents(hidden, moved):
            return False
        if not moved and self._passes_now >= MOST_PASSES:
            return False
        if (value - self._value) * self._direction >= 0:
            return True
        back_to_start = (value - self._first) * self._direction <= NEAR * abs(self._first)
        return self.total is not None and not back_to_start

    def _other_latents(self, hidden: Any, moved: bool) -> bool:
        """Whether latents are of another run: passes of one step may differ in the batch alone."""
        return sample_shape(hidden) != self._sample or (moved and signature(hidden) != self._shape)

    def label(self, timestep: Any, hidden: Any, name: str | None) -> StepInfo:
        """Label a forward that is about to happen in this run."""
        first_step, unsure = self._step < 0, False
        index, sample = self._count(), sample_shape(hidden)
        moved = index != self._index
        if self._counted is None and not first_step and moved:
            self._counted = True
        value, mean = self._timestep(timestep, moved)
        repeated = (value, mean, sample) == (self._value, self._mean, self._sample)
        if first_step:
            self._first, self._counted = value, None if index is not None else False
        elif not self._counted and self._direction == 0.0:
            self._direction = value - self._value
        if self._counted is False and name is not None and name in self._names:
            repeated = False  # a second-order sampler evaluates twice at one time
        if first_step or moved or (not self._counted and not repeated):
            if self._counted is None and not first_step:
                self._counted = moved
            self._step += 1
            unsure = self._alike and name is None and self._passes_now < self._passes
            self._passes, self._passes_now, self._names = self._passes_now, 0, {}
        first_pass = not self._passes_now
        before = self._names.get(name, 0)
        pass_name = f"pass{self._passes_now}" if name is None else name
        if name is not None and before:
            pass_name = f"{name}#{before}"  # windows of one step, or a second evaluation
        self._names[name] = before + 1
        self._passes_now += 1
        self._index, self._value, self._mean, self._sample = index, value, mean, sample
        if first_pass:
            self._shape = signature(hidden)
        elif name is None:
            self._alike = signature(hidden) == self._shape
        # Passes that look different are told apart by that.
        grown = name is None and self._alike and self._step > 0 and 1 <= self._passes == self._passes_now - 1
        last = self._is_last(value)
        return StepInfo(
            self.number, self._step, pass_name, first_pass, first_step, last, self.total, value, unsure, grown
        )

    def _timestep(self, timestep: Any, moved: bool) -> tuple[float, float]:
        """The timestep, latest and mean; from the list where reading it would wait for the device."""
        on_device = isinstance(timestep, Tensor) and timestep.device.type != "cpu"
        if not (self._counted and on_device and self.timesteps):
            return self._numbers(timestep)
        step = min(self._step + moved, len(self.timesteps) - 1)
        value = self.timesteps[step] * (self._first / self.timesteps[0] if self.timesteps[0] else 1.0)
        return value, value

    def _numbers(self, timestep: Any) -> tuple[float, float]:
        """Latest and mean timestep, since every image, frame or token may have its own."""
        place = _place_in(self.sampler_timesteps, timestep)
        if place is None or self.sampler_timesteps is None:
            return _read(timestep)
        if self._entries is None:
            self._entries = [float(entry) for entry in self.sampler_timesteps.tolist()]
        return self._entries[place], self._entries[place]

    def _is_last(self, value: float) -> bool:
        if self.timesteps is None or self._step < len(self.timesteps) - 1:
            return False
        if self._passes_now < self._passes:
            return False
        if self._counted:
            return True
        # Loops of several schedulers run on after as many steps as one of them has.
        ratio = self._first / self.timesteps[0] if self.timesteps[0] else 1.0
        return abs(value - ratio * self.timesteps[-1]) <= NEAR * abs(self._first)


def _place_in(entries: Tensor | None, timestep: Any) -> int | None:
    """Which entry of a list a timestep is a view of (`for t in timesteps`, `t.expand(B)`); None if it is none."""
    if entries is None or not isinstance(timestep, Tensor) or timestep.dtype != entries.dtype:
        return None
    spread = any(stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1)
    if spread or not same_memory(timestep, entries):
        return None
    place = (timestep.storage_offset() - entries.storage_offset()) // max(entries.stride(0), 1)
    return place if 0 <= place < len(entries) else None


def _read(timestep: Any) -> tuple[float, float]:
    """Latest and mean of the numbers of a timestep. Waits for the device.

    Raises:
        AdapterError: if it has none: a tensor on `meta`, or one of a `FakeTensorMode`.
    """
    if isinstance(timestep, FakeTensor) or (type(timestep) is Tensor and timestep.is_meta):
        raise AdapterError(
            "the timestep is a tensor without numbers (on meta, or of a FakeTensorMode), and steps are told apart by "
            "them; give it as a number or as a tensor of the host"
        )
    if not isinstance(timestep, Tensor) or timestep.numel() == 1:
        value = float(timestep)
        return value, value
    latest, mean = torch.stack([timestep.max().float(), timestep.float().mean()]).tolist()
    return latest, mean


class Runs:
    """The runs under way on one transformer, one per owner.

    Args:
        module: the transformer.
        home: the pipeline that it was accelerated in, for loops of the user's own; None for a bare transformer.
    """

    def __init__(self, module: nn.Module, home: PipelineView | None = None) -> None:
        self._module, self._home = module, home
        self._runs: dict[Owner, Run] = {}
        self._numbers = count()
        self._called: Tensor | None = None  # timesteps of the latest call of a pipeline
        self._said = False  # that calls take turns

    def label(self, timestep: Any, hidden: Any, name: str | None = None) -> tuple[Run, StepInfo] | None:
        """The run and the label of a forward that is about to happen; None for one of a callback, which is no step.

        Args:
            timestep: the transformer's argument, `[]`, `[B]` or one per frame or token.
            hidden: the transformer's latents, a tensor or a list of them.
            name: the pass, if the pipeline names it.
        """
        caller = Caller()
        if caller.callback:
            return None
        run = self._runs.get(caller.owner)
        # A frame that has gone leaves its identity to others: the same owner may be the call of another pipeline.
        if (
            run is None
            or (run.view is not None and run.owner.frame is not None and run.view.pipe is not caller.pipe)
            or not run.goes_on(timestep, hidden)
        ):
            run = self._begin(caller)
        return run, run.label(timestep, hidden, name)

    @property
    def current(self) -> Run | None:
        """The run of what happens now on this thread."""
        return self._runs.get(current_owner())

    @property
    def under_way(self) -> tuple[Run, ...]:
        """All runs."""
        return tuple(self._runs.values())

    def end(self, run: Run | None = None) -> None:
        """Forget a run, or all of them: the owner's next forward starts a new one."""
        if run is None:
            self._runs.clear()
        elif self._runs.get(run.owner) is run:
            del self._runs[run.owner]

    def _begin(self, caller: Caller) -> Run:
        owner = caller.owner
        self._runs.pop(owner, None)
        others = list(self._runs)
        for gone in set(others) - alive(others):
            dropped = self._runs.pop(gone, None)
            if dropped is not None and dropped.suspended and not self._said:
                self._said = True
                warnings.warn(IN_TURN, HastenWarning, stacklevel=5)
        view = self._view(caller.pipe)
        run = self._runs[owner] = Run(next(self._numbers), owner, view, self._module, caller.timesteps)
        run.suspended = caller.suspends
        if owner.frame is not None:
            self._called = run.sampler_timesteps
        return run

    def _view(self, pipe: Any) -> PipelineView | None:
        if pipe is not None:
            return PipelineView(pipe)
        if self._home is None or getattr(self._home.scheduler, "num_inference_steps", None) is None:
            return None
        # A loop of the user's own may go by the pipeline's scheduler, unless a call of the pipeline does, or did.
        taken = [self._called, *(run.sampler_timesteps for run in self.under_way)]
        mine = self._home.at_start and all(timesteps is not self._home.timesteps for timesteps in taken)
        return self._home if mine else None
