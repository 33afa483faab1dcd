"""Every number that a command takes, as a value that cannot work: one line that names it, before any work."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import typer
from test_bench import command

from hasten.cli.main import app

VALUES = ("nan", "inf", "-1", "1" + 40 * "0")
LISTS = {"computed_steps", "guidances", "guidance", "k", "classes"}  # options whose text may hold several numbers
NEEDED = {
    "certify": ("--min-psnr", "30"),
    "tune": ("--guidance", "3", "--min-psnr", "30"),
    "generate": ("--prompts-file", "prompts.txt", "--out", "pictures"),
    "report": ("nowhere.json",),
    "tokens fit": ("codes.npy",),
    "tokens inspect": ("tree",),
    "tokens map": ("tree", "--k", "4"),
    "tokens convert": ("model", "--map", "map"),
    "tokens train": ("fine", "--map", "map"),
    "tokens refine": ("fine", "--model", "model"),
    "tokens sample": ("model", "--classes", "0", "--length", "4"),
    "comfyui install": ("folder",),
}
LOADERS = (
    "bench.subject.open_model",
    "bench.subject.load_streaming",
    "tokens.reading.read_codebook",
    "tokens.tree.SemanticTree.load",
    "tokens.shards.TokenShards.open",
    "tokens.export.open_model",
    "tokens.mapping.TokenMap.load",
)


def commands(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Callable[..., Any]]]:
    """All commands with their functions."""
    for one in group.registered_commands:
        name = one.name or one.callback.__name__.rstrip("_")
        yield " ".join((*path, name)), one.callback
    for inner in group.registered_groups:
        yield from commands(inner.typer_instance, (*path, inner.name))


def numeric(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return numeric(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return any(numeric(member) for member in get_args(hint))
    return hint in (int, float)


def options() -> Iterator[tuple[str, str]]:
    """Commands and their options that take numbers."""
    for name, function in commands(app):
        hints = get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            hint = hints[parameter.name]
            if not numeric(hint) and not (parameter.name in LISTS and get_origin(hint) is Annotated):
                continue
            (info,) = (extra for extra in get_args(hint)[1:] if isinstance(extra, typer.models.ParameterInfo))
            given = [option for option in info.param_decls or () if option.startswith("--")]
            yield name, (given or ["--" + parameter.name.replace("_", "-")])[0]


OPTIONS = sorted(set(options()))


def test_there_are_options_of_every_command_that_takes_numbers() -> None:
    found = {name for name, _ in OPTIONS}
    assert {"bench", "calibrate", "tune", "certify", "generate", "demo", "tokens train", "tokens sample"} <= found
    assert len(OPTIONS) > 60


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "prompts.txt").write_text("red apple\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)

    def worked(*_: Any, **__: Any) -> None:
        pytest.fail("something was loaded or read")

    for loader in LOADERS:
        monkeypatch.setattr(f"hasten.{loader}", worked)
    return tmp_path


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=map(" ".join, OPTIONS))
def test_numbers_that_cannot_work_are_one_line_before_any_work(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, option: str
) -> None:
    before = set(nowhere.rglob("*"))
    for value in VALUES:
        code, out, error = command(monkeypatch, capsys, *name.split(), *NEEDED.get(name, ()), f"{option}={value}")
        said = f"{option}={value}: {error}"
        assert (code, out) == (2, ""), said
        assert error.startswith("error: "), said
        assert len(error.strip().splitlines()) == 1, said
        assert option.lstrip("-") in error.replace("_", "-"), said
    assert set(nowhere.rglob("*")) == before


@pytest.mark.parametrize(
    "line",
    [
        "tokens fit codes.npy --out codes.npy",
        "tokens map tree.safetensors --k 2 --out tree.safetensors",
        "generate --model emoji-flux --prompts-file 00000.json --out .",
        "bench --prompts-file 00000.json --prompts 1 --json 00000.json",
        "certify --min-psnr 30 --prompts-file 00000.json --out 00000.json",
    ],
)
def test_no_command_replaces_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("codes.npy", np.eye(4))
    (tmp_path / "tree.safetensors").write_text("a tree")
    (tmp_path / "00000.json").write_text("red apple\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, error = command(monkeypatch, capsys, *line.split())
    assert (code, error.count("\n")) == (2, 1), error
    assert "would be replaced" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
