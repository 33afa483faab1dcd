"""What a pipeline tells: its denoisers, and the steps of the run under way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from diffusers import ModularPipeline
from torch import Tensor, nn

from hasten import models
from hasten.errors import AdapterError, TargetError

__all__ = ["DENOISERS", "PipelineView", "denoisers", "same_memory", "unwrap"]

_EXPERTS = ("transformer", "transformer_2")  # which take over from each other within a run
# Where pipelines keep what denoises.
DENOISERS = (*_EXPERTS, "unconditional_transformer", "unet", "prior", "decoder")


# What spreads a module over devices, and why nothing is skipped around it.
WRAPPERS = {
    "DataParallel": "copies it to every device in each call, so that a cache has nothing to stay on; give each device "
    "a pipeline of its own",
    "DistributedDataParallel": "is for training; accelerate what it wraps, its .module",
    "FullyShardedDataParallel": "stands in front of it; accelerate what it wraps, its .module, or use fully_shard",
}


def unwrap(module: Any) -> Any:
    """The module that `torch.compile` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by name, unwrapped; a bare one by the name of its class.

    Raises:
        TargetError: if there is none, or it is inside of what spreads it over devices.
    """
    if isinstance(target, nn.Module):
        _refuse_wrapper("the denoiser", target)
        return {type(unwrap(target)).__name__: unwrap(target)}
    found = {name: unwrap(getattr(target, name, None)) for name in DENOISERS}
    for name, module in found.items():
        _refuse_wrapper(f"pipe.{name}", module)
    modules = {
        name: module
        for name, module in found.items()
        if isinstance(module, nn.Module) and (name in _EXPERTS or _takes_a_timestep(module))
    }
    if not modules:
        if isinstance(target, ModularPipeline):
            raise TargetError(
                f"{type(target).__name__} has no denoiser yet; call its load_components() or "
                "update_components(transformer=...) first"
            )
        raise TargetError(
            f"{type(target).__name__} has nothing that denoises; give a diffusers pipeline with one of "
            f"{', '.join(DENOISERS)}, or the transformer or UNet itself"
        )
    return modules


def _refuse_wrapper(name: str, module: Any) -> None:
    kind = type(unwrap(module)).__name__
    if kind in WRAPPERS and isinstance(getattr(module, "module", None), nn.Module):
        raise TargetError(f"{name} is inside of a {kind}, which {WRAPPERS[kind]}")


def _takes_a_timestep(module: nn.Module) -> bool:
    """Whether a module denoises, since pipelines call other things a decoder, too."""
    try:
        return models.find(module) is not None or bool(models.root_arguments(module))
    except AdapterError:
        return False


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both are views of the same numbers, if they have any; reads none of them, and waits for no device."""
    memory = one.untyped_storage().data_ptr()
    return memory != 0 and memory == other.untyped_storage().data_ptr()


def _is_part(loop: Any, timesteps: Tensor) -> bool:
    """Whether a tensor is a slice of the scheduler's list.

    The first entry alone, or one that is repeated, is the time of a step: pipelines as DiT's have it under the list's
    name, once per image of the batch. A later entry alone is a loop of one step, as image to image may have it.
    """
    if not isinstance(loop, Tensor) or loop.dim() != 1 or not same_memory(loop, timesteps):
        return False
    several = len(loop) > min(1, len(timesteps) - 1)
    return loop.stride(0) > 0 and (several or loop.storage_offset() > timesteps.storage_offset())


class PipelineView:
    """What a pipeline tells of the run under way: read-only, and without keeping the pipeline alive.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe: Callable[[], Any]
        try:
            self._pipe = weakref.ref(pipe)
        except TypeError:  # a stand-in that cannot be referred to weakly
            self._pipe = lambda: pipe

    @property
    def pipe(self) -> Any:
        """The pipeline; None once it is gone."""
        return self._pipe()

    @property
    def scheduler(self) -> Any:
        """Its scheduler, None without one."""
        return getattr(self.pipe, "scheduler", None)

    @property
    def timesteps(self) -> Tensor | None:
        """The scheduler's list: another object in each run, since `set_timesteps` makes it."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        return timesteps if isinstance(timesteps, Tensor) else None

    @property
    def begin_index(self) -> int:
        """Where in the list the run begins (later than 0 in image to image)."""
        return getattr(self.scheduler, "begin_index", None) or 0

    @property
    def step_index(self) -> int | None:
        """Where in the list the scheduler stands; None for one that does not count."""
        scheduler = self.scheduler
        if not hasattr(scheduler, "step_index"):
            counter = getattr(scheduler, "counter", None)  # PNDM, in whose list a timestep comes twice
            return counter if isinstance(counter, int) else None
        index = scheduler.step_index
        return self.begin_index if index is None else index

    @property
    def at_start(self) -> bool:
        """Whether the scheduler has taken no step of its list, as far as it counts them."""
        return self.step_index in (None, self.begin_index)

    @property
    def guidance(self) -> float | None:
        """The guidance scale of the run under way."""
        scale = getattr(self.pipe, "_guidance_scale", None)
        return float(scale) if isinstance(scale, (int, float)) else None

    def wrapper_of(self, module: nn.Module) -> nn.Module | None:
        """What `torch.compile(module)` returned, if the pipeline calls that in the denoiser's place."""
        parts = [getattr(self.pipe, name, None) for name in DENOISERS]
        return next((part for part in parts if unwrap(part) is module and part is not module), None)

    def timesteps_of(self, module: nn.Module, loop: Any = None) -> tuple[float, ...] | None:
        """The timesteps of the run at which a transformer is called; reads the list, so once per run.

        Args:
            module: the transformer.
            loop: what the pipeline goes through. It counts where it is a part of the scheduler's list: image to image
                with a scheduler that has no begin index, `denoising_end`, lists that end with the time of the image.
        """
        if self.timesteps is None:
            return None
        timesteps = self._looped(self.timesteps, loop)
        mine = self._steps_of(module, timesteps)
        return tuple((timesteps if mine is None else timesteps[mine]).tolist())

    def part_of(self, module: nn.Module, loop: Any = None) -> tuple[int, int] | None:
        """First step of one of two experts, and steps of the whole run; None where one transformer takes them all."""
        timesteps = None if self.timesteps is None else self._looped(self.timesteps, loop)
        mine = None if timesteps is None else self._steps_of(module, timesteps)
        if mine is None:
            return None
        chosen = mine.nonzero()
        return (int(chosen[0]) if len(chosen) else 0), len(mine)

    def _looped(self, timesteps: Tensor, loop: Any) -> Tensor:
        """Those of the scheduler's list that the pipeline goes through."""
        if _is_part(loop, timesteps):
            looped: Tensor = loop
            return looped
        timesteps = timesteps[self.begin_index :]
        # The list of an SCMScheduler ends with the time of the finished image.
        return timesteps[:-1] if type(self.scheduler).__name__ == "SCMScheduler" else timesteps

    def _steps_of(self, module: nn.Module, timesteps: Tensor) -> Tensor | None:
        """Which of these a transformer is called at, if two experts take over from each other (Wan 2.2)."""
        ratio = getattr(getattr(self.pipe, "config", None), "boundary_ratio", None)
        first, second = (unwrap(getattr(self.pipe, name, None)) for name in _EXPERTS)
        if ratio is None or first is None or second is None:
            return None
        early = timesteps >= ratio * self.scheduler.config.num_train_timesteps
        return early if module is first else ~early
