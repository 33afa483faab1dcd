"""The images of drape/docs/drape.md, from drape/benchmarks/bench.json and the textures in the folder of `drape bench`.

python drape/benchmarks/images.py out/drape-bench
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from drape.controls import control, load_images
from drape.gamut import Gamut
from drape.io import write_atomically, write_text
from drape.plots import azimuth_svg, curve_svg
from drape.scene.cloth import ENGINES
from drape.walks import TEST, TRAIN, scenes

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SIDE, COLUMNS, MARGIN = 208, 5, 26
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


def cloth_sheet(textures: dict[str, torch.Tensor]) -> Image.Image:
    """The same frames of a walk with the garments of each engine, one row each."""
    sheet = Image.new("RGB", (SIDE * COLUMNS, SIDE * len(ENGINES)))
    for row, engine in enumerate(ENGINES):
        walk = scenes(TRAIN[:1], 16, 416, engine)[0]
        low, high = walk.buffers.boxes[:, :2].amin(dim=0), walk.buffers.boxes[:, 2:].amax(dim=0)
        (x0, y0), side = (int(v) for v in low), int((high - low).max())
        frames = walk.render(textures, list(range(1, 3 * COLUMNS, 3)))
        sheet.paste(strip(frames, [None] * COLUMNS, (x0, y0, x0 + side, y0 + side)), (0, SIDE * row))
    return sheet


def main(work: Path) -> None:
    found = json.loads((ROOT / "benchmarks" / "bench.json").read_text(encoding="utf-8"))
    spec = found["about"]["spec"]
    walk = scenes(TEST[:1], spec["frames"], spec["size"])[0]
    low, high = walk.buffers.boxes[:, :2].amin(dim=0), walk.buffers.boxes[:, 2:].amax(dim=0)
    middle, half = (low + high) / 2, float((high - low).max()) / 2 + MARGIN
    x0, y0 = (int(v) for v in middle - half)
    crop = (x0, y0, x0 + int(2 * half), y0 + int(2 * half))
    textures = {
        "plain": control("plain", Gamut.proxy()),
        "sequence-0": load_images(work / "sequence-0.npz"),
    }
    chosen = np.linspace(0, spec["frames"] - 1, COLUMNS).round().astype(int).tolist()
    sheet = Image.new("RGB", (SIDE * COLUMNS, SIDE * len(ROWS)))
    for row, name in enumerate(ROWS):
        boxes = [found["video"][name][t] for t in chosen]
        sheet.paste(strip(walk.render(textures[name], chosen), boxes, crop), (0, SIDE * row))
    write_atomically(IMAGES / "walk.png", lambda target: sheet.save(target, optimize=True))

    if importlib.util.find_spec("newton") is not None:  # an extra; the image stays as it is without
        cloth = cloth_sheet(textures["plain"])
        write_atomically(IMAGES / "cloth.png", lambda target: cloth.save(target, optimize=True))

    lines = {title: found["results"][name]["curves"][walk.label] for name, title in ROWS.items()}
    for defence, title in {
        "consensus": "behind consensus",
        "hardened+aggregate": "behind fine-tuning, aggregated",
    }.items():
        lines[title] = found["defences"][defence]["curves"][walk.label]
    sides = {title: found["results"][name]["azimuth"] for name, title in ROWS.items()}
    for file, svg in {"curve.svg": curve_svg(lines), "azimuth.svg": azimuth_svg(sides)}.items():
        text = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" ', 1)
        write_text(IMAGES / file, text + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python drape/benchmarks/images.py FOLDER, the --work folder of drape bench")
    main(Path(sys.argv[1]))
