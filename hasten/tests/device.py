"""A device for tests: tensors that lie apart from the host, and a count of what crosses between the two.

Nothing here has a GPU. `Device` stands for one: its tensors are `Held`, say that they lie on `meta`, and hold their
numbers on the host where no code but this file's looks. Like a GPU it refuses to work on tensors of the host, apart
from numbers. What has to wait for a GPU, or copy to it, comes through `Device` by construction, and is counted:

* `reads`: from the device to the host (`item()`, `float()`, `tolist()`, `.cpu()`, `if tensor:`, shapes that depend on
  numbers);
* `copies`: from the host to the device (`.to(device)`, `torch.tensor(..., device=)`);
* `live`, `peak` and `made`: its storages of `large` bytes or more, now, at most, and new ones.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["DEVICE", "Device", "Held", "Waits", "host", "move"]

DEVICE = torch.device("meta")
aten = torch.ops.aten


class Held(Tensor):
    """A tensor on the device; `inner` has its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @staticmethod
    def __new__(cls: type[Held], inner: Tensor) -> Held:
        held = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        held.inner = inner
        return held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on the device outside of `with Device()`")


def host(tensor: Tensor) -> Tensor:
    """The numbers of a tensor on the device, for assertions."""
    return tensor.inner if isinstance(tensor, Held) else tensor


def move(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = Held(parameter.detach())  # type: ignore[assignment]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Held(buffer)
    return module


WAITS = {aten.nonzero.default, aten.equal.default, aten.unique_dim.default, aten._unique2.default}


class Device(TorchDispatchMode):
    """Runs what happens on the device, and counts; see above.

    Args:
        large: bytes from which on storages count.
    """

    def __init__(self, large: int = 0) -> None:
        super().__init__()
        self._large = large
        self._known: set[int] = set()
        self.live = 0
        self.reset()

    def reset(self) -> None:
        """Count from here."""
        self.reads = self.copies = self.made = 0
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        held = [value for value in flat if isinstance(value, Held)]
        target = kwargs.get("device")
        there = torch.device(target) == DEVICE if target is not None else bool(held)
        if func is aten._local_scalar_dense.default and held:
            self.reads += 1
            return func(held[0].inner)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = flat[-1]
            destination = there if func is aten._to_copy.default else isinstance(flat[0], Held)
            self.reads += isinstance(source, Held) and not destination
            self.copies += destination and not isinstance(source, Held)
        elif held:
            apart = [value for value in flat if not isinstance(value, Held) and value.dim()]
            self.reads += func in WAITS or (func is aten.index.Tensor and any(h.dtype is torch.bool for h in held[1:]))
            if apart:
                raise RuntimeError(f"{func}: a tensor of the host, {list(apart[0].shape)}, among tensors of the device")
        if target is not None:
            kwargs["device"] = torch.device("cpu") if there else target
        plain = tree_map(host, args), tree_map(host, kwargs)
        result = func(*plain[0], **plain[1])
        return tree_map(self._wrap(held), result) if there else result

    def _wrap(self, held: list[Held]) -> Callable[[Any], Any]:
        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            for other in held:  # an operation in place returns the tensor that it was given
                if other.inner is value:
                    return other
            self._note(value)
            return Held(value)

        return wrap

    def _note(self, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        if storage._cdata in self._known or storage.nbytes() < self._large:
            return
        self._known.add(storage._cdata)
        self.live += 1
        self.made += 1
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self._known.discard(key)
        self.live -= 1


class Waits(TorchDispatchMode):
    """Counts operations for which a GPU's host waits, or which copy an index to it."""

    names = ("_local_scalar_dense", "nonzero", "equal", "item", "unique", "is_nonzero", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts.update([name] if name in self.names else [])
        return func(*args, **(kwargs or {}))
