"""Find out how an unknown transformer is laid out, by watching one forward of it, and prove what was found.

Any list of blocks will do, wherever it is held: what a block takes and returns is found by identity (the tensor that
one block returns and the next one receives) and else by shape. What is found is then tried: the forward runs once more
with all blocks skipped and with what left the last of them put in its place. Unless every output comes out as before,
the next reading is tried, and in the end the transformer is refused with what was seen and the lines to describe it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import AdapterError
from hasten.models.adapter import BlockStack, ModelAdapter
from hasten.models.blocks import Skipped, streams_in, swapped
from hasten.models.forms import tensors_in
from hasten.models.proxy import Here, Proxy

__all__ = ["require_stacks", "root_arguments", "trace"]

_HIDDEN_NAMES = ("hidden_states", "x", "hidden", "latents", "img", "visual_embed", "sample")
_ENCODER_NAMES = ("encoder_hidden_states", "context", "encoder", "text_embed", "txt", "y", "c")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level")
_LIKE_A_TIMESTEP = re.compile(r"(^|_)(timesteps?|time|sigmas?|noise_levels?)($|_)")
# Lists that hold less of the parameters are left to run: refiners of the text, projections of captions.
_LEAST_SHARE = 0.05
_MOST = 0.5  # of the parameters that the lists found have to hold together, or skipping them saves little
# Relative difference of outputs that are the same: the same operations on the same numbers, on any device.
_NEAR, _NEAR_HALF = 1e-5, 1e-3
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)


def _weight(module: nn.Module) -> int:
    """Parameters that are multiplied with; tables of embeddings cost nothing to look up."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in module.parameters() if id(p) not in tables)


def _lists(module: nn.Module, depth: int, path: str = "") -> Iterator[str]:
    """Paths of the lists of blocks; with `depth` 0 the outermost ones, with 1 those inside their blocks, and so on."""
    for name, child in module.named_children():
        here = f"{path}{name}"
        blocks = [block for block in child._modules.values() if block is not None]  # with those that come twice
        if not isinstance(child, _LISTS) or (
            blocks and all(isinstance(b, (nn.ModuleList, nn.ModuleDict)) for b in blocks)
        ):
            yield from _lists(child, depth, here + ".")  # a list of lists holds lists, not blocks
        elif depth:
            yield from _lists(child, depth - 1, here + ".")
        elif len(blocks) > 1 and _weight(child):
            yield here


def require_stacks(model: nn.Module) -> list[str]:
    """Paths of the lists that hold more than a little of the model, or an `AdapterError` if there are none."""
    total = _weight(model) or 1
    stacks = [path for path in _lists(model, 0) if _weight(model.get_submodule(path)) >= _LEAST_SHARE * total]
    if not stacks:
        name = type(model).__name__
        children = ", ".join(f"{key}: {type(child).__name__}" for key, child in model.named_children()) or "nothing"
        raise AdapterError(
            f"{name} has no list of blocks that could be skipped (looked for a ModuleList, Sequential or ModuleDict of "
            f"two or more blocks; its children are {children}). {_remedy(model, [])}, or use site='output'"
        )
    return stacks


def root_arguments(model: nn.Module) -> tuple[str, str]:
    """Names of the transformer's (hidden, timestep) arguments.

    Raises:
        AdapterError: if the forward has no argument that looks like a timestep.
    """
    parameters = _parameters(model.forward)
    alike = (p for p in parameters if _LIKE_A_TIMESTEP.search(p))
    timestep = next((p for p in _TIMESTEP_NAMES if p in parameters), None) or next(alike, None)
    if timestep is None or not parameters:
        raise AdapterError(
            f"{type(model).__name__}.forward({', '.join(parameters)}) has no timestep argument (looked for "
            f"{', '.join(_TIMESTEP_NAMES)}, and for names with such a word in them). {_remedy(model, [])}; "
            "timestep=None says that every call is a step"
        )
    others = [p for p in parameters if p != timestep]
    hidden = next((p for p in _HIDDEN_NAMES if p in others), others[0] if others else timestep)
    return hidden, timestep


def _remedy(model: nn.Module, stacks: list[BlockStack]) -> str:
    """The lines that would describe the model, as far as it is known."""
    described = ", ".join(
        f"BlockStack({s.name!r}, returns={s.returns!r}, hidden={s.hidden!r}, encoder={s.encoder!r})" for s in stacks
    )
    stack = described or "BlockStack('<list of blocks>', returns=('hidden',))"
    try:
        parameters = _parameters(model.forward)
    except (TypeError, ValueError):
        parameters = []
    hidden = next((p for p in _HIDDEN_NAMES if p in parameters), "<latents>")
    timestep = next((p for p in parameters if p in _TIMESTEP_NAMES or _LIKE_A_TIMESTEP.search(p)), "<time>")
    return (
        f"Describe it with hasten.models.register({type(model).__name__!r}, "
        f"ModelAdapter(stacks=({stack},), hidden={hidden!r}, timestep={timestep!r}))"
    )


