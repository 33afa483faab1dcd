"""Writing atomically, reading within bounds, declared contents."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hostile import SPECIMEN_NAMES, specimens
from matplotlib.figure import Figure
from PIL import Image

from hasten.bench.token_plots import plot_sizes
from hasten.bench.video import write_video
from hasten.errors import CalibrationError, ConfigError, FileError, HastenError, ModelError
from hasten.io import (
    Array,
    Kind,
    Limits,
    add_line,
    alone,
    check_arrays,
    check_files,
    check_sealed,
    check_target,
    conform,
    decreasing,
    parse_json,
    read_json,
    read_lines,
    read_record,
    read_tensors,
    step_list,
    write_atomically,
    write_record,
    write_sealed,
    write_tensors,
)
from hasten.tokens import flat_map

# --- one writer

WORKER = """
import hashlib, os, sys
from pathlib import Path
from hasten.io import write_atomically
path, count = Path(sys.argv[1]), int(sys.argv[2])
torn = missing = 0
for i in range(count):
    body = f"{os.getpid()} {i} ".encode() * 300
    write_atomically(path, hashlib.sha256(body).hexdigest().encode() + body)
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        missing += 1
        continue
    torn += hashlib.sha256(found[64:]).hexdigest().encode() != found[:64]
print(torn, missing)
"""


def compete(path: Path, processes: int, writes: int) -> None:
    body = b"old " * 1000
    write_atomically(path, hashlib.sha256(body).hexdigest().encode() + body)
    command = [sys.executable, "-c", WORKER, str(path), str(writes // processes)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    found = [worker.communicate()[0].split() for worker in workers]
    assert found == [["0", "0"]] * processes  # torn, missing
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("processes", [2, 4])
def test_writers_of_one_file_never_tear_it(tmp_path: Path, processes: int) -> None:
    compete(tmp_path / "file.bin", processes, 200)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_ten_thousand_writes_of_one_file(tmp_path: Path, processes: int) -> None:
    compete(tmp_path / "file.bin", processes, 10_000)


class StopError(Exception):
    """What a test raises while a file is written."""


def _stop(file: Any) -> None:
    file.write(b"half")
    raise StopError


def _stop_as_the_system_does(file: Any) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "deep" / "file", "old")
    with pytest.raises(StopError):
        write_atomically(path, _stop)
    with pytest.raises(FileError, match=r"file: cannot be written \(No space left on device\); free some space"):
        write_atomically(path, _stop_as_the_system_does)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"


def test_targets_that_are_no_files_are_refused_before_any_work(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"")
    (tmp_path / "folder").mkdir()
    for bad, message in {
        tmp_path / "folder": "it is a folder.*give the path of a file",
        tmp_path / "file" / "below": "whose folders are no files",
        tmp_path / ("x" * 300): "choose a shorter name",
        Path(f"{tmp_path}/zero\0byte"): "null",
    }.items():
        for write in (check_target, lambda path: write_atomically(path, b"")):
            with pytest.raises(FileError, match=message):
                write(bad)
    assert check_target(tmp_path / "new" / "file", tmp_path / "file", None) == tmp_path / "new" / "file"
    assert list((tmp_path / "new").iterdir()) == []


def test_a_target_that_is_read_is_refused_by_whatever_name(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"read")
    (tmp_path / "link").symlink_to("file")
    for one, other in (("file", "file"), ("link", "file"), ("file", "link"), ("file", "../" + tmp_path.name + "/file")):
        with pytest.raises(FileError, match="would be replaced"):
            check_target(tmp_path / one, None, tmp_path / "missing", tmp_path / other)
    check_target("/dev/null", Path("/dev/null"))


def test_lines_end_with_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffa\u2028b\x0c c\r\nd\x85\n".encode())
    assert read_lines(path) == ["a\u2028b\x0c c", "d\x85", ""]
    with pytest.raises(ValueError, match="more than"):
        read_lines(Path("/dev/zero"), 1000)


def test_what_a_killed_writer_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file[1].bin"
    (tmp_path / f".{path.name}.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".other.0123456789abcdef.tmp").write_bytes(b"half")

    def write_another(file: Any) -> None:
        write_atomically(path, b"inner")  # meanwhile
        file.write(b"outer")

    write_atomically(path, write_another)
    assert path.read_bytes() == b"outer"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other.0123456789abcdef.tmp", path.name]


def test_links_permissions_and_devices_stay(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "real", b"old")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    write_atomically(tmp_path / "link", b"new")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    old = os.umask(0o027)
    try:
        assert write_atomically(tmp_path / "fresh", b"").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)
    write_atomically("/dev/null", b"gone")
    assert not Path("/dev/null").is_file()


def test_lines_are_added_and_a_torn_one_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    for line in ("one", "zwölf"):
        add_line(path, line)
    assert path.read_text(encoding="utf-8") == "one\nzwölf\n"
    path.write_text("one\ntw", encoding="utf-8")
    add_line(path, "three")
    assert path.read_text(encoding="utf-8") == "one\nthree\n"
    with pytest.raises(FileError, match="cannot be written"):
        add_line(tmp_path / "new", "line")


def test_one_process_alone_works_on_a_file(tmp_path: Path) -> None:
    path, code = tmp_path / "out.json", "import sys; from hasten.io import alone\nwith alone(sys.argv[1]): print('in')"

    def another() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)

    with alone(path):
        with pytest.raises(FileError, match="another process is at work on it"), alone(path):
            pass
        assert "another process is at work on it" in another().stderr
        with alone(tmp_path / "other.json"):
            pass
    assert another().stdout == "in\n"
    (tmp_path / ".out.json.lock").touch()  # of a process that was killed
    with alone(path):
        pass
    assert list(tmp_path.iterdir()) == []
    with alone("/dev/null"):
        pass


def test_links_in_a_loop_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for write in (check_target, lambda path: write_atomically(path, b"")):
        with pytest.raises(FileError, match="symbolic links"):
            write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_a_pipe_that_takes_a_files_place_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_atomically(tmp_path / "x.json", "{}")
    found = os.stat

    def then_swapped(*args: Any, **kwargs: Any) -> Any:
        result = found(*args, **kwargs)
        if args[0] == path:
            path.unlink()
            os.mkfifo(path)
        return result

    monkeypatch.setattr(os, "stat", then_swapped)
    with pytest.raises(FileError, match="no regular file"):
        read_json(path)


# --- folders that other libraries fill


def _two_files(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "a.json").write_text("{}")
    (folder / "b.bin").write_bytes(b"b")


def test_a_sealed_folder_holds_what_was_written_and_nothing_else(tmp_path: Path) -> None:
    folder = write_sealed(tmp_path / "out", _two_files)
    check_sealed(folder, ModelError, "Again.")
    (folder / ".hidden").write_text("")
    check_sealed(folder, ModelError, "Again.")
    for file, message in {"part/a.json": "'part/a.json' is missing, damaged", "digests.json": "no such file"}.items():
        kept = (folder / file).read_bytes()
        (folder / file).unlink()
        with pytest.raises(ModelError, match=message):
            check_sealed(folder, ModelError, "Again.")
        (folder / file).write_bytes(kept)
    (folder / "part" / "c.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"'part/c\.bin' was not written with the other files"):
        check_sealed(folder, ModelError, "Again.")


def test_a_sealed_folder_is_of_what_it_says(tmp_path: Path) -> None:
    folder = write_sealed(tmp_path / "out", _two_files, "this")
    check_sealed(folder, ModelError, "Again.", "this")
    check_sealed(folder, ModelError, "Again.")
    with pytest.raises(ModelError, match=r"out holds 'this', not that; name a folder of that$"):
        check_sealed(folder, ModelError, "Again.", "that")
    check_sealed(write_sealed(tmp_path / "unnamed", _two_files), ModelError, "Again.", "that")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "part", "x\0y", "link"])
def test_a_list_names_files_of_its_own_folder_alone(tmp_path: Path, name: str) -> None:
    folder = write_sealed(tmp_path / "out", _two_files)
    (tmp_path / "outside").write_text("")
    (folder / "link").symlink_to(tmp_path / "outside")
    digest = hashlib.sha256(b"").hexdigest()
    with pytest.raises(ModelError, match="is missing, damaged or changed"):
        check_files(folder, {name: digest}, ModelError, "Again.")


def test_a_folder_that_cannot_be_filled_stays_as_it_was(tmp_path: Path) -> None:
    folder = write_sealed(tmp_path / "out", _two_files)

    def fail(scratch: Path) -> None:
        (scratch / "b.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FileError, match=r"out: cannot be written \(No space left on device\); free some space"):
        write_sealed(folder, fail)
    check_sealed(folder, ModelError, "Again.")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


def _figure(file: Any) -> None:
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    figure.savefig(file, format="png")


def _video(suffix: str) -> Any:
    def make(path: Path) -> Path:
        if suffix == ".mp4":
            pytest.importorskip("imageio_ffmpeg")
        return write_video(torch.rand(4, 3, 32, 32), path.with_suffix(suffix))

    return make


OTHERS = {
    "array": lambda file: np.save(file, np.arange(9_000)),
    "weights": lambda file: torch.save({"w": torch.ones(9_000)}, file),
    "image": lambda file: Image.effect_noise((128, 128), 64).save(file, format="png"),
    "figure": _figure,
}
PATHS = {
    "webp": _video(".webp"),
    "gif": _video(".gif"),
    "mp4": _video(".mp4"),
    "plot": lambda path: plot_sizes({"one": flat_map(9)}, path.with_suffix(".png")),
}


@pytest.mark.parametrize("name", [*SPECIMEN_NAMES, *OTHERS, *PATHS])
def test_a_full_disk_leaves_the_old_file_and_one_line(small_disk: Path, name: str) -> None:
    def make(folder: Path) -> object:
        if name in OTHERS:
            return write_atomically(folder / "file", OTHERS[name])
        if name in PATHS:
            return PATHS[name](folder / "file")
        return specimens()[name].make(folder)

    folder = small_disk / "work"
    folder.mkdir()
    make(folder)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    _fill(small_disk)
    with pytest.raises(HastenError, match=r"cannot be written \(.*free some space") as caught:
        make(folder)
    assert str(caught.value).isprintable()
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    (small_disk / "filler").unlink()
    make(folder)


# --- killed while they work

KILLED = """
import os, sys, torch
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
folder, work = Path(sys.argv[2]), sys.argv[3]
if work == "calibrate":
    import hasten
    from pipelines import make_pipe
    pipe = make_pipe()
    def act():
        call = {"prompt": "red apple", "height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 8,
                "num_inference_steps": 6, "generator": torch.Generator().manual_seed(0)}
        for name in ("l2p", "svdcache"):
            hasten.calibrate(pipe, name, [call]).save(folder / f"{name}.safetensors")
            call["generator"].manual_seed(0)
