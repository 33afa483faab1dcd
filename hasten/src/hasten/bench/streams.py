"""`hasten bench` on a streaming model: time, work, bytes read, likeness to the full history, drift.

The same worlds are rolled out with the full history and with every method in turn. JSON as for images, told apart by
`"kind": "streaming"`; a playable video of the first world for each method lies beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from hasten.bench import subject
from hasten.bench.arms import build_method, parse_options, reported
from hasten.bench.rollout import Rolled, StreamRow, measure
from hasten.bench.runner import environment
from hasten.bench.schema import SCHEMA, short_label
from hasten.bench.video import best_suffix, side_by_side, write_video
from hasten.errors import ConfigError
from hasten.io import write_atomically
from hasten.streaming.policy import StreamingMethod

__all__ = ["DEFAULT_METHODS", "StreamSettings", "parse_streaming", "run_streams"]

# Six frames of history for each head are a quarter of the mean history of 48 frames.
DEFAULT_METHODS = (
    "focused-forcing:budget=6:diversity_tokens=16",
    "sliding-window:window=5",
    "topk-attention:k=6",
    "dummy-forcing:local=1:history=10",
    "forcing-kv",
)
ENLARGE = 6  # pixels of the video files for one of the model's


@dataclass(frozen=True)
class StreamSettings:
    """What to roll out.

    Args:
        worlds: how many, by seeds `seed`, `seed + 1`, ...
        frames: of each video.
        steps: of the sampler, for each chunk.
        seed: of the first world and its noise.
    """

    worlds: int = 8
    frames: int = 48
    steps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.worlds, self.frames, self.steps) < 1:
            raise ConfigError(
                f"worlds, frames and steps must be at least 1, got {self.worlds}, {self.frames}, {self.steps}"
            )


def parse_streaming(text: str) -> StreamingMethod:
    """Read a method such as `focused-forcing:budget=6`.

    Raises:
        UnknownNameError: for a method or parameter that does not exist.
        ConfigError: for a method that does not choose history.
    """
    name, params = parse_options(text)
    method = build_method(name, params)
    if not isinstance(method, StreamingMethod):
        raise ConfigError(f"{name} chooses no history, which a streaming model needs; take one such as focused-forcing")
    return method


def run_streams(
    model: subject.StreamingSubject,
    methods: Mapping[str, StreamingMethod],
    settings: StreamSettings,
    out: Path,
    progress: Callable[[int, int, str], None] | None = None,
    together: Path | None = None,
) -> dict[str, Any]:
    """Measure and write `out` (JSON) and a folder of videos beside it; returns the JSON's content.

    Args:
        model: from `subject.load_streaming`.
        methods: by the names that tables give them; the full history is measured in any case.
        settings: what to roll out.
        out: path of the JSON file; videos go to `<stem>.videos/`.
        progress: called with (done, total, label) as the work goes on.
        together: a file for all videos of the first world side by side; beside the others by default.
    """
    videos: dict[str, Tensor] = {}
    folder, suffix = out.parent / f"{out.stem}.videos", best_suffix()
    total, done = settings.worlds * (len(methods) + 1), 0

    def watch(name: str, seed: int, rolled: Rolled) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, name)
        if seed == settings.seed:
            videos[name] = rolled.video[0]
            write_video(rolled.video[0], folder / f"{_file_name(name)}{suffix}", enlarge=ENLARGE)

    seeds = range(settings.seed, settings.seed + settings.worlds)
    rows = measure(model.rollout(settings.frames, settings.steps), methods, seeds, watch)
    named = {short_label(name): video for name, video in videos.items()}
    write_video(side_by_side(named, ENLARGE), together or folder / f"all{suffix}")
    result = {
        "schema": SCHEMA,
        "kind": "streaming",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "model": model.name,
        "settings": asdict(settings),
        "rows": [
            {**_row(row, methods.get(row.method)), "video": f"{folder.name}/{_file_name(row.method)}{suffix}"}
            for row in rows
        ],
    }
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    return result


def _row(row: StreamRow, method: StreamingMethod | None) -> dict[str, Any]:
    return {**row.to_dict(), "params": {} if method is None else reported(method)}


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-=." else "_" for c in name)
