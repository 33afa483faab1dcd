"""`hasten calibrate` and `hasten tune` on the trained reference model, at a small size."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from subjects import install
from test_bench import command

import hasten
from hasten import registry
from hasten.bench import recording
from hasten.bench.row import Row
from hasten.bench.subject import PIPELINES, Subject
from hasten.bench.tune import TuneSettings, run_tune
from hasten.bench.usage import python_line
from hasten.calibration import Calibration
from hasten.fitting import closed_loop
from hasten.quality.certificate import certificates
from hasten.solvers.plain import SOLVERS

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
            assert run.summary().skipped_steps > 0


TUNE = ("--prompts", 2, "--held-out", 2, *SMALL, "--trials", 3, "--rounds", 1)


def test_tune_learns_compares_and_goes_on_where_it_was(emoji, monkeypatch, capsys, tmp_path):
    arguments = ("tune", "--computed-steps", "5,4", *TUNE, "--out", tmp_path)
    code, out, _ = command(monkeypatch, capsys, *arguments)
    assert code == 0
    result = json.loads((tmp_path / "tune.json").read_text())
    rows = {(row["method"].split(":")[0], row["budget"]): row for row in result["rows"]}
    assert {name for name, _ in rows} - {*SOLVERS} == {"leap", "leapcache", "foca", "taylorseer"}
    assert {"euler", "unipc"} <= {name for name, _ in rows}  # and the best of all plain samplers, if it is another one
    assert not [row["failed"] for row in result["rows"] if row["failed"]]
    learned = set(emoji.prompts[-2:])
    assert not learned & set(result["settings"]["prompts"])
    for count in (4, 5):
        assert rows["leap", count]["computed_steps"] == count
        assert rows["leap", count]["psnr"] > rows["euler", count]["psnr"]
        best = next(row for row in result["rows"] if row["id"] == result["tune"]["best"][str(count)])
        assert best["psnr"] == max(r["psnr"] for (_, n), r in rows.items() if n == count and r["library"] == "hasten")
    assert "computed steps" in out
    assert "num_inference_steps=4" in out.replace("\n", " ")  # LEAP, which is far ahead there
    assert "<svg" in (tmp_path / "tune.html").read_text()
    steps = Calibration.load(tmp_path / "steps.safetensors")
    leap = Calibration.load(tmp_path / "leap.safetensors")
    assert steps.tensors["steps/4"].tolist() == leap.report["4"]["steps"]
    before = (tmp_path / "leap.safetensors").stat().st_mtime_ns
    command(monkeypatch, capsys, "tune", "--computed-steps", "5", "--methods", "leap", *TUNE, "--out", tmp_path)
    assert (tmp_path / "leap.safetensors").stat().st_mtime_ns == before  # nothing had to be learned again


def test_tune_takes_a_bound_instead_of_a_number(monkeypatch, capsys, tmp_path):
    arguments = ("tune", "--methods", "leap", "--max-error", 0.03, *TUNE, "--out", tmp_path)
    code, _, _ = command(monkeypatch, capsys, *arguments)
    assert code == 0
    result = json.loads((tmp_path / "tune.json").read_text())
    (count,) = result["tune"]["best"]
    leap = Calibration.load(tmp_path / "leap.safetensors")
    assert max(map(int, leap.report)) == int(count)  # and nothing beyond was fitted
    (row,) = [row for row in result["rows"] if row["library"] == "hasten"]
    errors = [10 ** (-figures["psnr"] / 10) for figures in row["per_prompt"]]
    assert (sum(errors) / len(errors)) ** 0.5 <= 0.03
    code, _, err = command(
        monkeypatch, capsys, "tune", "--methods", "leap", "--max-error", 1e-9, *TUNE[:-1], 0, "--out", tmp_path
    )
    assert code == 2
    assert "allow more" in " ".join(err.split())


def test_tune_searches_with_a_cache_and_fits_what_needs_it(monkeypatch, capsys, tmp_path):
    arguments = ("--methods", "hyca,l2p:schedule=even,reuse", "--search", "taylorseer:order=2", "--computed-steps", "4")
    code, _, _ = command(monkeypatch, capsys, "tune", *arguments, *TUNE, "--out", tmp_path)
    assert code == 0
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {"hyca", "l2p", "steps"}
    steps = Calibration.load(tmp_path / "steps.safetensors").report["4"]["steps"]
    rows = {row["method"].split(":")[0]: row for row in json.loads((tmp_path / "tune.json").read_text())["rows"]}
    assert rows["hyca"]["params"]["searched"] == "given"
    assert len(steps) == 4
    assert "searched" not in rows["l2p"]["params"]


def test_tune_chooses_the_parameters_of_one_method_and_goes_on(emoji, monkeypatch, capsys, tmp_path):
    wanted = ("--method", "hicache:schedule=even", "--try", "sigma=0.4,0.7", "--try", "order=1,2", "--prompts", 2)
    arguments = ("tune", *wanted, "--computed-steps", 4, *SMALL, "--out", tmp_path)
    code, out, _ = command(monkeypatch, capsys, *arguments)
    assert code == 0
    content = json.loads((tmp_path / "tuned-hicache.json").read_text())
    best, trials = content["best"]["4"], content["trials"]["4"]
    assert best["decibels"] == pytest.approx(max(trials.values()), abs=1e-3)
    assert best["method"].startswith("hicache:schedule=even:")
    (method,) = registry.parse(best["method"])
    assert method.computed_steps == 4
    assert method.sigma in (0.4, 0.5, 0.7)
    assert best["method"] in " ".join(out.split())
    monkeypatch.setattr(closed_loop._Loop, "_sample", lambda self, index: torch.zeros(1, 3, 2, 2))  # runs nothing again
    assert command(monkeypatch, capsys, *arguments)[0] == 0
    assert json.loads((tmp_path / "tuned-hicache.json").read_text())["best"] == content["best"]
    (tmp_path / "tuned-hicache.json").write_text("{cut off")
    code, _, error = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "tuned-hicache.json" in error
    assert "Take it away to begin again." in " ".join(error.split())


def test_tune_fits_what_the_method_needs(emoji, monkeypatch, capsys, tmp_path):
    arguments = ("--method", "svdcache", "--try", "mode=velocity,taylor", "--computed-steps", 4, "--prompts", 2)
    assert command(monkeypatch, capsys, "tune", *arguments, *SMALL, "--out", tmp_path)[0] == 0
    (file,) = tmp_path.glob("svdcache-*.safetensors")
    assert Calibration.load(file).fingerprint.domain == "normed"
    assert str(file) in json.loads((tmp_path / "tuned-svdcache.json").read_text())["best"]["4"]["method"]
    # With another calibration of the same name what was tried has to be tried again.
    drawn, own = [], closed_loop._Loop._sample
    monkeypatch.setattr(closed_loop._Loop, "_sample", lambda self, index: drawn.append(index) or own(self, index))
    assert command(monkeypatch, capsys, "tune", *arguments, *SMALL, "--out", tmp_path)[0] == 0
    alone = len(drawn)
    replace(Calibration.load(file), options={"energy": 0.7}).save(file)
    assert command(monkeypatch, capsys, "tune", *arguments, *SMALL, "--out", tmp_path)[0] == 0
    assert len(drawn) - alone == alone + 2
    # Nor is one for another guidance or number of steps taken for one for these.
    for others, steps in ((("--guidance", 3), 10), (("--steps", 12), 12)):
        assert command(monkeypatch, capsys, "tune", *arguments, *SMALL, *others, "--out", tmp_path)[0] == 0
        method = json.loads((tmp_path / "tuned-svdcache.json").read_text())["best"]["4"]["method"]
        fingerprint = registry.parse(method)[0].fitted.fingerprint
        assert fingerprint.steps == steps
        assert fingerprint.passes == (("cond", "uncond") if "--guidance" in others else ("cond",))
    assert len([*tmp_path.glob("svdcache-*.safetensors")]) == 3


def test_tune_says_where_settings_are_left_untried(emoji, monkeypatch, capsys, tmp_path):
    arguments = ("--method", "hicache:schedule=even", "--try", "sigma=0.4,0.6", "--computed-steps", 4, "--prompts", 2)
    for trials, said in ((2, True), (9, False)):
        code, out, _ = command(
            monkeypatch, capsys, "tune", *arguments, *SMALL, "--trials", trials, "--out", tmp_path / str(trials)
        )
        assert code == 0
        assert ("4 computed steps: 2 trials left settings untried" in " ".join(out.split())) == said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--try", "sigma=0.4"), "--try names values for --method"),
        (("--method", "hicache", "--max-error", "0.1"), "of computed steps; leave --max-error out"),
        (("--method", "hicache", "--try", "sigm=0.4"), "--try takes a parameter of hicache"),
        (("--method", "hicache", "--try", "sigma=2"), "sigma must be"),
        (("--method", "hicache", "--try", "sigma=0.4", "--try", "sigma=0.5"), "--try has sigma twice"),
        (("--method", "foca", "--try", "sigma=0.4"), "--try takes a parameter of foca (site, "),
        (("--method", "dvg+foca"), "--method tunes one caching method"),
        (("--method", "leap"), "LEAP is fitted by hasten tune without --method"),
        (("--method", "teacache"), "how many teacache computes its threshold says"),
        (("--method", "foca", "--search", "foca"), "leave --search out"),
        (("--method", "foca", "--held-out", "2"), "leave --held-out out"),
        (("--method", "foca", "--guidances", "2,3"), "leave --guidances out"),
        (("--method", "foca", "--rounds", "3"), "leave --rounds out"),
        (("--method", "foca", "--min-psnr", "30"), "leave --min-psnr out"),
    ],
)
def test_bad_requests_to_tune_a_method(emoji, monkeypatch, capsys, tmp_path, arguments, says):
    code, _, err = command(monkeypatch, capsys, "tune", *arguments, "--computed-steps", 4, *SMALL, "--out", tmp_path)
    assert code == 2
    assert says in " ".join(err.split())


@pytest.mark.slow
def test_tune_compares_all_methods(monkeypatch, capsys, tmp_path):
    arguments = ("tune", "--methods", "all", "--computed-steps", "4", *TUNE, "--out", tmp_path)
    code, out, _ = command(monkeypatch, capsys, *arguments)
    assert code == 0
    rows = json.loads((tmp_path / "tune.json").read_text())["rows"]
    caches = {info.name for info in hasten.methods() if info.kind == "caching"}
    assert {row["method"].split(":")[0] for row in rows} - {*SOLVERS} == {"leap", *caches}
    assert all(row["method"] in out or not row["failed"] for row in rows)


def test_bench_measures_a_scheduler_where_it_was_fitted(monkeypatch, capsys, tmp_path):
    command(monkeypatch, capsys, "tune", "--computed-steps", 4, "--methods", "leap", *TUNE, "--out", tmp_path)
    result = tmp_path / "out.json"
    methods = f"leap:calibration={tmp_path / 'leap.safetensors'},taylorseer:warmup=1"
    measuring = ("--computed-steps", "4,3", "--prompts", 2, *SMALL, "--json", result)
    code, out, _ = command(monkeypatch, capsys, "bench", "--methods", methods, *measuring)
    assert code == 0
    rows = {(row["method"].split(":")[0], row["budget"]): row for row in json.loads(result.read_text())["rows"]}
    assert rows["leap", 4]["steps"] == rows["leap", 4]["computed_steps"] == 4
    assert "fitted for 4 evaluations" in rows["leap", 3]["failed"]
    assert "Not measured: leap" in out


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


def test_tune_measures_resolution_methods_beside_the_others(emoji, monkeypatch, capsys, tmp_path):
    # Five is more than the default interval has in so short a run.
    arguments = ("--methods", "foca,dvg", "--search", "foca", "--computed-steps", 5, *TUNE, "--out", tmp_path)
    code, out, _ = command(monkeypatch, capsys, "tune", *arguments)
    assert code == 0
    result = json.loads((tmp_path / "tune.json").read_text())
    assert [row["budget"] for row in result["rows"] if row["method"].startswith("foca")] == [5]
    (dvg,) = [row for row in result["rows"] if row["method"] == "dvg"]
    assert "FluxPipeline cannot run DVG" in dvg["failed"]
    assert result["tune"]["best"]["5"].startswith("foca")
    assert "Not measured: dvg" in out


def test_the_line_to_use_names_the_objects_of_a_combination():
    row = Row(id="x", library="hasten", method="dvg:budget=0.5+foca:interval=4", staged=True, steps=50)
    line = python_line(row, "emoji-flux")
    assert line == "hasten.accelerate(pipe, hasten.DVG(budget=0.5), hasten.FoCa(interval=4))   # num_inference_steps=50"
    assert hasten.DVG(budget=0.5).budget == 0.5


@pytest.mark.parametrize("given", [True, False])
def test_the_line_to_use_of_leap_runs_as_it_is_pasted(emoji, given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if given:
        shutil.copy(emoji.fitted["leap"], "own.safetensors")
    method = "leap:calibration=own.safetensors" if given else "leap"
    row = Row(id="x", library="hasten", method=method, steps=5, budget=5)

    def draw():
        call = emoji.call | {"num_inference_steps": row.steps, "output_type": "latent"}
        return emoji.pipe("red apple", generator=torch.Generator().manual_seed(0), **call).images

    with hasten.accelerate(emoji.pipe, hasten.Leap(emoji.fitted["leap"])):
        measured = draw()
    line = python_line(row, emoji.name)
    assert line.endswith("num_inference_steps=5")
    exec(line, {"hasten": hasten, "pipe": emoji.pipe})
    pasted = draw()
    hasten.remove(emoji.pipe)
    assert torch.equal(pasted, measured)
    assert not torch.equal(pasted, draw())


def test_a_calibration_that_was_stopped_goes_on(emoji, monkeypatch, capsys, tmp_path):
    arguments = ("calibrate", "--methods", "l2p", "--prompts", 3, *SMALL, "--tokens", 16, "--out")
    original, recorded = recording.record, []

    def stops(*given, **options):
        if len(recorded) == 2:
            raise KeyboardInterrupt
        recorded.append(given)
        return original(*given, **options)

    monkeypatch.setattr(recording, "record", stops)
    code, _, error = command(monkeypatch, capsys, *arguments, tmp_path)
    assert code == 130
    assert "2 of 3 runs are kept in" in " ".join(error.split())
    assert not (tmp_path / "l2p.safetensors").exists()
    monkeypatch.setattr(recording, "record", lambda *a, **o: recorded.append(a) or original(*a, **o))
    assert command(monkeypatch, capsys, *arguments, tmp_path)[0] == 0
    assert len(recorded) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["l2p.safetensors"]
    assert command(monkeypatch, capsys, *arguments, tmp_path / "undisturbed")[0] == 0
    assert (tmp_path / "l2p.safetensors").read_bytes() == (tmp_path / "undisturbed/l2p.safetensors").read_bytes()


def test_tune_says_how_far_it_is(emoji, monkeypatch, tmp_path):
    told = []
    settings = TuneSettings(
        computed_steps=(4,), methods=("leap",), prompts=3, held_out=1, steps=10, trials=2, rounds=1, batch=1,
        call={"height": 32, "width": 32},
    )  # fmt: skip
    run_tune(emoji, settings, tmp_path, lambda *now: told.append(now))
    drawing = [(done, total) for label, done, total in told if label.startswith("drawing")]
    assert drawing == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [label for label, done, total in told if label.startswith("leap, 4 evaluations") and done == total]


def test_tune_with_a_tolerance_certifies_what_it_learned(pipe, monkeypatch, capsys, tmp_path):
    """LEAP is learned on the last prompts, compared on those before, certified on the first ones."""
    monkeypatch.setenv("HASTEN_CERTIFICATES", str(tmp_path / "store"))
    prompts = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("apple", "car", "cat", "dog")]
    call = {"height": 32, "width": 32, "max_sequence_length": 8}
    install(monkeypatch, PIPELINES, "tiny", lambda: Subject("tiny", pipe, prompts, call))
    arguments = (
        "tune", "--model", "tiny", "--methods", "leap", "--computed-steps", "4,3", "--prompts", 1, "--held-out", 1,
        "--steps", 8, "--trials", 1, "--rounds", 0, "--min-psnr", 10, "--share", 0.5, "--confidence", 0.6,
    )  # fmt: skip
    code, _, text = command(monkeypatch, capsys, *arguments, "--certify-on", 9, "--out", tmp_path / "out")
    assert code == 2
    assert "--certify-on 9 and 8 that screen ask for more than the 10 prompts" in text
    code, out, _ = command(monkeypatch, capsys, *arguments, "--certify-on", 2, "--out", tmp_path / "out")
    assert code == 0
    assert "hasten.accelerate(pipe, quality='custom')" in out
    (made,) = certificates()
    assert made.setting.startswith("leap:calibration=leap-")
    assert made.evidence.requests == 2
    with hasten.accelerate(pipe, quality="custom"):
        pipe(prompts[0], num_inference_steps=8, output_type="latent", **call)
