"""The record of a training: hours and curve over interruptions, small enough to be kept, and the terms of a run."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import pytest
import torch
from hasten.errors import HastenWarning, ModelError
from torch import nn

from hasten_zoo.record import CURVE, LOG, POSITION, export_record, read_log, start_of, thinned
from hasten_zoo.training import CHECKPOINT, Loss, Settings, Training, read_checkpoint, run


def _training(lr: float = 1e-2, **terms: float) -> Training:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)

    def loss(generator: torch.Generator) -> Loss:
        time.sleep(0.002)
        return Loss(net(torch.randn(4, 3, generator=generator)).square().mean(), 4, "all")

    return Training(net, loss, Settings(lr=lr, warmup_steps=1), terms=terms)


def _lines(path: Path, *rows: dict[str, float]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hours_are_of_all_parts(tmp_path: Path) -> None:
    begun = time.monotonic()
    run(_training(), tmp_path, samples=80, log_every=5)
    run(_training(), tmp_path, samples=160, log_every=5)
    spent = (time.monotonic() - begun) / 3600
    export_record(tmp_path / "weights", read_checkpoint(tmp_path), tmp_path / LOG)
    record = json.loads((tmp_path / "weights" / POSITION).read_text())
    assert (record["steps"], record["samples"]) == (40, 160)
    rows = read_log(tmp_path / LOG)
    assert [row["samples"] for row in rows] == list(range(20, 180, 20))
    assert [row["hours"] for row in rows] == sorted(row["hours"] for row in rows)
    seconds, timed_from = read_checkpoint(tmp_path)["time"]
    assert 40 * 0.002 <= seconds <= 3600 * spent
    assert timed_from == 0


def test_rows_after_the_checkpoint_that_a_run_went_on_from_do_not_count(tmp_path: Path) -> None:
    steps = [(5, 0.1), (10, 0.2), (15, 0.3), (10, 0.25), (15, 0.35)]  # killed after 15 steps, gone on from 5
    log = _lines(tmp_path / LOG, *({"step": s, "samples": 4 * s, "hours": h} for s, h in steps))
    log.write_text(log.read_text() + '{"step": 20, "sam')
    assert [(row["step"], row["hours"]) for row in read_log(log)] == [(5, 0.1), (10, 0.25), (15, 0.35)]


def test_the_hours_of_a_release_before_are_those_of_its_log(tmp_path: Path) -> None:
    run(_training(), tmp_path, samples=8)
    state = {k: v for k, v in read_checkpoint(tmp_path).items() if k not in ("time", "terms", "ends_from")}
    torch.save(state, tmp_path / CHECKPOINT)
    seconds = [1800, 3600, 900, 1800]  # two parts: an hour, and half of one
    _lines(tmp_path / LOG, *({"step": i, "samples": i, "seconds": s} for i, s in enumerate(seconds)))
    export_record(tmp_path / "before", state, tmp_path / LOG)
    assert json.loads((tmp_path / "before" / POSITION).read_text())["hours"] == 1.5
    training = _training()
    run(training, tmp_path, samples=16)
    assert 5400 < training.seconds < 5500


def test_a_curve_is_short_and_means_what_the_log_means(tmp_path: Path) -> None:
    rows = [
        {"step": 50 * i, "samples": 3200 * i, "hours": i / 10, "loss/128": 1 / i, "samples_per_second": 44.1}
        | ({"loss/64": 2 / i} if i % 3 == 0 else {})
        for i in range(1, 2001)
    ]
    curve = thinned(rows)
    assert len(curve) == 100
    assert curve[0]["loss/128"] == pytest.approx(sum(1 / i for i in range(1, 21)) / 20, abs=1e-5)
    assert curve[0]["loss/64"] == pytest.approx(sum(2 / i for i in range(3, 21, 3)) / 6, abs=1e-5)
    assert (curve[0]["samples"], curve[-1]["samples"]) == (3200 * 20, 3200 * 2000)
    few = thinned(rows[:7])
    assert few == [pytest.approx({k: row[k] for k in row if k != "samples_per_second"}, abs=1e-5) for row in rows[:7]]
    log = _lines(tmp_path / LOG, *rows)
    export_record(tmp_path, {"position": [100_000, 6_400_000, 0]}, log)
    assert (tmp_path / CURVE).stat().st_size <= 20_000


def test_a_run_from_exported_weights_takes_up_their_record(tmp_path: Path) -> None:
    run(_training(), tmp_path / "one", samples=80, log_every=5)
    state = read_checkpoint(tmp_path / "one")
    export_record(tmp_path / "weights", state | {"time": [7200.0, 8]}, tmp_path / "one" / LOG)
    training = _training()
    run(training, tmp_path / "two", 120, fallback=lambda: start_of(tmp_path / "weights", state["net"]), log_every=5)
    assert training.timed_from == 8
    assert 7200 < training.seconds < 7300
    assert [row["samples"] for row in read_log(tmp_path / "two" / LOG)] == [20, 40, 60, 80, 100, 120]
    (tmp_path / "weights" / POSITION).write_text('{"steps": 20, "samples": 80}')  # of a release before
    assert start_of(tmp_path / "weights", {}).timed_from == 80


def test_a_part_that_ends_with_its_time_goes_on_falling_where_it_was_interrupted(tmp_path: Path) -> None:
    minutes = 1 / 60
    first = _training()
    with pytest.warns(HastenWarning):
        run(first, tmp_path, 200, minutes, fall=1.0)  # interrupted after 50 steps
    assert 0.05 < first.fallen < 1
    second = _training()
    with warnings.catch_warnings():
        warnings.simplefilter("error", HastenWarning)  # it falls to the end
        run(second, tmp_path, 10**9, minutes, fall=1.0, log_every=1)
    rates = [row["lr"] for row in read_log(tmp_path / LOG)]
    assert rates[0] <= 1e-2 * first.fallen
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-3
    assert second.seconds == pytest.approx(60 * minutes, rel=0.2)


def test_samples_that_end_a_run_before_its_rate_has_fallen_are_named(tmp_path: Path) -> None:
    message = r"all --samples 8 were seen in .* of the 5 --minutes, .* fell to 1 of itself, .* with more --samples"
    with pytest.warns(HastenWarning, match=message):
        run(_training(), tmp_path, 8, 5.0, fall=0.5)
    with pytest.warns(HastenWarning, match=message):
        run(_training(), tmp_path, 8, 5.0, fall=0.5)  # also where there is nothing left to do
    with warnings.catch_warnings():
        warnings.simplefilter("error", HastenWarning)
        run(_training(), tmp_path / "constant", 8, 5.0)


@pytest.mark.filterwarnings("ignore:all --samples")
@pytest.mark.parametrize(
    ("fall", "minutes", "message"),
    [
        (0.0, 5.0, "--fall 0.5, now it is not given"),
        (0.25, 5.0, "now it is 0.25"),
        (0.5, 6.0, "--minutes 5.0, now it is 6.0"),
    ],
)
def test_a_run_that_ends_with_its_time_is_not_gone_on_with_otherwise(
    fall: float, minutes: float, message: str, tmp_path: Path
) -> None:
    run(_training(), tmp_path, 8, 5.0, fall=0.5)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ModelError, match=message):
        run(_training(), tmp_path, 16, minutes, fall=fall)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    run(_training(), tmp_path, 16, 5.0, fall=0.5)
    assert read_checkpoint(tmp_path)["position"][1] == 16


@pytest.mark.filterwarnings("ignore:all --samples")
def test_a_run_may_end_later_than_it_was_thought_of(tmp_path: Path) -> None:
    run(_training(), tmp_path, 40)
    training = _training()
    run(training, tmp_path, 80, 5.0, fall=1.0)
    assert training.ends_from is not None
    assert 0 < training.ends_from < training.seconds


def test_a_checkpoint_is_of_its_terms(tmp_path: Path) -> None:
    run(_training(windows=4), tmp_path, 8)
    with pytest.raises(ModelError, match=r"a run with windows 4, now it is 8; go on with 4, or .*\(--out\)"):
        run(_training(windows=8), tmp_path, 16)


def test_what_is_frozen_does_not_drift_in_the_average(tmp_path: Path) -> None:
    training = _training()
    training.net.bias.requires_grad_(False)
    frozen = Training(training.net, training.loss, Settings(warmup_steps=1))
    for _ in range(5):
        frozen.step()
    assert torch.equal(frozen.average["bias"], training.net.bias)
    assert not torch.equal(frozen.average["weight"], training.net.weight)
