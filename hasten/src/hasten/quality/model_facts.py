"""What a denoiser is, to the last bit of its weights: what was certified of one does not hold for another.

All bits are read when a model is seen first, and again when it shows a change: another tensor, a version that PyTorch
counted up, or other numbers at a few places of each tensor, since changes through `.data` (as LoRA is fused) are not
counted. A call of a model that shows none costs these few numbers.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from hasten.calibration import model_digest

__all__ = ["ModelFacts"]

CHUNK = 1 << 20  # numbers that are multiplied at a time
PLACES = 8  # of each tensor, that are compared at every call
WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ADAPTERS = ("scaling", "active_adapters", "disable_adapters")  # of layers with LoRA


@dataclass(frozen=True)
class ModelFacts:
    """A denoiser.

    Attributes:
        model: its class.
        config: digest of its architecture.
        dtype: of its parameters.
        weights: digest of all bits of them, and of the strengths of its adapters; empty where they cannot be read.
    """

    model: str
    config: str
    dtype: str
    weights: str

    @classmethod
    def of(cls, module: nn.Module) -> ModelFacts:
        """The facts of a module."""
        tensors, state = _tensors(module)
        with _LOCK:
            known = _KNOWN.get(module)
            if known is None or not known.same(tensors, state):
                known = _KNOWN[module] = _Seen(module, tensors, state)
        return known.facts

    def differences(self, here: ModelFacts) -> list[str]:
        """What is different here, as text."""
        if here.model != self.model:
            return [f"certified for {self.model}, this is {here.model}"]
        if here.config != self.config:
            return [f"certified for a {self.model} of another configuration (size, depth, or adapters such as LoRA)"]
        if here.dtype != self.dtype:
            return [f"certified for weights in {self.dtype}, these are in {here.dtype}"]
        if not here.weights:
            return ["its weights are offloaded where they cannot be compared with those that were certified"]
        if here.weights != self.weights:
            return [
                "certified for other weights of the same architecture (or another strength of adapters such as LoRA)"
            ]
        return []


class _Seen:
    """A module as it was when all bits of it were read.

    Args:
        module: whose facts they are.
        tensors: its parameters and persistent buffers by name.
        state: what else decides, as text.
    """

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor], state: str) -> None:
        self._places = _places(tensors)
        self._marks = {name: (weakref.ref(tensor), _version(tensor)) for name, tensor in tensors.items()}
        self._state = state
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in module.parameters()})
        weights = "" if any(tensor.is_meta for tensor in tensors.values()) else _digest(tensors, state)
        self.facts = ModelFacts(type(module).__name__, model_digest(module), " and ".join(kinds), weights)

    def same(self, tensors: dict[str, Tensor], state: str) -> bool:
        """Whether a module that has these now shows no change."""
        if state != self._state or tensors.keys() != self._marks.keys():
            return False
        for name, tensor in tensors.items():
            known, version = self._marks[name]
            if known() is not tensor or version is None or version != _version(tensor):
                return False
        return _places(tensors) == self._places


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()  # of several threads one reads, the others wait


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place, as far as PyTorch counts; None where it does not."""
    return None if tensor.is_inference() else tensor._version


def _tensors(module: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Parameters and persistent buffers by name, and the classes and adapters of layers as text."""
    found: dict[str, Tensor] = {}
    state = [type(module).__qualname__]
    for path, part in module.named_modules():
        kept = {name: x for name, x in part._buffers.items() if name not in part._non_persistent_buffers_set}
        for name, tensor in (*part._parameters.items(), *kept.items()):
            if tensor is not None:
                found[f"{path}.{name}"] = _offloaded(part, name) if tensor.is_meta else tensor
        if isinstance(part.__dict__.get("scaling"), dict):
            state += [path, *(str(getattr(part, name, None)) for name in ADAPTERS)]
    return found, "\n".join(state)


def _offloaded(part: nn.Module, name: str) -> Tensor:
    """The tensor that accelerate's hook keeps for a forward; the empty one of the module where there is none."""
    hook = getattr(part, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        kept = getattr(one, "weights_map", None)
        if kept is not None and name in kept:
            tensor: Tensor = kept[name]
            return tensor
    own: Tensor = getattr(part, name)
    return own


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors with numbers of their own that a tensor consists of: one, or the parts of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
        return
    data = tensor.detach().as_subclass(Tensor)
    yield name, torch.view_as_real(data) if data.is_complex() else data


def _bits(data: Tensor) -> Tensor:
    """The numbers of a tensor as whole ones of as many bits."""
    return data.contiguous().view(-1).view(WHOLE[data.element_size()])


@torch.no_grad()
def _places(tensors: dict[str, Tensor]) -> tuple[bytes, ...]:
    """The bits at a few places of each tensor, by dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for name, tensor in tensors.items():
        for _, data in _plain(name, tensor):
            count = data.numel()
            if data.is_meta or not count:
                continue
            few = min(PLACES, count)
            if not data.is_contiguous():
                data = data.reshape(-1)
            chosen = data.as_strided((few,), (count // few,))
            groups.setdefault((data.device, data.dtype), []).append(chosen)
    found = [torch.cat(several) for several in groups.values()]
    return tuple(_bits(one).cpu().numpy().tobytes() for one in found)


@torch.no_grad()
def _digest(tensors: dict[str, Tensor], state: str) -> str:
    """SHA-256 over sums of all bits, each number times an odd one of its place: whole numbers, alike on all devices."""
    sums: list[Tensor] = []
    entries: list[tuple[str, str, list[int], int]] = []
    for name, tensor in sorted(tensors.items()):
        for part, data in _plain(name, tensor):
            own = [_sum(chunk) for chunk in _bits(data).split(CHUNK)] if data.numel() else []
            sums += own
            entries.append((part, str(data.dtype), list(data.shape), len(own)))
    digest = hashlib.sha256(json.dumps([entries, state]).encode())
    digest.update(b"".join(value.to_bytes(8, "little", signed=True) for value in _read(sums)))
    return digest.hexdigest()[:32]


def _read(sums: list[Tensor]) -> list[int]:
    """Numbers in their order, wherever they lie; each device is waited for once."""
    values = [0] * len(sums)
    for device in {one.device for one in sums}:
        places = [place for place, one in enumerate(sums) if one.device == device]
        for place, value in zip(places, torch.stack([sums[place] for place in places]).tolist(), strict=True):
            values[place] = value
    return values


def _sum(bits: Tensor) -> Tensor:
    """A number that is another one, but by a chance of 2^-63, if a bit of them is: their sum modulo 2^64."""
    return (bits.to(torch.int64) * _factors(bits.device)[: len(bits)]).sum()


@cache
def _factors(device: torch.device) -> Tensor:
    """`[CHUNK]` odd whole numbers without an order."""
    mixed = torch.arange(1, CHUNK + 1, dtype=torch.int64) * -7046029254386353131
    mixed ^= mixed >> 29
    mixed *= -4658895280553007687
    return ((mixed ^ (mixed >> 32)) | 1).to(device)
