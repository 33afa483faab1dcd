"""The command line: wrong input is one line before any work, and what is there is listed."""

import json
import logging
import subprocess
import sys

import pytest
from subjects import install
from test_bench import command

import hasten
from hasten.bench import runner, subject
from hasten.bench.result import read_result
from hasten.bench.subject import Subject
from hasten.cli import boundary, measure
from hasten.errors import ConfigError, FileError

BENCH = ("bench", "--json", "out.json")
TUNE = ("tune", "--out", "fits")
CALIBRATE = ("calibrate", "--out", "fits")

# Arguments, and what the line says. All of it is known before a prompt is drawn.
WRONG = [
    ((*BENCH, "--model", "emoji-flx"), "unknown model 'emoji-flx'. Did you mean 'emoji-flux'?"),
    ((*BENCH, "--model", "./nowhere/pipeline"), "cannot load the pipeline './nowhere/pipeline'"),
    ((*BENCH, "--methods", "hicahce"), "unknown method 'hicahce'. Did you mean 'hicache'?"),
    ((*BENCH, "--methods", ""), "give at least one method"),
    ((*BENCH, "--methods", "hicache:ordre=1"), "unknown parameter of hicache 'ordre'. Did you mean 'order'?"),
    ((*BENCH, "--methods", "hicache:order"), "is not parameter=value"),
    ((*BENCH, "--methods", "hicache:order=two"), "order must be a whole number"),
    ((*BENCH, "--methods", "foca:schedule=evne"), "did you mean 'even'"),
    ((*BENCH, "--methods", "foca+hicache"), "a combination is one resolution method and one cache"),
    ((*BENCH, "--methods", "dvg+leap"), "leap is a scheduler"),
    ((*BENCH, "--methods", "focused-forcing"), "focused-forcing is no caching or resolution method"),
    ((*BENCH, "--methods", "leap:calibration=nowhere.safetensors"), "nowhere.safetensors: no such file"),
    ((*BENCH, "--methods", "l2p"), "l2p has to be fitted to the model first"),
    ((*BENCH, "--computed-steps", "nine"), "whole numbers from 1 to 10000 with commas, such as 12,9,7; got 'nine'"),
    ((*BENCH, "--computed-steps", ""), "such as 12,9,7; got ''"),
    ((*BENCH, "--computed-steps", "9,0"), "whole numbers from 1 to 10000"),
    ((*BENCH, "--computed-steps", "51"), "between 1 and the 50 steps of the run, got 51"),
    ((*BENCH, "--computed-steps", "2"), "warmup"),
    ((*BENCH, "--computed-steps", "11"), "cannot compute 11 of 50 steps"),
    ((*BENCH, "--prompts", "0"), "--prompts must be a whole number from 1 to 1000000, got 0"),
    ((*BENCH, "--prompts", "many"), "'--prompts'"),
    ((*BENCH, "--prompts", "100000"), "asks for more than the 245 prompts there are"),
    ((*BENCH, "--prompts-file", "nowhere.txt"), "--prompts-file nowhere.txt"),
    ((*BENCH, "--prompts-file", "empty.txt"), "no prompts in it; write one per line"),
    ((*BENCH, "--seed", "1e30"), "'--seed'"),
    ((*BENCH, "--seed", "-1"), "--seed must be a whole number from 0 to 4611686018427387904, got -1"),
    ((*BENCH, "--steps", "0"), "--steps must be a whole number from 1 to 10000, got 0 (see hasten bench --help)"),
    ((*BENCH, "--height", "128"), "emoji-flux draws 64x64 or 32x32 pixels, not 128x64"),
    ((*BENCH, "--height", "63"), "emoji-flux draws 64x64 or 32x32 pixels, not 63x64"),
    ((*BENCH, "--width", "0"), "--width must be a whole number from 1 to 16384, got 0"),
    ((*BENCH, "--height", "-64"), "--height must be a whole number from 1 to 16384, got -64"),
    ((*BENCH, "--guidance", "nan"), "--guidance must be a number from 0 to 1000, got nan"),
    ((*BENCH, "--device", "cuda"), "--device cuda: there are 0 cuda devices here"),
    ((*BENCH, "--device", "gpu"), "--device gpu: no such device"),
    ((*BENCH, "--only-peers", "hermite"), "give --peers as well"),
    ((*BENCH, "--peers", "--only-peers", "hermit"), "Did you mean 'hermite'?"),
    ((*BENCH, "--image", "nowhere.png"), "nowhere.png"),
    ((*BENCH, "--image", "empty.txt"), "takes no source image"),
    ((*BENCH, "--frames", "9"), "emoji-flux streams no video; leave --frames out"),
    ((*BENCH, "--fraems", "9"), "No such option: --fraems"),
    ((*BENCH, "--model", "sprites-stream", "--computed-steps", "9"), "streams video; leave --computed-steps out"),
    ((*BENCH, "--model", "sprites-stream", "--methods", "foca"), "foca chooses no history"),
    (("bench", "--json", "folder"), "folder"),
    (("bench", "--json", "empty.txt/out.json"), "empty.txt/out.json"),
    (("demo", "--video", "x.mov"), "expected a path that ends in .mp4, .webp, .gif, got x.mov"),
    (("demo", "--video", "x.gif", "--prompts", "3"), "leave --prompts out"),
    (("demo", "--video", "x.gif", "--model", "sprites-wan"), "streams a video, which sprites-wan does not"),
    (("demo", "--computed-steps", "x"), "whole numbers from 1 to 10000"),
    (("report", "nowhere.json"), "nowhere.json: no such file"),
    (("report", "empty.txt"), "empty.txt: no usable JSON"),
    (("report", "empty.txt", "--format", "pdf"), "unknown format of a report 'pdf'"),
    (("methods", "focca"), "Did you mean 'foca'?"),
    ((*CALIBRATE, "--methods", "l2q"), "Did you mean 'l2p'?"),
    ((*CALIBRATE, "--methods", "taylorseer"), "taylorseer has nothing to calibrate"),
    (
        (*CALIBRATE, "--methods", "l2p,hyca", "--steps", "3"),
        "hyca is fitted to how features change, which takes runs of 4 steps or more",
    ),
    ((*CALIBRATE, "--methods", "hyca,hyca:clusters=2"), "--methods has hyca twice"),
    ((*CALIBRATE, "--methods", ""), "--methods names what to fit"),
    ((*CALIBRATE, "--methods", "hyca:clusters=none"), "clusters must be a whole number"),
    ((*CALIBRATE, "--methods", "hyca:site=module,l2p"), "in a command of their own"),
    ((*CALIBRATE, "--prompts", "9999"), "more than the 245 prompts"),
    ((*CALIBRATE, "--height", "128"), "draws 64x64 or 32x32 pixels"),
    (("calibrate", "--out", "empty.txt"), "empty.txt"),
    ((*TUNE, "--max-error", "0.01", "--computed-steps", "9"), "leave out one of it and --computed-steps"),
    ((*TUNE, "--max-error", "-1"), "--max-error must be a number above 0 to 1, got -1"),
    ((*TUNE, "--max-error", "nan"), "--max-error must be a number above 0 to 1, got nan"),
    ((*TUNE, "--computed-steps", "4,x"), "whole numbers from 1 to 10000"),
    ((*TUNE, "--guidances", "1.5,3"), "--guidances needs --guidance"),
    ((*TUNE, "--guidance", "3", "--guidances", "3,x"), "--guidances takes different numbers"),
    ((*TUNE, "--computed-steps", "51"), "between 1 and the 50 steps"),
    ((*TUNE, "--methods", "leap,fcoa"), "Did you mean 'foca'?"),
    ((*TUNE, "--methods", "hyca:intervall=3"), "unknown parameter of hyca 'intervall'"),
    ((*TUNE, "--search", "fcoa"), "Did you mean 'foca'?"),
    ((*TUNE, "--search", "dvg"), "dvg is no caching method"),
    ((*TUNE, "--prompts", "240", "--held-out", "9"), "more than the 245 prompts"),
    (("tokens", "fit", "nowhere.npy"), "nowhere.npy: no such file"),
    (("tokens", "fit", "empty.txt"), "empty.txt"),
    (("tokens", "map", "nowhere.safetensors", "--k", "0"), "--k must be a whole number from 1 to"),
    (("tokens", "map", "nowhere.safetensors", "--k", "4"), "nowhere.safetensors: no such file"),
    (("tokens", "map", "empty.txt", "--k", "4"), "no usable semantic tree"),
    (("tokens", "map", "empty.txt", "--k", "4", "--out", "folder"), "folder: cannot be written (it is a folder)"),
    (("tokens", "inspect", "folder"), "it is no regular file"),
    (("tokens", "train", "nowhere", "--map", "empty.txt"), "nowhere/index.json: no such file"),
    (("tokens", "train", "nowhere", "--map", "empty.txt", "--seed", "1e30"), "'--seed'"),
    (
        ("tokens", "train", "nowhere", "--map", "empty.txt", "--seed", "99999999999999999999"),
        "--seed must be a whole number",
    ),
    (("tokens", "train", "nowhere", "--map", "empty.txt", "--seed", "-1"), "--seed must be a whole number"),
    (
        ("tokens", "train", "nowhere", "--map", "empty.txt", "--lr", "nan"),
        "--lr must be a number above 0 to 10, got nan",
    ),
    (("tokens", "train", "nowhere", "--map", "empty.txt", "--minutes", "nan"), "--minutes must be a number from 0 to"),
    (("tokens", "train", "nowhere", "--map", "empty.txt", "--width", "7"), "must divide the width"),
    (("tokens", "train", "nowhere", "--map", "empty.txt", "--out", "empty.txt"), "empty.txt/checkpoint.safetensors"),
    (("tokens", "refine", "nowhere", "--model", "nowhere"), "nowhere holds no model with its map"),
    (("tokens", "refine", "nowhere", "--model", "nowhere", "--out", "folder"), "folder: cannot be written"),
    (("tokens", "sample", "nowhere", "--classes", "0", "--length", "4"), "nowhere holds no model with its map"),
    (
        ("tokens", "sample", "nowhere", "--classes", "0", "--length", "4", "--top-k", "-4"),
        "--top-k must be a whole number from 0",
    ),
    (("tokens", "sample", "nowhere", "--classes", "0", "--length", "4", "--out", "folder"), "folder: cannot be"),
    (("tokens", "convert", "nowhere", "--map", "empty.txt"), "empty.txt: no usable token map"),
    ((*BENCH, "--height", "1000000"), "--height must be a whole number from 1 to 16384, got 1000000"),
    ((*BENCH, "--guidance", "inf"), "--guidance must be a number from 0 to 1000, got inf"),
    (
        (*BENCH, "--model", "sprites-stream", "--frames", "1000000000"),
        "--frames must be a whole number from 1 to 100000",
    ),
    ((*BENCH, "--prompts-file", "folder"), "--prompts-file folder: not readable as text"),
    (("bench", "--json", "/proc/nowhere/out.json"), "/proc/nowhere/out.json: cannot be written"),
    (("report", "folder"), "folder: no usable JSON (it is no regular file)"),
    (("demo", "--out", "empty.txt"), "empty.txt/emoji-flux/result.json: cannot be written"),
    (("certify", "--max-flip", "nan"), "max_flip must be a number"),
    (("certify", "--quality", "hihg"), "Did you mean 'high'?"),
    (("generate", "--model", "x", "--prompts-file", "empty.txt", "--out", "pictures"), "empty.txt"),
    (("generate", "--model", "x", "--prompts-file", "nowhere.txt", "--out", "pictures"), "nowhere.txt"),
    (("benhc",), "No such command 'benhc'"),
]


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder with an empty file, a folder, and nothing else."""
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "says"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_input_is_one_line_before_any_work(nowhere, monkeypatch, capsys, arguments, says):
    def drawn(*_, **__):
        pytest.fail("something was drawn")

    monkeypatch.setattr("diffusers.FluxPipeline.__call__", drawn)
    monkeypatch.setattr("hasten_zoo.sprites_stream.reference.roll_out", drawn)
    code, out, error = command(monkeypatch, capsys, *arguments)
    assert code == 2
    assert out.strip() == ""
    assert len(error.strip().splitlines()) == 1, error
    assert error.startswith("error: ")
    assert says in error
    assert "Traceback" not in error
    left = {path.relative_to(nowhere).as_posix() for path in nowhere.rglob("*") if path.is_file()}
    assert left == {"empty.txt"}


def test_an_error_of_ours_leaves_its_traceback_in_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken(**_):
        raise ZeroDivisionError("this\nis a bug")

    with pytest.raises(SystemExit) as stop:
        boundary.run(broken)
    (file,) = tmp_path.iterdir()
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error == (
        f"error: unexpected ZeroDivisionError: this is a bug; the traceback is in {file}, "
        "please report it with that file\n"
    )
    assert "in broken" in file.read_text()


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (FileError("a\n  b"), 2, "error: a b"),
        (FileError("no \x1b[31mred\x07 file"), 2, "error: no [31mred file"),
        (FileError("\udcc3.json: no such file"), 2, "error: ?.json: no such file"),
        (KeyboardInterrupt("3 of 4 are kept"), 130, "stopped: 3 of 4 are kept"),
        (KeyboardInterrupt(), 130, "stopped: nothing was kept"),
    ],
)
def test_every_end_is_one_line_with_its_code(capsys, raised, code, says):
    def ends(**_):
        raise raised

    with pytest.raises(SystemExit) as stop:
        boundary.run(ends)
    assert stop.value.code == code
    assert capsys.readouterr().err.strip() == says


def test_the_log_says_what_is_done_if_asked(monkeypatch, capsys):
    for flags, level in (((), logging.ERROR), (("-v",), logging.INFO)):
        assert command(monkeypatch, capsys, *flags, "report", "nowhere.json")[0] == 2
        assert logging.getLogger("hasten").level == level


def test_methods_lists_all_and_shows_the_parameters_of_one(monkeypatch, capsys):
    code, text, _ = command(monkeypatch, capsys, "methods")
    assert code == 0
    for info in hasten.methods():
        assert info.name in text
    code, text, _ = command(monkeypatch, capsys, "methods", "hicache")
    assert code == 0
    text = " ".join(text.split())
    for parameter in next(info for info in hasten.methods() if info.name == "hicache").parameters.values():
        assert parameter.name in text
        assert parameter.meaning.split()[0] in text


def test_models_lists_what_is_installed_and_known(monkeypatch, capsys):
    code, text, _ = command(monkeypatch, capsys, "models")
    assert code == 0
    text = " ".join(text.split())
    for word in ("emoji-flux", "64x64, 32x32", "images", "edits", "clips", "33 frames", "sprites-stream", "video"):
        assert word in text
    assert "FluxTransformer2DModel" in text
    assert "with a UNet (sites output and deep)" in text
    for name in ("demo", "bench", "tune", "calibrate"):
        assert "sprites-wan" in command(monkeypatch, capsys, name, "--help")[1].replace("\n", "")


def test_a_model_that_cannot_be_loaded_is_listed_with_the_reason(monkeypatch, capsys):
    def missing():
        raise ConfigError("its weights are gone")

    install(monkeypatch, subject.PIPELINES, "broken", missing)
    code, text, _ = command(monkeypatch, capsys, "models")
    assert code == 0
    assert "its weights are gone" in text


def test_each_model_has_a_demo_folder_of_its_own(pipe, monkeypatch, capsys, tmp_path):
    small = {"height": 32, "width": 32, "max_sequence_length": 8}
    for name in ("one", "other"):
        install(monkeypatch, subject.PIPELINES, name, lambda name=name: Subject(name, pipe, ["red apple"], small))
        monkeypatch.setitem(measure.DEMOS, name, ("reuse",))
        arguments = ("--model", name, "--prompts", 1, "--computed-steps", 5, "--steps", 8, "--out", tmp_path)
        assert command(monkeypatch, capsys, "demo", *arguments)[0] == 0
    for name in ("one", "other"):
        assert json.loads((tmp_path / name / "result.json").read_text())["model"] == name
        assert (tmp_path / name / "report.html").is_file()
        assert (tmp_path / name / "contact_sheet_5.png").is_file()


def test_a_bench_that_was_stopped_goes_on(pipe, monkeypatch, capsys, tmp_path):
    call = {"height": 32, "width": 32, "max_sequence_length": 8}
    model = Subject("tiny", pipe, ["red apple", "blue fish", "green tree"], call)
    install(monkeypatch, subject.PIPELINES, "tiny", lambda: model)
    drawn, resumed, original = [], [], runner.draw_sample

    def stops(model, attach, steps, prompt, seed, call):
        if prompt == "green tree" and not resumed:
            raise KeyboardInterrupt
        drawn.append((prompt, seed))
        return original(model, attach, steps, prompt, seed, call)

    monkeypatch.setattr(runner, "draw_sample", stops)
    out = tmp_path / "out.json"
    arguments = ("bench", "--model", "tiny", "--methods", "taylorseer,fbcache", "--computed-steps", 5, "--steps", 12)
    arguments = (*arguments, "--prompts", 3, "--json", out)
    code, _, error = command(monkeypatch, capsys, *arguments)
    assert code == 130
    assert "2 of 3 prompts are kept in" in " ".join(error.split())
    assert "the same command goes on from there" in " ".join(error.split())
    assert not out.exists()
    before = len(drawn)
    assert {prompt for prompt, _ in drawn} == {"red apple", "blue fish"}
    resumed.append(True)
    matched = []
    monkeypatch.setattr("hasten.bench.thresholds.draw_sample", lambda *a: matched.append(a) or original(*a))
    assert command(monkeypatch, capsys, *arguments)[0] == 0
    assert not matched  # the threshold was found before
    assert {prompt for prompt, _ in drawn[before:]} == {"green tree"}
    result = json.loads(out.read_text())
    assert [p["prompt"] for p in result["rows"][-1]["per_prompt"]] == ["red apple", "blue fish", "green tree"]
    assert not list(tmp_path.glob("*.partial*"))
    undisturbed = tmp_path / "again.json"
    assert command(monkeypatch, capsys, *arguments[:-1], undisturbed)[0] == 0
    for row, same in zip(result["rows"], json.loads(undisturbed.read_text())["rows"], strict=True):
        assert [row["id"], row["psnr"], row["ssim"], row["params"]] == [
            same["id"], same["psnr"], same["ssim"], same["params"],
        ]  # fmt: skip


def test_what_belongs_to_another_bench_is_not_taken_up(pipe, tmp_path, caplog):
    call = {"height": 32, "width": 32, "max_sequence_length": 8}
    model = Subject("tiny", pipe, ["red apple", "blue fish"], call)
    partial = tmp_path / "out.partial.json"
    seen = []

    def stop(done, total, label):
        seen.append(label)
        if label.startswith("blue fish"):
            raise KeyboardInterrupt

    settings = {"methods": ("reuse",), "computed_steps": (5,), "prompts": 2, "steps": 8}
    with pytest.raises(KeyboardInterrupt, match="1 of 2 prompts"):
        runner.run_bench(model, runner.BenchSettings(**settings), tmp_path / "out.json", stop)
    assert partial.is_file()
    with pytest.raises(KeyboardInterrupt, match="1 of 2 prompts"), caplog.at_level(logging.WARNING, "hasten"):
        runner.run_bench(model, runner.BenchSettings(**settings, seed=5), tmp_path / "out.json", stop)
    assert "belongs to another command" in caplog.text
    partial.write_text(partial.read_text()[:-40])
    with pytest.raises(KeyboardInterrupt, match="1 of 2 prompts"), caplog.at_level(logging.WARNING, "hasten"):
        runner.run_bench(model, runner.BenchSettings(**settings, seed=5), tmp_path / "out.json", stop)
    assert "the bench starts again" in caplog.text


def test_an_image_that_is_not_finite_fails_its_arm_alone(pipe, tmp_path, monkeypatch):
    call = {"height": 32, "width": 32, "max_sequence_length": 8}
    model = Subject("tiny", pipe, ["red apple"], call)
    original = runner.draw_sample

    def broken(model, attach, *rest):
        sample = original(model, attach, *rest)
        if type(attach).__name__ == "Accelerated":
            sample.image[0, 0, 0] = float("nan")
        return sample

    monkeypatch.setattr(runner, "draw_sample", broken)
    settings = runner.BenchSettings(methods=("reuse",), computed_steps=(5,), prompts=1, steps=8)
    result = runner.run_bench(model, settings, tmp_path / "out.json")
    assert "values that are not finite" in result.failed[0].failed
    assert {row.method for row in result.measured} == {"euler", "unipc"}


def test_version_and_help_load_no_heavy_library():
    """In a process of its own: nothing here was imported before."""
    for arguments, words in ((["--version"], "typer torch"), (["bench", "--help"], "torch diffusers matplotlib")):
        code = f"""
