"""What training, sampling and the refiner need of an autoregressive model of clusters: predictions after a condition.

`HuggingFaceModel` (in `hasten.tokens.hugging_face`) makes one of a causal LM of transformers, with a static cache;
`FunctionModel` of any module and a function that runs it; further ones are subclasses with a `forward`.

Shapes: `B` images, `P` ids of a condition, `l` clusters that are known, `L` clusters of an image, `k` clusters that
there are, `H` width of the states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from hasten.errors import ConfigError, brief
from hasten.parameters import Range, accepted

__all__ = ["CausalModel", "Condition", "Decoding", "FunctionModel", "Prediction", "evaluating"]


class Prediction(NamedTuple):
    """Of each next cluster.

    Attributes:
        logits: `[B, l + 1, k]`, or `[B, k]` of the last one.
        states: hidden states that they were made of, `[B, l + 1, H]` or `[B, H]`; None where the model does not tell.
    """

    logits: Tensor
    states: Tensor | None


Decoding = Generator[Prediction, Tensor, None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model without dropout; each of its modules is in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_ids(ids: Tensor) -> None:
    """Refuse what is no plain matrix of whole numbers."""
    accepted("Condition", "ids", Tensor, ids)
    plain = ids.layout is torch.strided and not ids.is_meta and ids.dtype not in (torch.bool, torch.uint8)
    if not plain or ids.is_floating_point() or ids.is_complex() or ids.ndim != 2 or not ids.shape[1]:
        raise ConfigError(f"a condition is whole numbers [B, P] in a plain tensor, got {ids.dtype} {tuple(ids.shape)}")


@dataclass(frozen=True, eq=False)
class Condition:
    """What images are to show: a class or a text, as ids of the model's own tokenizer before the replacement.

    Attributes:
        ids: `[B, P]` int64.
        mask: `[B, P]` bool, False for padding, which lies in front; all True by default.
        has_padding: whether there is any; told once, so that no device has to be asked for it.

    Raises:
        ConfigError: if the ids are no matrix, or the mask is none of theirs.
    """

    ids: Tensor
    mask: Tensor
    has_padding: bool

    def __init__(self, ids: Tensor, mask: Tensor | None = None, has_padding: bool | None = None) -> None:
        _check_ids(ids)
        accepted("Condition", "mask", Tensor | None, mask)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "mask", torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool())
        found = mask is not None and (not bool(mask.all()) if has_padding is None else has_padding)
        object.__setattr__(self, "has_padding", found)
        if ids.shape != self.mask.shape:
            raise ConfigError(f"a mask is of the shape of its ids, {tuple(ids.shape)}, got {tuple(self.mask.shape)}")

    @classmethod
    def padded(cls, ids: Tensor) -> Condition:
        """Of ids `[B, P]` with -1 in front of shorter ones.

        Raises:
            ConfigError: if -1 is elsewhere, or an image has no id at all.
        """
        _check_ids(ids)
        mask = ids >= 0
        if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or not bool(mask[:, -1].all()):
            raise ConfigError("conditions are padded with -1 in front, and each has an id at its end")
        return cls(ids.clamp_min(0), mask)

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Condition:
        """On another device."""
        return Condition(self.ids.to(device), self.mask.to(device), self.has_padding)

    def part(self, images: slice) -> Condition:
        """Of some of the images."""
        return Condition(self.ids[images], self.mask[images], self.has_padding)

    def and_then(self, other: Condition) -> Condition:
        """The images of both, the shorter condition padded in front."""
        longest = max(self.ids.shape[1], other.ids.shape[1])
        parts = [
            (nn.functional.pad(one.ids, (missing, 0)), nn.functional.pad(one.mask, (missing, 0)))
            for one in (self, other)
            for missing in (longest - one.ids.shape[1],)
        ]
        padded = self.has_padding or other.has_padding or self.ids.shape != (len(self), other.ids.shape[1])
        ids, mask = (torch.cat(column) for column in zip(*parts, strict=True))
        return Condition(ids, mask, padded)

    def expanded(self, images: int) -> Condition:
        """One condition for all of so many images.

        Raises:
            ConfigError: if there are several already.
        """
        if len(self) not in (1, images):
            raise ConfigError(f"one condition, or one for each of {images} images is needed, got {len(self)}")
        return Condition(self.ids.expand(images, -1), self.mask.expand(images, -1), self.has_padding)


class CausalModel(nn.Module, ABC):
    """An autoregressive model of clusters.

    Attributes:
        clusters: that there are, `k`.
        codebooks: sizes of the vocabularies that positions take in turn (residual VQ); they add up to `k`.
    """

    def __init__(self, clusters: int, codebooks: tuple[int, ...] = ()) -> None:
        super().__init__()
        clusters = accepted(type(self).__name__, "clusters", Annotated[int, Range(1)], clusters)
        if codebooks:
            codebooks = accepted(type(self).__name__, "codebooks", tuple[Annotated[int, Range(1)], ...], codebooks)
        if codebooks and (sum(codebooks) != clusters):
            raise ConfigError(f"the codebooks {codebooks} must add up to {clusters} clusters")
        self.clusters = clusters
        self.codebooks = codebooks or (clusters,)

    @abstractmethod
    def forward(self, condition: Condition, clusters: Tensor) -> Prediction:
        """Predictions of the first `l + 1` clusters, given the first `l` `[B, l]` int64 (0 of them at first)."""

    def trained(self) -> list[nn.Parameter]:
        """Parameters that predictions depend on; a tokenizer or a vision tower within the model is none of them."""
        return list(self.parameters())

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters of which some rows get no gradient and are to stay as they are, so that weight decay is off."""
        return []

    def decode(self, condition: Condition, length: int) -> Decoding:
        """Yields the prediction of each of `length` clusters, and is sent what was drawn, `[B]`.

        Everything is computed again for each cluster here; a subclass with a cache does better.
        """
        clusters = condition.ids.new_empty(len(condition), 0)
        for _ in range(length):
            logits, states = self(condition, clusters)
            drawn = yield Prediction(logits[:, -1], None if states is None else states[:, -1])
            clusters = torch.cat([clusters, drawn[:, None]], dim=1)

    def within_codebook(self, logits: Tensor, first: int) -> Tensor:
        """Logits `[B, l, k]` of positions from `first` on, minus infinity outside the codebook of each position."""
        if len(self.codebooks) == 1:
            return logits
        sizes = torch.tensor(self.codebooks, device=logits.device)
        of_cluster = torch.repeat_interleave(sizes, output_size=self.clusters)  # index of the codebook
        of_position = torch.arange(first, first + logits.shape[1], device=logits.device) % len(self.codebooks)
        return logits.masked_fill(of_cluster != of_position[:, None], -torch.inf)


