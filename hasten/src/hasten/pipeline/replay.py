"""Calls of a pipeline that can be made again with the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Replay"]


class Replay:
    """The arguments of calls; each time they are taken, their generators are where they were at first.

    Args:
        calls: keyword arguments of a pipeline, perhaps with a `generator` or a list of them.
    """

    def __init__(self, calls: Sequence[Mapping[str, Any]]) -> None:
        self._calls = calls
        self._states = [[generator.get_state() for generator in _generators(call)] for call in calls]

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The arguments of a call, for latents as the result."""
        self._rewind(index)
        return {**self._calls[index], "output_type": "latent"}

    def rewind(self) -> None:
        """Leave all generators as they were at first."""
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
