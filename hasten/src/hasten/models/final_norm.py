"""The norm through which the image tokens leave a transformer, where a family has one that is known.

The blocks' output `h` goes to a norm over the channels of each token, then to a modulation and a projection. That norm
is idempotent: of `h` it passes on nothing but `N(h)`, and `N(N(h)) = N(h)`. A cache may therefore keep `N(h)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hasten.errors import AdapterError
from hasten.models.adapter import ModelAdapter

__all__ = ["FinalNorm", "final_norm"]

KINDS: dict[str, Literal["layer", "rms"]] = {"LayerNorm": "layer", "RMSNorm": "rms"}


@dataclass(frozen=True)
class FinalNorm:
    """A norm over the channels of each token, without its affine part, which only follows it.

    Attributes:
        kind: layer normalisation, or division by the root mean square.
        eps: what is added to the variance or the mean square.
    """

    kind: Literal["layer", "rms"]
    eps: float

    def __call__(self, tokens: Tensor) -> Tensor:
        """Normalised tokens `[..., D]` in their dtype, computed in float32 or wider."""
        width = tokens.shape[-1:]
        wide = tokens if tokens.itemsize >= 4 else tokens.float()
        normed = (F.layer_norm if self.kind == "layer" else F.rms_norm)(wide, width, eps=self.eps)
        return normed.to(tokens.dtype)


def final_norm(model: nn.Module, adapter: ModelAdapter | None) -> FinalNorm:
    """The final norm of a transformer.

    Raises:
        AdapterError: if the family's is not known, or this model has none of a kind that is idempotent.
    """
    name = type(model).__name__
    remedy = "use domain='plain', or name the norm with hasten.models.register(ModelAdapter(final_norm=...))"
    if adapter is None or adapter.final_norm is None:
        raise AdapterError(f"the final norm of {name} is not known; {remedy}")
    try:
        module = attrgetter(adapter.final_norm)(model)
    except AttributeError:
        raise AdapterError(f"{name} has no {adapter.final_norm!r}; {remedy}") from None
    classes = [cls.__name__ for cls in type(module).__mro__]
    kind = next((kind for known, kind in KINDS.items() if known in classes), None)
    if kind is None:
        raise AdapterError(f"{adapter.final_norm!r} of {name} is a {classes[0]}, no LayerNorm or RMSNorm; {remedy}")
    return FinalNorm(kind, float(getattr(module, "eps", None) or 1e-6))
