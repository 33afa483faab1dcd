"""`hasten bench` and `hasten demo --video` on models that stream video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from hasten.bench.result import StreamSettings
from hasten.cli.common import BAR, command_line, console, show_result
from hasten.io import check_target

__all__ = ["bench_streams", "demo_video"]

DEMO = ("focused-forcing:budget=6", "sliding-window:window=5")


def bench_streams(
    name: str, methods: Sequence[str], settings: StreamSettings, out: Path, together: Path | None = None
) -> None:
    """Measure the methods (the usual ones if none are given), show the table, and write JSON and videos."""
    from hasten.bench import subject
    from hasten.bench.streams import DEFAULT_METHODS, parse_streaming, run_streams
    from hasten.bench.video import check_video_path

    if together is not None:
        check_video_path(together)
    for target in (out, *([] if together is None else [together])):
        check_target(target)
    arms = {text: parse_streaming(text) for text in methods or DEFAULT_METHODS}
    with console.status(f"loading {name}"):
        model = subject.load_streaming(name)
    with Progress(*BAR, console=console) as bar:
        task = bar.add_task("rolling out", total=None)
        result = run_streams(
            model,
            arms,
            settings,
            out,
            lambda done, total, label: bar.update(task, completed=done, total=total, description=label),
            together,
            command_line(),
        )
    show_result(result)


def demo_video(name: str, video: Path, out: Path, seed: int) -> None:
    """Roll one world out with the whole history and with less; a playable file shows them side by side."""
    from hasten.bench.report import render_report

    result_file = out / "result.json"
    bench_streams(name, DEMO, StreamSettings(worlds=1, seed=seed), result_file, video)
    console.print(f"video:  [bold]{video}[/bold]")
    console.print(f"report: [bold]{render_report(result_file, out / 'report.html')}[/bold]")
