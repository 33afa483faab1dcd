"""Memory of a long rollout of `sprites-stream`: what the stream holds and what the process takes, frame after frame.

    python benchmarks/streaming_memory.py --json benchmarks/streaming-memory.json

Finished frames are dropped, so that only the history counts. Every method runs in a process of its own, because an
allocator keeps what one rollout gave back. The full history stops early: its work grows with the square of the length.
Then the same length is drawn and graded with and without forgetting: does who was forgotten come back as the same one?
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hasten.bench.environment import environment
from hasten.bench.streams import parse_streaming
from hasten.io import write_atomically
from hasten_zoo.sprites_stream.grade import grade
from hasten_zoo.sprites_stream.model import load_model, new_stream
from hasten_zoo.sprites_stream.reference import WEIGHTS, worlds_of
from hasten_zoo.sprites_stream.rollout import roll_out, rolled_chunks

METHODS = (
    "sliding-window:window=5",
    "focused-forcing:budget=6",
    "full-history",
)
UNBOUNDED = "full-history"
GRADED = ("focused-forcing:budget=6", "focused-forcing:budget=6:forget_after=none")
MARKS = 25  # figures a rollout


def process_bytes() -> int:
    """Resident memory of this process; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def rolled(text: str, frames: int, steps: int) -> dict[str, Any]:
    """Roll out and note, every so often, what is held."""
    torch.set_num_threads(1)
    model = load_model(WEIGHTS)
    stream = new_stream(model, parse_streaming(text))
    chunk, total = model.config.chunk, frames // model.config.chunk
    every = max(1, total // MARKS)
    marks: list[dict[str, Any]] = []
    for i, _ in enumerate(rolled_chunks(model, worlds_of(0), stream, steps), 1):
        if i % every == 0 or i == total:
            stats = stream.stats()
            marks.append(
                {
                    "frames": i * chunk,
                    "held": stats.frames,
                    "cache_bytes": stats.cache_bytes,
                    "process_bytes": process_bytes(),
                }
            )
        if i == total:
            break
    return {"method": text, "frames": total * chunk, "marks": marks}


@torch.no_grad()
def graded(text: str, frames: int, steps: int, seed: int) -> list[float | None]:
    """Share of those in sight who are the right ones, every third frame of one world; None where nobody is in sight."""
    torch.set_num_threads(1)
    model, worlds = load_model(WEIGHTS), worlds_of(seed)
    stream = new_stream(model, parse_streaming(text))
    video = roll_out(model, worlds, stream, frames, steps, seed).video
    return [None if math.isnan(one) else round(one, 4) for one in grade(worlds[0], video[0])["identity"]]


def known(curves: list[list[float | None]]) -> float:
    """Mean over worlds and frames, those with nobody in sight left out."""
    return round(float(np.nanmean(np.array(curves, dtype=float))), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/streaming-memory.json"))
    parser.add_argument("--frames", type=int, default=1002, help="a multiple of the chunk of three")
    parser.add_argument("--full-frames", type=int, default=150, help="of the full history")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--worlds", type=int, default=4, help="that are graded")
    args = parser.parse_args()
    rows = []
    for text in METHODS:
        frames = args.full_frames if text == UNBOUNDED else args.frames
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(rolled, (text, frames, args.steps))
        rows.append(row)
        last = row["marks"][-1]
        print(f"{text}: {last['frames']} frames, {last['cache_bytes'] / 2**20:.1f} MiB held")
    identity = {}
    for text in GRADED:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            curves = [pool.apply(graded, (text, args.frames, args.steps, seed)) for seed in range(args.worlds)]
        thirds = [[curve[i * len(curve) // 3 : (i + 1) * len(curve) // 3] for curve in curves] for i in range(3)]
        identity[text] = {"mean": known(curves), "thirds": [known(third) for third in thirds], "curves": curves}
        print(text, identity[text]["mean"], identity[text]["thirds"])
    result = {
        "model": "sprites-stream",
        "steps": args.steps,
        "environment": environment(),
        "rows": rows,
        "identity": identity,
    }
    write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
