"""`hasten bench` on a streaming model: time, work, bytes read, likeness to the full history, drift.

The same worlds are rolled out with the full history and with every method in turn. JSON as for images, told apart by
`"kind": "streaming"`; a playable video of the first world for each method lies beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from hasten import registry
from hasten.bench import subject
from hasten.bench.environment import environment, load
from hasten.bench.labels import short_label
from hasten.bench.requests import reported
from hasten.bench.result import StreamResult, StreamSettings
from hasten.bench.rollout import Rolled, measure
from hasten.bench.video import best_suffix, check_video_path, side_by_side, write_video
from hasten.errors import ConfigError
from hasten.io import alone, check_target
from hasten.streaming.method import StreamingMethod

__all__ = ["DEFAULT_METHODS", "StreamSettings", "parse_streaming", "run_streams"]

# Six frames of history for each head are a quarter of the mean history of 48 frames.
DEFAULT_METHODS = (
    "focused-forcing:budget=6",
    "sliding-window:window=5",
    "topk-attention:k=6",
    "dummy-forcing:local=1:history=10",
    "forcing-kv",
)
ENLARGE = 6  # pixels of the video files for one of the model's


def parse_streaming(text: str) -> StreamingMethod:
    """Read a method such as `focused-forcing:budget=6`.

    Raises:
        UnknownNameError: for a method or parameter that does not exist.
        ConfigError: for a method that does not choose history.
    """
    (method, *more) = registry.parse(text)
    if more or not isinstance(method, StreamingMethod):
        raise ConfigError(
            f"{text.strip()} chooses no history, which a streaming model needs; take one such as focused-forcing"
        )
    return method


def run_streams(
    model: subject.StreamingSubject,
    methods: Mapping[str, StreamingMethod],
    settings: StreamSettings,
    out: Path,
    progress: Callable[[int, int, str], None] | None = None,
    together: Path | None = None,
    command: str = "",
) -> StreamResult:
    """Measure, and write `out` (JSON) and a folder of videos beside it.

    Args:
        model: from `subject.load_streaming`.
        methods: by the names that tables give them; the full history is measured in any case.
        settings: what to roll out.
        out: path of the JSON file; videos go to `<stem>.videos/`.
        progress: called with (done, total, label) as the work goes on.
        together: a file for all videos of the first world side by side; beside the others by default.
        command: the command line that asked for it.
    """
    with alone(out):
        return _run(model, methods, settings, out, progress, together, command)


def _run(
    model: subject.StreamingSubject,
    methods: Mapping[str, StreamingMethod],
    settings: StreamSettings,
    out: Path,
    progress: Callable[[int, int, str], None] | None,
    together: Path | None,
    command: str,
) -> StreamResult:
    if together is not None:
        check_video_path(together)
        check_target(together)
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
    failures: dict[str, str] = {}
    rows = measure(model.rollout(settings.frames, settings.steps), methods, seeds, watch, failures)
    named = {short_label(name): video for name, video in videos.items()}
    write_video(side_by_side(named, ENLARGE), together or folder / f"all{suffix}")
    for row in rows:
        row.params = {} if row.method not in methods else reported(methods[row.method])
        row.video = f"{folder.name}/{_file_name(row.method)}{suffix}"
    result = StreamResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        environment=environment() | load(),
        model=model.name,
        settings=settings,
        rows=rows,
        failed=failures,
    )
    result.write(out)
    return result


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-=." else "_" for c in name)
