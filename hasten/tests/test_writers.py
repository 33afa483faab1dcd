"""A contract: whatever writes a file goes through the one writer of `io` (or `drape.io`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("hasten/src", "hasten/mutants", "zoo/src", "drape/src", "benchmarks", "drape/benchmarks")
WRITERS = ("hasten/src/hasten/io/", "drape/src/drape/io.py")
HANDLES = {"file", "stream", "buffer", "target"}  # what the one writer hands out, or memory
FUNCTIONS = {
    "torch.save", "np.save", "np.savez", "np.savez_compressed", "json.dump", "pickle.dump", "save_file",
    "np.lib.format.open_memmap", "os.replace", "os.rename", "shutil.copy", "shutil.copyfile", "shutil.move",
}  # fmt: skip
METHODS = {"write_text", "write_bytes", "savefig", "save_pretrained", "to_csv", "tofile"}
# What writes otherwise, and why that is right.
EXCEPTIONS = {
    "hasten/mutants/run.py: write_text": "changes a scratch copy of the source, which is thrown away",
    "hasten/src/hasten/tokens/export.py: save_pretrained": "fills the scratch folder of write_files",
    "hasten/src/hasten/tokens/export.py: save_file": "fills the scratch folder of write_files",
    "hasten/src/hasten/cli/boundary.py: open": "a traceback, in a new file of the system's temporary folder",
    "drape/src/drape/cli.py: open": "a traceback, in a new file of the system's temporary folder",
    "drape/src/drape/detectors/fetch.py: write_bytes": "into the temporary file of drape's writer",
    "zoo/src/hasten_zoo/fit.py: save_pretrained": "fills the scratch folder of write_sealed",
    "zoo/src/hasten_zoo/low_rank.py: save_pretrained": "fills the scratch folder of write_sealed",
    "zoo/src/hasten_zoo/training.py: save_pretrained": "fills the scratch folder of write_sealed",
    "zoo/src/hasten_zoo/emoji_flux/train.py: save_pretrained": "fills the scratch folder of write_sealed",
    "zoo/src/hasten_zoo/emoji_styles/train_vae.py: save_pretrained": "fills the scratch folder of write_sealed",
    "zoo/src/hasten_zoo/sprites_wan/train_vae.py: save_pretrained": "fills the scratch folder of write_sealed",
    "zoo/src/hasten_zoo/fashion_dit/data.py: write_bytes": "published files, unpacked into a temporary folder",
    "zoo/src/hasten_zoo/emoji_styles/data.py: np.lib.format.open_memmap": "gigabytes; the index comes last",
    "benchmarks/killed.py: open": "what a command says, in a temporary folder",
    "benchmarks/pictures.py: save": "tiles of a sheet, in a temporary folder",
}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _mode(call: ast.Call, place: int) -> str:
    given = [*call.args[place : place + 1], *(k.value for k in call.keywords if k.arg == "mode")]
    return str(given[0].value) if given and isinstance(given[0], ast.Constant) else "r"


def _first(call: ast.Call) -> str:
    return _name(call.args[0]) if call.args else ""


def writes(source: str) -> Iterator[str]:
    """What in a module writes to a path on its own."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = _name(call.func)
        last = call.func.attr if isinstance(call.func, ast.Attribute) else name
        opens = last in ("open", "NamedTemporaryFile") and name not in ("Image.open", "os.open", "tarfile.open")
        if opens and set(_mode(call, name == "open")) & set("wax+"):
            yield "open"
        elif name in FUNCTIONS and _first(call) not in HANDLES:
            yield name
        elif isinstance(call.func, ast.Attribute) and last in METHODS and _first(call) not in HANDLES:
            yield last
        elif last == "save" and any(k.arg in ("format", "optimize", "quality") for k in call.keywords):
            if _first(call) not in HANDLES:
                yield last
        elif last == "save" and isinstance(call.func, ast.Attribute) and _is_image(call.func.value):
            yield last


def _is_image(node: ast.expr) -> bool:
    """Whether a value is an image of Pillow, as far as the names tell."""
    name = _name(node.func) if isinstance(node, ast.Call) else _name(node)
    return name in ("to_pil", "film_strip", "image_grid", "sheet", "Image.fromarray", "image")


def test_whatever_writes_goes_through_the_one_writer() -> None:
    found = set()
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if not file.startswith(WRITERS):
                found |= {f"{file}: {what}" for what in writes(path.read_text(encoding="utf-8"))}
    assert found - EXCEPTIONS.keys() == set(), "use write_atomically of hasten.io or drape.io"
    assert EXCEPTIONS.keys() - found == set(), "exceptions that are none any more"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("open(path, 'w')", "open"),
        ("open(path, mode='ab')", "open"),
        ("path.open('wb')", "open"),
        ("path.open(mode='a')", "open"),
        ("open(path)", None),
        ("path.open('rb')", None),
        ("path.write_text(text)", "write_text"),
        ("torch.save(state, path)", "torch.save"),
        ("partial(torch.save, state)", None),
        ("write_atomically(path, lambda file: np.save(file, array))", None),
        ("np.save(path, array)", "np.save"),
        ("image.save(path)", "save"),
        ("sheet.save(path, optimize=True)", "save"),
        ("write_atomically(path, lambda file: image.save(file, format='png'))", None),
        ("calibration.save(path)", None),
        ("figure.savefig(path)", "savefig"),
        ("pipe.save_pretrained(folder)", "save_pretrained"),
    ],
)
def test_the_contract_sees_what_writes(line: str, what: str | None) -> None:
    assert list(writes(line)) == ([] if what is None else [what])
