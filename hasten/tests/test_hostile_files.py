"""Damaged and forged files of every kind: refused in one line, or read as if nothing had happened; memory is bounded.

HASTEN_FUZZ=1000 pytest -m slow hasten/tests/test_hostile_files.py -s        # the long profile prints its counts
"""

from __future__ import annotations

import os
import re
from itertools import chain
from pathlib import Path

import pytest
from hostile import Outcome, Specimen, flipped, specimens, structured, truncated, try_all

SPECIMENS = specimens()
FAST = 25
LONG = int(os.environ.get("HASTEN_FUZZ", "1000"))
MOST_MEMORY = 300 << 20  # bytes by which reading damaged files of a few kB may raise the process's peak

kinds = pytest.mark.parametrize("specimen", SPECIMENS.values(), ids=SPECIMENS.keys())


class Peak:
    """The largest resident size of this process since the object was made, in bytes (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self.now

    @property
    def now(self) -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) << 10


def attack(specimen: Specimen, folder: Path, count: int) -> tuple[Outcome, Outcome]:
    specimen.make(folder)
    content = (folder / specimen.file).read_bytes()
    accident, forgery = Outcome(), Outcome()
    damages = chain(truncated(content), flipped(content, count), structured(content, -(-count // 2), forged=False))
    try_all(specimen, folder, damages, accident)
    try_all(specimen, folder, structured(content, -(-count // 2), forged=True, seed=1), forgery, forged=True)
    return accident, forgery


def check(specimen: Specimen, folder: Path, count: int) -> None:
    peak = Peak()
    accident, forgery = attack(specimen, folder, count)
    print(f"\n{specimen.name:16} {(peak.now - peak.start) >> 20:4} MiB  accidents {accident}  forgeries {forgery}")
    assert accident.raw == ()
    assert forgery.raw == ()
    assert accident.different == 0  # a forger may write whatever is well-formed
    assert accident.refused > accident.tried / 2
    assert peak.now - peak.start < MOST_MEMORY


@kinds
def test_damaged_and_forged_files_are_refused_or_harmless(specimen: Specimen, tmp_path: Path) -> None:
    check(specimen, tmp_path, FAST)


@pytest.mark.slow
@kinds
def test_a_thousand_damages_of_each_kind(specimen: Specimen, tmp_path: Path) -> None:
    check(specimen, tmp_path, LONG)
