"""What comes with the project: read only as it was written."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hasten.errors import ModelError
from hasten.io import check_sealed
from hasten.io.folder import LIST, write_sealed
from torch import nn

import hasten_zoo
from hasten_zoo import emoji_flux, emoji_styles, emoji_tokens, sprites_stream, sprites_wan
from hasten_zoo.emoji_styles.judge import read_judge
from hasten_zoo.emoji_tokens.features import FeatureNet
from hasten_zoo.emoji_tokens.tokenizer import VQTokenizer
from hasten_zoo.low_rank import DIFFERENCES
from hasten_zoo.reading import reading
from hasten_zoo.training import CHECKPOINT, Loss, Settings, Training, run

ROOT = Path(hasten_zoo.__file__).parent
SEALED = sorted(path.parent for path in ROOT.rglob(LIST))
CONTAINERS: dict[str, tuple[Path, Callable[[Path], object]]] = {
    "features": (emoji_tokens.WEIGHTS / "features.safetensors", FeatureNet.load),
    "tokenizer": (emoji_tokens.WEIGHTS / "tokenizer.safetensors", VQTokenizer.load),
    "stream": (
        ROOT / "sprites_stream" / "weights" / "model.safetensors",
        lambda p: sprites_stream.load_model(p.parent),
    ),
    "judge": (emoji_styles.HERE / "judge.safetensors", lambda path: read_judge(path.parent)),
}


@pytest.mark.parametrize("folder", SEALED, ids=lambda path: path.parent.name)
def test_the_bundled_weights_are_those_of_their_list(folder: Path) -> None:
    check_sealed(folder, ModelError, "")


def test_every_bundled_pipeline_has_a_list() -> None:
    assert {folder.parent.name for folder in SEALED} == {
        path.parents[2].name for path in ROOT.rglob("weights/transformer/config.json")
    } | {path.parents[1].name for path in ROOT.rglob(f"weights/{DIFFERENCES}")}


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _flipped(folder / "transformer" / "diffusion_pytorch_model.safetensors"),
        lambda folder: _flipped(folder / "scheduler" / "scheduler_config.json"),
        lambda folder: _flipped(folder / LIST),
        lambda folder: (folder / LIST).unlink(),
        lambda folder: (folder / "vae" / "config.json").unlink(),
        lambda folder: (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle"),
    ],
    ids=["weights", "scheduler", "list", "no list", "no file", "another file"],
)
def test_damaged_weights_are_refused_before_they_are_loaded(
    damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(emoji_flux.WEIGHTS, tmp_path / "weights")
    assert emoji_flux.load_emoji_flux(folder).pipe is not None
    damage(folder)
    for name in ("WordTokenizer", "FlowMatchEulerDiscreteScheduler", "PixelVAE", "FluxTransformer2DModel"):
        reader = f"hasten_zoo.emoji_flux.model.{name}.from_pretrained"
        monkeypatch.setattr(reader, lambda *given, **named: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match="Reinstall") as caught:
        emoji_flux.load_emoji_flux(folder)
    assert str(caught.value).isprintable()


MODELS = ("emoji_flux", "emoji_kontext", "emoji_styles", "fashion_dit", "sprites_wan")
FROM_STYLES = ("emoji_styles_edit", "emoji_styles_turbo")  # differences from emoji-styles


@pytest.mark.parametrize("module", [*MODELS, *FROM_STYLES])
def test_a_folder_that_is_not_there_is_named_wherever_models_are_read(module: str, tmp_path: Path) -> None:
    """Trainings and evaluations read pipelines, too, and not only what hands out models."""
    load = importlib.import_module(f"hasten_zoo.{module}.model").load_pipeline
    name, folder = module.replace("_", "-"), tmp_path / "nowhere"
    with pytest.raises(ModelError, match=rf"no {name} weights in {folder}; .* -m hasten_zoo.{module}.train --export$"):
        load(folder)
    (tmp_path / "settings.json").write_text("{}")  # as in a folder of a training
    with pytest.raises(ModelError, match=rf"no {name} weights in {tmp_path};"):
        load(tmp_path)
    if module in FROM_STYLES:
        with pytest.raises(ModelError, match=f"no {name} weights in {folder}"):
            load(folder, folder)  # its own are asked for first
        with pytest.raises(ModelError, match=f"no emoji-styles weights in {folder}"):
            load(ROOT / module / "weights", folder)


def _unnamed(folder: Path, out: Path) -> Path:
    """A copy of a folder whose list names no model."""
    return write_sealed(out, lambda to: shutil.copytree(folder, to, dirs_exist_ok=True, ignore=lambda *_: [LIST]))


@pytest.mark.parametrize("module", [*MODELS, *FROM_STYLES])
def test_weights_of_another_model_are_refused_in_a_line(module: str) -> None:
    """Pairs of the models have the same parts in the same shapes, and would draw nonsense with each other's weights."""
    load = importlib.import_module(f"hasten_zoo.{module}.model").load_pipeline
    name = module.replace("_", "-")
    for other in SEALED:
        if other.parent.name != module:
            with pytest.raises(
                ModelError, match=rf"no {name} weights in|holds '.*', not {name}; name a folder of {name}$"
            ) as caught:
                load(other)
            assert len(str(caught.value).splitlines()) == 1


