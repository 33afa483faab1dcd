"""The images of `fashion-dit`: Fashion-MNIST, 60,000 to learn from and 10,000 to be judged by.

    python -m hasten_zoo.fashion_dit.data --out runs/fashion-dit/data

takes the four published files from `--source` (a folder), from the Debian package `dataset-fashion-mnist` if it is
installed, or else from that package's archive, which `apt-get download` fetches. The digest of each file is checked.
The images (MIT, Zalando SE) stay out of the repository.

Shapes: `[N, 1, 32, 32]` uint8, the published 28x28 pixels with two black pixels around them; labels `[N]` in 0..9.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hasten.io import write_atomically
from torch import Tensor
from torch.nn import functional as F

from hasten_zoo.command import told

__all__ = ["FashionData", "load_fashion_data", "prepare", "scaled"]

PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FILES = {  # sha256 of the published files
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
PREPARED = "fashion.npz"
SIDE, PUBLISHED = 32, 28


@dataclass(frozen=True)
class FashionData:
    """Images `[N, 1, 32, 32]` uint8 and labels `[N]` int64, to learn from (`train`) and held out (`test`)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def scaled(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def load_fashion_data(folder: Path) -> FashionData:
    """Open what `prepare` wrote.

    Raises:
        FileNotFoundError: if the folder has no prepared images.
    """
    file = folder / PREPARED
    if not file.is_file():
        raise FileNotFoundError(f"no images in {folder}; run python -m hasten_zoo.fashion_dit.data --out {folder}")
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    return FashionData(arrays["train"], arrays["train_labels"].long(), arrays["test"], arrays["test_labels"].long())


def prepare(source: Path, out: Path) -> None:
    """Check the four published files in a folder and write them as one.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not the published one.
    """
    raw = {name: _checked(source / name) for name in FILES}
    arrays: dict[str, Any] = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        pixels = np.frombuffer(raw[f"{prefix}-images-idx3-ubyte.gz"], np.uint8, offset=16).copy()
        images = torch.from_numpy(pixels).view(-1, 1, PUBLISHED, PUBLISHED)
        arrays[part] = F.pad(images, [(SIDE - PUBLISHED) // 2] * 4).numpy()
        arrays[f"{part}_labels"] = np.frombuffer(raw[f"{prefix}-labels-idx1-ubyte.gz"], np.uint8, offset=8)
    write_atomically(out / PREPARED, partial(np.savez_compressed, allow_pickle=False, **arrays))


def _checked(file: Path) -> bytes:
    """The content of a published file, whose digest is checked."""
    packed = file.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != FILES[file.name]:
        raise ValueError(f"{file} has sha256 {digest}, expected {FILES[file.name]}; it is not the published file")
    return gzip.decompress(packed)


@contextmanager
def _published(source: Path | None) -> Iterator[Path]:
    """A folder with the published files."""
    if source is not None or INSTALLED.is_dir():
        yield source or INSTALLED
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob(f"{PACKAGE}_*.deb")
        unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with (
            subprocess.Popen(unpack, stdout=subprocess.PIPE) as out,
            tarfile.open(fileobj=out.stdout, mode="r|") as tar,
        ):
            for member in tar:
                name = Path(member.name).name
                content = tar.extractfile(member) if name in FILES else None
                if content is not None:
                    (Path(folder) / name).write_bytes(content.read())
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion-dit/data"))
    parser.add_argument("--source", type=Path, help="a folder with the four published .gz files")
    args = parser.parse_args()
    with _published(args.source) as source:
        prepare(source, args.out)


if __name__ == "__main__":
    told(main)
