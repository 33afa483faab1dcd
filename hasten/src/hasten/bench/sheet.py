"""Contact sheets: images side by side with captions, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hasten.bench.result import Result

__all__ = ["bench_sheet", "contact_sheet", "film_strip", "image_grid", "png_of", "to_pil"]

MARGIN, GAP = 12, 6
STRIP_FRAMES = 5  # of a clip, from the first to the last
SIDE, STRIP_SIDE = 128, 64  # height on a sheet of an image and of a strip of frames, pixels
INK, PAPER, FAINT = (32, 32, 36), (255, 255, 255), (120, 120, 128)


def to_pil(image: Tensor) -> Image.Image:
    """`[3, H, W]` in [0, 1] as an 8-bit image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def png_of(image: Tensor) -> bytes:
    """`[3, H, W]` in [0, 1] as a PNG file."""
    file = io.BytesIO()
    to_pil(image).save(file, format="png")
    return file.getvalue()


def image_grid(images: Tensor, columns: int) -> Image.Image:
    """`[B, 3, H, W]` in [0, 1] as one image, row by row, without captions."""
    count, _, height, width = images.shape
    grid = Image.new("RGB", (columns * width, -(-count // columns) * height), PAPER)
    for i, image in enumerate(images):
        grid.paste(to_pil(image), (i % columns * width, i // columns * height))
    return grid


def film_strip(clip: Tensor, frames: int = STRIP_FRAMES) -> Image.Image:
    """A few frames of a clip `[F, 3, H, W]` in [0, 1], evenly spread, in a row."""
    shown = torch.linspace(0, len(clip) - 1, min(frames, len(clip))).round().long()
    return image_grid(clip[shown], columns=len(shown))


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while font.getlength(text) > width and len(text) > 2:
        text = text[:-2] + "…"
    return text


def contact_sheet(
    rows: Sequence[Sequence[Path]], row_labels: Sequence[str], column_labels: Sequence[str], side: int = SIDE
) -> Image.Image:
    """A grid of images, one row per caption, one column per method; small images are enlarged without smoothing.

    Args:
        rows: image files, `len(row_labels)` rows of `len(column_labels)`; all of the shape of the first one.
        row_labels: written to the left.
        column_labels: written above; `|` breaks a line.
        side: height of an image on the sheet in pixels; a square is as wide.
    """
    font = ImageFont.load_default(size=13)
    with Image.open(rows[0][0]) as first:
        wide = round(side * first.width / first.height)
    left = MARGIN + max(int(font.getlength(label)) for label in row_labels) + GAP
    lines = max(label.count("|") + 1 for label in column_labels)
    top = MARGIN + 17 * lines + GAP
    size = (left + len(column_labels) * (wide + GAP) + MARGIN, top + len(rows) * (side + GAP) + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        x = left + column * (wide + GAP) + wide // 2
        for k, line in enumerate(label.split("|")):
            draw.text((x, MARGIN + 17 * k), _fit(line, font, wide), fill=FAINT if k else INK, font=font, anchor="mt")
    for y, (paths, label) in enumerate(zip(rows, row_labels, strict=True)):
        draw.text((left - GAP, top + y * (side + GAP) + side // 2), label, fill=INK, font=font, anchor="rm")
        for x, path in enumerate(paths):
            with Image.open(path) as image:
                scaled = image.convert("RGB").resize((wide, side), Image.Resampling.NEAREST)
            sheet.paste(scaled, (left + x * (wide + GAP), top + y * (side + GAP)))
    return sheet


def bench_sheet(result: Result, folder: Path, computed_steps: int, most: int = 8) -> Image.Image:
    """The contact sheet of a bench result at one number of computed steps: the baseline, then each row.

    Clips are shown as a few frames in a row.
    """
    rows = [row for row in result.groups()[computed_steps] if row.images]
    columns = [result.baseline.images, *(row.images for row in rows)]
    labels = [f"plain|{result.baseline.steps} steps"]
    for row in rows:
        quality = "" if row.psnr is None else f", {row.psnr:.1f} dB"
        labels.append(f"{row.name}|{row.budget} computed{quality}")
    prompts = result.settings.prompts[:most]
    images = [[folder / column[i] for column in columns] for i in range(len(prompts))]
    return contact_sheet(images, prompts, labels, SIDE if result.settings.frames is None else STRIP_SIDE)
