"""Do the tests bite? Change one decision of the source at a time and see whether a test fails.

    python hasten/mutants/run.py                 all mutations of mutants.toml, two at a time
    python hasten/mutants/run.py gates leap      those whose file or text contains one of the words
    python hasten/mutants/run.py --jobs 1

A mutation that no test notices *survives*; the command lists the survivors and exits 1 if one has no `reason` in the
list, or if a mutation with a reason is killed after all. Nothing in the working tree changes: each mutation is applied
to a copy of `src`, and its tests run in a process of their own, forked after the heavy libraries are loaded.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCE, TESTS = ROOT / "hasten" / "src", ROOT / "hasten" / "tests"
LIMIT = 300  # seconds for the tests of a mutation; one that makes them hang is noticed
PASSED, FAILED = 0, 1  # pytest's exit statuses when it could run the tests
HEAVY = {"diffusers", "transformers", "torch", "scipy", "PIL", "safetensors", "hypothesis", "tokenizers", "skimage"}


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
        Mutation(file=group["file"], tests=change.get("tests", group.get("tests", [])), **_texts(change))
        for group in content["group"]
        for change in group["change"]
    ]


def _texts(change: dict[str, str]) -> dict[str, str]:
    return {name: change[name] for name in ("before", "after", "reason") if name in change}


class Trial:
    """The tests of one mutation (or of none) in a process of its own, against a copy of the source."""

    def __init__(self, source: Path, tests: list[str], mutation: Mutation | None = None) -> None:
        """Copy `source`, apply the mutation to the copy, fork.

        Args:
            source: what to copy; compiled modules that lie beside their sources come along.
            tests: files below `tests`, or node ids in them.
            mutation: the change, or None.
        """
        self.mutation, self._tests, self._started = mutation, tests, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        try:
            shutil.copytree(source, self.folder / "src")
        except BaseException:
            self.close()
            raise
        if mutation is not None:
            path = self.folder / "src" / "hasten" / mutation.file
            path.write_text(mutation.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
                compiled.unlink()
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            status = 3
            try:
                status = self._run()
            finally:
                os._exit(status)
        with suppress(OSError):  # a group of its own, so that what hangs is ended with all that it has started
            os.setpgid(self.process, self.process)

    def _run(self) -> int:
        """Run the tests, in the forked process; returns pytest's exit status."""
        import pytest

        os.setpgid(0, 0)
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, str(self.folder / "src"))
        os.environ["PYTHONPATH"] = f"{self.folder / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        nodes = [str(TESTS / test) for test in self._tests]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "--rootdir", str(ROOT)]
        status = int(pytest.main(["-c", str(ROOT / "hasten" / "pyproject.toml"), *options, *nodes]))
        loaded = [name for name in sys.modules if name.split(".")[0] in HEAVY]
        (self.folder / "modules").write_text("\n".join(loaded), encoding="utf-8")
        return status

    def status(self) -> int | None:
        """The exit status of the tests, negative when they were stopped by a signal; None while they run."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        if done:
            self.seconds = time.monotonic() - self._started
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - self._started > LIMIT:
            self._kill()
        return None

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)

    def log(self) -> str:
        """The last lines of what the tests printed."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-2000:]

    def stop(self) -> None:
        """End the tests where they are."""
        self._kill()
        with suppress(ChildProcessError):
            os.waitpid(self.process, 0)

    def close(self) -> None:
        """Remove the copy."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _finished(trial: Trial) -> int:
    try:
        while (status := trial.status()) is None:
            time.sleep(0.05)
    except BaseException:
        trial.stop()
        trial.close()
        raise
    return status


def _unchanged(chosen: list[Mutation]) -> Path | None:
    """Run all tests of the mutations without any; returns a copy of the source with its compiled modules.

    None if the tests fail: then nothing can be said. What the tests load of large libraries is loaded here as well, so
    that every process that is forked from this one has it.
    """
    tests = sorted({test for mutation in chosen for test in mutation.tests})
    files = {test.split("::")[0] for test in tests}
    print(f"{len(chosen)} mutations; first their tests without any: {', '.join(sorted(files))}", flush=True)
    trial = Trial(SOURCE, [test for test in tests if "::" not in test or test.split("::")[0] not in tests])
    if _finished(trial) != PASSED:
        print(f"{trial.log()}\nthe tests do not pass without a mutation; nothing can be said", file=sys.stderr)
        trial.close()
        return None
    print(f"they pass, in {trial.seconds:.0f} s", flush=True)
    for name in (trial.folder / "modules").read_text(encoding="utf-8").split():
        with suppress(ImportError):
            importlib.import_module(name)
    return trial.folder


def _try_all(chosen: list[Mutation], source: Path, jobs: int) -> tuple[int, list[Mutation], int]:
    """Try the mutations, `jobs` at a time, and print a line for each.

    Returns:
        How many tests noticed, those that survived, and the number of results that are not as the list says; where no
        test ran, nothing is known.
    """
    waiting, running = list(reversed(chosen)), list[Trial]()
    noticed, survivors, wrong = 0, [], 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                mutation = waiting.pop()
                running.append(Trial(source, mutation.tests, mutation))
            time.sleep(0.05)
            for trial in list(running):
                if (status := trial.status()) is None:
                    continue
                running.remove(trial)
                assert trial.mutation is not None
                word = {PASSED: "SURVIVED", FAILED: "killed"}.get(status, "hung" if status < 0 else "UNCLEAR")
                print(f"{word:8} {trial.seconds:6.1f} s  {trial.mutation.name}", flush=True)
                if word == "UNCLEAR":  # no test ran, or the source does not even load
                    print(trial.log(), file=sys.stderr, flush=True)
                noticed += word in ("killed", "hung")
                if word == "SURVIVED":
                    survivors.append(trial.mutation)
                wrong += word == "UNCLEAR" or (word == "SURVIVED") != bool(trial.mutation.reason)
                trial.close()
    finally:  # after an interruption
        for trial in running:
            trial.stop()
            trial.close()
    return noticed, survivors, wrong


def main() -> int:
    """Run the mutations; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="take only the mutations whose file or text contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time")
    args = parser.parse_args()
    chosen = [m for m in load() if not args.words or any(word in m.name for word in args.words)]
    if not chosen:
        parser.error(f"no mutation has any of {', '.join(args.words)} in its file or text")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)  # no threads of its own when it forks
    source = _unchanged(chosen)
    if source is None:
        return 2
    try:
        noticed, survivors, wrong = _try_all(chosen, source / "src", args.jobs)
    finally:
        shutil.rmtree(source, ignore_errors=True)
    print(f"\n{noticed} of {len(chosen)} killed, {len(survivors)} survived; {wrong} not as listed")
    for mutation in survivors:
        print(f"survived: {mutation.name}\n          {mutation.reason or 'no reason is listed: write a test'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
