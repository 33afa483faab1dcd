"""`sum_k w_k F_k`: the one place where forecasts are summed, in one pass over memory and without copies of features.

Sums are in float32 whatever the feature's dtype (float64 for float64), because the weights of a forecast cancel: in
bfloat16 most bits of the difference of two near-equal features are lost. Three ways lead to the same numbers up to
rounding: a fused kernel where Triton serves the device, chunks small enough to stay in a cache elsewhere, and a plain
expression where a compiler traces, which fuses it with what comes before and after.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hasten.errors import HastenWarning

__all__ = [
    "Weight",
    "add_into",
    "buffer_for",
    "finite",
    "fused_on",
    "inner_product",
    "magnitude",
    "map_tokens",
    "weighted_sum",
    "written",
]

Weight = float | Tensor  # of a whole feature, or `[D]` float32 of its channels; in a traced graph also `[]`
CHUNK = {"cpu": 1 << 16}  # numbers that are summed at a time; on the host they stay in the second-level cache
LARGE_CHUNK = 1 << 20
EXACT = (torch.float32, torch.float64)
FUSED = (torch.float32, torch.bfloat16, torch.float16)
MOST = 8  # features that the kernel takes


def weighted_sum(features: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """`sum_k w_k F_k` as a new contiguous tensor of the features' dtype; features of weight 0 are not read.

    Args:
        features: of one shape; those of a memory are contiguous, and none of them is copied.
        weights: one per feature: a number, or a vector with one number per channel (the last dimension).
    """
    if torch.compiler.is_compiling():
        return _expression(features, weights)
    terms = [(f, w) for f, w in zip(features, weights, strict=True) if isinstance(w, Tensor) or w != 0.0]
    if not terms:
        return torch.zeros_like(features[0])
    first, weight = terms[0]
    if len(terms) == 1 and not isinstance(weight, Tensor) and weight == 1.0:
        return first.clone()
    if first.is_cuda and len(terms) <= MOST and first.dtype in FUSED and fused_on(first.device):
        from hasten.caching.kernel import fused_sum

        return fused_sum([f.contiguous() for f, _ in terms], [w for _, w in terms])
    if first.dtype in EXACT:
        return _accumulate(terms)
    return _chunked(terms)


def finite(forecast: Tensor) -> Tensor:
    """Clip a forecast, in place, to the range of its dtype: models in float16 do so, an extrapolation does not."""
    if forecast.dtype is not torch.float16:
        return forecast
    limits = torch.finfo(forecast.dtype)
    return forecast.clamp_(limits.min, limits.max)


def add_into(total: Tensor, other: Tensor) -> Tensor:
    """`total + other`, in the place of `total` where that can hold it; `total` must be the caller's own."""
    if torch.result_type(total, other) != total.dtype or total.shape != other.shape:
        return total + other
    return total.add_(other)


def buffer_for(tensor: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Memory of our own that can hold a tensor, contiguous: `buffer` if that can, else new.

    What pipelines, models and captured graphs hand us they write into again; whatever is kept beyond a forward is kept
    in such a buffer.
    """
    if buffer is not None and (buffer.shape, buffer.dtype, buffer.device) == (
        tensor.shape,
        tensor.dtype,
        tensor.device,
    ):
        return buffer
    with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def written(buffer: Tensor | None, tensor: Tensor) -> Tensor:
    """A copy of a tensor, in the place of what a buffer held if it fits in there."""
    return buffer_for(tensor, buffer).copy_(tensor.detach())


def map_tokens(function: Callable[[Tensor], Tensor], tokens: Tensor, out: Tensor) -> None:
    """Write `function(tokens)`, which is token by token, into `out`, both `[..., N, D]`: some tokens at a time."""
    size = max(1, CHUNK.get(tokens.device.type, LARGE_CHUNK) * tokens.shape[-2] // max(tokens.numel(), 1))
    for part, place in zip(tokens.split(size, -2), out.split(size, -2), strict=True):
        place.copy_(function(part))


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two features `[n]` as a float64 scalar on their device: products in float32, sums in float64."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    size = CHUNK.get(a.device.type, LARGE_CHUNK)
    for x, y in zip(a.split(size), b.split(size), strict=True):
        total += (x.float() * y.float()).sum(dtype=torch.float64)
    return total


def magnitude(tensor: Tensor, per_sample: bool = False) -> Tensor:
    """`sum |x|` in float32, of all of a tensor `[B, ...]` or of each image, on its device: `[]` or `[B]`."""
    dims = tuple(range(1, tensor.ndim)) if per_sample and tensor.ndim > 1 else None
    return torch.linalg.vector_norm(tensor, 1, dims, dtype=torch.float32)


def _expression(features: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """For a compiler, which fuses it; the float32 tensors of the text are never made."""
    total = features[0].float() * weights[0]
    for feature, weight in zip(features[1:], weights[1:], strict=True):
        total = total + feature.float() * weight
    return total.to(features[0].dtype)


def _accumulate(terms: Sequence[tuple[Tensor, Weight]]) -> Tensor:
    """The sum of float32 or float64 features, or of parts of half-precision ones in float32."""
    (first, weight), *rest = terms
    total = torch.mul(first, weight) if first.dtype in EXACT else first.float().mul_(weight)
    for feature, weight in rest:
        if isinstance(weight, Tensor):
            total.addcmul_(feature.to(total.dtype), weight)
        else:
            total.add_(feature, alpha=weight)
    return total


def _chunked(terms: Sequence[tuple[Tensor, Weight]]) -> Tensor:
    """The sum of half-precision features, some rows of channels at a time."""
    first = terms[0][0]
    width = first.shape[-1] if first.dim() else 1
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    rows, parts = out.view(-1, width), [(f.reshape(-1, width), w) for f, w in terms]
    size = max(1, CHUNK.get(first.device.type, LARGE_CHUNK) // width)
    for start in range(0, len(rows), size):
        chosen = slice(start, start + size)
        rows[chosen] = _accumulate([(f[chosen], w) for f, w in parts])
    return out


@cache
def fused_on(device: torch.device) -> bool:
    """Whether the kernel is used on a device: where Triton is installed and has reproduced the plain sum there.

    The first answer for a device compiles, and waits for it; ask before a skipped step.
    """
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    numbers = [2.5, -2.0, 0.25]
    try:
        from hasten.caching.kernel import fused_sum

        line = torch.linspace(-1, 1, 96, device=device).view(2, 48)
        features = [line.mul(k + 1).to(torch.bfloat16) for k in range(3)]
        kinds: list[list[Weight]] = [list(numbers), [line[0] * number for number in numbers]]
        pairs = [(fused_sum(features, w), _chunked(list(zip(features, w, strict=True)))) for w in kinds]
        if all(torch.allclose(ours.float(), plain.float(), rtol=2**-7, atol=2**-7) for ours, plain in pairs):
            return True
        reason = "it does not reproduce the plain sum"
    except Exception as error:  # whatever a driver or compiler raises, the sum has another way
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"the fused kernel for forecasts is not used on {device} ({reason}); they are summed in chunks",
        HastenWarning,
        stacklevel=2,
    )
    return False