elif work == "fit":
    from hasten.tokens import SemanticTree
    codes = np.random.default_rng(0).standard_normal((300, 4))
    def act():
        tree = SemanticTree.fit(codes)
        tree.save(folder / "tree.safetensors")
        tree.map(20).save(folder / "map.safetensors")
else:
    from hasten.fitting.token_model import Trainer
    from hasten.fitting.token_recipe import Recipe
    from hasten.tokens import flat_map
    from hasten.tokens.export import export_model
    from hasten.tokens.shards import write_shards
    shards = write_shards(folder / "shards", np.arange(480).reshape(80, 6) % 24, 24)
    def act():
        trainer = Trainer(shards, flat_map(24), Recipe(steps=60, batch=4, width=16, layers=1, heads=2), cpu=True)
        assert trainer.run(folder, every=2)
        export_model(trainer.causal.model, trainer.mapping, folder / "model", trainer.causal.vocabulary)
act()
print("ready", flush=True)
for _ in range(int(sys.argv[4])):
    pid = os.fork()
    if not pid:
        if work == "train":
            for name in ("checkpoint.safetensors", "log.jsonl"):
                (folder / name).unlink(missing_ok=True)
        while True:
            act()
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
    sys.stdin.readline()
act()
print("done", flush=True)
"""


def _contents(folder: Path) -> dict[str, str]:
    """Digests of all files but temporaries and processor times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".tmp")
    }


