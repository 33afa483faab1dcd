"""`hasten calibrate` and `hasten tune` on the trained reference model, at a small size."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_bench import command

import hasten
from hasten.caching.calibration import Calibration

SMALL = ("--steps", 10, "--height", 32, "--width", 32)


def test_calibrate_writes_one_file_a_method_that_the_methods_take(emoji, monkeypatch, capsys, tmp_path):
    methods = "l2p,hyca:clusters=3,svdcache:energy=0.95,magcache,teacache"
    code, out, _ = command(
        monkeypatch,
        capsys,
        "calibrate",
        "--methods",
        methods,
        "--prompts",
        2,
        *SMALL,
        "--tokens",
        16,
        "--out",
        tmp_path,
    )
    assert code == 0
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["hyca", "l2p", "magcache", "svdcache", "teacache"]
    for name in ("l2p", "hyca", "magcache"):
        assert name in out
    hyca = Calibration.load(tmp_path / "hyca.safetensors")
    assert hyca.options == {"clusters": 3}
    assert len(hyca.report["hidden"]["channels"]) == 3
    assert hyca.fingerprint.steps == 10
    call = {**emoji.call, "height": 32, "width": 32, "num_inference_steps": 10, "output_type": "latent"}
    for name in ("l2p", "svdcache"):
        with hasten.accelerate(emoji.pipe, name, calibration=tmp_path / f"{name}.safetensors", interval=3) as run:
            emoji.pipe("red apple", generator=torch.Generator().manual_seed(0), **call)
            assert run.summary().cached > 0


def test_tune_finds_lists_that_methods_take(emoji, monkeypatch, capsys, tmp_path):
    file = tmp_path / "steps.safetensors"
    code, out, _ = command(
        monkeypatch, capsys, "tune", "--method", "taylorseer:order=2", "--full-steps", "4,5", "--prompts", 2, *SMALL,
        "--trials", 6, "--out", file,
    )  # fmt: skip
    assert code == 0
    tuned = Calibration.load(file)
    for count in ("4", "5"):
        assert tuned.report[count]["relative_squared_error"] <= tuned.report[count]["at_the_start"]
        assert " ".join(map(str, tuned.report[count]["steps"])) in out
    assert hasten.TaylorSeer(tuned=file, interval=2, warmup=1).plan().steps == tuple(tuned.report["5"]["steps"])


def test_tune_makes_a_scheduler_and_bench_measures_it(monkeypatch, capsys, tmp_path):
    file, result = tmp_path / "leap.safetensors", tmp_path / "out.json"
    tuning = ("--full-steps", 4, "--prompts", 2, *SMALL, "--trials", 3, "--out", file)
    code, out, _ = command(monkeypatch, capsys, "tune", "--method", "leap", *tuning)
    assert code == 0
    assert "LeapScheduler.load" in out
    methods = f"leap:calibration={file},taylorseer:warmup=1"
    measuring = ("--full-steps", "4,3", "--prompts", 2, *SMALL, "--json", result)
    code, out, _ = command(monkeypatch, capsys, "bench", "--methods", methods, *measuring)
    assert code == 0
    rows = {(row["method"].split(":")[0], row["full_steps"]): row for row in json.loads(result.read_text())["rows"]}
    assert rows["leap", 4]["steps"] == rows["leap", 4]["computed_steps"] == 4
    assert rows["leap", 4]["psnr"] > rows["euler", 4]["psnr"]
    assert "fitted for 4 evaluations" in rows["leap", 3]["error"]
    assert "not measured: leap" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("calibrate", "--methods", "l2q"), "Did you mean 'l2p'"),
        (("calibrate", "--methods", "taylorseer"), "nothing to calibrate"),
        (("calibrate", "--methods", "hyca:clusters"), "param=value"),
        (("calibrate", "--methods", "hyca:site=module,l2p"), "in a command of their own"),
        (("calibrate", "--prompts", 9999), "more than the 245 prompts"),
        (("calibrate", "--model", "emoji-fulx"), "Did you mean 'emoji-flux'"),
        (("tune", "--full-steps", "4,x"), "whole numbers with commas"),
        (("tune", "--full-steps", "10", "--prompts", 1, *SMALL), "fewer than the 10 of the run"),
        (("tune", "--method", "fcoa"), "Did you mean 'foca'"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, capsys, arguments, says):
    quick = () if "--steps" in arguments else SMALL
    code, _, err = command(
        monkeypatch, capsys, *arguments, *quick, *(() if "--prompts" in arguments else ("--prompts", 1))
    )
    assert code == 2
    assert says in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path):
    arguments = ["calibrate", "--methods", "l2p", "--prompts", "2", *map(str, SMALL), "--tokens", "16", "--out"]
    hasten_command = os.path.join(os.path.dirname(sys.executable), "hasten")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([hasten_command, *arguments, tmp_path / "one"], check=True, env=environment, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", hasten_command]
    subprocess.run([*torchrun, *arguments, tmp_path / "two"], check=True, env=environment, capture_output=True)
    one, two = (Calibration.load(tmp_path / name / "l2p.safetensors") for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert torch.allclose(one.tensors["gram/cond"], two.tensors["gram/cond"], rtol=1e-5)