def test_weights_that_tell_no_model_are_read_by_what_is_in_them(tmp_path: Path) -> None:
    assert emoji_flux.load_emoji_flux(_unnamed(emoji_flux.WEIGHTS, tmp_path / "own")).pipe is not None
    with pytest.raises(ModelError, match=r"the sprites-wan files in .* cannot be read") as caught:
        sprites_wan.load_sprites_wan(_unnamed(emoji_flux.WEIGHTS, tmp_path / "other"))
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_reader_says_of_files_itself_is_not_said_twice(tmp_path: Path) -> None:
    write_sealed(tmp_path, lambda to: (to / "part").write_text("x"))
    for error, said in (
        (ModelError("of another base"), r"^of another base$"),
        (TypeError("one\n two"), r"^the emoji-flux files in .* cannot be read \(one two\); reinstall"),
    ):
        with pytest.raises(ModelError, match=said), reading("emoji-flux", tmp_path, "part"):
            raise error


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_networks_are_refused(name: str, tmp_path: Path) -> None:
    source, load = CONTAINERS[name]
    path = Path(shutil.copy(source, tmp_path))
    load(path)
    content = path.read_bytes()
    for place in (0, 9, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ModelError, match=path.name):
            load(path)
    path.write_bytes(content[:-3])
    with pytest.raises(ModelError, match=path.name):
        load(path)


# --- training


def _training() -> Training:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)

    def loss(generator: torch.Generator) -> Loss:
        return Loss(net(torch.randn(4, 3, generator=generator)).square().mean(), 4, "all")

    return Training(net, loss, Settings(warmup_steps=2))


def test_a_checkpoint_of_the_release_before_is_gone_on_from(tmp_path: Path) -> None:
    """It was written with torch.save beside `checkpoint.pt.tmp`, and a log whose last line may be cut off."""
    training = _training()
    for _ in range(3):
        training.step()
    torch.save(training.state(), tmp_path / (CHECKPOINT + ".tmp"))
    os.replace(tmp_path / (CHECKPOINT + ".tmp"), tmp_path / CHECKPOINT)
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"st')
    for _ in range(3):
        training.step()
    again = _training()
    run(again, tmp_path, 24, log_every=3)
    assert again.steps == 6
    for name, value in training.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 2}'
    assert '"step": 6' in lines[1]
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, "log.jsonl"}


def test_all_weights_together_stay_small_enough_for_a_package() -> None:
    found = [path for path in ROOT.glob("*/weights/**/*.safetensors") if path.is_file()]
    assert len(found) > 15
    assert sum(path.stat().st_size for path in found) < 80 * 2**20
