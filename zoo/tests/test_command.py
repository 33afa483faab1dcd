"""What all commands have: options that are checked, one line for what cannot be done, and where figures are written."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from hasten.errors import ConfigError, HastenWarning, ModelError
from torch import nn

from hasten_zoo.command import add_options, run_with, told
from hasten_zoo.evaluation import add_folders, out_of
from hasten_zoo.record import POSITION
from hasten_zoo.training import Loss, Settings, Training


class Nearer:
    """One number that is drawn towards zero."""

    def __init__(self, net: nn.Linear) -> None:
        self.net = net

    def __call__(self, generator: torch.Generator) -> Loss:
        return Loss(self.net(torch.ones(1, 1)).square().mean(), 4, "all")


def options(folder: Path, *given: str, committed: Path = Path("none")) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, folder, 8, 4, committed)
    return parser.parse_args(given)


def trained(args: argparse.Namespace) -> int:
    net = nn.ModuleDict({"transformer": nn.Linear(1, 1)})
    training = Training(net, Nearer(net["transformer"]), Settings(lr=args.lr, bfloat16=False, muon=False), "cpu")
    run_with(args, training, {"transformer": net["transformer"]}, args.out, args.samples)
    return training.samples


def test_without_minutes_a_training_ends_by_itself_and_with_them_when_they_are_over(tmp_path: Path) -> None:
    assert trained(options(tmp_path)) == 8
    with pytest.warns(HastenWarning, match="8 samples have been seen already, and --samples is 8 in total: nothing is"):
        assert trained(options(tmp_path)) == 8
    assert trained(options(tmp_path, "--minutes", "0.01")) > 8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--minutes", "-5"), "--minutes: must be above 0, got -5"),
        (("--minutes", "nan"), "--minutes: must be above 0, got nan"),
        (("--batch", "0"), "--batch: must be at least 1, got 0"),
        (("--batch", "many"), "--batch: must be a number, got 'many'"),
        (("--samples", "0"), "--samples: must be at least 1, got 0"),
        (("--lr", "0"), "--lr: must be above 0, got 0"),
        (("--device", "nowhere"), "--device: nowhere cannot be used here"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit):
        options(tmp_path, *given)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_to_go_on_from_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights of a training in .*mistyped; give another --committed, or none"):
        trained(options(tmp_path / "run", "--committed", str(tmp_path / "mistyped")))
    assert not (tmp_path / "run").exists()
    (tmp_path / POSITION).write_text("{}")
    with pytest.raises(ModelError):  # it is read, where it is there
        trained(options(tmp_path / "run", committed=tmp_path))


@pytest.mark.parametrize("error", [ModelError("no images in x"), FileNotFoundError("no images in x")])
def test_what_cannot_be_done_is_one_line(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        told(main)
    assert caught.value.code == "error: no images in x"


def test_figures_of_other_weights_are_not_written_beside_the_card(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_folders(parser, tmp_path / "model" / "weights")
    assert out_of(parser.parse_args([])) == tmp_path / "model"
    assert out_of(parser.parse_args(["--weights", str(tmp_path), "--out", str(tmp_path / "x")])) == tmp_path / "x"
    with pytest.raises(ConfigError, match=r"the figures beside the card are of .*weights; give --out for those of"):
        out_of(parser.parse_args(["--weights", str(tmp_path)]))
