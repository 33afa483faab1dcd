"""The images and captions that `emoji-flux` learns: 3-D emoji, re-shipped under their MIT licence.

The package carries a 64x64 copy of the images that the model was trained on (one lossless atlas,
`training_set.png`, and the captions beside it), so that anybody can retrain the model or measure how often it draws
the right thing without downloading anything. `python -m hasten_zoo.emoji_flux.data` makes that copy again from the
two published archives (`npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource@16.0.0`).

Shapes: images are `[N, 3, R, R]` float32 in [0, 1].
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hasten.io import write_atomically
from PIL import Image
from torch import Tensor

__all__ = ["EmojiSet", "load_emoji_set", "prepare"]

HERE = Path(__file__).parent
RESOLUTION = 64
COLUMNS = 16
SUBCATEGORIES = (
    "food-fruit",
    "food-vegetable",
    "food-prepared",
    "food-sweet",
    "drink",
    "animal-mammal",
    "animal-bird",
    "animal-marine",
    "animal-bug",
    "animal-reptile",
    "animal-amphibian",
    "plant-flower",
)


@dataclass(frozen=True)
class EmojiSet:
    """Captions and images of the training set.

    Attributes:
        captions: `N` lower-case names, such as `"red apple"`.
        images: `[N, 3, 64, 64]` float32 in [0, 1], on white.
    """

    captions: list[str]
    images: Tensor

    def at(self, resolution: int) -> Tensor:
        """The images at a resolution that divides 64, by exact box averaging: `[N, 3, R, R]`."""
        if resolution < 1 or RESOLUTION % resolution:
            raise ValueError(f"resolution must divide {RESOLUTION}, got {resolution}")
        return torch.nn.functional.avg_pool2d(self.images, RESOLUTION // resolution)


def load_emoji_set() -> EmojiSet:
    """Read the shipped copy of the training set."""
    captions = json.loads((HERE / "training_set.json").read_text())["captions"]
    atlas = np.asarray(Image.open(HERE / "training_set.png").convert("RGB"))
    tiles = torch.from_numpy(atlas.copy()).unfold(0, RESOLUTION, RESOLUTION).unfold(1, RESOLUTION, RESOLUTION)
    images = tiles.flatten(0, 1)[: len(captions)].float() / 255  # rows x columns -> N, already [N, 3, R, R]
    return EmojiSet(captions=captions, images=images)


def prepare(images_tgz: Path, names_tgz: Path, out: Path = HERE) -> int:
    """Build the shipped copy from the two npm archives; returns the number of images."""
    with tarfile.open(names_tgz) as archive:
        names_file = archive.extractfile("package/emoji.json")
        assert names_file is not None
        rows = json.load(names_file)
    rows = [row for row in rows if row["subcategory"] in SUBCATEGORIES]
    rows.sort(key=lambda row: row["sort_order"])
    captions, tiles = [], []
    with tarfile.open(images_tgz) as archive:
        members = {Path(name).stem: name for name in archive.getnames()}
        for row in rows:
            code = row["unified"].lower()
            member = members.get(code) or members.get(code.removesuffix("-fe0f"))
            caption = " ".join(row["name"].lower().replace("-", " ").replace(",", " ").split())
            if member is None or caption in captions:
                continue
            image_file = archive.extractfile(member)
            assert image_file is not None
            image = Image.open(io.BytesIO(image_file.read())).convert("RGBA")
            canvas = Image.new("RGBA", image.size, "white")
            canvas.alpha_composite(image)
            tiles.append(np.asarray(canvas.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)))
            captions.append(caption)
    n_rows = -(-len(tiles) // COLUMNS)
    atlas = np.full((n_rows * RESOLUTION, COLUMNS * RESOLUTION, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = divmod(i, COLUMNS)
        atlas[y * RESOLUTION : (y + 1) * RESOLUTION, x * RESOLUTION : (x + 1) * RESOLUTION] = tile
    write_atomically(out / "training_set.png", partial(Image.fromarray(atlas).save, format="png", optimize=True))
    source = "@lobehub/fluent-emoji-3d 1.1.0 (MIT, images by Microsoft), emoji-datasource 16.0.0 (MIT, names)"
    write_atomically(out / "training_set.json", json.dumps({"source": source, "captions": captions}, indent=1) + "\n")
    return len(captions)


if __name__ == "__main__":
    import sys

    print(prepare(Path(sys.argv[1]), Path(sys.argv[2])), "images")
