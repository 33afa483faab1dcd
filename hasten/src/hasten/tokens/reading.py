"""Codebooks from files: arrays, safetensors, and checkpoints of tokenizers (read weights-only)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hasten.errors import ModelError
from hasten.io import as_path

__all__ = ["codebook_of", "read_codebook"]

KNOWN = ("quantize.embedding.weight", "quantizer.embedding.weight", "quantize.embed", "embedding.weight", "codebook")
STATES = ("model", "state_dict", "ema")  # where checkpoints keep the weights, the first that is there
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")
DEEPEST = 8  # levels of these
PAIR = 2  # dimensions of a matrix


def read_codebook(path: str | Path, name: str | None = None) -> NDArray[np.float32]:
    """The codebook of a file, `[codes, width]`.

    Args:
        path: `.npy`; `.safetensors`; or `.pt`, `.pth`, `.ckpt`, `.bin` as torch saves them (LlamaGen's `vq_ds16_c2i.pt`
            has its codebook at `model`, `quantize.embedding.weight`). Nothing in a file is executed.
        name: of the tensor; by default a known one, or the only matrix.

    Raises:
        ModelError: if there is none, it is not clear which, or the file cannot be read.
    """
    path = as_path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give a codebook as .npy, .safetensors or .pt")
    try:
        if path.suffix == ".npy":
            return _real(_array(path), str(path))
        found = _tensors(path)
    except ModelError:
        raise
    except UnpicklingError as error:  # torch's own message tells how to run what is in the file
        raise ModelError(f"{path}: cannot be read as a codebook (it is damaged, or holds more than tensors)") from error
    except Exception as error:  # whatever the readers raise, the file is no codebook
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: cannot be read as a codebook ({message})") from error
    return _chosen(found, name, str(path))


def codebook_of(tokenizer: nn.Module, name: str | None = None) -> NDArray[np.float32]:
    """The codebook of a tokenizer, `[codes, width]`, by the names of its tensors.

    Raises:
        ModelError: if there is none, or it is not clear which.
    """
    return _chosen(tokenizer.state_dict(), name, type(tokenizer).__name__)


def _tensors(path: Path) -> Mapping[str, Any]:
    if path.suffix in CHECKPOINTS:
        found = torch.load(path, map_location="cpu", weights_only=True)
        for _ in range(DEEPEST):
            inner = next((key for key in STATES if key in found), None) if isinstance(found, Mapping) else None
            found = found if inner is None else found[inner]
        return {"codebook": found} if isinstance(found, Tensor) else dict(found)
    from safetensors.torch import load_file

    return load_file(path)


def _chosen(tensors: Mapping[str, Any], name: str | None, where: str) -> NDArray[np.float32]:
    matrices = {key: value for key, value in tensors.items() if isinstance(value, Tensor) and value.ndim == PAIR}
    if name is None:
        likely = {key for key in matrices for known in KNOWN if key == known or key.endswith(f".{known}")}
        candidates = likely or set(matrices)
        name = candidates.pop() if len(candidates) == 1 else None
    if name not in matrices:
        shown = ", ".join(sorted(matrices)[:20]) or "none"
        raise ModelError(f"{where} holds the matrices {shown}; say which is the codebook with name= (--tensor)")
    chosen = matrices[name]
    if chosen.layout is not torch.strided or chosen.is_meta:
        kind = "without numbers" if chosen.is_meta else f"of layout {chosen.layout}"
        raise ModelError(f"{where}: {name!r} is a tensor {kind}; save it as a plain one")
    return _real(chosen.numpy() if chosen.is_complex() else chosen.float().numpy(), where)


def _array(path: Path) -> NDArray[Any]:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("it was not written by numpy.save")
    return np.asarray(np.load(path))


def _real(numbers: NDArray[Any], where: str) -> NDArray[np.float32]:
    if numbers.dtype.kind not in "biuf":
        raise ModelError(f"{where} holds numbers of type {numbers.dtype}; a codebook has real ones")
    with np.errstate(over="ignore"):  # what is too large is refused with its place
        return numbers.astype(np.float32)
