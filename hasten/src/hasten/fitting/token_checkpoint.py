"""Checkpoints of token models: weights and the optimizer's moments, whole, however many processes share them.

Parameters that are sharded over processes (FSDP) are gathered to be written, and cut again when they are read, so that
a run may go on with another number of processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hasten.errors import ModelError

__all__ = ["MOMENTS", "check_tensors", "load_tensors", "tensors_of"]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
Arrays = dict[str, NDArray[Any]]


def _whole(value: Tensor) -> Tensor:
    gathered: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return gathered


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Arrays:
    """Weights, and the optimizer's moments once it has made a step; to be called by all processes alike."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for i, parameter in enumerate(_parameters(optimizer)):
        if parameter in optimizer.state:
            tensors |= {f"optimizer/{i}/{name}": optimizer.state[parameter][name] for name in MOMENTS}
    found = {}
    for name, value in tensors.items():
        whole = _whole(value.detach()).cpu()
        found[name] = (whole.float() if whole.dtype == torch.bfloat16 else whole).numpy()  # numpy has no bfloat16
    return found


def check_tensors(arrays: Arrays, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Whether a checkpoint's tensors are what a training of this model leaves.

    Raises:
        ModelError: if they are not, naming the tensor.
    """
    expected = {f"model/{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    for i, parameter in enumerate(_parameters(optimizer) if steps else []):
        shape = tuple(parameter.shape)
        expected |= {f"optimizer/{i}/{name}": () if name == "step" else shape for name in MOMENTS}
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise ModelError("its tensors are not those of this model")
    for name, array in arrays.items():
        wrong = not np.isfinite(array).all() or (name.endswith("/exp_avg_sq") and array.min() < 0)
        if wrong or (name.startswith("optimizer/") and name.endswith("/step") and array != steps):
            raise ModelError(f"{name!r} has a value that no training leaves")


@torch.no_grad()
def load_tensors(arrays: Arrays, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back; to be called by all processes alike, after `check_tensors`."""
    for name, value in model.state_dict().items():
        value.copy_(_like(torch.from_numpy(arrays[f"model/{name}"]), value))
    for i, parameter in enumerate(_parameters(optimizer)):
        if f"optimizer/{i}/step" in arrays:
            moments = {name: torch.from_numpy(arrays[f"optimizer/{i}/{name}"]) for name in MOMENTS}
            optimizer.state[parameter] = {
                name: value.clone() if name == "step" else _like(value, parameter).clone()
                for name, value in moments.items()
            }


def _like(whole: Tensor, model: Tensor) -> Tensor:
    """A whole tensor with the type, the device and the shards of another."""
    whole = whole.to(model.device, model.dtype)
    return distribute_tensor(whole, model.device_mesh, model.placements) if isinstance(model, DTensor) else whole


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
