"""A short text that tells the weights of one model from those of another of the same architecture.

It holds a few numbers of some matrices, at least one of each kind: matrices are of one kind if their names differ in
the numbers of blocks and layers alone. They are compared matrix by matrix, since what is fused into a model (a LoRA)
changes some kinds and leaves the others, and all biases and norms, as they were. Texts of before 0.2 are of every n-th
parameter by name, most of which are biases where blocks have as many of them as of matrices; they are still read.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = ["same_weights", "spaced_digest", "weights_digest"]

MATRICES, NUMBERS = 64, 8  # at most, and of each
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # of a block or a layer, as a whole part of a name: not in attn1 and attn2
GOLDEN = 0.618  # where in the depth of the model the next kind is looked at: far from all before
# Relative distance of weights that are the same: after rounding to 16 bits, and to 8 (float8_e5m2: 0.06).
WIDE, NARROW = 0.005, 0.08
SMALLEST = 1e-6  # absolute, of numbers that 16 bits hold no more exactly
SPACED = ("wide", "narrow")  # kinds of the texts of before 0.2
KINDS = ("matrices", "matrices in 8 bits")

Numbers = npt.NDArray[np.float32]


def weights_digest(model: nn.Module) -> str:
    """The text for a model's weights, to be compared by `same_weights`; empty where they are elsewhere (offloaded).

    Returns:
        one of `KINDS`, a colon, and the numbers as bfloat16 in hexadecimal.
    """
    return _written(_chosen(model), KINDS)


def spaced_digest(model: nn.Module, samples: int = 16) -> str:
    """The text as before 0.2: of every n-th parameter by name."""
    named = sorted(model.named_parameters(), key=lambda item: item[0])
    return _written([parameter for _, parameter in named[:: max(1, len(named) // samples)]], SPACED)


def same_weights(digest: str, model: nn.Module) -> bool:
    """Whether a model has the weights of a text, as far as its numbers are kept exactly enough to tell."""
    kind, own = _numbers(digest)
    spaced = kind in SPACED
    here_kind, here = _numbers(spaced_digest(model) if spaced else weights_digest(model))
    if not len(own) or not len(here):
        return digest == "" or not len(here)
    if len(own) != len(here):
        return False
    if {kind, here_kind} & {SPACED[1], KINDS[1]}:  # a few numbers of 8 bits tell something together alone
        return bool(np.linalg.norm(own - here) <= NARROW * np.linalg.norm(own))
    width = len(own) if spaced else NUMBERS
    own, here = own.reshape(-1, width), here.reshape(-1, width)
    return bool((np.linalg.norm(own - here, axis=1) <= WIDE * np.linalg.norm(own, axis=1) + SMALLEST).all())


def _chosen(model: nn.Module) -> list[Tensor]:
    """Some of the matrices: of each kind as many, at depths that differ from kind to kind."""
    named = list(model.named_parameters())
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in [one for one in named if one[1].ndim > 1] or named:
        kinds.setdefault(NUMBER.sub("#", name), []).append(parameter)
    names = sorted(kinds)
    if len(names) > MATRICES:
        names = [names[round(i)] for i in np.linspace(0, len(names) - 1, MATRICES)]
    found: list[Tensor] = []
    for j, name in enumerate(names):
        members = kinds[name]
        many = min(len(members), MATRICES // len(names))
        places = {int((i + j * GOLDEN % 1) * len(members) / many) for i in range(many)}
        found += [members[place] for place in sorted(places)]
    return found


def _written(parameters: list[Tensor], kinds: tuple[str, str]) -> str:
    numbers, narrow = [], False
    for parameter in parameters:
        if parameter.is_meta:
            return ""
        narrow |= type(parameter.data) is not Tensor or parameter.itemsize == 1
        flat = _wide(parameter)
        some = flat[:: max(1, flat.numel() // NUMBERS)][:NUMBERS].to("cpu", torch.bfloat16)
        numbers.append(some if kinds == SPACED else nn.functional.pad(some, (0, NUMBERS - len(some))))
    values = torch.cat(numbers).view(torch.int16).numpy() if numbers else np.zeros(0, np.int16)
    return f"{kinds[narrow]}:{values.astype('<i2').tobytes().hex()}"


def _wide(parameter: Tensor) -> Tensor:
    """The numbers that a parameter stands for, whatever it is kept in, in a row."""
    data = parameter.detach()
    rows = getattr(parameter, "SCB", None)  # the largest of each row in bitsandbytes' int8
    if isinstance(rows, Tensor):
        return (data.float() * rows.to(data.device).float()[:, None] / 127).flatten()
    return data.flatten() if type(data) is Tensor else data.dequantize().flatten()


def _numbers(digest: str) -> tuple[str, Numbers]:
    """Kind and numbers of a text; none for one that is not from here."""
    kind, _, text = digest.partition(":")
    width = 1 if kind in SPACED else NUMBERS
    try:
        halves = np.frombuffer(bytes.fromhex(text), "<u2")
    except ValueError:
        halves = np.zeros(0, "<u2")
    if kind not in (*SPACED, *KINDS) or len(halves) % width:
        halves = halves[:0]
    numbers: Numbers = (halves.astype(np.uint32) << 16).view(np.float32)
    return kind, numbers
