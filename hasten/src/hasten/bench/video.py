"""Write frames as a file that plays."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from hasten.errors import ConfigError
from hasten.io import write_atomically

__all__ = ["best_suffix", "check_video_path", "side_by_side", "write_video"]

SUFFIXES = (".mp4", ".webp", ".gif")
BAR, GAP = 28, 8  # pixels: height of the line with the names, distance between videos
FONT_SIZES = (14, 12, 10, 8)


def _has_ffmpeg() -> bool:
    try:
        import imageio_ffmpeg  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        return False
    return True


def best_suffix() -> str:
    """`".mp4"` if imageio-ffmpeg is installed, else `".webp"`, which every browser plays."""
    return ".mp4" if _has_ffmpeg() else ".webp"


def side_by_side(videos: Mapping[str, Tensor], enlarge: int = 6) -> Tensor:
    """Several videos as one, each under its name.

    Args:
        videos: `[F, 3, H, W]` in [0, 1] by name, all of one shape.
        enlarge: copies of each pixel along both axes.

    Returns:
        `[F, 3, BAR + enlarge H, ...]` in [0, 1].

    Raises:
        ConfigError: for none, or for different shapes.
    """
    shapes = {tuple(video.shape) for video in videos.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise ConfigError(f"expected videos [F, 3, H, W] of one shape, got {sorted(shapes)}")
    columns = []
    for name, video in videos.items():
        large = interpolate(video.detach().float().cpu().clamp(0, 1), scale_factor=enlarge, mode="nearest")
        frames, _, _, width = large.shape
        heading = Image.new("RGB", (width, BAR), "white")
        ImageDraw.Draw(heading).text((4, 6), name, "black", _fitting(name, width - 8))
        line = torch.from_numpy(np.asarray(heading).copy()).permute(2, 0, 1) / 255
        column = torch.cat([line.expand(frames, -1, -1, -1), large], 2)
        columns += [column, torch.ones(*column.shape[:3], GAP)]
    return torch.cat(columns[:-1], 3)


def _fitting(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font of a few in which a line is no wider than that; the smallest if none is."""
    fonts = [ImageFont.load_default(size=size) for size in FONT_SIZES]
    return next((font for font in fonts if font.getlength(text) <= width), fonts[-1])


def check_video_path(path: Path) -> None:
    """Find out whether a video can be written under such a name.

    Raises:
        ConfigError: for another ending, or mp4 without imageio-ffmpeg.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"expected a path that ends in {', '.join(SUFFIXES)}, got {path.name}")
    if path.suffix == ".mp4" and not _has_ffmpeg():
        raise ConfigError(
            "writing mp4 needs imageio-ffmpeg; pip install imageio-ffmpeg, or take a path that ends in .webp or .gif"
        )


def write_video(video: Tensor, path: str | Path, fps: int = 12, enlarge: int = 1) -> Path:
    """Write a video as mp4 (needs imageio-ffmpeg), webp (lossless) or gif, by the ending of the path.

    Args:
        video: `[F, 3, H, W]` in [0, 1].
        path: where to; folders are made.
        fps: frames per second.
        enlarge: copies of each pixel along both axes.

    Returns:
        The path.

    Raises:
        ConfigError: for another shape or ending, or mp4 without imageio-ffmpeg.
    """
    path = Path(path)
    if video.ndim != 4 or video.shape[1] != 3 or not len(video) or fps < 1 or enlarge < 1:
        raise ConfigError(
            f"expected a video [F, 3, H, W] with at least one frame and fps and enlarge of 1 or more, got "
            f"{list(video.shape)}, {fps} and {enlarge}"
        )
    check_video_path(path)
    large = interpolate(video.detach().float().cpu().clamp(0, 1), scale_factor=enlarge, mode="nearest")
    frames = (large * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    if path.suffix == ".mp4":
        _write_mp4([frame.tobytes() for frame in frames], (frames.shape[2], frames.shape[1]), path, fps)
        return path
    first, *others = [Image.fromarray(frame) for frame in frames]
    # "lossless" means something to webp only; gif passes it over.
    save = partial(first.save, format=path.suffix[1:], save_all=True, append_images=others, lossless=True)
    return write_atomically(path, lambda file: save(file, duration=round(1000 / fps), loop=0))


def _write_mp4(frames: list[bytes], size: tuple[int, int], path: Path, fps: int) -> None:
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as scratch:  # ffmpeg writes in place
        whole = Path(scratch) / "video.mp4"
        writer = imageio_ffmpeg.write_frames(str(whole), size, fps=fps, macro_block_size=2)
        writer.send(None)
        for frame in frames:
            writer.send(frame)
        writer.close()
        write_atomically(path, whole.read_bytes())
