"""`hasten generate --ray`: 200 jobs on two workers, one of which is killed, and then the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import command

from hasten.errors import ConfigError
from hasten.integrations.batch import Worker, generate, read_jobs
from hasten.integrations.ray_batch import generate as share
from hasten.quality.configuration import Configuration

JOBS = 200
TINY = Configuration(model="emoji-flux", method="foca:schedule=even", computed_steps=3, steps=6, height=32, width=32)
DRIVER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from hasten.integrations.batch import read_jobs
from hasten.integrations.ray_batch import generate
from test_ray import TINY
print("starting", flush=True)
failures = generate(TINY, read_jobs(Path({jobs!r})), Path({out!r}), workers=2)
assert failures == []
"""


def workers_of(mark, kind=b"_Actor"):
    """Process ids of a driver's workers."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::") and kind in name and mark.encode() in environment:
            found.append(int(process.name))
    return found


def wait_until(holds, driver=None, seconds=900):
    end = time.monotonic() + seconds
    while not holds():
        assert driver is None or driver.poll() is None, "the driver ended"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_every_job_is_done_once_though_a_worker_and_the_driver_are_killed(tmp_path):
    pytest.importorskip("ray")
    jobs, out, right = tmp_path / "jobs.txt", tmp_path / "out", tmp_path / "right"
    jobs.write_text("".join(f"red apple {i}\n" for i in range(JOBS)))
    paths = [path for path in sys.path if path]
    code = DRIVER.format(paths=paths, jobs=str(jobs), out=str(out))
    mark = f"HASTEN_TEST={uuid.uuid4().hex}"
    environment = os.environ | dict([mark.split("=")]) | {"PYTHONPATH": os.pathsep.join(paths)}

    def images():
        return len(list(out.glob("*.png"))) if out.exists() else 0

    driver = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: images() >= 40, driver)
        os.kill(workers_of(mark)[0], signal.SIGKILL)
        before = images()
        wait_until(lambda: images() >= before + 40, driver)  # the other goes on, and one starts again
    finally:
        driver.kill()
    driver.wait()
    assert 80 <= images() < JOBS
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    wait_until(lambda: not workers_of(mark))  # they end with their driver
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert images() == JOBS
    assert all((out / name).stat().st_mtime_ns == made for name, made in kept.items())  # none was made twice
    generate(Worker(TINY), read_jobs(jobs), right)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in right.iterdir())
    for path in right.glob("*.png"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_model_that_the_workers_do_not_have_is_one_line(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "jobs.txt").write_text("red apple\n")
    with pytest.raises(ConfigError, match="unknown model 'nosuch'"):
        share(replace(TINY, model="nosuch"), read_jobs(tmp_path / "jobs.txt"), tmp_path / "out", workers=1)


def test_without_ray_it_is_said_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "jobs.txt").write_text("red apple\n")
    arguments = (
        "generate",
        "--model",
        "emoji-flux",
        "--prompts-file",
        tmp_path / "jobs.txt",
        "--out",
        tmp_path / "out",
    )
    code, _, error = command(monkeypatch, capsys, *arguments, "--ray", "local")
    assert code == 2
    assert "pip install ray" in error
    code, _, error = command(monkeypatch, capsys, *arguments, "--workers", 2)
    assert code == 2
    assert "give --ray as well" in error
    code, _, error = command(monkeypatch, capsys, *arguments, "--ray", "local", "--device", "cpu")
    assert code == 2
    assert "leave --device or --ray out" in error