import sys
sys.argv = ["hasten", *{arguments!r}]
from hasten.cli.entry import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in {words.split()!r} if name in sys.modules]
assert not loaded, loaded
"""
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("method", ["fbcache", "foca"])
def test_an_arm_that_fails_in_any_way_loses_its_row_alone(pipe, tmp_path, monkeypatch, method):
    """In the search for a threshold, or when it is measured."""
    call = {"height": 32, "width": 32, "max_sequence_length": 8}
    model = Subject("tiny", pipe, ["red apple"], call)

    def fails(original):
        def replaced(model, attach, *rest):
            chosen = getattr(attach, "method", None)
            if chosen is not None and type(chosen).__name__.lower() == method:
                raise ZeroDivisionError("in a\nmethod")
            return original(model, attach, *rest)

        return replaced

    monkeypatch.setattr(runner, "draw_sample", fails(runner.draw_sample))
    monkeypatch.setattr("hasten.bench.thresholds.draw_sample", fails(runner.draw_sample))
    settings = runner.BenchSettings(methods=(method, "reuse"), computed_steps=(5,), prompts=1, steps=8)
    result = runner.run_bench(model, settings, tmp_path / "out.json")
    assert [row.failed for row in result.failed] == ["ZeroDivisionError: in a method"]
    assert {row.method for row in result.measured} == {"euler", "unipc", "reuse"}
    assert read_result(tmp_path / "out.json") == result


def test_a_measurement_that_fails_loses_its_row_alone(pipe, tmp_path, monkeypatch):
    call = {"height": 32, "width": 32, "max_sequence_length": 8}
    model = Subject("tiny", pipe, ["red apple"], call)
    original = runner.measure

    def broken(model, sample, reference, *rest):
        if sample.cache_bytes:  # of a method that keeps features
            raise ValueError("no such figure")
        return original(model, sample, reference, *rest)

    monkeypatch.setattr(runner, "measure", broken)
    settings = runner.BenchSettings(methods=("reuse",), computed_steps=(5,), prompts=1, steps=8)
    result = runner.run_bench(model, settings, tmp_path / "out.json")
    assert [row.failed for row in result.failed] == ["ValueError: no such figure"]
