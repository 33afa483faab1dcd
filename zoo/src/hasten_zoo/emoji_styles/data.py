"""The images and captions of `emoji-styles`: seven icon sets that draw the same Unicode concepts.

    python -m hasten_zoo.emoji_styles.data --out runs/emoji-styles/data

fetches the published packages with the npm client, checks their digests, rasterises every image once and writes
`images-192.npy`, `images-128.npy`, `images-64.npy` and `index.json` (needs `npm`, and `pip install resvg-py==0.5.0`).
The images are not ours to re-ship in bulk and stay out of the repository.

A *concept* is a Unicode emoji without skin tones that the first four sets have; a *pair* is a style and a concept and
has one image. Of the pairs, a tenth is held out, at most one per concept, so that every style and every concept is
known to the model and only their combination is new.

The autoencoder and the judge know all of them. The transformer is *taught* animals, plants and food alone (`TAUGHT`):
the training that a few cores can do, spread over all 1,594 concepts, left most objects without a name.

Shapes: stored images are `[N, R, R, 4]` uint8, colour premultiplied by alpha.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hasten.errors import ModelError
from hasten.io import write_atomically
from PIL import Image
from torch import Tensor

from hasten_zoo.command import told

__all__ = [
    "PACKAGES",
    "EmojiStyles",
    "Package",
    "Pair",
    "boxed",
    "fetch",
    "held_out_pairs",
    "load_emoji_styles_data",
    "prepare",
]

RENDERED = 384  # pixels; a multiple of every stored size, so that those are exact box averages
SIZES = (192, 128, 64)
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
HELD_OUT_SHARE = 0.1
TAUGHT = ("Animals & Nature", "Food & Drink")  # categories; with a GPU there may be more


@dataclass(frozen=True)
class Package:
    """A published package; `integrity` is the registry's sha512 of the archive."""

    name: str
    version: str
    integrity: str
    licence: str


PACKAGES = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
    ),
    "twemoji": Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
    ),
    "openmoji": Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
    ),
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
    ),
    "emojione": Package(
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
    ),
}
CODED = ("noto", "flat", "twemoji", "openmoji")  # these carry code points and define the concepts
NAMED = ("emojione", "fxemoji")  # these are matched by name, as far as names agree

# Images with letters, digits or a direction in their name must not be mirrored.
DIRECTED_CATEGORIES = {"Symbols", "Flags"}
# fmt: off
DIRECTED_WORDS = {
    "arrow", "left", "right", "leftwards", "rightwards", "button", "clock", "oclock", "thirty", "watch", "calendar",
    "keyboard", "newspaper", "page", "keycap", "letter", "banknote", "chart", "date", "atm", "sign", "input",
    "facing", "label", "ticket", "tickets", "tilted", "bank", "1st", "2nd", "3rd", "back", "end", "soon", "top",
    "100", "hundred", "receipt", "e", "mail", "package", "dvd", "abacus", "ok", "musical", "score", "notes", "flag",
    "mahjong", "playing", "cards", "joker", "ruler", "alarm", "mantelpiece", "timer", "pool", "ball", "book", "books",
    "notebook", "ledger", "stop", "hotel", "hospital", "convenience", "store", "school",
}
# fmt: on


@dataclass(frozen=True)
class Pair:
    """One image: its style, its concept (a lower-case name), and whether it may be mirrored or is held out."""

    style: str
    concept: str
    category: str
    mirror: bool
    held_out: bool

    @property
    def taught(self) -> bool:
        """Whether the concept is among those that the transformer is taught."""
        return self.category in TAUGHT


class Carried:
    """The images of some of `N` pairs, asked for by the numbers that they have among all (see `carry.py`)."""

    def __init__(self, values: npt.NDArray[np.uint8], rows: Sequence[int], pairs: int) -> None:
        self.values, self.place = values, np.full(pairs, -1)
        self.place[list(rows)] = np.arange(len(rows))

    def __getitem__(self, rows: Any) -> npt.NDArray[np.uint8]:
        places = self.place[rows]
        if (places < 0).any():
            raise ModelError(
                f"{int((places < 0).sum())} of the images asked for were not carried to this machine; use the folder "
                "that python -m hasten_zoo.emoji_styles.data writes"
            )
        found: npt.NDArray[np.uint8] = self.values[places]
        return found


