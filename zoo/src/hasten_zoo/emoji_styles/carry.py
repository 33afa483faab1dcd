"""Carry the images that are taught to a machine without npm or network, a GPU's perhaps, in one file of 22 MB.

    python -m hasten_zoo.emoji_styles.carry --pack taught.zip --data runs/emoji-styles/data
    python -m hasten_zoo.emoji_styles.carry --unpack taught.zip --data runs/emoji-styles/data     # over there

It has what training needs of `emoji-styles` and `emoji-styles-edit`: images of the concepts that are taught and of the
objects that edits add, as lossless WebP at 192 and 128 pixels; those of 64 are made of the latter, as in `data.py` but
rounded twice, so that a value can be off by one. All pairs are in the index, so that vocabularies stay as they are;
whoever asks for the image of another pair is refused.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from hasten.errors import ModelError
from hasten.io import write_atomically
from PIL import Image

from hasten_zoo.command import told
from hasten_zoo.emoji_styles.data import SIZES, boxed, load_emoji_styles_data
from hasten_zoo.emoji_styles_edit.data import item_rows

__all__ = ["pack", "unpack"]

PACKED = (192, 128)


def pack(data: Path, file: Path) -> int:
    """Write the images that are taught into one file; returns how many pairs they are of."""
    known = load_emoji_styles_data(data)
    taught = (i for i, pair in enumerate(known.pairs) if pair.taught)
    rows = sorted({*taught, *item_rows(known.pairs).values()})
    index = json.loads((data / "index.json").read_text()) | {"carried": rows}

    def fill(target: IO[bytes]) -> None:
        with zipfile.ZipFile(target, "w") as archive:  # WebP is compressed already
            for size in PACKED:
                for row in rows:
                    archive.writestr(_name(size, row), _encoded(known.images[size][row]))
            archive.writestr("index.json", json.dumps(index))

    write_atomically(file, fill)
    return len(rows)


def unpack(file: Path, data: Path) -> int:
    """Write a folder that `load_emoji_styles_data` opens; returns how many pairs it has images of.

    Raises:
        ModelError: if the file is none of `pack`'s, or the folder has all images.
    """
    if (data / "index.json").is_file() and "carried" not in json.loads((data / "index.json").read_text()):
        raise ModelError(
            f"{data} has the images of all pairs, which those of the file would replace; give another --data"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            index = json.loads(archive.read("index.json"))
            rows = index["carried"]
            images = {size: np.stack([_decoded(archive.read(_name(size, row))) for row in rows]) for size in PACKED}
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {file}; write it with --pack where the images are") from error
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ModelError(f"{file} is not a file that --pack wrote ({type(error).__name__}); pack it again") from error
    images[64] = np.stack([boxed(image.astype(np.float32), 64) for image in images[128]])
    data.mkdir(parents=True, exist_ok=True)
    (data / "index.json").unlink(missing_ok=True)  # comes last: arrays without an index are not whole
    for size in SIZES:
        write_atomically(data / f"images-{size}.npy", partial(np.save, arr=images[size]))
    write_atomically(data / "index.json", json.dumps(index) + "\n")
    return len(rows)


def _name(size: int, row: int) -> str:
    return f"{size}/{row}.webp"


def _encoded(image: npt.NDArray[np.uint8]) -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(target, "WEBP", lossless=True, exact=True, quality=60)
    return target.getvalue()


def _decoded(content: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))  # an opaque image comes back without alpha


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-styles/data"))
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--pack", type=Path, metavar="FILE", help="write the images of --data into a file")
    which.add_argument("--unpack", type=Path, metavar="FILE", help="write --data from a file")
    args = parser.parse_args(arguments)
    print(pack(args.data, args.pack) if args.pack else unpack(args.unpack, args.data), "images")


if __name__ == "__main__":
    told(main)
