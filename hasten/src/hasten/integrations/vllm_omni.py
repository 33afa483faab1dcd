r"""vLLM-Omni: the cache backend `hasten`, registered by the entry point `vllm_omni.general_plugins`.

    vllm serve MODEL --omni --cache-backend hasten \
        --cache-config '{"computed_steps": 9}'

The engine has no registry of backends: the plug-in stands in for `get_cache_backend`, which every process calls.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from hasten import registry
from hasten.acceleration import accelerate
from hasten.caching.default import DEFAULT
from hasten.caching.method import CachingMethod, ScheduledMethod
from hasten.errors import ConfigError, ScheduleError, TargetError, unknown
from hasten.integrations.listed import listed
from hasten.pipeline.handle import Acceleration

__all__ = ["NAME", "register"]

log = logging.getLogger("hasten")

NAME = "hasten"
ENTRIES = ("method", "computed_steps")
USUAL = ("transformer", "transformer_2")  # where pipelines that say nothing else keep what denoises
RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"  # has the function under a name of its own


def register() -> None:
    """Make the backend known in this process; a second time nothing happens."""
    from vllm_omni.diffusion.cache import selector  # type: ignore[import-not-found]
    from vllm_omni.diffusion.cache.base import CacheBackend  # type: ignore[import-not-found]

    before = selector.get_cache_backend
    if hasattr(before, NAME):
        return

    class HastenBackend(_Backend, CacheBackend):
        """hasten as the engine's base class wants it."""

        def __init__(self, config: Any) -> None:
            CacheBackend.__init__(self, config)
            _Backend.__init__(self, config)

    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        return HastenBackend(cache_config) if cache_backend == NAME else before(cache_backend, cache_config)

    setattr(get_cache_backend, NAME, True)
    selector.get_cache_backend = get_cache_backend
    if RUNNER in sys.modules:
        vars(sys.modules[RUNNER])["get_cache_backend"] = get_cache_backend


def _method(config: Any) -> CachingMethod:
    """The caching method of a backend's configuration, the engine's object or a mapping.

    Raises:
        ConfigError, UnknownNameError: for entries or values that cannot work.
    """
    given = config if isinstance(config, Mapping) else getattr(config, "_extra_params", {})
    for name in given:
        if name not in ENTRIES:
            raise unknown("entry of the cache config", name, ENTRIES)
    methods = registry.parse(str(given.get("method", DEFAULT)))
    if len(methods) != 1 or not isinstance(methods[0], CachingMethod):
        raise ConfigError(f"cache config: method must be one caching method, such as foca; got {given['method']!r}")
    method = methods[0]
    if "computed_steps" not in given:
        return method
    if not isinstance(method, ScheduledMethod):
        raise ConfigError(f"cache config: {given['method']} decides by its threshold; leave computed_steps out")
    (name, _), *_ = registry.split(str(given.get("method", DEFAULT)))
    params = {p: getattr(method, p) for p in registry.info(name).parameters}
    return registry.build(name, **{**params, "interval": None, "computed_steps": given["computed_steps"]})


class _Backend:
    """Accelerates the transformers of an engine's pipeline, with the number of steps that each request has."""

    enabled: bool

    def __init__(self, config: Any) -> None:
        self._method = _method(config)
        self._handles: list[Acceleration] = []
        self._steps: int | None = None

    def enable(self, pipeline: Any) -> None:
        """Find out whether the pipeline can be accelerated.

        Raises:
            TargetError: if it has no transformer.
            AdapterError: if a transformer's layout is not known and cannot be found out.
        """
        for handle in [accelerate(module, self._method) for module in self._modules(pipeline)]:
            handle.remove()
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Prepare a request of so many steps."""
        if num_inference_steps == self._steps:
            for handle in self._handles:
                handle.reset()
            return
        for handle in self._handles:
            handle.remove()
        self._handles, self._steps = [], num_inference_steps
        try:
            method = listed(self._method, num_inference_steps)
        except ScheduleError as error:
            log.error("requests of %d steps are computed in full: %s", num_inference_steps, error)
            return
        self._handles = [accelerate(module, method) for module in self._modules(pipeline)]
        if verbose:
            log.info("%r for requests of %d steps", method, num_inference_steps)

    @staticmethod
    def _modules(pipeline: Any) -> list[nn.Module]:
        names = getattr(pipeline, "_dit_modules", None) or USUAL
        found = [getattr(pipeline, name, None) for name in names]
        modules = [module for module in found if isinstance(module, nn.Module)]
        if not modules:
            raise TargetError(f"{type(pipeline).__name__} has no {' or '.join(names)}, which hasten accelerates")
        return modules
