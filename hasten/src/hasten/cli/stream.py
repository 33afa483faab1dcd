"""`hasten bench` and `hasten demo --video` on models that stream video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.progress import Progress
from rich.table import Table

from hasten.cli.common import BAR, console

__all__ = ["bench_streams", "demo_video"]

DEMO = ("focused-forcing:budget=6:diversity_tokens=16", "sliding-window:window=5")


def bench_streams(
    name: str, methods: Sequence[str], settings: Any, out: Path, together: Path | None = None
) -> dict[str, Any]:
    """Measure the methods (the usual ones if none are given), show the table, and write JSON and videos."""
    from hasten.bench import subject
    from hasten.bench.streams import DEFAULT_METHODS, parse_streaming, run_streams

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
        )
    console.print(_table(result))
    return result


def demo_video(name: str, video: Path, out: Path, seed: int) -> None:
    """Roll one world out with the whole history and with less; a playable file shows them side by side."""
    from hasten.bench.report import render_report
    from hasten.bench.streams import StreamSettings

    result_file = out / "result.json"
    bench_streams(name, DEMO, StreamSettings(worlds=1, seed=seed), result_file, video)
    console.print(f"video:  [bold]{video}[/bold]")
    console.print(f"report: [bold]{render_report(result_file, out / 'report.html')}[/bold]")


def _table(result: dict[str, Any]) -> Table:
    """The figures of a streaming result."""
    from hasten.bench.schema import short_label
    from hasten.bench.stream_report import late

    settings = result["settings"]
    table = Table(
        title=f"{result['model']}: {settings['worlds']} videos of {settings['frames']} frames",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="times less than with the full history: speed of all, time for attention, its work, keys and values "
        "read; choosing: share of the time for attention; PSNR (dB) to the full history's video; then what drifts, "
        "mean over the last third",
    )
    names = sorted({name for row in result["rows"] for name in row["drift"]})
    headings = ("method", "s/frame", "speed", "attention", "work", "KV read", "choosing", "MiB", "PSNR")
    for i, heading in enumerate([*headings, *names]):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for i, row in enumerate(result["rows"]):
        ratios = (row["speedup"], row["attention_speedup"], row["work_ratio"], row["kv_ratio"])
        drift = [late(row["drift"].get(name, [])) for name in names]
        table.add_row(
            short_label(row["method"]),
            f"{row['seconds_per_frame']:.3f}",
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{row['overhead']:.1%}",
            f"{row['cache_bytes'] / 2**20:.1f}",
            f"{row['psnr']:.1f}" if i else "-",
            *("-" if value is None else f"{value:.3f}" for value in drift),
        )
    return table
