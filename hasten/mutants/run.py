"""Do the tests bite? Change one decision of the source at a time and see whether a test fails.

    python hasten/mutants/run.py                 all mutations of mutants.toml, two at a time
    python hasten/mutants/run.py gates           those whose file or name contains a word
    python hasten/mutants/run.py --jobs 1

A mutation that no test notices *survives*; the command lists the survivors and exits 1 if one has no `reason` in the
list, or if a mutation with a reason is killed after all. Nothing in the working tree changes: each mutation is applied
to a copy of `src`, and its tests run in a process of their own, forked after the heavy libraries are loaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE, TESTS = ROOT / "hasten" / "src", ROOT / "hasten" / "tests"
LIMIT = 600  # seconds for the tests of a mutation; one that hangs is killed, and counts so
FAILED = 1  # pytest's exit status when tests failed


@dataclass(frozen=True)
class Mutation:
    """One change of the source.

    Attributes:
        file: below `src/hasten`.
        before: text that stands there exactly once.
        after: what takes its place.
        tests: files below `tests` that should notice, or node ids in them.
        reason: why it may survive; empty where it must not.
    """

    file: str
    before: str
    after: str
    tests: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}: {' '.join(self.before.split())} -> {' '.join(self.after.split()) or 'nothing'}"

    def applied(self, source: str) -> str:
        """The source with the change.

        Raises:
            ValueError: if the text does not stand there exactly once.
        """
        count = source.count(self.before)
        if count != 1:
            raise ValueError(f"{self.name}: the text stands {count} times in the file; bring mutants.toml up to date")
        return source.replace(self.before, self.after)


def load() -> list[Mutation]:
    """The mutations of `mutants.toml`."""
    content = tomllib.loads((HERE / "mutants.toml").read_text(encoding="utf-8"))
    return [
        Mutation(file=group["file"], tests=change.get("tests", group["tests"]), **_texts(change))
        for group in content["group"]
        for change in group["change"]
    ]


def _texts(change: dict[str, str]) -> dict[str, str]:
    return {name: change[name] for name in ("before", "after", "reason") if name in change}


def _child(folder: Path, tests: list[str]) -> int:
    """Run the tests against the copy in `folder`, in this (forked) process; returns pytest's exit status."""
    import pytest

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path.insert(0, str(folder / "src"))
    os.environ["PYTHONPATH"] = f"{folder / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    nodes = [str(TESTS / test) for test in tests]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--rootdir", str(ROOT)]
    return int(pytest.main(["-c", str(ROOT / "hasten" / "pyproject.toml"), *options, *nodes]))


def killed(mutation: Mutation | None, tests: list[str]) -> tuple[bool, float]:
    """Whether the tests notice the mutation, and the seconds that it took; without one, whether they fail anyway."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        shutil.copytree(SOURCE, folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            path = folder / "src" / "hasten" / mutation.file
            path.write_text(mutation.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
        process = os.fork()
        if process == 0:
            status = 3
            try:
                status = _child(folder, tests)
            finally:
                os._exit(status)
        while True:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                break
            if time.monotonic() - started > LIMIT:
                os.kill(process, 9)
            time.sleep(0.1)
        code = os.waitstatus_to_exitcode(status)
        if code > FAILED:
            print((folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:], file=sys.stderr)
            raise RuntimeError(f"pytest ended with status {code} on {', '.join(tests)}; see above")
    return code != 0, time.monotonic() - started


def main() -> int:
    """Run the mutations; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="take only the mutations whose file or text contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time")
    args = parser.parse_args()
    chosen = [m for m in load() if not args.words or any(word in m.name for word in args.words)]
    os.environ["OMP_NUM_THREADS"] = "1"
    import diffusers  # noqa: F401 - loaded once, before the forks
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    files = sorted({test.split("::")[0] for m in chosen for test in m.tests})
    print(f"{len(chosen)} mutations; first the tests without any: {', '.join(files)}", flush=True)
    if killed(None, files)[0]:
        print("the tests fail without a mutation; nothing can be said", file=sys.stderr)
        return 2
    bad = survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutation, (noticed, seconds) in zip(chosen, pool.map(lambda m: killed(m, m.tests), chosen), strict=True):
            word = "killed" if noticed else "SURVIVED"
            print(f"{word:8} {seconds:6.1f} s  {mutation.name}  {mutation.reason}", flush=True)
            survived += not noticed
            bad += noticed == bool(mutation.reason)
    print(f"{len(chosen) - survived} of {len(chosen)} killed; {bad} not as listed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
