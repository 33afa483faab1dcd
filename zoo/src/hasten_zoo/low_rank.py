"""Models that come as low-rank differences from another one: `W + B A` (LoRA, Hu et al. 2021, arXiv:2106.09685).

A model distilled or trained on from another differs from it by little. Each matrix `W` of a linear layer stays as it
was, frozen, and two thin factors learn: `up` `[out, rank]`, zero at the start, and `down` `[rank, in]`. Whatever is
no such matrix (biases, norms, tables of embeddings) learns as a whole. LCM-LoRA (Luo et al. 2023, arXiv:2311.05556)
ships distilled models this way. Merging gives the plain model back, of the same classes and at the same speed.

A file has the factors and the tensors that learned as a whole, in half precision, the rank, and the digest of the
weights that they are differences from: on others they would be noise, and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hasten.errors import ConfigError, ModelError
from hasten.io import Kind, check_sealed, digest_of, read_tensors, write_sealed, write_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from hasten_zoo.record import Start, export_record, start_of

__all__ = [
    "DIFFERENCES",
    "LowRankLinear",
    "add_low_rank",
    "learned",
    "merge",
    "read_low_rank",
    "save_differences",
    "start_from_differences",
    "weights_digest",
    "write_low_rank",
]

DIFFERENCES = "differences.safetensors"


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        rank: of the differences.
        base: `weights_digest` of what they are differences from.
    """

    rank: int
    base: str


KIND = Kind(
    "low-rank differences",
    Header,
    ModelError,
    "Reinstall hasten-zoo, or export the weights again with the training script.",
)


class LowRankLinear(nn.Module):
    """A linear layer, from `[..., in]` to `[..., out]`, whose matrix is frozen and has a difference that learns.

    The matrix is put together in every forward. With some thousand tokens in a batch that is a hundredth of the layer's
    work, where taking the input through one factor after the other would save the matrix's gradient, but takes three
    thin products: on a CPU 10 % (256 to 1024, rank 16) to 145 % (256 to 256, rank 32) more time than a plain layer that
    learns, against 0 to 24 % this way (bfloat16, 2,560 tokens, forward and backward). In float32 what is trained is
    also, bit for bit, what is merged. Under autocast the sum is put together in bfloat16, and a file holds the factors
    in half precision: there the merged layer differs from the trained one by that rounding.

    Args:
        layer: the plain layer; its parameters become this one's, its bias goes on learning.
        rank: of the difference.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.requires_grad_(False), layer.bias
        self.down = nn.Parameter(self.weight.new_empty(rank, layer.in_features))
        self.up = nn.Parameter(self.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.addmm(self.weight, self.up, self.down), self.bias)

    def merged(self) -> nn.Linear:
        """The plain layer with the difference in its matrix."""
        features, width = self.weight.shape
        with torch.device("meta"):
            layer = nn.Linear(width, features, self.bias is not None)
        layer.weight = nn.Parameter(torch.addmm(self.weight, self.up.detach(), self.down.detach()))
        layer.bias = self.bias
        return layer


def add_low_rank(module: nn.Module, rank: int) -> None:
    """Give every matrix of a linear layer in `module` factors of a difference, in place, and freeze the matrix.

    What the module gives is the same, bit for bit, until the factors have learned. Layers so small that the factors
    would be no smaller than the matrix stay as they are, and learn as a whole.

    Raises:
        ConfigError: if the rank is below 1.
    """
    if rank < 1:
        raise ConfigError(f"the rank of low-rank differences must be at least 1, got {rank}; 16 and 32 are usual")
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and rank * sum(layer.weight.shape) < layer.weight.numel():
                setattr(parent, name, LowRankLinear(layer, rank))


def merge(module: nn.Module) -> None:
    """Make the differences part of the matrices, in place: plain linear layers again."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LowRankLinear):
                setattr(parent, name, layer.merged())


