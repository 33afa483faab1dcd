"""The refiner: given the main model's hidden state and the drawn cluster, which member it is.

The paper (arXiv:2510.04220) names one transformer decoder layer of width 512 with 4 heads; its code has an interface
only, so the rest is our reading. Query: embedding of the cluster plus the projected hidden state. Logits over all `N`
tokens, minus infinity outside the cluster's members; cross-entropy with the true token where a cluster has more than
one member; the main model stays as it is.

Shapes: `B` batch, `L` positions, `H` width of the main model, `N` tokens, `k` clusters, `W` width of the refiner.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
from torch import Tensor, nn

from hasten.errors import ConfigError, ModelError
from hasten.io import Kind, read_tensors, write_tensors
from hasten.parameters import Declared, Range, accepted
from hasten.tokens.mapping import TokenMap
from hasten.tokens.sample import drawn_from, refuse_lost

__all__ = ["Refiner", "RefinerConfig"]

MOST_LAYERS = 128
MOST_WIDTH = 65_536


@dataclass(frozen=True, kw_only=True)
class RefinerConfig(Declared):
    """Size of a refiner.

    Raises:
        ConfigError: if a size is not positive or the heads do not divide the width.
    """

    hidden: Annotated[int, Range(1, MOST_WIDTH), "width of the main model's hidden states, `H`"]
    width: Annotated[int, Range(1, MOST_WIDTH), "of the refiner, `W`"] = 512
    heads: Annotated[int, Range(1), "of attention; divides the width"] = 4
    layers: Annotated[int, Range(1, MOST_LAYERS), "of the decoder"] = 1

    def check(self) -> None:
        super().check()
        if self.width % self.heads:
            raise ConfigError(f"heads must divide the width, got {self.heads} and {self.width}")


@dataclass(frozen=True)
class _Content:
    """What the header of a refiner's file holds."""

    config: RefinerConfig
    fingerprint: str = ""  # of the codebook; files of before do not tell it


KIND = Kind("refiner", _Content, ModelError, "Train it again with `hasten tokens refine`.", 4 << 30)


def _check_within(name: str, ids: Tensor, size: int) -> None:
    """Refuse what is not within `0 .. size - 1`; a device checks by itself, and is not waited for."""
    if ids.is_floating_point() or ids.is_complex():
        raise ConfigError(f"{name} must be whole numbers, got {ids.dtype}")
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ConfigError(f"{name} {int(ids.min())} .. {int(ids.max())} are not all in 0 .. {size - 1}")


