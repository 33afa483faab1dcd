"""Memory of a long rollout of `sprites-stream`: what the stream holds and what the process takes, frame after frame.

    python benchmarks/streaming_memory.py --json benchmarks/streaming-memory.json

Finished frames are dropped, so that only the history counts. Every method runs in a process of its own, because an
allocator keeps what one rollout gave back. The full history stops early: its work grows with the square of the length.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from hasten.bench.environment import environment
from hasten.bench.streams import parse_streaming
from hasten.io import write_atomically
from hasten_zoo.sprites_stream.model import load_model, new_stream
from hasten_zoo.sprites_stream.reference import WEIGHTS, worlds_of
from hasten_zoo.sprites_stream.rollout import rolled_chunks

METHODS = (
    "sliding-window:window=5",
    "focused-forcing:budget=6",
    "full-history",
)
UNBOUNDED = "full-history"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/streaming-memory.json"))
    parser.add_argument("--frames", type=int, default=1002, help="a multiple of the chunk of three")
    parser.add_argument("--full-frames", type=int, default=150, help="of the full history")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    rows = []
    for text in METHODS:
        frames = args.full_frames if text == UNBOUNDED else args.frames
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(rolled, (text, frames, args.steps))
        rows.append(row)
        last = row["marks"][-1]
        print(f"{text}: {last['frames']} frames, {last['cache_bytes'] / 2**20:.1f} MiB held")
    result = {
        "model": "sprites-stream",
        "steps": args.steps,
        "environment": environment(),
        "rows": rows,
    }
    write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
