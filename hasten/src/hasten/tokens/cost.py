"""What fitting a tree costs, known before it begins: memory, which may not be there, and time, which may be long."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hasten.errors import ConfigError
from hasten.tokens.approximate import BLOCK, CELL, GROUPS, MOST_DISTANCES
from hasten.tokens.linkage import SQUARE

__all__ = ["TreeCost", "free_memory", "tree_cost"]

# Nanoseconds for each pair of codes, for each number of a pair, and for each code: fits to one core of a cloud machine,
# 2,048 to 8,192 codes of 8 to 256 numbers exactly, 20,000 to 40,000 approximately. An announcement needs the order.
EXACT = (35.0, 0.25, 0.0)
APPROXIMATE = (6.0, 0.5, 350_000.0)


@dataclass(frozen=True)
class TreeCost:
    """What a tree costs.

    Attributes:
        codes: that are clustered.
        exact: whether all distances are kept.
        memory: bytes at the peak, about.
        seconds: on one core, about.
    """

    codes: int
    exact: bool
    memory: int
    seconds: float

    def __str__(self) -> str:
        kind = "exact" if self.exact else "approximate"
        return (
            f"{kind} tree of {self.codes:,} codes: about {_size(self.memory)} of memory and {_duration(self.seconds)}"
        )

    def refuse_unless_it_fits(self, width: int) -> None:
        """Compare with the memory that is free.

        Raises:
            ConfigError: if it is not enough, naming the approximate tree where that would be.
        """
        free = free_memory()
        if free is None or self.memory <= free:
            return
        message = f"an {self}, but {_size(free)} are free"
        other = tree_cost(self.codes, width, exact=False)
        if self.exact and other.memory <= free:
            raise ConfigError(f"{message}; use exact=False (--no-exact): an {other}")
        raise ConfigError(f"{message}; use fewer codes, or a machine with more memory")


def tree_cost(codes: int, width: int, exact: bool) -> TreeCost:
    """What a tree of so many codes of so many numbers costs."""
    copies = 4 * 8 * codes * width
    if exact:
        return TreeCost(codes, True, _table(codes) + copies, _seconds(codes, width, EXACT))
    groups = min(GROUPS, codes // 2)
    tables = max(_table(min(codes, 2 * CELL)), 12 * groups * groups)
    memory = tables + 2 * 8 * min(MOST_DISTANCES, BLOCK * codes) + copies
    return TreeCost(codes, False, memory, _seconds(codes, width, APPROXIMATE))


def _table(codes: int) -> int:
    """Bytes of the distances of so many codes: one triangle of float64, and for few codes the square besides."""
    return (12 if codes <= SQUARE else 4) * codes * codes


def _seconds(codes: int, width: int, each: tuple[float, float, float]) -> float:
    return 1e-9 * (codes * codes * (each[0] + each[1] * width) + codes * each[2])


def free_memory() -> int | None:
    """Bytes that this process may still ask for, as far as the system tells (Linux, and its control groups)."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    if not found:
        with suppress(OSError, ValueError, AttributeError):  # the memory that there is
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(found, default=None)


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
