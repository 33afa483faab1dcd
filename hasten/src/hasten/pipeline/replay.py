"""Calls of a pipeline that can be made again with the same noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch

from hasten.errors import ConfigError

__all__ = ["Replay"]


class Replay:
    """The arguments of calls; each time they are taken, their generators are where they were at first.

    As a context it leaves them there, too, however it ends: the same calls are the same again.

    Args:
        calls: keyword arguments of a pipeline, perhaps with a `generator` or a list of them.

    Raises:
        ConfigError: if they are something else.
    """

    def __init__(self, calls: Sequence[Mapping[str, Any]]) -> None:
        wrong = (
            calls if not isinstance(calls, Sequence) else next((c for c in calls if not isinstance(c, Mapping)), None)
        )
        if wrong is not None:
            raise ConfigError(
                "calls are a list with the arguments of each call, such as [{'prompt': 'a red apple'}]; got a "
                f"{type(wrong).__name__}"
            )
        self._calls = calls
        self._states = [[generator.get_state() for generator in _generators(call)] for call in calls]

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The arguments of a call, for latents as the result."""
        self._rewind(index)
        return {**self._calls[index], "output_type": "latent"}

    def changed(self, count: int | None = None, **arguments: Any) -> Replay:
        """The same calls, or the first ones, with the same noise and other arguments."""
        found = Replay([{**call, **arguments} for call in self._calls[:count]])
        found._states = self._states[:count]  # where the generators are now does not matter
        return found

    def runs(self, pipe: Any) -> list[Callable[[], Any]]:
        """Functions that make the calls, one each, as `record` and `calibrate` take them."""
        return [partial(self._run, pipe, index) for index in range(len(self))]

    def _run(self, pipe: Any, index: int) -> Any:
        return pipe(**self[index])

    def steps(self, pipe: Any) -> int | None:
        """Steps of the pipeline's runs, as far as the first call or the pipeline's own default says it."""
        call = self._calls[0]
        listed = next((call[name] for name in ("sigmas", "timesteps") if call.get(name) is not None), None)
        default = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
        steps = call.get("num_inference_steps", None if default is None else default.default)
        found = steps if listed is None else len(listed)
        return found if isinstance(found, int) else None

    def output_type(self, index: int) -> str:
        """The kind of result that a call asks for itself."""
        return str(self._calls[index].get("output_type", "latent"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for index in range(len(self)):
            self._rewind(index)

    def _rewind(self, index: int) -> None:
        for generator, state in zip(_generators(self._calls[index]), self._states[index], strict=True):
            generator.set_state(state)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def _generators(call: Mapping[str, Any]) -> list[torch.Generator]:
    given = call.get("generator")
    return [given] if isinstance(given, torch.Generator) else list(given or [])
