"""What `emoji-styles-turbo` is made of: `emoji-styles`, differences of its transformer, a sampler of its own."""

from __future__ import annotations

from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn

from hasten_zoo.emoji_styles import WEIGHTS as STYLES
from hasten_zoo.emoji_styles.model import digest
from hasten_zoo.emoji_styles.model import load_pipeline as load_styles
from hasten_zoo.low_rank import DIFFERENCES, merge, read_low_rank
from hasten_zoo.reading import reading

__all__ = ["BASE", "learning", "load_pipeline"]

BASE = "emoji-styles"  # what the differences are from, for messages


def learning(pipe: FluxPipeline) -> nn.ModuleDict:
    """The part that differs from `emoji-styles`."""
    return nn.ModuleDict({"transformer": pipe.transformer})


def load_pipeline(folder: Path, styles: Path = STYLES) -> FluxPipeline:
    """An unmodified pipeline from a folder that the training script exported, the rest from that of `emoji-styles`.

    Raises:
        ModelError: if a file is missing or damaged, or was trained from other weights of `emoji-styles`.
    """
    with reading("emoji-styles-turbo", folder, DIFFERENCES, "scheduler"):
        pipe = load_styles(styles)
        net = learning(pipe)
        read_low_rank(folder / DIFFERENCES, net, digest(pipe), BASE)
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    merge(net)
    return pipe
