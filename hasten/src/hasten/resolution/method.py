"""What all resolution methods have in common: how they are put on a pipeline, and how many steps they want."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

__all__ = ["ResolutionEngine", "ResolutionMethod"]


class ResolutionEngine(Protocol):
    """What is put on a pipeline.

    Attributes:
        method: what it does.
        records: one for each sampler step.
        plans: what was decided in each run, such as grids, layouts and maps.
    """

    method: Any
    records: list[Any]
    plans: list[Any]

    def remove(self) -> None:
        """Take it away and leave pipeline and scheduler as they were found."""


class ResolutionMethod(ABC):
    """Base of the resolution methods, frozen dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def evaluations(self) -> int | None:
        """Steps that the pipeline has to be called with; None for any number."""
        return None

    @abstractmethod
    def attach(self, pipe: Any) -> ResolutionEngine:
        """Put the method on a pipeline, around what is there, until `.remove()` of what is returned."""
