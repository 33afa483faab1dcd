"""Find out how an unknown transformer is laid out, by watching one forward of it.

Lists of blocks are found by looking; what a block takes and returns is found by identity: the tensor that one block
returns and the next one receives as its hidden argument is the stream of image tokens. Nothing is guessed where that
leaves a doubt: the error says what to register.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hasten.errors import AdapterError
from hasten.models.adapter import BlockStack, ModelAdapter, Stream
from hasten.models.proxy import Proxy

__all__ = ["candidate_stacks", "require_stacks", "root_arguments", "trace"]

_HIDDEN_NAMES = ("hidden_states", "x", "hidden", "latents", "img", "visual_embed")
_ENCODER_NAMES = ("encoder_hidden_states", "context", "encoder", "text_embed", "txt", "y")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma")

_REMEDY = (
    "Describe it with hasten.models.register({name!r}, "
    "ModelAdapter(stacks=(BlockStack('<list of blocks>', returns=('hidden',)),)))."
)


def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)


def candidate_stacks(model: nn.Module) -> list[str]:
    """Names of the direct children that are lists of at least two blocks of one class taking image tokens first."""
    names = []
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList) or len(child) < 2 or len({type(block) for block in child}) != 1:
            continue
        parameters = _parameters(child[0].forward)
        if parameters and parameters[0] in _HIDDEN_NAMES:
            names.append(name)
    return names


def require_stacks(model: nn.Module) -> list[str]:
    """`candidate_stacks`, or a `AdapterError` if there are none."""
    stacks = candidate_stacks(model)
    if not stacks:
        name = type(model).__name__
        raise AdapterError(
            f"{name} has no list of blocks that hasten knows how to skip "
            "(looked for direct children that are ModuleLists of "
            f"two or more blocks of one class whose first argument is one of {', '.join(_HIDDEN_NAMES)}). "
            + _REMEDY.format(name=name)
        )
    return stacks


def root_arguments(model: nn.Module) -> tuple[str, str]:
    """Names of the transformer's (hidden, timestep) arguments.

    Raises:
        AdapterError: if the forward has no argument that looks like a timestep.
    """
    parameters = _parameters(model.forward)
    timestep = next((p for p in _TIMESTEP_NAMES if p in parameters), None)
    if timestep is None or not parameters:
        known = ", ".join(_TIMESTEP_NAMES)
        raise AdapterError(
            f"{type(model).__name__}.forward({', '.join(parameters)}) has no timestep argument (looked for {known}). "
            + _REMEDY.format(name=type(model).__name__)
        )
    hidden = next((p for p in _HIDDEN_NAMES if p in parameters), parameters[0])
    return hidden, timestep


class _Watch(Proxy):
    """Stands in for one block while the forward is watched."""

    def __init__(self, block: nn.Module, stack: str, log: _Log) -> None:
        super().__init__(block)
        self.stack, self.log = stack, log

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        self.log.note(self.stack, self.original, args, kwargs, output)
        return output


class _Log:
    """Keeps only the latest output, so that watching does not hold every activation of a large model."""

    def __init__(self) -> None:
        self.stacks: dict[str, dict[str, Any]] = {}
        self.last: tuple[str, tuple[Any, ...]] | None = None

    def note(self, stack: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = dict(zip(_parameters(block.forward), args, strict=False)) | kwargs
        outputs = output if isinstance(output, tuple) else (output,)
        hidden_name = next(name for name in bound if name in _HIDDEN_NAMES)
        encoder_name = next((n for n in _ENCODER_NAMES if isinstance(bound.get(n), Tensor)), None)
        entry = self.stacks.setdefault(
            stack, {"hidden": hidden_name, "encoder": encoder_name, "index": set(), "kept": True}
        )
        entry["size"] = len(outputs)
        entry["kept"] &= any(isinstance(o, Tensor) and o.shape == bound[hidden_name].shape for o in outputs)
        if self.last is not None and self.last[0] == stack:
            entry["index"] |= {i for i, o in enumerate(self.last[1]) if o is bound[hidden_name]}
        self.last = (stack, outputs)


def trace(model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ModelAdapter, Tensor]:
    """Run one full forward and learn the layout from it.

    Returns:
        the forward's own output, the `ModelAdapter`, and the image tokens that left the last stack.

    Raises:
        AdapterError: if no list of blocks carries the image tokens through unchanged in shape.
    """
    name = type(model).__name__
    log = _Log()
    originals = {stack: list(getattr(model, stack)) for stack in require_stacks(model)}
    try:
        for stack, blocks in originals.items():
            for i, block in enumerate(blocks):
                getattr(model, stack)._modules[str(i)] = _Watch(block, stack, log)
        output = forward(*args, **kwargs)
    finally:
        for stack, blocks in originals.items():
            for i, block in enumerate(blocks):
                getattr(model, stack)._modules[str(i)] = block
    specs = []
    for stack, entry in log.stacks.items():
        if len(entry["index"]) != 1 or not entry["kept"] or entry["size"] > 2:
            continue
        index = entry["index"].pop()
        returns: tuple[Stream, ...] = ("hidden",)
        if entry["size"] == 2:
            returns = ("hidden", "encoder") if index == 0 else ("encoder", "hidden")
        specs.append(BlockStack(stack, returns=returns, hidden=entry["hidden"], encoder=entry["encoder"]))
    if not specs or log.last is None or specs[-1].name != log.last[0]:
        raise AdapterError(
            f"cannot tell how the blocks of {name} hand on the image tokens "
            f"(saw the lists {', '.join(log.stacks) or 'none'}). " + _REMEDY.format(name=name)
        )
    hidden, timestep = root_arguments(model)
    spec = ModelAdapter(stacks=tuple(specs), hidden=hidden, timestep=timestep)
    return output, spec, log.last[1][specs[-1].returns.index("hidden")]
