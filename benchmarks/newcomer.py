"""The first ten minutes of a newcomer, with a clock: clone, set up, demo, own prompt, tutorial to a certified setting.

    python benchmarks/newcomer.py --json out/newcomer.json     clones the commit that is checked out into a new folder

Times are those of this machine, network and pip cache included; on a busy one they are none, so the load is told. With
`--folder` an environment that `make setup` made there before is taken as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from hasten.io import write_atomically

ROOT = Path(__file__).resolve().parents[1]
OWN = "a green pear"
LEFT_OUT = ("PYTHONPATH", "VIRTUAL_ENV")  # a newcomer's shell has none of these


class Clock:
    """Runs commands one after the other and notes the seconds since the beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, time.monotonic()
        self.seconds: dict[str, float] = {}
        self.environment = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}

    def note(self, what: str) -> None:
        """Write down that something is there now."""
        self.seconds[what] = round(time.monotonic() - self.began, 1)
        print(f"{self.seconds[what]:8.1f} s  {what}", flush=True)

    def run(self, what: str, *command: str, text: str | None = None) -> None:
        """Run a command in the folder; it has to succeed."""
        subprocess.run(command, cwd=self.folder, env=self.environment, input=text, text=True, check=True)
        self.note(what)


def python_blocks(page: Path) -> list[str]:
    """The Python of a page, block by block, as it stands."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def watch(clock: Clock, folder: Path, done: threading.Event) -> None:
    """Note when the first image file is there."""
    while not done.wait(0.2):
        if any(folder.rglob("*.png")):
            clock.note("first image")
            return


def main() -> None:
    """Go the way, and write the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="a clone that is there already")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp()) / "hasten"
    clock = Clock(folder.parent if options.folder is None else folder)
    if options.folder is None:
        clock.run("clone", "git", "clone", "--quiet", str(ROOT), str(folder))
        clock.folder = folder
    done = threading.Event()
    watching = threading.Thread(target=watch, args=(clock, folder / "out", done))
    watching.start()
    try:
        clock.run("make setup", "make", "setup")
        clock.run("make demo", "make", "demo")
    finally:
        done.set()
        watching.join()
    python, blocks = str(folder / ".venv" / "bin" / "python"), python_blocks(folder / "docs" / "tutorial" / "index.md")
    clock.run("own prompt", python, "-", text=blocks[0].replace("red apple", OWN))
    certified = next(number for number, block in enumerate(blocks) if "run_certify(" in block)
    clock.run("certified setting", python, "-", text="\n".join(blocks[: certified + 1]))
    clock.run("all of the tutorial", python, "-", text="\n".join(blocks))
    commit = subprocess.run(
        ("git", "rev-parse", "--short=12", "HEAD"), cwd=folder, capture_output=True, text=True, check=True
    )
    told = {
        "command": f"python benchmarks/newcomer.py {' '.join(sys.argv[1:])}",
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load": round(os.getloadavg()[2], 1),
        "seconds": clock.seconds,
    }
    write_atomically(options.json, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
