"""The vocabulary in which a transformer's wiring is described.

A *stack* is a list of blocks that the transformer runs in order. A block takes the image tokens ("hidden") and
perhaps the text tokens ("encoder"), by name or by position, and returns one or both. What else it takes and returns, a
stream of its own such as the tokens of the sound that goes with a clip, is named as the block's argument is.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, get_args

from torch import nn

from hasten.errors import AdapterError, unknown

__all__ = ["BlockModules", "BlockStack", "LayoutKind", "ModelAdapter"]

Tokens = Literal["image", "text", "joint"]
LayoutKind = Literal["latent", "channels-last", "frames", "history", "ids", "positions", "shapes", "sizes", "list"]


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
        name: where the transformer holds the list, `"blocks"` or `"model.blocks"`.
        returns: what a block returns, in order: `"encoder"`, `"hidden"`, the name of another argument whose stream it
            carries on (it is forecast beside the image tokens), or None for what is always None.
        hidden: name of the block's argument with the image tokens.
        encoder: name of the block's argument with the text tokens, or None.
        joint: whether the image tokens come with the text tokens in one sequence.
        modules: submodules for the module site, or None if that site is not described.
        wrapped: whether a block that returns one tensor returns it in a tuple.
        side: whether the blocks stand beside the stacks (what one returns is added to the image tokens): those that are
            called before the last block of the last stack feed only skipped blocks.
    """

    name: str
    returns: tuple[str | None, ...] = ("encoder", "hidden")
    hidden: str = "hidden_states"
    encoder: str | None = "encoder_hidden_states"
    joint: bool = False
    modules: BlockModules | None = None
    wrapped: bool = False
    side: bool = False

    @property
    def streams(self) -> tuple[str, ...]:
        """Arguments of a block that carry streams beside image and text."""
        return tuple(name for name in self.returns if name not in (None, "hidden", "encoder"))

    def container(self, model: nn.Module) -> nn.Module:
        """The module of `model` that holds the blocks: a `ModuleList`, `Sequential` or `ModuleDict`."""
        container = attrgetter(self.name)(model)
        assert isinstance(container, nn.Module)
        return container

    def holder(self, model: nn.Module) -> tuple[nn.Module, str]:
        """The module of `model` that holds the container, and the container's name in it."""
        path, _, name = self.name.rpartition(".")
        return (model.get_submodule(path) if path else model), name

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of `model`, in order."""
        return [block for block in self.container(model)._modules.values() if block is not None]


@dataclass(frozen=True)
class ModelAdapter:
    """One family of transformers.

    Attributes:
        stacks: in the order in which the transformer runs them. The image tokens that leave the last non-empty one go
            to the final norm and projection.
        timestep: name of the transformer's timestep argument; None where it has none, and every call is a step.
        hidden: name of the transformer's argument whose shape identifies the image's size.
        width: name of the attribute (of the model or its config) with the width of the image tokens, for estimates;
            without one, heads times head width is tried.
        layout: which arguments of the transformer tell where the tokens of the image lie, or None if that is unknown:
            `"latent"` (latents `[B, C, H, W]` or `[B, C, T, H, W]`), `"channels-last"` (`[B, T, H, W, C]`), `"frames"`
            (`[B, T, C, H, W]`), `"history"` (as latent, after latents of the clip so far), `"ids"` (`img_ids`),
            `"positions"` (`position_ids` of text, then image), `"shapes"` (`img_shapes`), `"sizes"` (`num_frames`,
            `height`, `width` or `video_coords`) or `"list"` (a latent `[C, T, H, W]` for each image).
        final_norm: name of the norm over the channels of each token that the image tokens go to from the last stack,
            with nothing but a choice of tokens before it; None if it is not known.

    Raises:
        UnknownNameError: for a layout of another name.
    """

    stacks: tuple[BlockStack, ...]
    timestep: str | None = "timestep"
    hidden: str = "hidden_states"
    width: str = "inner_dim"
    layout: LayoutKind | None = None
    final_norm: str | None = None

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in get_args(LayoutKind):
            raise unknown("layout", self.layout, get_args(LayoutKind))

    def used(self, model: nn.Module) -> list[BlockStack]:
        """The stacks of this model that carry the image tokens and have blocks (a family may allow an empty one)."""
        return [stack for stack in self.stacks if not stack.side and stack.blocks(model)]

    def beside(self, model: nn.Module) -> list[BlockStack]:
        """The stacks of this model that stand beside those, and have blocks."""
        return [stack for stack in self.stacks if stack.side and stack.blocks(model)]

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