@pytest.mark.slow
@pytest.mark.parametrize("work", ["calibrate", "fit", "train"])
def test_files_are_whole_whenever_their_writer_is_killed(tmp_path: Path, work: str) -> None:
    import random
    import signal
    import time

    from hasten.calibration import Calibration
    from hasten.fitting.token_model import KIND
    from hasten.tokens import SemanticTree, TokenMap
    from hasten.tokens.export import open_model

    readers = {
        "l2p.safetensors": Calibration.load,
        "svdcache.safetensors": Calibration.load,
        "tree.safetensors": SemanticTree.load,
        "map.safetensors": TokenMap.load,
        "checkpoint.safetensors": lambda path: read_tensors(path, KIND),
        "log.jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    }
    rounds, rng = 20, random.Random(0)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), work, str(rounds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    undisturbed, leftovers = _contents(tmp_path), 0
    for _ in range(rounds):
        pid = int(process.stdout.readline())
        time.sleep(rng.uniform(0.0, 1.5))
        os.kill(pid, signal.SIGKILL)
        assert process.stdout.readline().strip() == "gone"
        for path in [path for path in tmp_path.rglob("*") if path.name in readers]:
            readers[path.name](path)
        if work == "train":
            open_model(tmp_path / "model")
        leftovers += len(list(tmp_path.rglob("*.tmp")))
        process.stdin.write("\n")
        process.stdin.flush()
    assert "done" in process.stdout.read()
    assert process.wait() == 0
    after = _contents(tmp_path)
    assert after.keys() == undisturbed.keys()
    timed = {"checkpoint.safetensors", "log.jsonl"}  # hold processor times
    assert {k: v for k, v in after.items() if k not in timed} == {
        k: v for k, v in undisturbed.items() if k not in timed
    }
    assert list(tmp_path.rglob("*.tmp")) == []
    print(f"{work}: {rounds} kills, {leftovers} temporaries seen and removed by the next writer")


# --- JSON within bounds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 33 + "]" * 33, "nested more than 32"),
        ("[" * 100_000, "nested more than 32"),
        ('{"a": ' * 33 + "1" + "}" * 33, "nested more than 32"),
        ("NaN", "no finite number"),
        ("[1e999]", "no finite number"),
        ("-Infinity", "no finite number"),
        (str(2**64), "no number of 64 bits"),
        ("9" * 5000, "no number of 64 bits"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
        ("{", "no JSON: expecting"),
        ("", "no JSON: expecting"),
        (b"\xff", "byte 0 is no UTF-8"),
        (r'["\uD800"]', "surrogate"),
        (r'{"\udfff": 1}', "surrogate"),
        ('{"a": 1, ' + ", ".join(f'"{i}": 1' for i in range(50_000)) + ', "a": 1}', "'a' is there twice"),
        ("1" * 2000, "expected at most 1000"),
    ],
)
def test_json_that_may_hurt_is_refused(tmp_path: Path, text: Any, message: str) -> None:
    limits = Limits(1000 if "1000" in message else 1 << 20)
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=message.replace("expected at most 1000", "expected at most")) as caught:
        read_json(path, limits, ModelError, "Make it again.")
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    if not isinstance(text, bytes):
        with pytest.raises(ValueError, match=message):
            parse_json(text, limits)