class FunctionModel(CausalModel):
    """Any module with a function that runs it.

    Args:
        module: whose parameters are trained.
        forward: `(condition, clusters [B, l]) -> logits [B, l + 1, k]`, or those and the states `[B, l + 1, H]`, which
            a refiner needs.
        clusters: that there are, `k`.
        codebooks: sizes of the vocabularies that positions take in turn.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Condition, Tensor], Tensor | tuple[Tensor, Tensor]],
        clusters: int,
        codebooks: tuple[int, ...] = (),
    ) -> None:
        accepted("FunctionModel", "module", nn.Module, module)
        accepted("FunctionModel", "forward", Callable, forward)
        super().__init__(clusters, codebooks)
        self.module = module
        self.function = forward

    def forward(self, condition: Condition, clusters: Tensor) -> Prediction:
        found = self.function(condition, clusters)
        if not isinstance(found, Tensor) and not (
            isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)
        ):
            raise ConfigError(f"the forward must give logits, or logits and states, as tensors; got {brief(found)}")
        logits, states = (found, None) if isinstance(found, Tensor) else found
        expected = (len(condition), clusters.shape[1] + 1, self.clusters)
        if logits.shape != expected:
            raise ConfigError(f"the forward gave logits {tuple(logits.shape)}, expected [B, l + 1, k] = {expected}")
        return Prediction(self.within_codebook(logits, 0), states)
