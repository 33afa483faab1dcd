"""Where the tokens of the image lie in the tensor that the hidden site records.

Each family tells it in one of a few ways, and `ModelAdapter.layout` says in which. Most of them read shapes and plain
numbers, which takes microseconds. `"ids"`, and `"sizes"` with coordinates, read a tensor of positions that lies on the
model's device: one copy to the host, and so one wait for the device. Call `layout_of` once per run, not once per step.

Shape legend: `B` images, `N` tokens, `A` axes of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hasten.errors import AdapterError
from hasten.models.adapter import LayoutKind, ModelAdapter

__all__ = ["TokenLayout", "layout_of", "patch_size"]

Arguments = Mapping[str, Any]
Positions = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of the image (or clip) that is being made lie.

    Attributes:
        grid: (H, W) or (T, H, W) in tokens, row-major: the last axis moves fastest.
        offset: index of the first of them. Text may come before; text, padding and reference images may come after.
    """

    grid: tuple[int, ...]
    offset: int = 0


def layout_of(model: Any, adapter: ModelAdapter | None, arguments: Arguments) -> TokenLayout:
    """Where the tokens of the image lie in one forward of a transformer.

    Args:
        model: the transformer.
        adapter: its entry.
        arguments: of the forward, by name.

    Raises:
        AdapterError: if the entry does not say how to find them, or the arguments do not describe one grid.
    """
    name = type(model).__name__
    if adapter is None or adapter.layout is None:
        raise AdapterError(
            f"it is not known where the tokens of the image lie in {name}; say how to find them with "
            f"hasten.models.register({name!r}, ModelAdapter(..., layout=...)), where layout is one of "
            f"{', '.join(_READERS)}"
        )
    return _READERS[adapter.layout](model, adapter, arguments)


def _argument(model: Any, arguments: Arguments, name: str) -> Any:
    value = arguments.get(name)
    if value is None:
        raise AdapterError(
            f"{type(model).__name__} was called without {name!r}, which says where the tokens of the image lie; "
            "pass it as the pipelines of diffusers do"
        )
    return value


