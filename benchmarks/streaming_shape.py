"""What streaming methods save in one layer of Wan2.1-1.3B's shape, on random queries, keys and values.

    python benchmarks/streaming_shape.py --json benchmarks/streaming-shape.json

12 heads of width 128, 1,560 tokens a frame (480x832), chunks of three frames, four forwards and a clean pass for each;
on a CPU fewer will do (`--steps 1`), with which choosing and copying weigh more than they would.
Time and work depend on the shape alone; random tensors say nothing of quality.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from hasten.bench.environment import environment
from hasten.bench.streams import parse_streaming
from hasten.io import write_atomically
from hasten.streaming import KVStream, StreamingMethod, StreamStats
from rich.progress import track

HEADS, WIDTH, TOKENS, CHUNK = 12, 128, 1560, 3
METHODS = (
    "full-history",
    "focused-forcing:budget=5",
    "focused-forcing:budget=5:choice=frame",
    "sliding-window:window=4",
    "topk-attention:k=5",
    "dummy-forcing:local=1:history=9",
)


@torch.no_grad()
def rolled(
    method: StreamingMethod, chunks: int, steps: int, tokens: int, device: str, dtype: torch.dtype
) -> StreamStats:
    """One layer's work for a rollout."""
    generator = torch.Generator().manual_seed(0)
    stream = KVStream(method, 1, timed=True)
    for _ in range(chunks):
        shape = (3, 1, CHUNK, tokens, HEADS, WIDTH)
        for _ in range(steps + 1):
            q, k, v = torch.randn(shape, generator=generator).to(device, dtype)
            stream.attend(0, q, k, v)
        stream[0].append(k, v)
    return stream.stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/streaming-shape.json"))
    parser.add_argument("--chunks", type=int, default=7, help="21 frames, Self-Forcing's window")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a frame")
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, help="to measure; the first is what others are held to"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rolled(parse_streaming(METHODS[1]), 2, 1, args.tokens, args.device, dtype)  # warm-up
    rows: list[dict[str, Any]] = []
    for text in track(args.methods, "rolling out"):
        stats = rolled(parse_streaming(text), args.chunks, args.steps, args.tokens, args.device, dtype)
        seconds = stats.attention_seconds + stats.pack_seconds + stats.select_seconds
        rows.append(
            {
                "method": text,
                "seconds": round(seconds, 3),
                "times_less": round(rows[0]["seconds"] / seconds, 3) if rows else 1.0,
                "work_ratio": round(stats.work_ratio, 3),
                "choosing": round(stats.overhead, 5),
                "copying": round(stats.pack_seconds / seconds, 5),
            }
        )
    result = {
        "shape": {"heads": HEADS, "width": WIDTH, "tokens": args.tokens, "chunk": CHUNK},
        "chunks": args.chunks,
        "steps": args.steps,
        "dtype": str(dtype).removeprefix("torch."),
        "environment": environment(),
        "rows": rows,
    }
    write_atomically(args.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
