"""Fixtures: a short rendered walk, alone and as a scene, a cache of its own, a seeded generator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from drape.scene.camera import Camera
from drape.scene.cloth import Cloth
from drape.scene.light import light
from drape.scene.places import Plate
from drape.scene.scene import Scene
from drape.scene.sequence import Buffers, SequenceSpec, build_sequence

TINY = SequenceSpec(path="circle", frames=4, fps=1, size=64, cloth=Cloth(engine="skinned"), camera=Camera(distance=7))


@pytest.fixture(scope="session")
def walk() -> Buffers:
    """Four frames of a circle, 64 px, with cloth that only follows the body."""
    return build_sequence(TINY)


@pytest.fixture(scope="session")
def plate() -> Plate:
    """An image with fine structure, 64 px, ground everywhere."""
    pixels = torch.from_numpy(np.random.default_rng(0).random((3, 64, 64), dtype=np.float32)) * 0.5 + 0.25
    return Plate(pixels, torch.ones(64, 64), torch.ones(0, 64, 64))


@pytest.fixture
def scene(walk: Buffers, plate: Plate) -> Scene:
    """The walk with boxes that are the whole frame, as those of the tests' detectors are."""
    boxes = torch.tensor([0.0, 0, 64, 64]).expand(4, 4)
    return Scene("circle", replace(walk, boxes=boxes), light("overcast"), plate)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for one test."""
    monkeypatch.setenv("DRAPE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
