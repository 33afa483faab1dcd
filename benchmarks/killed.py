"""Long commands killed (SIGKILL) at random times: what lies there then is whole, and the rerun ends as if nothing was.

    python benchmarks/killed.py                        every command, 20 kills each: half an hour on two cores
    python benchmarks/killed.py tune-leap --kills 3    some of them

Each command runs twice undisturbed: what differs between the two (dates) is not compared, nor are seconds, and its
names are printed. Then, for each kill, the command starts in an empty folder or in that of a finished run, and is
killed after a random part of the time that it takes undisturbed. Every file has to be whole then: containers, results
and records have their digest, images and pages end, lines of logs are JSON.
The same command runs again to its end, and its files have to hold what an undisturbed run's hold.

The detectors of drape are made up, since its figures are not the point. Bounded by the memory of one small model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hasten.bench.result import read_result
from hasten.errors import HastenError
from hasten.io import Kind, read_record, read_tensors, write_atomically
from PIL import Image

SMALL = ("--steps", "6", "--height", "32", "--width", "32")
TUNE = ("--computed-steps", "3", "--prompts", "2", "--held-out", "1", *SMALL, "--trials", "2", "--rounds", "1")
WALKS = ("--fps", "0.5", "--size", "64", "--cloth", "skinned")
COMMANDS: dict[str, tuple[str, ...]] = {
    "calibrate": (
        "hasten", "calibrate", "--methods", "l2p,svdcache,magcache", "--prompts", "4", *SMALL, "--tokens", "16",
        "--out", "out",
    ),
    "tune-leap": ("hasten", "tune", "--methods", "leap,foca", *TUNE, "--out", "out"),
    "tune-schedules": (
        "hasten", "tune", "--methods", "foca,l2p", "--search", "taylorseer:order=2", *TUNE, "--out", "out",
    ),
    "bench": (
        "hasten", "bench", "--methods", "taylorseer,foca,fbcache", "--computed-steps", "3", "--prompts", "3", *SMALL,
        "--json", "out/bench.json",
    ),
    "bench-streams": (
        "hasten", "bench", "--model", "sprites-stream", "--methods", "focused-forcing:budget=6:diversity_tokens=16",
        "--prompts", "1", "--frames", "9", "--steps", "2", "--json", "out/bench.json",
    ),
    "certify": (
        "hasten", "certify", "--methods", "foca:schedule=even", "--computed-steps", "4,3", "--min-psnr", "10",
        "--share", "0.5", "--confidence", "0.6", "--prompts", "6", "--screen", "2", *SMALL, "--out", "out/draft.json",
    ),
    "generate": (
        "hasten", "generate", "--model", "emoji-flux", "--prompts-file", "prompts.txt", "--method", "foca", *SMALL,
        "--out", "out",
    ),
    "tokens-fit": ("hasten", "tokens", "fit", "codebook.npy", "--out", "out/tree.safetensors"),
    "tokens-train": (
        "hasten", "tokens", "train", "fine", "--map", "map.safetensors", "--steps", "400", "--batch", "4", "--width",
        "16", "--layers", "1", "--heads", "2", "--out", "out",
    ),
    "drape-optimise": ("drape", "optimise", "--steps", "6", "--train-walks", "1", *WALKS, "--out", "out"),
    "drape-bench": (
        "drape", "bench", "--seeds", "1", "--steps", "2", "--train-walks", "1", "--walks", "1", *WALKS, "--work", "out",
        "--to", "out/bench.json",
    ),
}  # fmt: skip


# --- running


def prepare(folder: Path) -> None:
    """What the commands read."""
    from hasten.tokens import flat_map
    from hasten.tokens.shards import write_shards

    codes = np.random.default_rng(0).standard_normal((1200, 8))
    write_atomically(folder / "codebook.npy", lambda file: np.save(file, codes))
    write_atomically(folder / "prompts.txt", "red apple\nblue car\nowl\nred apple\ncat\n")
    write_shards(folder / "fine", np.arange(480).reshape(80, 6) % 24, 24)
    flat_map(24).save(folder / "map.safetensors")


def use_made_up_detectors() -> None:
    """Each sees a person where a frame is more red than blue, or the other way; its box is the whole frame."""
    from drape.detectors import registry
    from drape.detectors.base import Candidates, Detector

    class Hue(Detector):
        def __init__(self, name: str, sign: float) -> None:
            super().__init__(name, 64)
            self.bias = torch.nn.Parameter(torch.tensor([0.6]), requires_grad=False)
            self.sign = sign

        def candidates(self, images: torch.Tensor) -> Candidates:
            redness = self.sign * (images[:, 0] - images[:, 2]).mean(dim=(1, 2)) * 10 + self.bias
            box = torch.tensor([0.0, 0, 64, 64]).expand(len(images), 1, 4)
            return Candidates(box, redness.clamp(0.01, 0.99)[:, None])

    def maker(name: str, sign: float) -> Callable[[], Detector]:
        return lambda: Hue(name, sign)

    for name, sign in {"nanodet": 1.0, "yolov3-tiny": -1.0, "centernet": 0.5}.items():
        registry.LOADERS[name] = maker(name, sign)


def load_libraries() -> None:
    """Load what the commands use before they are forked, so that kills hit their work."""
    import hasten.bench.report
    import hasten.bench.streams
    import hasten.bench.tune
    import hasten.cli.main
    import hasten.fitting.token_model  # noqa: F401
    from hasten.bench import subject

    subject.load("emoji-flux")
    subject.load_streaming("sprites-stream").rollout(3, 1)


def start(command: Sequence[str], folder: Path) -> int:
    """Run a command in a process of its own, forked when all libraries are loaded; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        with (folder / "said").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.argv = list(command)
        if command[0] == "drape":
            from drape.cli import main as run
        else:
            from hasten.cli.main import main as run
        run()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def finish(command: Sequence[str], folder: Path) -> float:
    """Run a command to its end; returns the seconds."""
    started = time.monotonic()
    _, status = os.waitpid(start(command, folder), 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}: {(folder / 'said').read_text()[-2000:]}")
    return time.monotonic() - started


