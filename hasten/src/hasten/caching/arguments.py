"""What a denoiser is called with: its latents, and the timestep that tells its steps apart."""

from __future__ import annotations

import inspect
from itertools import count
from numbers import Real
from typing import Any

from torch import Tensor, nn

from hasten import models
from hasten.errors import AdapterError
from hasten.models import ModelAdapter

__all__ = ["Arguments"]


class Arguments:
    """Reads the arguments of a denoiser's calls, given by name or by position.

    Args:
        model: the denoiser.
        adapter: how it is laid out; None for a family that has no entry.

    Raises:
        AdapterError: if it has no argument that looks like a timestep.
    """

    def __init__(self, model: nn.Module, adapter: ModelAdapter | None) -> None:
        self._name = type(model).__name__
        self._hidden: str
        self._timestep: str | None
        if adapter is None:
            self._hidden, self._timestep = models.root_arguments(model)
        else:
            self._hidden, self._timestep = adapter.hidden, adapter.timestep
        self._calls = count(1)
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._positions = {name: position for position, name in enumerate(self._parameters)}

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        return dict(zip(self._parameters, args, strict=False)) | kwargs

    def latents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The latents of a call: a tensor or a list of them."""
        given = kwargs.get(self._hidden)  # as nearly every pipeline gives them: at once, on every skipped step
        return self._argument("hidden", self._hidden, args, kwargs) if given is None else given

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The timestep of a call; of a model that is given none, a number that is another one in each call.

        Raises:
            AdapterError: if it is left out, or is no number.
        """
        if self._timestep is None:
            return -float(next(self._calls))
        timestep = self._argument("timestep", self._timestep, args, kwargs)
        if not isinstance(timestep, (Tensor, Real)):
            raise AdapterError(
                f"{self._name} was given a {type(timestep).__name__} for {self._timestep!r}, expected a number or a "
                f"tensor, which tells its steps apart; {self._remedy('timestep')}"
            )
        return timestep

    def _argument(self, role: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self._positions.get(name, len(args))
        if position >= len(args):
            raise AdapterError(
                f"{self._name} was called without {name!r}, which tells its steps apart; {self._remedy(role)}"
            )
        return args[position]

    def _remedy(self, role: str) -> str:
        every = "; timestep=None says that every call is a step" if role == "timestep" else ""
        return (
            "call it so, or say which argument it is with "
            f"hasten.models.register({self._name!r}, ModelAdapter(..., {role}=...)){every}"
        )
