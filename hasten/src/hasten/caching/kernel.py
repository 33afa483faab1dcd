"""The fused kernel of `sums.py` in Triton: every feature is read once, the sum is written once, float32 in between.

Imported where Triton is installed only; `sums.py` decides whether it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST", "fused_sum"]

MOST = 8  # features that one launch reads
BLOCK = 1024


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _term(feature, weight, offsets, inside, width, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    value = tl.load(feature + offsets, mask=inside, other=0.0).to(tl.float32)
    # One return: the compiler would go on behind a first one, and multiply by pointers.
    return value * (tl.load(weight + offsets % width, mask=inside, other=0.0) if CHANNELS else weight)


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _sum(  # type: ignore[no-untyped-def]
    out, f0, f1, f2, f3, f4, f5, f6, f7, w0, w1, w2, w3, w4, w5, w6, w7, size, width,
    K: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = _term(f0, w0, offsets, inside, width, CHANNELS)
    if K > 1:
        total += _term(f1, w1, offsets, inside, width, CHANNELS)
    if K > 2:
        total += _term(f2, w2, offsets, inside, width, CHANNELS)
    if K > 3:
        total += _term(f3, w3, offsets, inside, width, CHANNELS)
    if K > 4:
        total += _term(f4, w4, offsets, inside, width, CHANNELS)
    if K > 5:
        total += _term(f5, w5, offsets, inside, width, CHANNELS)
    if K > 6:
        total += _term(f6, w6, offsets, inside, width, CHANNELS)
    if K > 7:
        total += _term(f7, w7, offsets, inside, width, CHANNELS)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


def fused_sum(features: Sequence[Tensor], weights: Sequence[Any]) -> Tensor:
    """`sum_k w_k F_k` of 1 to `MOST` contiguous features of one shape, as a new tensor of their dtype.

    Args:
        features: float32 or half precision.
        weights: all of them numbers, or all of them vectors `[D]` float32 over the last dimension.
    """
    first, spare = features[0], MOST - len(features)
    out = torch.empty_like(first)
    channels = isinstance(weights[0], Tensor)
    size, width = first.numel(), first.shape[-1]
    # A launch goes to the current device, which need not be the features'.
    with torch.cuda.device(first.device) if first.device.type == "cuda" else nullcontext():
        _sum[(triton.cdiv(size, BLOCK),)](
            out, *features, *[first] * spare, *weights, *[weights[0]] * spare, size, width,
            K=len(features), CHANNELS=channels, BLOCK=BLOCK,
        )  # fmt: skip
    return out