@dataclass(frozen=True)
class EmojiStyles:
    """All pairs and their images.

    Attributes:
        pairs: `N` records in the order of the images.
        images: by size, `[N, R, R, 4]` uint8 premultiplied, usually memory-mapped; some may have been left behind.
    """

    pairs: list[Pair]
    images: Mapping[int, npt.NDArray[np.uint8] | Carried]

    @property
    def concepts(self) -> list[str]:
        """Each concept once, sorted."""
        return sorted({pair.concept for pair in self.pairs})

    def rows(self, held_out: bool) -> Tensor:
        """`[n]` indices of the pairs that are held out, or of those to train on."""
        return torch.tensor([i for i, pair in enumerate(self.pairs) if pair.held_out == held_out])

    def taught(self, held_out: bool) -> Tensor:
        """`[n]` those of these rows whose concept the transformer is taught."""
        rows = self.rows(held_out)
        return rows[torch.tensor([self.pairs[i].taught for i in rows.tolist()])]


def held_out_pairs(pairs: list[tuple[str, str]], share: float = HELD_OUT_SHARE) -> set[tuple[str, str]]:
    """The held-out ones among (style, concept) pairs: a share of them, at most one per concept, the same every time."""

    def rank(*words: str) -> str:
        return hashlib.sha256("/".join(words).encode()).hexdigest()

    styles: dict[str, list[str]] = {}
    for style, concept in pairs:
        styles.setdefault(concept, []).append(style)
    choices = [(min(known, key=lambda s: rank(s, concept)), concept) for concept, known in styles.items()]
    choices = [(style, concept) for style, concept in choices if len(styles[concept]) > 1]
    choices.sort(key=lambda pair: rank("held out", *pair))
    return set(choices[: round(share * len(pairs))])


def load_emoji_styles_data(folder: Path) -> EmojiStyles:
    """Open what `prepare` wrote.

    Raises:
        FileNotFoundError: if the folder has no prepared images.
    """
    if not (folder / "index.json").is_file():
        raise FileNotFoundError(f"no images in {folder}; run python -m hasten_zoo.emoji_styles.data --out {folder}")
    index = json.loads((folder / "index.json").read_text())
    pairs = [Pair(**row) for row in index["pairs"]]
    images = {size: np.load(folder / f"images-{size}.npy", mmap_mode="r") for size in SIZES}
    if "carried" in index:
        return EmojiStyles(pairs, {size: Carried(x, index["carried"], len(pairs)) for size, x in images.items()})
    return EmojiStyles(pairs, images)


@dataclass(frozen=True)
class PackedPairs:
    """What there is to know about pairs without their images, compactly; goes with the weights.

    Attributes:
        concepts: name, category and whether it may be mirrored.
        styles: for each, the numbers of the concepts that are `"seen"` in training and of those that are `"held_out"`.
    """

    concepts: list[tuple[str, str, bool]]
    styles: dict[str, dict[str, list[int]]]

    def __post_init__(self) -> None:
        numbers = [i for known in self.styles.values() for part in known.values() for i in part]
        if not numbers or min(numbers) < 0 or max(numbers) >= len(self.concepts):
            raise ValueError(f"a pair is of none of the {len(self.concepts)} concepts")
        if any(set(known) != {"seen", "held_out"} for known in self.styles.values()):
            raise ValueError("a style has not two lists, seen and held_out")

    def unpacked(self) -> list[Pair]:
        """The pairs, style by style."""
        return [
            Pair(style, *self.concepts[i], held_out=kind == "held_out")
            for style, known in self.styles.items()
            for kind, numbers in known.items()
            for i in numbers
        ]


