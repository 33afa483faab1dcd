"""The deep part of a UNet, forecast, with the outermost level computed at every step: the site of DeepCache.

As at the other sites the model's own forward runs, with proxies in the places of the inner levels for the length of it.
On a skipped step the last of them returns the forecast, and the others something of the right shape that nobody reads.
What a ControlNet or an adapter adds to the outermost level is therefore of this step; what it adds further in is in the
forecast.

Source: Ma, Fang, Wang, DeepCache: Accelerating Diffusion Models for Free, arXiv:2312.00858. There the feature is
reused, and what is computed may be a part of the outermost level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hasten.caching.memory import PassMemory
from hasten.caching.sites import PlainSite
from hasten.errors import AdapterError
from hasten.models import Here, Proxy, deep_part
from hasten.models.blocks import swapped
from hasten.models.forms import Form
from hasten.pipeline.hooks import Forward

__all__ = ["DeepSite"]


class _Level(Proxy):
    """Stands for one inner level."""

    def __init__(self, original: nn.Module, here: Here, answer: Callable[[nn.Module, Any, Any], Any]) -> None:
        super().__init__(original, here)
        self.__dict__["answer"] = answer

    def respond(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self.original, args, kwargs)


class DeepSite(PlainSite):
    """What the inner levels of a UNet hand up to the outermost one.

    Args:
        model: the UNet.

    Raises:
        AdapterError: if it is none, or its levels are no modules of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        part = deep_part(model)
        if part is None:
            raise AdapterError(
                f"site 'deep' forecasts the inner levels of a UNet, and {type(model).__name__} has none that are "
                "modules of their own (looked for lists `down_blocks` and `up_blocks` of two or more levels); "
                "use site='output', or site='hidden' for a transformer"
            )
        self._model, self._part, self._here = model, part, Here()
        self._memory: PassMemory | None = None
        self._computing = True
        self._levels: dict[str, _Level] = {}

    def compute(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        return self._run(forward, args, kwargs, memory, computing=True)

    def skip(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        return self._run(forward, args, kwargs, memory, computing=False)

    def _run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, computing: bool) -> Any:
        self._memory, self._computing = memory, computing
        try:
            with swapped([self._swap(path) for path in self._part.modules], self._here):
                return forward(*args, **kwargs)
        finally:
            self._memory = None

    def _swap(self, path: str) -> tuple[nn.Module, str, nn.Module]:
        parent, _, name = path.rpartition(".")
        owner = self._model.get_submodule(parent)
        original = owner._modules[name]
        assert original is not None
        level = self._levels.get(path)
        if level is None or level.original is not original:
            level = self._levels[path] = _Level(original, self._here, lambda *call: self._answer(path, *call))
        return owner, name, level

    def _answer(self, path: str, original: nn.Module, args: Any, kwargs: Any) -> Any:
        memory, last = self._memory, path == self._part.last
        assert memory is not None
        if self._computing:
            output = original(*args, **kwargs)
            form = Form(output, f"{path!r} of {type(self._model).__name__}")
            for i, tensor in enumerate(form.tensors if last else ()):
                memory.record(f"deep/{i}", tensor)
            memory.forms[path] = form.forget()
            return output
        known: Form = memory.forms[path]
        return known.build(lambda i: memory.forecast(f"deep/{i}")) if last else known.filler()

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        config: Any = self._model.config
        return int(batch * image_tokens * config.block_out_channels[1])
