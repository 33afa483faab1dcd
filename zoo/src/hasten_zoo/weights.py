"""Weights of the project's own networks: a container with the sizes in its header, in half precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from hasten.errors import HastenError
from hasten.io import Kind, describe, read_tensors, write_tensors
from torch import nn

__all__ = ["read_weights", "write_weights"]

T = TypeVar("T")
Net = TypeVar("Net", bound=nn.Module)


def write_weights(path: str | Path, kind: Kind[Any], net: nn.Module, content: Mapping[str, Any]) -> Path:
    """Write a network's state as float16, atomically, and what it is built from; returns the path.

    Raises:
        FileError: if it cannot be written.
    """
    arrays = {name: value.detach().cpu().half().numpy() for name, value in net.state_dict().items()}
    return write_tensors(path, kind, arrays, content)


def read_weights(path: str | Path, kind: Kind[T], build: Callable[[T], Net]) -> Net:
    """The network that `build` makes of the header's content, with the weights that `write_weights` wrote, as float32.

    Raises:
        HastenError: of the kind's class, if the file is missing, damaged or of another network.
    """
    arrays, content = read_tensors(path, kind)
    try:
        with torch.device("meta"):  # its sizes are compared before memory for them is asked for
            expected = {name: tuple(value.shape) for name, value in build(content).state_dict().items()}
        if {name: array.shape for name, array in arrays.items()} != expected:
            raise ValueError("its tensors are not those of such a network")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("a weight is not finite")
        net = build(content)
        net.load_state_dict({name: torch.from_numpy(array).float() for name, array in arrays.items()})
    except (HastenError, RuntimeError, TypeError, ValueError) as error:
        raise kind.error(f"{path}: no usable {kind.name} ({describe(error)}). {kind.remedy}") from error
    return net
