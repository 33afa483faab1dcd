"""UNets: which modules are their deep part, behind the outermost level.

A UNet has no list of blocks that hand on one stream: each level passes its result across to the level of the same size.
What changes little from step to step is what comes up from the inner levels (DeepCache, arXiv:2312.00858).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

__all__ = ["DeepPart", "deep_part", "is_unet"]


@dataclass(frozen=True)
class DeepPart:
    """The inner levels of a UNet.

    Attributes:
        modules: where they are, in the order in which they run.
    """

    modules: tuple[str, ...]

    @property
    def last(self) -> str:
        """The module whose output goes up into the outermost level."""
        return self.modules[-1]


def is_unet(model: nn.Module) -> bool:
    """Whether a denoiser goes down a list of levels and up another one."""
    lists = (getattr(model, name, None) for name in ("down_blocks", "up_blocks"))
    return all(isinstance(levels, nn.ModuleList) for levels in lists)


def deep_part(model: nn.Module) -> DeepPart | None:
    """The inner levels of a UNet; None for other denoisers, and for UNets whose levels are no modules of their own."""
    if not is_unet(model):
        return None
    down, up = model.down_blocks, model.up_blocks
    assert isinstance(down, nn.ModuleList)
    assert isinstance(up, nn.ModuleList)
    levels = [*down, *up]
    if min(len(down), len(up)) < 2 or any(isinstance(level, (nn.ModuleList, nn.Sequential)) for level in levels):
        return None
    middle = ("mid_block",) if isinstance(getattr(model, "mid_block", None), nn.Module) else ()
    return DeepPart(
        (
            *(f"down_blocks.{i}" for i in range(1, len(down))),
            *middle,
            *(f"up_blocks.{i}" for i in range(len(up) - 1)),
        )
    )
