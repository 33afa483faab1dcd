"""The vocabulary in which a transformer's wiring is described.

A *stack* is a list of blocks that the transformer runs in order. A block takes the image tokens ("hidden") and
perhaps the text tokens ("encoder"), by name or by position, and returns one or both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from hasten.errors import AdapterError, unknown

__all__ = ["BlockModules", "BlockStack", "LayoutKind", "ModelAdapter"]

Stream = Literal["encoder", "hidden"]
Tokens = Literal["image", "text", "joint"]
LayoutKind = Literal["latent", "frames", "history", "ids", "shapes", "sizes", "list"]


@dataclass(frozen=True)
class BlockModules:
    """What the module site does inside one block.

    Submodules that a block lacks (a last block often lacks some) are passed over.

    Attributes:
        forecast: submodules whose outputs are forecast, each with the tokens that its output tensors cover: one entry
            for a plain tensor, several for a tuple or for a submodule that runs more than once in a block.
        skip: submodules whose outputs feed only forecast ones, so that a skipped step need not run them.
    """

    forecast: tuple[tuple[str, tuple[Tokens, ...]], ...]
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockStack:
    """One list of blocks.

    Attributes:
        name: the attribute of the transformer that holds the list.
        returns: what a block returns, in order.
        hidden: name of the block's argument with the image tokens.
        encoder: name of the block's argument with the text tokens, or None.
        joint: whether the image tokens come with the text tokens in one sequence.
        modules: submodules for the module site, or None if that site is not described.
    """

    name: str
    returns: tuple[Stream, ...] = ("encoder", "hidden")
    hidden: str = "hidden_states"
    encoder: str | None = "encoder_hidden_states"
    joint: bool = False
    modules: BlockModules | None = None

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The list of blocks of `model`."""
        blocks = getattr(model, self.name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks


@dataclass(frozen=True)
class ModelAdapter:
    """One family of transformers.

    Attributes:
        stacks: in the order in which the transformer runs them. The image tokens that leave the last non-empty one go
            to the final norm and projection.
        timestep: name of the transformer's timestep argument.
        hidden: name of the transformer's argument whose shape identifies the image's size.
        width: name of the attribute (of the model or its config) with the width of the image tokens, for estimates;
            without one, heads times head width is tried.
        layout: which arguments of the transformer tell where the tokens of the image lie, or None if that is unknown:
            `"latent"` (latents `[B, C, H, W]` or `[B, C, T, H, W]`), `"frames"` (`[B, T, C, H, W]`), `"history"` (as
            latent, after latents of the clip so far), `"ids"` (`img_ids`), `"shapes"` (`img_shapes`), `"sizes"`
            (`num_frames`, `height`, `width` or `video_coords`) or `"list"` (a latent `[C, T, H, W]` for each image).

    Raises:
        UnknownNameError: for a layout of another name.
    """

    stacks: tuple[BlockStack, ...]
    timestep: str = "timestep"
    hidden: str = "hidden_states"
    width: str = "inner_dim"
    layout: LayoutKind | None = None

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in get_args(LayoutKind):
            raise unknown("layout", self.layout, get_args(LayoutKind))

    def used(self, model: nn.Module) -> list[BlockStack]:
        """The stacks of this model that have blocks (a family may allow an empty one)."""
        return [stack for stack in self.stacks if len(stack.blocks(model))]

    def width_of(self, model: Any) -> int:
        """Channels of an image token between the blocks."""
        config = getattr(model, "config", None)
        for owner in (model, config):
            value = getattr(owner, self.width, None)
            if value is not None:
                return int(value)
        heads, head_width = getattr(config, "num_attention_heads", None), getattr(config, "attention_head_dim", None)
        if heads is None or head_width is None:
            raise AdapterError(
                f"cannot tell the width of {type(model).__name__}: it has no {self.width!r}; "
                "name the right attribute with ModelAdapter(width=...)"
            )
        return int(heads * head_width)