# --- reading


def content_of(path: Path) -> Any:
    """What a file holds as plain data, if it is whole.

    Raises:
        Exception: of whatever kind, if it is not.
    """
    if path.suffix == ".safetensors":
        try:
            tensors, content = read_tensors(path, anything(_kind_of(path)))
        except HastenError:
            from safetensors.numpy import load_file  # an exported model, whose digest is in its facts

            return {name: array.tolist() for name, array in load_file(path).items()}
        return {"content": content, **{name: array.tolist() for name, array in tensors.items()}}
    if path.suffix == ".json":
        return _json(path)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: arrays[name].tolist() for name in arrays.files if name != "about.json"}
    if path.suffix in (".png", ".webp"):
        with Image.open(path) as image:
            image.load()
            return [np.asarray(image).tolist(), getattr(image, "n_frames", 1)]
    if path.suffix == ".html":
        if not path.read_text().rstrip().endswith("</html>"):
            raise ValueError("the page does not end")
        return None  # made of the result, with its times
    if path.suffix == ".seconds":
        float(path.read_text())
        return None
    raise ValueError(f"a file of a kind that this does not know: {path}")


def anything(kind: str) -> Kind[Any]:
    """A kind of file of which the digest alone is checked."""
    return Kind(kind, Any, HastenError, "", 1 << 30)  # type: ignore[arg-type]


