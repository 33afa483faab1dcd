"""Fixtures: a short rendered walk, alone and as a scene, a cache of its own, a seeded generator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drape.scene.backgrounds import background
from drape.scene.light import light
from drape.scene.scene import Scene
from drape.scene.sequence import Buffers, SequenceSpec, build_sequence


@pytest.fixture(scope="session")
def walk() -> Buffers:
    """Four frames of a circle, 64 px."""
    return build_sequence(SequenceSpec(path="circle", frames=4, fps=3, size=64))


@pytest.fixture
def scene(walk: Buffers) -> Scene:
    """The walk with boxes that are the whole frame, as those of the tests' detectors are."""
    boxes = torch.tensor([0.0, 0, 64, 64]).expand(4, 4)
    return Scene("circle", replace(walk, boxes=boxes), light("overcast"), background("gravel", 64))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for one test."""
    monkeypatch.setenv("DRAPE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