def learned(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module with low-rank differences that are not its base's, by name: all that are not frozen."""
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bits of all weights of a plain module."""
    return digest_of("weights", {name: value.cpu().numpy() for name, value in module.state_dict().items()})


def write_low_rank(path: Path, module: nn.Module, rank: int, base: str) -> Path:
    """Write what `learned` gives, in half precision; returns the path.

    Args:
        path: of the file.
        module: with the low-rank differences of `add_low_rank`.
        rank: of these.
        base: `weights_digest` of the plain module that they were added to.

    Raises:
        FileError: if it cannot be written.
    """
    arrays = {name: value.cpu().half().numpy() for name, value in learned(module).items()}
    return write_tensors(path, KIND, arrays, {"rank": rank, "base": base})


def read_low_rank(path: Path, module: nn.Module, base: str, name: str) -> int:
    """Put what `write_low_rank` wrote into a plain module, in place, as factors (see `merge`); returns the rank.

    Args:
        path: of the file.
        module: with the weights that the differences are from, apart from what learned as a whole.
        base: `weights_digest` of these.
        name: what the base is called, for messages.

    Raises:
        ModelError: if the file is missing or damaged, or its differences are from other weights.
    """
    arrays, header = _read(path, base, name)
    add_low_rank(module, header.rank)
    _fill(module, arrays, path, name)
    return header.rank


def save_differences(
    folder: Path,
    module: nn.Module,
    state: Mapping[str, Any],
    log: Path,
    rank: int,
    base: str,
    of: str,
    others: Mapping[str, Any] | None = None,
    **entries: int,
) -> None:
    """Write the averaged differences of a run and its record as a sealed folder.

    Args:
        folder: gets `differences.safetensors`, one folder per other part, and what `export_record` writes.
        module: what learned; overwritten.
        state: of `Training.state`.
        log: of the run.
        rank: see `write_low_rank`.
        base: see `write_low_rank`.
        of: name of the model.
        others: parts that are not the base's, by name, written as they are.
        entries: further ones of `training.json`.

    Raises:
        FileError: if it cannot be written.
    """
    module.load_state_dict(state["average"])

    def fill(scratch: Path) -> None:
        write_low_rank(scratch / DIFFERENCES, module, rank, base)
        for name, part in (others or {}).items():
            part.save_pretrained(scratch / name)
        export_record(scratch, state, log, **entries)

    write_sealed(folder, fill, of)


def start_from_differences(folder: Path, module: nn.Module, rank: int, base: str, name: str) -> Start:
    """What `save_differences` wrote, to go on from.

    Args:
        folder: that was written.
        module: what learns, with differences of that rank; its weights become those of the folder.
        rank: of the run.
        base: see `read_low_rank`.
        name: see `read_low_rank`.

    Raises:
        ModelError: if a file is missing, not as it was written, of another rank, or from other weights.
    """
    check_sealed(folder, ModelError, "Export the weights again, or start afresh: --committed none.")
    path = folder / DIFFERENCES
    arrays, header = _read(path, base, name)
    if header.rank != rank:
        raise ModelError(
            f"{path} holds differences of rank {header.rank}, not {rank}: go on with --rank {header.rank}, or start "
            "afresh: --committed none"
        )
    _fill(module, arrays, path, name)
    return start_of(folder, module.state_dict())


def _read(path: Path, base: str, name: str) -> tuple[dict[str, Any], Header]:
    arrays, header = read_tensors(path, KIND)
    if header.base != base:
        raise ModelError(
            f"{path} holds differences from other weights of {name} ({header.base[:12]}) than these ({base[:12]}); "
            f"take the weights of {name} that it was trained from, or train it afresh from these (--committed none)"
        )
    return arrays, header


def _fill(module: nn.Module, arrays: Mapping[str, Any], path: Path, name: str) -> None:
    """Copy tensors to where they belong in a module with factors."""
    places = learned(module)
    if {place: tuple(value.shape) for place, value in places.items()} != {k: a.shape for k, a in arrays.items()}:
        raise ModelError(f"{path}: its tensors are not those of differences from {name}. {KIND.remedy}")
    for place, array in arrays.items():
        places[place].copy_(torch.from_numpy(array))
