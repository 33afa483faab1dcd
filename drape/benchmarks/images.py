"""The images of drape/docs/drape.md.

python drape/benchmarks/images.py                     walks.jpg, a sheet of walks
python drape/benchmarks/images.py out/drape-bench     the others too, from bench.json and the folder of `drape bench`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from drape.controls import control, load_images
from drape.gamut import Gamut
from drape.io import write_atomically, write_text
from drape.plots import azimuth_svg, curve_svg
from drape.scene.scene import Scene
from drape.walks import TEST, Walk, scenes

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SIDE, COLUMNS, MARGIN = 208, 5, 26
SHOWN = (0, 1, 2, 3, 4, 5)  # of the held-out walks
ROWS = {"plain": "plain clothes", "sequence-0": "worst-case clothes"}


def strip(frames: torch.Tensor, boxes: list[list[float] | None], crop: tuple[int, int, int, int]) -> Image.Image:
    """Frames beside each other, cut to `crop`, with the detector's box where it sees a person."""
    image = Image.new("RGB", (SIDE * len(frames), SIDE))
    for column, (frame, box) in enumerate(zip(frames, boxes, strict=True)):
        pixels = np.round(frame.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        tile = Image.fromarray(pixels).crop(crop).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        if box is not None:
            scale = SIDE / (crop[2] - crop[0])
            corners = [(v - crop[i % 2]) * scale for i, v in enumerate(box)]
            ImageDraw.Draw(tile).rectangle(corners, outline=(40, 230, 90), width=2)
        image.paste(tile, (SIDE * column, 0))
    return image


def around(walk: Scene) -> tuple[int, int, int, int]:
    """The square that a person fills over the walk, with a margin."""
    low, high = walk.buffers.boxes[:, :2].amin(dim=0), walk.buffers.boxes[:, 2:].amax(dim=0)
    middle, half = (low + high) / 2, float((high - low).max()) / 2 + MARGIN
    x0, y0 = (int(v) for v in middle - half)
    return x0, y0, x0 + int(2 * half), y0 + int(2 * half)


def walks_sheet(walks: Sequence[Walk], clothes: dict[str, torch.Tensor], fps: float, size: int) -> Image.Image:
    """Five frames of each walk, one row per walk."""
    sheet = Image.new("RGB", (SIDE * COLUMNS, SIDE * len(walks)))
    for row, scene in enumerate(scenes(walks, fps, size)):
        chosen = np.linspace(0, scene.buffers.frames - 1, COLUMNS).round().astype(int).tolist()
        frames = scene.render(clothes, chosen)
        sheet.paste(strip(frames, [None] * COLUMNS, (0, 0, size, size)), (0, SIDE * row))
    return sheet


def main(work: Path | None) -> None:
    plain = control("plain", Gamut.proxy())
    shown = walks_sheet([TEST[number] for number in SHOWN], plain, 1.0, 416)
    write_atomically(IMAGES / "walks.jpg", lambda target: shown.save(target, quality=84))
    if work is not None:
        from_bench(work, plain)


def from_bench(work: Path, plain: dict[str, torch.Tensor]) -> None:
    """The first held-out walk with boxes, and the curves."""
    found = json.loads((ROOT / "benchmarks" / "bench.json").read_text(encoding="utf-8"))
    spec = found["about"]["spec"]
    walk = scenes(TEST[:1], spec["fps"], spec["size"])[0]
    crop = around(walk)
    textures = {
        "plain": plain,
        "sequence-0": load_images(work / "sequence-0.npz"),
    }
    chosen = np.linspace(0, walk.buffers.frames - 1, COLUMNS).round().astype(int).tolist()
    sheet = Image.new("RGB", (SIDE * COLUMNS, SIDE * len(ROWS)))
    for row, name in enumerate(ROWS):
        boxes = [found["video"][name][t] for t in chosen]
        sheet.paste(strip(walk.render(textures[name], chosen), boxes, crop), (0, SIDE * row))
    write_atomically(IMAGES / "walk.png", lambda target: sheet.save(target, optimize=True))

    lines = {title: found["results"][name]["curves"][walk.label] for name, title in ROWS.items()}
    for defence, title in {
        "consensus": "behind consensus",
        "hardened+aggregate": "behind fine-tuning, aggregated",
    }.items():
        lines[title] = found["defences"]["table"][defence]["curves"][walk.label]
    sides = {title: found["results"][name]["azimuth"] for name, title in ROWS.items()}
    for file, svg in {"curve.svg": curve_svg(lines), "azimuth.svg": azimuth_svg(sides)}.items():
        text = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
        write_text(IMAGES / file, text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
