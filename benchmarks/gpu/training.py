"""Training `emoji-styles` for what is left of the time: the project's own training command.

It wants the data and latents that the commands of `zoo/src/hasten_zoo/emoji_styles` make (`--training-data`). The
averaged weights come back as one archive.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bench
from hasten.io import write_atomically
from hasten_zoo.emoji_styles import train
from hasten_zoo.emoji_styles.data import PACKAGES, SIZES, TAUGHT, EmojiStyles, Pair, load_emoji_styles_data
from hasten_zoo.emoji_styles.latents import Latents, save_latents

LEAST_SECONDS = 60  # compiling takes a third of it
KEPT = 20  # seconds for the last checkpoint and for exporting the weights


def measure(bench: Bench) -> None:
    """Section 5 of `gpu.md`.

    Raises:
        FileNotFoundError: if there is nothing to train on.
    """
    folder, out = bench.path.parent, bench.path.parent / "training"
    data = tiny_data(folder / "training-data") if bench.dry else bench.options["training_data"]
    if not (data / "data" / "index.json").exists() or not list((data / "latents").glob("latents-*.npy")):
        raise FileNotFoundError(
            f"no data or latents in {data}; make them with python -m hasten_zoo.emoji_styles.data and .latents, "
            "or name their folder with --training-data"
        )
    if not bench.has_time(LEAST_SECONDS, "training"):
        return
    minutes = 0.001 if bench.dry else (bench.left - KEPT) / 60
    paths = ["--data", str(data / "data"), "--latents", str(data / "latents"), "--out", str(out)]
    if bench.dry:  # three images know other words than the committed weights
        paths += ["--committed", "none", "--vae", str(train.WEIGHTS / "vae")]
    batch = "2" if bench.dry else "512"
    begun = time.monotonic()
    run_training(*paths, "--device", bench.device.name, "--minutes", f"{minutes:.3f}", "--batch", batch)
    seconds = time.monotonic() - begun
    run_training(*paths, "--export", str(out / "weights"))
    position = json.loads((out / "weights" / "training.json").read_text())
    bench.row("training", seconds=seconds, batch=int(batch), **position, log=last_lines(out / "log.jsonl"))
    files = {str(file.relative_to(out)): file.stat().st_size for file in sorted((out / "weights").rglob("*.*"))}
    bench.row("weights", bytes=sum(files.values()), files=len(files))
    shutil.make_archive(str(folder / "emoji-styles-weights"), "gztar", out / "weights")


def last_lines(log: Path, count: int = 5) -> list[Any]:
    """The training's own records, which a short one does not get to."""
    return [json.loads(line) for line in log.read_text().splitlines()[-count:]] if log.exists() else []


def run_training(*arguments: str) -> None:
    """The project's own training command, in this process.

    Raises:
        RuntimeError: if it gives up.
    """
    before, sys.argv = sys.argv, [train.__file__, *arguments]
    threads = torch.get_num_threads()
    try:
        with torch.enable_grad():
            train.main()
    except SystemExit as error:
        raise RuntimeError(f"the training ended with {error.code}") from error
    finally:
        sys.argv = before
        torch.set_num_threads(threads)


def tiny_data(folder: Path) -> Path:
    """Data and latents of three images, in the form of the real ones."""
    pairs = [Pair(style, "red apple", TAUGHT[0], True, False) for style in list(PACKAGES)[:3]]
    write_atomically(folder / "data" / "index.json", json.dumps({"pairs": [asdict(pair) for pair in pairs]}))
    for size in SIZES:
        images = np.zeros((len(pairs), size, size, 4), np.uint8)
        write_atomically(folder / "data" / f"images-{size}.npy", partial(np.save, arr=images))
    data: EmojiStyles = load_emoji_styles_data(folder / "data")
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        values = torch.randn(1, len(data.taught(held_out=False)), 16, size // 8, size // 8, generator=generator)
        save_latents(Latents(values.half(), torch.zeros(values.shape[:2], dtype=torch.uint8)), folder / "latents", size)
    return folder
