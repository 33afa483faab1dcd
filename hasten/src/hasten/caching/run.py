"""What caching remembers of one run: a gate, the features of each pass, the decision of the step."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from hasten.caching.gates import Gate
from hasten.caching.memory import PassMemory
from hasten.caching.method import CachingMethod
from hasten.caching.schedule import Decision
from hasten.calibration import RunFacts
from hasten.errors import HastenWarning
from hasten.pipeline.caller import joined_passes
from hasten.pipeline.guidance import mixing_scale
from hasten.pipeline.runs import StepInfo

__all__ = ["CachingRun"]

UNSURE = (
    "a step had fewer passes than the one before, and none has a name: if it was not the last one that was left out, "
    "features of one pass serve another. Name the passes: with transformer.cache_context('cond'): ..."
)

GROWN = (
    "a step has more passes than the one before, and none has a name: if it is not the last one that is new, "
    "features of one pass serve another. Name the passes: with transformer.cache_context('cond'): ..."
)


class CachingRun:
    """State of a run.

    Args:
        method: as it serves the run.
        gate: a fresh one, begun.
        facts: what the pipeline tells of the run.
    """

    def __init__(self, method: CachingMethod, gate: Gate, facts: RunFacts) -> None:
        self.method = method
        self.gate: Gate | None = gate
        self.facts = facts
        self.memories: dict[str, PassMemory] = {}
        self._signatures: dict[str, Hashable] = {}
        self._joined: dict[str, bool] = {}  # whether a pass stands for several, by name
        self._last_computed: int | None = None
        self._decision = Decision(True, "first step")
        self._passes = self._passes_before = 0  # of this step so far, and of the one before
        self._guided: CachingMethod | None = None  # the method as it serves steps of several passes, once it does
        self.step = 0

    def memory(self, info: StepInfo, signature: Hashable) -> PassMemory | None:
        """What is remembered of the pass; nothing where its latents have another shape, dtype or device than before."""
        if info.first_pass:
            self._passes_before, self._passes = self._passes, 0
        self._passes += 1
        if info.unsure:
            warnings.warn(UNSURE, HastenWarning, stacklevel=2)
        if info.grown:
            warnings.warn(GROWN, HastenWarning, stacklevel=2)
        memory = self.memories.get(info.pass_name)
        if memory is None or signature != self._signatures[info.pass_name]:
            self.memories.pop(info.pass_name, None)
            self._signatures[info.pass_name] = signature
            return None
        memory.step = info.step
        return memory

    def method_now(self) -> CachingMethod:
        """The method, if it follows guidance, as it serves the step, whose first pass goes by the step before."""
        if max(self._passes, self._passes_before) < 2 and not any(self._joined.values()):
            return self.method
        if self._guided is None:
            self._guided = self.method.guided(mixing_scale())
        return self._guided

    def add_memory(self, info: StepInfo, memory: PassMemory, hidden: Any) -> PassMemory:
        """Begin to remember a pass, whose latents have another form than those before or are the first ones."""
        self._joined[info.pass_name] = joined_passes(hidden) > 1
        self.memories[info.pass_name] = memory
        memory.step = info.step
        return memory

    def decide(self, info: StepInfo, memory: PassMemory, observed: Tensor | None) -> Decision:
        """The step's decision, made at its first pass; a pass without features has to run all the same."""
        if self.gate is None:
            return Decision(True, "after the last step")
        if info.first_pass:
            self.step = info.step
            self._decision = self.gate.decide(info.step, self._last_computed, observed)
            if self._decision.computed:
                self._last_computed = info.step
        if not self._decision.computed and memory.empty:
            return Decision(True, "nothing to forecast from")
        return self._decision

    @property
    def held(self) -> int:
        """Bytes of the features, and of what the gate keeps."""
        held = 0
        for memory in self.memories.values():
            held += memory.bytes
        for tensor in () if self.gate is None else self.gate.held():
            held += tensor.nbytes
        return held

    def free(self) -> None:
        """Let go of all tensors: the last forward of the run is over."""
        self.memories.clear()
        self.gate = None