def patch_size(config: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns of one token, read off a transformer's configuration; 1 where it names none."""
    patch = getattr(config, "patch_size", None) or 1
    if several := getattr(config, "all_patch_size", None):  # sizes to choose from in each call (Z-Image)
        return config.all_f_patch_size[0], several[0], several[0]
    if isinstance(patch, int):
        return getattr(config, "patch_size_t", None) or 1, patch, patch
    frames, rows, columns = (1, *patch)[-3:]
    return frames, rows, columns


def _divided(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Patches along each axis; `patch` may have more axes than `sizes`, of which the last ones count."""
    return tuple(size // step for size, step in zip(sizes, patch[-len(sizes) :], strict=True))


def _still(grid: tuple[int, ...]) -> tuple[int, ...]:
    """A grid without its axis of frames, if there is only one."""
    return grid[1:] if grid[0] == 1 else grid


def _on_host(positions: Tensor) -> Positions:
    """Positions as an array: one copy from the device, and quicker to look at than a tensor."""
    array: Positions = positions.float().cpu().numpy()
    return array


def _row_major(model: Any, coordinates: Positions) -> tuple[int, ...]:
    """Sizes of the grid whose points have these coordinates `[N, A]`.

    Counts how long the outer axes stand still instead of reading the largest coordinate, because coordinates may come
    in bfloat16, which rounds integers above 256.
    """
    count, axes = coordinates.shape
    sizes: list[int] = []
    inner = 1
    for axis in reversed(range(axes)):
        moved = (coordinates[:, :axis] != coordinates[0, :axis]).any(1)
        run = int(moved.argmax()) or count  # argmax of all False is 0
        sizes.insert(0, run // inner)
        inner = run
    if math.prod(sizes) == count:
        points = coordinates.reshape(*sizes, axes)
        # [size, others]: one coordinate along its own axis
        lines = [np.moveaxis(points[..., axis], axis, 0).reshape(sizes[axis], -1) for axis in range(axes)]
        if all((line == line[:, :1]).all() and _rises(line[:, 0]) for line in lines):
            return tuple(sizes)
    raise AdapterError(
        f"expected the positions given to {type(model).__name__} to be a grid in row-major order, which they are not; "
        "use a method that does not split features by their place"
    )


def _rises(line: Positions) -> bool:
    """Whether coordinates `[N]` go up; rounding may make neighbours equal."""
    return len(line) == 1 or bool((np.diff(line) >= 0).all() and line[-1] > line[0])


def _from_latent(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """Latents `[B, C, H, W]` or `[B, C, T, H, W]`."""
    sizes = _argument(model, arguments, adapter.hidden).shape[2:]
    return TokenLayout(_divided(sizes, patch_size(model.config)))


def _from_frames(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """Latents `[B, T, C, H, W]`."""
    _, frames, _, height, width = _argument(model, arguments, adapter.hidden).shape
    return TokenLayout(_divided((frames, height, width), patch_size(model.config)))


def _from_last(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """Latents `[B, T, H, W, C]`."""
    if arguments.get("sparse_params"):
        raise AdapterError(
            f"{type(model).__name__} was called with sparse_params, which puts its tokens in another order; use a "
            "method that does not split features by their place"
        )
    _, *sizes, _ = _argument(model, arguments, adapter.hidden).shape
    return TokenLayout(_still(_divided(sizes, patch_size(model.config))))


def _from_history(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """Latents `[B, C, T, H, W]` after those of the clip so far, in coarser patches the older they are."""
    before = 0
    for name, patch in (("clean", (1, 2, 2)), ("history_2x", (2, 4, 4)), ("history_4x", (4, 8, 8))):
        latents = arguments.get(f"latents_{name}")
        if latents is not None and arguments.get(f"indices_latents_{name}") is not None:
            before += math.prod(-(-size // step) for size, step in zip(latents.shape[2:], patch, strict=True))
    return TokenLayout(_from_latent(model, adapter, arguments).grid, before)


def _from_ids(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """`img_ids` `[N, 3]`, `[N, 4]` or `[B, N, .]`: (image, row, column, ...); image 0 is the one that is made."""
    ids = _argument(model, arguments, "img_ids")
    ids = _on_host(ids[0] if ids.ndim == 3 else ids)
    own = np.flatnonzero(ids[:, 0] == 0)
    if not len(own) or int(own[-1] - own[0]) + 1 != len(own):
        raise AdapterError(
            f"expected img_ids of {type(model).__name__} that begin with 0 for the tokens of the image that is made, "
            f"which lie together, and with other numbers for reference images; {len(own)} of {len(ids)} begin with 0"
        )
    first = int(own[0])
    text = len(_argument(model, arguments, "encoder_hidden_states")[0]) if adapter.used(model)[-1].joint else 0
    return TokenLayout(_row_major(model, ids[first : first + len(own), 1:3]), text + first)


def _from_positions(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """`position_ids` `[N, 3]` or `[B, N, 3]`: (frame, row, column) of text tokens, then of the image's.

    The image's tokens are those that `indicator` says (2), or else as many as there are latents `[B, N, C]`.
    """
    positions = _argument(model, arguments, "position_ids")
    positions = _on_host(positions[0] if positions.ndim == 3 else positions)
    first = len(positions) - _argument(model, arguments, adapter.hidden).shape[1]
    if arguments.get("indicator") is not None:
        own = np.flatnonzero(_on_host(arguments["indicator"][0]) == 2)
        first = int(own[0]) if len(own) else len(positions)
    return TokenLayout(_row_major(model, positions[first:, 1:]), first)


def _from_shapes(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """`img_shapes`: for each image of the batch (T, H, W), or a list of such whose later ones are references."""
    shapes = _argument(model, arguments, "img_shapes")
    own = [tuple(shape[0] if isinstance(shape[0], (tuple, list)) else shape) for shape in shapes]
    _require_one_size(model, own)
    return TokenLayout(_still(own[0]))


def _from_sizes(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """`num_frames`, `height` and `width` in tokens, or `video_coords` `[B, 3, N]`, which go first.

    Frames that a clip is conditioned on come before it with coordinates of their own; the clip begins at the last token
    whose coordinates are all the smallest.
    """
    if arguments.get("video_coords") is None:
        return TokenLayout(tuple(int(_argument(model, arguments, n)) for n in ("num_frames", "height", "width")))
    own = arguments["video_coords"][0]
    coordinates = _on_host((own[..., 0] if own.ndim == 3 else own).T)  # LTX-2 gives where a patch begins and ends
    origins = np.flatnonzero((coordinates == coordinates.min(0)).all(1))
    first = int(origins[-1]) if len(origins) else 0
    return TokenLayout(_row_major(model, coordinates[first:]), first)


def _from_list(model: Any, adapter: ModelAdapter, arguments: Arguments) -> TokenLayout:
    """One latent `[C, T, H, W]` for each image; the patch sizes come with the call."""
    latents = _argument(model, arguments, adapter.hidden)
    if isinstance(latents[0], (list, tuple)):
        raise AdapterError(
            f"it is not known where the tokens of the image lie when {type(model).__name__} is given several latents "
            "for an image; use a method that does not split features by their place"
        )
    sizes = [tuple(latent.shape[1:]) for latent in latents]
    _require_one_size(model, sizes)
    patch = arguments.get("patch_size", 2)
    return TokenLayout(_still(_divided(sizes[0], (arguments.get("f_patch_size", 1), patch, patch))))


def _require_one_size(model: Any, sizes: Sequence[tuple[int, ...]]) -> None:
    if any(size != sizes[0] for size in sizes):
        raise AdapterError(
            f"expected images of one size in a batch of {type(model).__name__}, got {', '.join(map(str, sizes))}; "
            "draw them one after another, or use a method that does not split features by their place"
        )


_READERS: dict[LayoutKind, Callable[[Any, ModelAdapter, Arguments], TokenLayout]] = {
    "latent": _from_latent,
    "channels-last": _from_last,
    "frames": _from_frames,
    "history": _from_history,
    "ids": _from_ids,
    "positions": _from_positions,
    "shapes": _from_shapes,
    "sizes": _from_sizes,
    "list": _from_list,
}