class _Watch(Proxy):
    """Stands in for one block while the forward is watched."""

    def __init__(self, block: nn.Module, here: Here, seen: _Seen, position: int) -> None:
        super().__init__(block, here)
        self.__dict__["seen"] = seen
        self.position = position

    def respond(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        self.seen.note(self, args, kwargs, output)
        return output


@dataclass
class _Seen:
    """What was seen of one list of blocks.

    Attributes:
        path: where the list is.
        share: of the model's parameters that it holds.
        matches: for each output of a block the arguments of the same shape, in every call so far.
        passed: for each output the arguments that were given the very tensor that the block before returned.
        problem: why the list cannot be skipped, or an empty string.
        called: how often, in the order of all calls, its last block was called.
    """

    path: str
    share: float
    clock: list[int]
    matches: list[list[str]] = field(default_factory=list)
    passed: list[set[str]] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    wrapped: bool = False
    problem: str = ""
    called: int = 0
    latest: Any = None
    positions: list[int] = field(default_factory=list)  # of its blocks, in the order of their calls

    def note(self, watch: _Watch, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """One call of one of its blocks; a block that stands in several places is one in each."""
        block: nn.Module = watch.original
        self.clock[0] += 1
        self.called = self.clock[0]
        self.names.add(type(block).__name__)
        if watch.position in self.positions:
            self.problem = "a block is called twice in a forward"
        elif self.positions and watch.position < self.positions[-1]:
            self.problem = "its blocks are called in another order than they stand in"
        self.positions.append(watch.position)
        names = _parameters(getattr(block, "_orig_mod", block).forward)
        if names[:1] == ["args"]:
            names = ["hidden_states", "encoder_hidden_states"]
        bound = {k: v for k, v in (dict(zip(names, args, strict=False)) | kwargs).items() if isinstance(v, Tensor)}
        outputs = list(output) if isinstance(output, (tuple, list)) else [output]
        self.wrapped = isinstance(output, (tuple, list)) and len(outputs) == 1
        if not outputs or not all(o is None or isinstance(o, Tensor) for o in outputs):
            self.problem = f"{type(block).__name__} returns a {type(output).__name__} that is not of tensors"
            return
        if not self.matches:
            self.matches = [list(bound) for _ in outputs]
            self.passed = [set() for _ in outputs]
            self.arguments = list(bound)
        if len(outputs) != len(self.matches):
            self.problem = "its blocks return different numbers of tensors"
            return
        for i, tensor in enumerate(outputs):
            if tensor is not None:
                self.matches[i] = [n for n in self.matches[i] if n in bound and _alike(bound[n], tensor)]
                if not self.matches[i]:
                    self.problem = f"{type(block).__name__} returns a tensor of a shape that it was not given"
            before = None if self.latest is None else self.latest[i]
            if before is not None:
                self.passed[i] |= {n for n, v in bound.items() if v is before}
        self.latest = outputs

    def stack(self, everything: bool) -> BlockStack:
        """The list as a stack; with `everything` all that a block returns is forecast."""
        taken: list[str] = []
        for i, matches in enumerate(self.matches):
            free = [name for name in matches if name not in taken]
            named = sorted(free, key=lambda n: (n not in self.passed[i], n not in (*_HIDDEN_NAMES, *_ENCODER_NAMES)))
            taken.append(named[0] if named else "")
        hidden = next((n for n in _HIDDEN_NAMES if n in taken), next((n for n in self.arguments if n in taken), ""))
        encoder = next((n for n in _ENCODER_NAMES if n in self.arguments and n != hidden), None)
        returns = tuple(
            None if not n else "hidden" if n == hidden else "encoder" if n == encoder and not everything else n
            for n in taken
        )
        return BlockStack(self.path, returns=returns, hidden=hidden, encoder=encoder, wrapped=self.wrapped)

    def __str__(self) -> str:
        kinds = " and ".join(sorted(self.names)) or "blocks that were not called"
        takes = ", ".join(self.arguments)
        return (
            f"{self.path!r} ({kinds}({takes}), {self.share:.0%} of the parameters{self.problem and ': '}{self.problem})"
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.is_floating_point() == b.is_floating_point()


def _watch(model: nn.Module, paths: list[str], run: Callable[[], Any]) -> tuple[Any, list[_Seen], dict[str, Any]]:
    """Run a forward, and say what was seen of some lists and what left each of them in the end."""
    total, clock, here = _weight(model) or 1, [0], Here()
    seen: list[_Seen] = []
    changes: list[tuple[nn.Module, str, nn.Module]] = []
    for path in paths:
        container = model.get_submodule(path)
        entry = _Seen(path, _weight(container) / total, clock)
        seen.append(entry)
        blocks = [(name, block) for name, block in container._modules.items() if block is not None]
        changes += [(container, name, _Watch(block, here, entry, i)) for i, (name, block) in enumerate(blocks)]
    with swapped(changes, here):
        output = run()
    return output, seen, {entry.path: entry.latest for entry in seen}


def _readings(seen: list[_Seen]) -> Iterator[tuple[BlockStack, ...]]:
    """Stacks to try, the likeliest first."""
    usable = sorted((s for s in seen if s.called and not s.problem and s.matches), key=lambda s: s.called)
    large = [s for s in usable if s.share >= _LEAST_SHARE]
    if not large:
        return
    choices = [large]
    biggest = max(large, key=lambda s: s.share)
    # Without what runs after the largest list, and that list alone.
    choices += [large[: large.index(biggest) + 1], [biggest]]
    tried = set()
    for choice in choices:
        for everything in (False, True):
            stacks = tuple(s.stack(everything and s is choice[-1]) for s in choice)
            if stacks not in tried and all(stack.hidden for stack in stacks):
                tried.add(stacks)
                yield stacks


def _proves(
    model: nn.Module, adapter: ModelAdapter, run: Callable[[], Any], streams: dict[str, Tensor], out: Any
) -> bool:
    """Whether skipping all blocks leaves every output as it was, if what left the last one is put in its place."""
    skipped = Skipped(model, adapter, lambda: streams)
    try:
        with skipped.inside():
            again = tensors_in(run())
    except Exception:  # a reading that does not fit may fail anywhere in the model
        return False
    before = tensors_in(out)
    return skipped.asked and len(again) == len(before) and all(map(_equal, again, before))


def _equal(again: Tensor, before: Tensor) -> bool:
    """Whether two outputs of the same operations are the same, measured by their own size, however small that is."""
    if again.shape != before.shape or not before.numel():
        return again.shape == before.shape
    if not (before.is_floating_point() or before.is_complex()):
        return torch.equal(again, before)
    tolerance = _NEAR_HALF if before.dtype in (torch.float16, torch.bfloat16) else _NEAR
    return bool((again - before).abs().max() <= tolerance * before.abs().max())


def trace(
    model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Any, ModelAdapter, dict[str, Tensor]]:
    """Run one full forward, learn the layout from it, and prove it in a second one that skips all blocks.

    Returns:
        the forward's own output, the `ModelAdapter`, and the streams that left the last stack.

    Raises:
        AdapterError: if no list of blocks carries the image tokens through unchanged in shape, or the lists that do are
            not most of the model.
    """
    hidden, timestep = root_arguments(model)

    def run() -> Any:
        return forward(*args, **kwargs)

    described: list[str] = []
    guess: list[BlockStack] = []
    for depth in range(3):
        paths = list(_lists(model, depth))
        if not paths:
            break
        try:
            output, seen, left = _watch(model, paths, run)
        except Exception as error:  # what asks for the classes of its blocks fails on what stands for them
            run()  # and a call that is wrong in itself fails here
            reason = next(iter(str(error).splitlines()), "")
            raise AdapterError(
                f"the blocks of {type(model).__name__} cannot be watched ({type(error).__name__}: {reason}). "
                f"{_remedy(model, guess)}, or use site='output'"
            ) from error
        described += [str(entry) for entry in seen if entry.share >= _LEAST_SHARE]
        for stacks in _readings(seen):
            adapter = ModelAdapter(stacks=stacks, hidden=hidden, timestep=timestep)
            last = stacks[-1]
            latest = left[last.name]
            streams = streams_in(last, latest[0] if len(latest) == 1 else tuple(latest))
            guess = guess or list(stacks)
            if _proves(model, adapter, run, streams, output):
                share = sum(entry.share for entry in seen if entry.path in {stack.name for stack in stacks})
                if share >= _MOST:
                    return output, adapter, streams
                described.append(
                    f"{', '.join(s.name for s in stacks)} together hold only {share:.0%} of the parameters"
                )
    raise AdapterError(
        f"cannot tell how the blocks of {type(model).__name__} hand on the image tokens (saw "
        f"{'; '.join(described) or 'no list of blocks'}). {_remedy(model, guess)}, or use site='output'"
    )
