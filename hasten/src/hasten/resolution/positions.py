"""Tokens of mixed resolution: which ones a sequence has, and their positions as real numbers.

A *coarse* token covers 2x2 fine ones. A position is (row, column) in one common frame for all tokens of an image:

    lr_units    a coarse token at (r, c), its children at (r + i/2, c + j/2)
    hr_units    a fine token at (row, column), a coarse one at (2 r, 2 c)

FLUX takes positions as `img_ids`, with the image's number before them. Qwen-Image makes them from `img_shapes`, and
its `pos_embed` has to be replaced for the time of a forward (`models/rope.py`). It centres the grid, and the text
begins behind the largest half side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from hasten.errors import AdapterError, ConfigError, unknown

__all__ = [
    "ImageTokens",
    "TokenSet",
    "Units",
    "children",
    "flux_ids",
    "grid_sizes",
    "pack",
    "qwen_positions",
    "token_positions",
    "unpack",
]

Units = Literal["lr_units", "hr_units"]


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image, the one that is made or a reference.

    Attributes:
        size: rows and columns of the fine token grid.
        corners: `[S, 2]` integers, row and column on the fine grid of each token's top left fine token.
        units: the frame of the positions. `"lr_units"` needs even sides.
    """

    size: tuple[int, int]
    corners: Tensor
    units: Units

    def __post_init__(self) -> None:
        if self.units not in get_args(Units):
            raise unknown("units", self.units, get_args(Units))
        if self.corners.dim() != 2 or self.corners.shape[1] != 2:
            raise ConfigError(f"corners are [S, 2], rows and columns, got {list(self.corners.shape)}")
        if self.units == "lr_units" and (self.size[0] % 2 or self.size[1] % 2):
            raise ConfigError(
                f"{self.size[0]}x{self.size[1]} tokens cannot be counted in coarse tokens of 2x2; "
                "use even numbers of tokens (sizes divisible by 32 for FLUX and Qwen-Image), or hr_units"
            )
        beyond = self.corners.new_tensor(self.size)
        if len(self.corners) and bool(((self.corners < 0) | (self.corners >= beyond)).any()):
            raise ConfigError(f"corners must lie on the fine grid of {self.size[0]}x{self.size[1]} tokens")

    @classmethod
    def uniform(cls, rows: int, columns: int) -> ImageTokens:
        """All tokens of a uniform grid in raster order, at the positions that the model was trained with."""
        return cls((rows, columns), torch.cartesian_prod(torch.arange(rows), torch.arange(columns)), "hr_units")

    @property
    def frame(self) -> tuple[int, int]:
        """Rows and columns of the grid whose unit the positions have."""
        return (self.size[0] // 2, self.size[1] // 2) if self.units == "lr_units" else self.size


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Tokens of an image of which some have been promoted: the coarse ones, then the fine ones, each in raster order.

    `n` is the number of coarse tokens before promotion, `S` that of the tokens in the sequence: `n + 3 promoted`.

    Attributes:
        fine: `[h, w]` bool, the coarse tokens that have been replaced by their four fine ones.
    """

    fine: Tensor

    @cached_property
    def _coarse_places(self) -> Tensor:
        return (~self.fine).flatten().nonzero()[:, 0]

    @cached_property
    def _fine_places(self) -> Tensor:
        return self.fine.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten().nonzero()[:, 0]

    @cached_property
    def _children(self) -> Tensor:
        """`[4, number of coarse tokens]`: places on the fine grid that a coarse token covers."""
        width = self.fine.shape[1]
        first = 4 * width * (self._coarse_places // width) + 2 * (self._coarse_places % width)
        return torch.stack([first, first + 1, first + 2 * width, first + 2 * width + 1])

    @cached_property
    def key(self) -> bytes:
        """The same for equal sets; one read from the device."""
        return self.fine.cpu().numpy().tobytes()

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the fine grid."""
        return 2 * self.fine.shape[0], 2 * self.fine.shape[1]

    @property
    def coarse_count(self) -> int:
        """How many tokens are coarse."""
        return len(self._coarse_places)

    @property
    def fine_count(self) -> int:
        """How many tokens are fine."""
        return len(self._fine_places)

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return self.coarse_count + self.fine_count

    def image_tokens(self, units: Units) -> ImageTokens:
        """The tokens with their positions, in the order of the sequence."""
        places, width = torch.cat([self._children[0], self._fine_places]), self.size[1]
        return ImageTokens(self.size, torch.stack([places // width, places % width], 1), units)

    def gather(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """The sequence `[B, S, C]` from all coarse tokens `[B, n, C]` and all fine ones `[B, 4 n, C]`."""
        return torch.cat([coarse[:, self._coarse_places], fine[:, self._fine_places]], 1)

    def scatter(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All coarse tokens `[B, n, C]` and all fine ones `[B, 4 n, C]`, zero where the sequence has none of them."""
        batch, _, channels = tokens.shape
        coarse, fine = (tokens.new_zeros(batch, factor * self.fine.numel(), channels) for factor in (1, 4))
        coarse[:, self._coarse_places] = tokens[:, : self.coarse_count]
        fine[:, self._fine_places] = tokens[:, self.coarse_count :]
        return coarse, fine

    def spread(self, tokens: Tensor) -> Tensor:
        """The sequence `[B, S, C]` as a full-size one `[B, 4 n, C]`, every coarse token copied to its four places."""
        full = tokens.new_empty(len(tokens), 4 * self.fine.numel(), tokens.shape[2])
        full[:, self._fine_places] = tokens[:, self.coarse_count :]
        full[:, self._children] = tokens[:, None, : self.coarse_count]
        return full

    def collect(self, full: Tensor) -> Tensor:
        """Undo `spread`: `[B, 4 n, C]` to `[B, S, C]`."""
        return torch.cat([full[:, self._children[0]], full[:, self._fine_places]], 1)


def children(mask: Tensor) -> Tensor:
    """The fine tokens of coarse ones: `[h, w]` bool to `[4 h w, 1]`, in raster order."""
    return mask.repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(-1, 1)


def pack(latents: Tensor) -> Tensor:
    """Latent pixels `[B, C, H, W]` to tokens of 2x2 `[B, H W / 4, 4 C]`, as FLUX and Qwen-Image order them."""
    return functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo `pack`, for a grid of `size` tokens: `[B, n, 4 C]` to `[B, C, H, W]`."""
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, size), 2)


def token_positions(image: ImageTokens) -> Tensor:
    """`[S, 2]` float32: row and column of each token, in the image's units, from 0."""
    return image.corners.float() / (2 if image.units == "lr_units" else 1)


def flux_ids(images: Sequence[ImageTokens], device: torch.device | None = None) -> Tensor:
    """Rows of `img_ids` for `FluxTransformer2DModel`: `[S, 3]` float32 (bfloat16 holds halves only up to 127.5).

    Args:
        images: the one that is made, then the references, whose first id is their number from 1.
        device: of the ids.
    """
    if not images:
        raise ConfigError("ids need at least one image")
    positions = [
        torch.cat([torch.full((len(image.corners), 1), float(number)), token_positions(image).cpu()], 1)
        for number, image in enumerate(images)
    ]
    return torch.cat(positions).to(device)


def grid_sizes(arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of tokens of each image in a forward, the one that is made first.

    Args:
        arguments: of the transformer's forward, with `img_ids` `[S, 3]` (FLUX) or `img_shapes` (Qwen-Image).

    Raises:
        AdapterError: if there is neither, or they do not add up.
    """
    if arguments.get("img_shapes") is not None:
        return [(rows, columns) for _, rows, columns in arguments["img_shapes"][0]]
    ids = arguments.get("img_ids")
    if ids is None:
        raise AdapterError("the transformer was called without img_ids and img_shapes, and its tokens have no grid")
    sizes = []
    for number in ids[:, 0].unique():
        places = ids[ids[:, 0] == number][:, 1:].long()
        rows, columns = (int(side) + 1 for side in places.amax(0))
        if rows * columns != len(places):
            raise AdapterError(f"image {int(number)} has {len(places)} tokens, which are no grid of {rows}x{columns}")
        sizes.append((rows, columns))
    return sizes


def qwen_positions(images: Sequence[ImageTokens]) -> tuple[Tensor, int]:
    """Centred positions as `QwenEmbedRope(scale_rope=True)` counts them.

    Args:
        images: the one that is made, then the references.

    Returns:
        `[S, 3]` float32, the image's number, row and column; and the position at which the text begins.
    """
    if not images:
        raise ConfigError("positions need at least one image")
    rows, start = [], 0
    for number, image in enumerate(images):
        height, width = image.frame
        # As the model centres: a side of 5 runs from -3 to 1.
        centre = torch.tensor([height - height // 2, width - width // 2], dtype=torch.float32)
        centred = token_positions(image).cpu() - centre
        rows.append(torch.cat([torch.full((len(centred), 1), float(number)), centred], 1))
        start = max(start, height // 2, width // 2)
    return torch.cat(rows), start
