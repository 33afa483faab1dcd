"""The site `module`: the outputs of every attention and feed-forward.

Cache keys: one for every tensor that a described submodule returns.
"""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn

from hasten.caching.memory import PassMemory
from hasten.caching.sites import PlainSite
from hasten.errors import AdapterError
from hasten.models import Here, ModelAdapter, Proxy
from hasten.models.blocks import owner_of, swapped
from hasten.models.forms import Form
from hasten.pipeline.hooks import Forward

__all__ = ["ModuleSite"]


class _Submodule(Proxy):
    """An attention or feed-forward of the module site."""

    def __init__(self, original: nn.Module, site: ModuleSite, key: str, forecast: bool) -> None:
        super().__init__(original, site.here)
        self.__dict__["site"] = site
        self.key, self.forecast = key, forecast

    def respond(self, *args: Any, **kwargs: Any) -> Any:
        if self.site.computing:
            output = self.original(*args, **kwargs)
            self.site.record(self, output)
            return output
        return self.site.answer(self)


class ModuleSite(PlainSite):
    """Every attention and feed-forward output, before its gate: the papers' form, and the one that costs memory."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter | None) -> None:
        if adapter is None:
            raise AdapterError(
                f"site 'module' needs a registered family and {type(model).__name__} is none; "
                "use site='hidden' or 'output', or describe the family with hasten.models.register"
            )
        self._model, self.adapter, self.here = model, adapter, Here()
        missing = [stack.name for stack in adapter.stacks if stack.modules is None]
        if missing:
            raise AdapterError(
                f"site 'module' is not described for {type(model).__name__} (no BlockModules for "
                f"{', '.join(missing)}); use site='hidden', or register the family with "
                "BlockStack(..., modules=BlockModules(...))"
            )
        self._proxies: list[tuple[nn.Module, str, nn.Module]] = []  # (parent, submodule's name, proxy)
        self._originals: list[nn.Module] = []  # that the proxies stand for
        self._blocks: list[nn.Module] = []
        self._memory: PassMemory | None = None  # of the forward under way
        self._calls: dict[str, int] = {}  # of each submodule in this forward
        self.computing = True

    def _swaps(self) -> list[tuple[nn.Module, str, nn.Module]]:
        blocks = [block for stack in self.adapter.used(self._model) for block in stack.blocks(self._model)]
        if any("_orig_mod" in block._modules or block._compiled_call_impl is not None for block in blocks):
            raise AdapterError(
                f"site 'module' works inside the blocks of {type(self._model).__name__}, which are compiled; "
                "use site='hidden', or do not compile them"
            )
        same = len(blocks) == len(self._blocks) and all(map(is_, blocks, self._blocks))
        if not same or not all(map(is_, [parent._modules[name] for parent, name, _ in self._proxies], self._originals)):
            self._blocks, self._proxies = blocks, self._build()
            self._originals = [proxy.original for _, _, proxy in self._proxies]  # type: ignore[misc]
        return self._proxies

    def _build(self) -> list[tuple[nn.Module, str, nn.Module]]:
        proxies: list[tuple[nn.Module, str, nn.Module]] = []
        for stack in self.adapter.used(self._model):
            assert stack.modules is not None
            forecast = [name for name, _ in stack.modules.forecast]
            for i, block in enumerate(stack.blocks(self._model)):
                for name in (*forecast, *stack.modules.skip):
                    owner = owner_of(block, name)
                    if owner is not None and _has(block, name):
                        key = f"{stack.name}.{i}.{name}"
                        proxy = _Submodule(getattr(owner, name), self, key, name in forecast)
                        proxies.append((owner, name, proxy))
        return proxies

    def _run(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory, computing: bool) -> Any:
        self._memory, self.computing = memory, computing
        self._calls.clear()
        try:
            with swapped(self._swaps(), self.here):
                return forward(*args, **kwargs)
        finally:
            self._memory = None

    def compute(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        memory.forms.clear()
        return self._run(forward, args, kwargs, memory, computing=True)

    def skip(self, forward: Forward, args: Any, kwargs: Any, memory: PassMemory) -> Any:
        try:
            return self._run(forward, args, kwargs, memory, computing=False)
        except _NotRecordedError:
            return None

    def record(self, module: _Submodule, output: Any) -> None:
        """Remember what a submodule returned."""
        assert self._memory is not None
        call = self._calls.get(module.key, 0)
        self._calls[module.key] = call + 1
        form = Form(output, f"{module.key!r} of {type(self._model).__name__}")
        if module.forecast:
            for i, tensor in enumerate(form.tensors):
                self._memory.record(f"{module.key}/{call}/{i}", tensor)
        self._memory.forms.setdefault(module.key, []).append(form.forget())

    def answer(self, module: _Submodule) -> Any:
        """What a submodule would have returned."""
        memory, key = self._memory, module.key
        assert memory is not None
        call = self._calls.get(key, 0)
        self._calls[key] = call + 1
        forms: list[Form] = memory.forms.get(key, [])
        if call >= len(forms):
            raise _NotRecordedError
        if not module.forecast:
            return forms[call].filler()
        return forms[call].build(lambda i: memory.forecast(f"{key}/{call}/{i}"))

    def estimate(self, image_tokens: int, text_tokens: int, batch: int) -> int:
        tokens = {"image": image_tokens, "text": text_tokens, "joint": image_tokens + text_tokens}
        numbers = 0
        for stack in self.adapter.used(self._model):
            assert stack.modules is not None
            for block in stack.blocks(self._model):
                kept = [kinds for name, kinds in stack.modules.forecast if _has(block, name)]
                numbers += sum(tokens[kind] for kinds in kept for kind in kinds)
        return batch * numbers * self.adapter.width_of(self._model)


def _has(block: nn.Module, name: str) -> bool:
    """Whether a block, or what it wraps, has a submodule; last blocks often lack one, or have None in its place."""
    owner = owner_of(block, name)
    return owner is not None and owner._modules[name] is not None


class _NotRecordedError(Exception):
    """A submodule runs on a skipped step that did not run on the computed one (guidance that leaves out layers)."""