class Refiner(nn.Module):
    """`p(token | hidden states up to here, clusters up to here)`, within each position's cluster."""

    labels: Tensor
    sizes: Tensor
    used: Tensor

    def __init__(self, mapping: TokenMap, config: RefinerConfig) -> None:
        super().__init__()
        accepted("Refiner", "mapping", TokenMap, mapping)
        accepted("Refiner", "config", RefinerConfig, config)
        self.config = config
        self.mapping = mapping
        self.register_buffer("labels", torch.from_numpy(mapping.labels).long())
        self.register_buffer("sizes", torch.from_numpy(mapping.sizes).long())
        self.register_buffer("used", torch.from_numpy(mapping.used))
        self.cluster = nn.Embedding(mapping.clusters, config.width)
        self.project = nn.Linear(config.hidden, config.width)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, dropout=0.0, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(config.width)
        self.layers = nn.TransformerEncoder(layer, config.layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(config.width, mapping.tokens)

    def forward(self, hidden: Tensor, clusters: Tensor) -> Tensor:
        """Logits `[B, L, N]`, minus infinity outside each position's cluster.

        Args:
            hidden: `[B, L, H]`, the states from which the main model predicts `clusters`.
            clusters: `[B, L]` int64.

        Raises:
            ConfigError: if the shapes do not fit.
        """
        accepted("Refiner", "hidden", Tensor, hidden)
        accepted("Refiner", "clusters", Tensor, clusters)
        if hidden.shape != (*clusters.shape, self.config.hidden):
            raise ConfigError(
                f"hidden must be [B, L, {self.config.hidden}] for clusters [B, L]; got {tuple(hidden.shape)} "
                f"and {tuple(clusters.shape)}"
            )
        _check_within("clusters", clusters, len(self.sizes))
        query = self.cluster(clusters) + self.project(hidden.to(self.project.weight.dtype))
        mask = nn.Transformer.generate_square_subsequent_mask(query.shape[1], device=query.device, dtype=query.dtype)
        logits = self.head(self.layers(query, mask=mask, is_causal=True))
        return logits.masked_fill((self.labels != clusters[..., None]) | ~self.used, -torch.inf)

    def loss(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats over used tokens whose cluster has several members; zero if there are none."""
        _check_within("tokens", accepted("Refiner.loss", "tokens", Tensor, tokens), len(self.labels))
        clusters = self.labels[tokens]
        counted = (self.sizes[clusters] > 1) & self.used[tokens]
        logits = self(accepted("Refiner.loss", "hidden", Tensor, hidden).detach(), clusters)
        each = nn.functional.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
        return torch.where(counted.flatten(), each, 0.0).sum() / counted.sum().clamp_min(1)

    @torch.no_grad()
    def sample(self, hidden: Tensor, clusters: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A used member for each position, `[B, L]` int64.

        Raises:
            NonFiniteError: if probabilities are no numbers.
        """
        accepted("Refiner.sample", "hidden", Tensor, hidden)
        accepted("Refiner.sample", "generator", torch.Generator | None, generator)
        generator = generator or torch.Generator(hidden.device)
        chances = self(hidden, clusters).float().softmax(dim=-1)
        refuse_lost(chances.isnan().any(-1), "positions")
        return drawn_from(chances.flatten(0, 1), generator).reshape(clusters.shape)

    def check(self, mapping: TokenMap) -> None:
        """Refuse another map than the one that the refiner was made for.

        Raises:
            ModelError: if it is another.
        """
        accepted("Refiner.check", "mapping", TokenMap, mapping)
        prints = (self.mapping.fingerprint, mapping.fingerprint)
        same = torch.equal(self.labels.cpu(), torch.from_numpy(mapping.labels).long())
        same = same and (not all(prints) or prints[0] == prints[1])
        if not same or not torch.equal(self.used.cpu(), torch.from_numpy(mapping.used)):
            raise ModelError(
                f"the refiner is for another map ({len(self.labels)} tokens in {len(self.sizes)} clusters) than this "
                f"one ({mapping.tokens} in {mapping.clusters}); train one for this map with `hasten tokens refine`"
            )

    def save(self, path: str | Path) -> Path:
        """Write weights, map and size to one safetensors file, atomically; returns its path."""
        tensors = {name: value.detach().cpu().numpy() for name, value in self.state_dict().items()}
        tensors["used"] = tensors["used"].astype(np.uint8)
        header = {"config": asdict(self.config), "fingerprint": self.mapping.fingerprint}
        return write_tensors(path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelError: if the file is missing, damaged or no refiner.
        """
        arrays, content = read_tensors(path, KIND)
        try:
            arrays["used"] = arrays.get("used", np.ones(0)) == 1
            mapping = TokenMap(arrays.get("labels", np.empty(0)), fingerprint=content.fingerprint, used=arrays["used"])
            with torch.device("meta"):  # before memory for the sizes in the header is asked for
                shapes = {name: value.shape for name, value in cls(mapping, content.config).state_dict().items()}
            if {name: array.shape for name, array in arrays.items()} != shapes:
                raise ConfigError("its tensors are not those of a refiner of this size")
            if not np.array_equal(arrays["sizes"], mapping.sizes):
                raise ConfigError("the sizes of its clusters are not those of its labels")
            bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
            if bad:
                raise ConfigError(f"{bad[0]!r} has a value that is not finite")
        except ConfigError as error:
            raise ModelError(f"{path}: no usable refiner ({error}). {KIND.remedy}") from error
        refiner = cls(mapping, content.config)
        refiner.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        return refiner.eval()