def test_json_within_bounds_is_read_as_it_is() -> None:
    value = {"a": [1, 2.5, "x", None, True, {"b": []}], "c": -(2**63), "d": 2**64 - 1, "e": "é\n😀"}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * 32 + "]" * 32) is not None


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FileError, match="no regular file"):
            read_json(path)
    with pytest.raises(FileError, match="no such file"):
        read_json(tmp_path / "none")


# --- declared contents


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Content:
    inner: Inner
    mode: Literal["a", "b"]
    ratio: float | None
    pair: tuple[int, str]
    more: dict[str, list[bool]]


GOOD = {"inner": {"name": "x", "sizes": [1]}, "mode": "a", "ratio": 1, "pair": [1, "y"], "more": {"k": [True]}}
MADE = Content(Inner("x", (1,)), "a", 1.0, (1, "y"), {"k": [True]})
KIND = Kind("test file", Content, CalibrationError, "Make it again.", 1 << 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "c"}, r"header\.mode is 'c', expected 'a' or 'b'"),
        ({"mode": True}, r"header\.mode"),
        ({"ratio": "1"}, r"header\.ratio is '1', expected a finite number or null"),
        ({"ratio": True}, r"header\.ratio"),
        ({"pair": [1]}, r"header\.pair"),
        ({"pair": [1.0, "y"]}, r"header\.pair\[0\] is 1.0, expected a whole number"),
        ({"more": {"k": [1]}}, r"header\.more\['k'\]\[0\]"),
        ({"inner": {"name": "x", "size": 1}}, "unknown entry 'size'"),
        ({"inner": {}}, r"header\.inner lacks 'name'"),
        ({"inner": []}, r"header\.inner is \[\], expected an object"),
        ({"inner": {"name": "\ud800"}}, r"header\.inner\.name"),
        ({"extra": "a" * 1000}, "unknown entry 'extra'"),
    ],
)
def test_values_conform_to_their_declaration(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert conform(GOOD, Content, "header") == MADE
    with pytest.raises(ValueError, match=message):
        conform({**GOOD, **change}, Content, "header")
    path = write_record(tmp_path / "x.json", KIND, {**GOOD, **change})
    with pytest.raises(CalibrationError, match=r"x\.json: no usable test file \((the header|it holds half)"):
        read_record(path, KIND)


ARRAYS = {"w/{n}": Array("float", ("n", "T"), low=-1, high=1), "s/{key}": Array("integer", ("k",), (step_list,))}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"w/2": np.zeros((2, 3)), "s/a/b": np.array([0, 2])}, None),
        ({"w/2": np.zeros((2, 3))}, "lacks 's/{key}'"),
        ({"w/3": np.zeros((2, 3)), "s/a": np.array([0])}, r"'w/3' has the shape \[2, 3\], expected \[3, 3\]"),
        ({"w/2": np.zeros((2, 4)), "s/a": np.array([0])}, r"expected \[2, 3\]"),
        ({"w/2": np.zeros((2, 3), int), "s/a": np.array([0])}, "holds int64, expected float numbers"),
        ({"w/2": np.full((2, 3), np.nan), "s/a": np.array([0])}, "not finite"),
        ({"w/2": np.full((2, 3), 2.0), "s/a": np.array([0])}, "has the value 2.0, expected at most 1"),
        ({"w/2": np.full((2, 3), -2.0), "s/a": np.array([0])}, "at least -1"),
        ({"w/2": np.zeros((2, 3)), "s/a": np.array([1, 2])}, "begins with 1, expected 0"),
        ({"w/2": np.zeros((2, 3)), "s/a": np.array([0, 2, 2])}, "does not increase strictly"),
        ({"w/2": np.zeros((2, 3)), "s/a": np.zeros(0, int)}, r"has the shape \[0\]"),
        ({"w/2": np.zeros((2, 3)), "s/a": np.array([0]), "z": np.zeros(1)}, "no place for a tensor 'z'"),
    ],
)
def test_tensors_are_compared_with_their_declaration(arrays: dict[str, Any], message: str | None) -> None:
    if message is None:
        check_arrays(arrays, ARRAYS, {"T": 3})
    else:
        with pytest.raises(ValueError, match=message):
            check_arrays(arrays, ARRAYS, {"T": 3})