def packed(pairs: list[Pair]) -> PackedPairs:
    """Pairs without their images; their order becomes that of styles."""
    concepts = {pair.concept: (pair.category, pair.mirror) for pair in pairs}
    numbers = {concept: i for i, concept in enumerate(concepts)}
    styles: dict[str, dict[str, list[int]]] = {}
    for pair in pairs:
        known = styles.setdefault(pair.style, {"seen": [], "held_out": []})
        known["held_out" if pair.held_out else "seen"].append(numbers[pair.concept])
    rows = [(concept, *rest) for concept, rest in concepts.items()]
    return PackedPairs(rows, styles)


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive, downloaded unless it is there already, and checked against its digest.

    Raises:
        ValueError: if the archive is not the expected one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
    if not archive.exists():
        command = ["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}", "--silent"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != package.integrity:
        raise ValueError(f"{archive.name} has digest {digest}, expected {package.integrity}; delete it and try again")
    return archive


def _json(archive: Path, name: str) -> Any:
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{name}")
        assert file is not None
        return json.load(file)


def _code(text: str) -> str:
    """A code point sequence without the variation selector, which the sets use differently."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def _codes(archive: Path) -> dict[str, str]:
    """Icon name by code, skin tones left out."""
    rows: dict[str, str] = _json(archive, "chars.json")
    return {_code(code): name for code, name in rows.items() if not SKIN_TONES & set(code.split("-"))}


def _svg(icons: dict[str, Any], name: str) -> str:
    """The icon as a square SVG document; icons that are not square are centred."""
    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f'width="{RENDERED}" height="{RENDERED}" viewBox="0 0 {width} {height}"'
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {links} {box}>{icon['body']}</svg>"


def _premultiplied(image: Image.Image) -> npt.NDArray[np.float32]:
    """`[384, 384, 4]` float32 in 0..255, colour premultiplied by alpha."""
    square = image.convert("RGBA").convert("RGBa")
    if square.size != (RENDERED, RENDERED):
        square = square.resize((RENDERED, RENDERED), Image.Resampling.LANCZOS)
    return np.asarray(square, dtype=np.float32)


def boxed(image: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.uint8]:
    """Exact box average of `[R, R, 4]`, R a multiple of the size, to `[size, size, 4]`."""
    k = len(image) // size
    mean = image.reshape(size, k, size, k, 4).mean((1, 3))
    return np.round(mean).astype(np.uint8)


def _mirrors(concept: str, category: str) -> bool:
    return category not in DIRECTED_CATEGORIES and not DIRECTED_WORDS & set(concept.split())


def prepare(out: Path, packages: Path) -> int:
    """Fetch, rasterise and write everything; returns the number of images."""
    import resvg_py  # needed for this command alone

    archives = {style: fetch(package, packages) for style, package in PACKAGES.items()}
    codes = {style: _codes(archives[style]) for style in CODED}
    common = sorted(set.intersection(*(set(known) for known in codes.values())))
    icons = {style: _json(archives[style], "icons.json") for style in (*CODED, *NAMED)}
    metadata = _json(archives["noto"], "metadata.json")
    categories = {name: category for category, names in metadata["categories"].items() for name in names}
    fx = {name.replace("-", ""): name for name in icons["fxemoji"]["icons"]}
    with tarfile.open(archives["3d"]) as tar:
        solid = {_code(Path(m.name).stem): m for m in tar.getmembers() if m.name.endswith(".webp")}
        wanted: list[tuple[str, str, str]] = []  # style, code, name of the icon in its set
        for code in common:
            name = codes["noto"][code]
            wanted += [(style, code, codes[style][code]) for style in CODED]
            if code in solid:
                wanted.append(("3d", code, solid[code].name))
            if name in icons["emojione"]["icons"] or name in icons["emojione"].get("aliases", {}):
                wanted.append(("emojione", code, name))
            if name.replace("-", "") in fx:
                wanted.append(("fxemoji", code, fx[name.replace("-", "")]))
        names = {code: codes["noto"][code] for code in common}
        keys = [(style, names[code].replace("-", " ")) for style, code, _ in wanted]
        held_out = held_out_pairs(keys)
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.json").unlink(missing_ok=True)  # comes last again: arrays without an index are not whole
        stores = {
            size: np.lib.format.open_memmap(
                out / f"images-{size}.npy", mode="w+", dtype=np.uint8, shape=(len(wanted), size, size, 4)
            )
            for size in SIZES
        }
        pairs = []
        for i, ((style, code, icon), (_, concept)) in enumerate(zip(wanted, keys, strict=True)):
            if style == "3d":
                file = tar.extractfile(icon)
                assert file is not None
                drawn = file.read()
            else:
                drawn = resvg_py.svg_to_bytes(svg_string=_svg(icons[style], icon), skip_system_fonts=True)
            image = _premultiplied(Image.open(io.BytesIO(drawn)))
            for size, store in stores.items():
                store[i] = boxed(image, size)
            category = categories[names[code]]
            pair = Pair(style, concept, category, _mirrors(concept, category), (style, concept) in held_out)
            pairs.append(asdict(pair))
    sources = {style: f"{p.name} {p.version} ({p.licence})" for style, p in PACKAGES.items()}
    write_atomically(out / "index.json", json.dumps({"sources": sources, "pairs": pairs}) + "\n")
    return len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-styles/data"))
    parser.add_argument("--packages", type=Path, help="where archives are kept; default: packages, beside --out")
    args = parser.parse_args()
    print(prepare(args.out, args.packages or args.out.parent / "packages"), "images")


if __name__ == "__main__":
    told(main)
