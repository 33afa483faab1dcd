"""Context parallelism of diffusers: the devices that share the tokens of one image.

With `model.enable_parallelism(config=ContextParallelConfig(...))` each device holds a part of the tokens, so that a
number measured on the features (a norm, a change) differs from device to device. Whatever decides by such a number has
to sum it over these devices, and over these alone: the default group also holds devices that work on other images.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["group", "sum_over"]


def group(model: nn.Module) -> dist.ProcessGroup | None:
    """The devices that share the tokens of one image, ring and Ulysses together; None without context parallelism."""
    config: Any = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    return None if mesh is None else mesh.get_group()


def sum_over(model: nn.Module, tensor: Tensor) -> Tensor:
    """The sum of `tensor` over the devices that share an image; `tensor` itself without context parallelism.

    Every device gets the same bits, so that all of them decide alike. Collective: each device of the group has to call
    it, in the same order and with the same shape.
    """
    members = group(model)
    if members is None:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=members)
    return total