def test_times_decrease() -> None:
    assert decreasing(np.array([3.0, 2.0, 1.0])) is None
    assert decreasing(np.array([3.0, 3.0])) is not None


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "scalar": np.float32(3.0).reshape(()), "empty": np.zeros((0, 3), np.int8), "flags": np.array([True, False]),
        "turned": np.arange(12.0).reshape(3, 4).T, "half": np.ones(3, np.float16), "é/x": np.arange(3, dtype=np.uint16),
    }  # fmt: skip
    path = write_tensors(tmp_path / "x.safetensors", KIND, arrays, GOOD)
    found, content = read_tensors(path, KIND)
    assert content == MADE
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
        assert found[name].flags.writeable
    assert write_tensors(tmp_path / "y.safetensors", KIND, arrays, GOOD).read_bytes() == path.read_bytes()


def test_what_cannot_be_kept_is_refused_when_it_is_written(tmp_path: Path) -> None:
    for bad in (float("nan"), {1, 2}, object()):
        with pytest.raises(ConfigError, match="a test file cannot be kept"):
            write_record(tmp_path / "x.json", KIND, {**GOOD, "ratio": bad})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_claims_to_be_large_asks_for_no_memory(tmp_path: Path) -> None:
    """Sizes in the table, and holes of a sparse file, are compared before anything is allocated."""
    table = {"w": {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 8 << 40]}}
    text = json.dumps(table).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)
    with pytest.raises(CalibrationError, match="cut off or damaged"):
        read_tensors(path, KIND)
    path.write_bytes((1 << 40).to_bytes(8, "little") + text)
    with pytest.raises(CalibrationError, match="no safetensors file"):
        read_tensors(path, KIND)
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CalibrationError, match=r"1048576\.0 MiB, expected at most 1\.0"):
        read_tensors(path, KIND)
