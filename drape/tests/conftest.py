"""Fixtures: a short rendered walk, a cache of its own, a seeded generator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drape.scene.sequence import Buffers, SequenceSpec, build_sequence


@pytest.fixture(scope="session")
def walk() -> Buffers:
    """Four frames of a circle, 64 px."""
    return build_sequence(SequenceSpec(path="circle", frames=4, fps=3, size=64))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for one test."""
    monkeypatch.setenv("DRAPE_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
