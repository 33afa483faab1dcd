"""`fashion-dit`: the class-conditional DiT of the papers' tables in small, judged by distribution, not by closeness."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CLASSES", "HERE", "WEIGHTS"]

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
