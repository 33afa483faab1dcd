"""What several commands of `hasten tokens` share: options, the limits of their numbers, a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hasten.cli.options import MOST_COUNT, MOST_SEED, number
from hasten.errors import ModelError
from hasten.parameters import Range

if TYPE_CHECKING:
    from hasten.fitting.token_recipe import Conditions
    from hasten.tokens.export import Exported
    from hasten.tokens.hugging_face import HuggingFaceModel

__all__ = [
    "MOST_CODES",
    "MOST_HEADS",
    "MOST_LAYERS",
    "MOST_MINUTES",
    "MOST_RATE",
    "MOST_TEMPERATURE",
    "MOST_TOKENS",
    "MOST_UPDATES",
    "MOST_WIDTH",
    "Batch",
    "Codebook",
    "Heads",
    "Layers",
    "MapFile",
    "Out",
    "Rate",
    "Seed",
    "TreeFile",
    "Updates",
    "trained",
]

MOST_UPDATES = 1_000_000_000
MOST_WIDTH = 65_536
MOST_LAYERS = 128
MOST_HEADS = 1024
MOST_RATE = 10
MOST_TOKENS = 1_048_576  # of an image
MOST_CODES = 2**31
MOST_MINUTES = 10_000_000
MOST_TEMPERATURE = 1000

Codebook = Annotated[
    Path, typer.Argument(help="A codebook [codes, width]: .npy, .safetensors or .pt (weights only).", dir_okay=False)
]
TreeFile = Annotated[Path, typer.Argument(help="A tree that `hasten tokens fit` wrote.")]
MapFile = Annotated[Path, typer.Option("--map", help="A map that `hasten tokens map` wrote.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Seed = Annotated[int, number(Range(0, MOST_SEED), "Of everything that is drawn.")]
Layers = Annotated[int, number(Range(1, MOST_LAYERS), "Layers of it.")]
Heads = Annotated[int, number(Range(1, MOST_HEADS), "Heads of attention.")]
Updates = Annotated[int, number(Range(1, MOST_UPDATES), "Optimizer steps.", "--steps")]
Batch = Annotated[int, number(Range(1, MOST_COUNT), "Images of a step, over all processes.")]
Rate = Annotated[float, number(Range(above=0, most=MOST_RATE), "Peak learning rate.")]


def trained(folder: Path) -> tuple[HuggingFaceModel, Exported, Conditions]:
    """A class-conditional model that `hasten tokens train` wrote."""
    from hasten.fitting.token_recipe import class_conditions
    from hasten.tokens.export import open_model
    from hasten.tokens.hugging_face import HuggingFaceModel

    opened = open_model(folder)
    classes = opened.vocabulary.before - opened.mapping.tokens - 1
    if opened.vocabulary.offset or classes < 1:
        raise ModelError(
            f"{folder} is no class-conditional model of `hasten tokens train`; use hasten.tokens.sample in Python, "
            "with conditions of its own"
        )
    return HuggingFaceModel(opened.model, opened.vocabulary), opened, class_conditions(opened.mapping.tokens, classes)