def _kind_of(path: Path) -> str:
    with path.open("rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return str(json.loads(table["__metadata__"]["hasten"])["kind"]) if "hasten" in table.get("__metadata__", {}) else ""


def _json(path: Path) -> Any:
    value = json.loads(path.read_text())
    if isinstance(value, dict) and "schema" in value:
        read_result(path)
    elif isinstance(value, dict) and {"kind", "format", "digest"} <= value.keys():
        return read_record(path, anything(value["kind"]))
    elif isinstance(value, dict) and {"kind", "sha256"} <= value.keys():
        from drape.io import load_record

        return load_record(path, value["kind"], "")
    return value


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder but temporaries and what an unfinished run keeps hidden, by name."""
    found = sorted(
        path for path in (folder / "out").rglob("*") if path.is_file() and not path.name.endswith((".tmp", ".lock"))
    )
    return {path.relative_to(folder).as_posix(): content_of(path) for path in found}


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every plain value, by its place; long lists of numbers are one."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*place, key))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*place, i))
    else:
        yield place, value


def differing(one: Any, other: Any) -> set[tuple[Any, ...]]:
    """Places of the values in which two contents differ."""
    a, b = dict(leaves(one)), dict(leaves(other))
    return {place for place in a.keys() | b.keys() if place not in a or place not in b or a[place] != b[place]}


def named(places: set[tuple[Any, ...]]) -> str:
    """Their names, each once."""
    names = {"/".join(str(key) for key in place[-2:] if not isinstance(key, int)) for place in places}
    return ", ".join(sorted(names)) or "nothing"


# --- the trial


@dataclass
class Outcome:
    """What came of a command's kills."""

    kills: int = 0
    after_the_end: int = 0
    torn: int = 0
    failed: int = 0
    unequal: int = 0
    leftovers: int = 0


def trial(command: Sequence[str], inputs: Path, kills: int, rng: random.Random) -> tuple[Outcome, str]:
    """Kill a command; returns what came of it, and the names of what differs between undisturbed runs."""

    def fresh(name: str) -> Path:
        folder = inputs.parent / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(inputs, folder)
        return folder

    whole, second = fresh("whole"), fresh("second")
    finish(command, whole)  # fills caches
    seconds = finish(command, second)
    expected = contents(whole)
    known = differing(expected, contents(second))
    outcome = Outcome()
    for i in range(kills):
        folder = fresh("killed")
        if i % 3 == 2:
            shutil.copytree(whole / "out", folder / "out")
        pid = start(command, folder)
        time.sleep(rng.uniform(0, seconds))
        outcome.kills += 1
        os.kill(pid, signal.SIGKILL)  # one that has ended is there until it is waited for
        _, status = os.waitpid(pid, 0)
        outcome.after_the_end += not os.WIFSIGNALED(status)
        try:
            contents(folder)
        except Exception as error:
            outcome.torn += 1
            print(f"  torn: {error}", flush=True)
        try:
            finish(command, folder)
        except SystemExit as stop:
            outcome.failed += 1
            print(f"  {stop}", flush=True)
            continue
        found = {place for place in differing(expected, contents(folder)) - known if "seconds" not in str(place)}
        if found:
            outcome.unequal += 1
            print(f"  unequal: {named(found)} at {sorted(map(str, found))[:5]}", flush=True)
        outcome.leftovers += len(list((folder / "out").rglob(".*")))
    return outcome, f"{seconds:.1f} s; not compared: {named(known)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", choices=[[], *COMMANDS], help="all of them by default")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    load_libraries()
    use_made_up_detectors()
    print("| command | kills | torn | reruns that failed | unequal | leftovers | undisturbed |")
    print("|---|--:|--:|--:|--:|--:|---|", flush=True)
    bad = 0
    for name in args.commands or COMMANDS:
        with tempfile.TemporaryDirectory() as work:
            inputs = Path(work) / "inputs"
            inputs.mkdir()
            prepare(inputs)
            found, about = trial(COMMANDS[name], inputs, args.kills, random.Random(args.seed))
            late = f" ({found.after_the_end} after the end)" if found.after_the_end else ""
            print(
                f"| {name} | {found.kills}{late} | {found.torn} | {found.failed} | {found.unequal} | "
                f"{found.leftovers} | {about} |",
                flush=True,
            )
            bad += found.torn + found.failed + found.unequal + found.leftovers
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
