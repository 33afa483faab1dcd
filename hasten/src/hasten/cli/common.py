"""What the commands share: the console, options, and readers of their values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hasten.errors import ConfigError

__all__ = ["BAR", "ModelName", "Seed", "console", "names", "numbers", "own_prompts", "show_result"]

console = Console()
if not console.is_terminal:
    console.width = max(console.width, 130)  # a table in a log or a file need not be squeezed

Seed = Annotated[int, typer.Option(help="Prompt i is drawn with seed SEED + i.")]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="A reference model (emoji-flux, or one that edits or makes clips), a pipeline folder, or a hub id.",
    ),
]
BAR = (
    TextColumn("{task.description:44.44}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def numbers(text: str, option: str) -> list[int]:
    """`12,9,7` as whole numbers.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers with commas, such as 12,9,7; got {text!r}") from None


def names(text: str) -> list[str]:
    """`a,b` as names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def own_prompts(file: Path | None) -> tuple[str, ...]:
    """The lines of a file of prompts; none without a file."""
    if file is None:
        return ()
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


LONGEST = 36  # characters of a method's name on a line of the table
EXTRA = {"psnr_unedited": ("unedited", 2), "psnr_edited": ("edited", 2), "temporal_error": ("temporal", 4)}


def _row(row: dict[str, Any], extra: list[str]) -> list[str]:
    """The cells of a row; a peer is named with its library."""
    from hasten.bench.schema import short_label

    library, method = row["library"], short_label(row["method"])
    name = {"plain": f"[dim]plain {method}[/dim]", "hasten": method}.get(library, f"[cyan]{library}[/cyan] {method}")
    held = row["cache_bytes"]
    return [
        name, f"{row['computed_steps']:.3g}", _cell(row["flops_ratio_measured"], 2), _cell(row["seconds"], 3),
        _cell(row["latency_ratio"], 2), _cell(row["latency_share"], 2), _cell(row["psnr"], 2), _cell(row["ssim"], 4),
        _cell(row["lpips"], 4), _cell(row["flip"], 4), *(_cell(row[key], EXTRA[key][1]) for key in extra),
        _cell(None if held is None else held / 1024, 0), _cell(row["top1"], 2),
    ]  # fmt: skip


def _baseline(base: dict[str, Any], extra: list[str]) -> list[str]:
    seconds, quality = _cell(base["seconds"], 3), ["-"] * 4
    own = [_cell(base.get(key), EXTRA[key][1]) for key in extra]
    return ["[bold]plain[/bold]", str(base["steps"]), "1.00", seconds, "1.00", "1.00", *quality, *own, "-",
            _cell(base["top1"], 2)]  # fmt: skip


def _caption(base: dict[str, Any], extra: list[str]) -> str:
    text = (
        "full: steps computed, mean; FLOPs (counted) and speed: times less than plain; share: speed over FLOPs; PSNR "
        "(dB), SSIM, LPIPS and FLIP (0 is identical) against the plain sampler's image; cache in KiB; top-1: drew "
        "what the prompt names"
    )
    if "psnr_unedited" in extra:
        vae = _cell(base["psnr_unedited_vae"], 1)
        text += f"; unedited: PSNR to the source outside the edit ({vae} after the VAE alone); edited: to the target"
    if "temporal_error" in extra:
        text += "; figures are means over the frames; temporal: relative error of the differences between frames"
    return text


def _bench_table(result: dict[str, Any]) -> Table:
    """The figures of a bench result, one section for each number of computed steps, best PSNR first."""
    table = Table(
        title=f"{result['model']}: {len(result['settings']['prompts'])} prompts, medians",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    measured = [row for row in result["rows"] if not row["error"]]
    extra = [key for key in EXTRA if any(row[key] is not None for row in measured)]
    headings = ("method", "full", "FLOPs", "seconds", "speed", "share", "PSNR", "SSIM", "LPIPS", "FLIP")
    for i, heading in enumerate([*headings, *(EXTRA[key][0] for key in extra), "cache", "top-1"]):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, max_width=None if i else LONGEST)
    table.caption = _caption(result["baseline"], extra)
    table.add_row(*_baseline(result["baseline"], extra))
    for count in sorted({count for row in measured for count in row["groups"]}, reverse=True):
        table.add_section()
        table.add_row(f"[bold]{count} computed steps[/bold]")
        group = [row for row in measured if count in row["groups"]]
        for row in sorted(group, key=lambda row: math.inf if row["psnr"] is None else row["psnr"], reverse=True):
            table.add_row(*_row(row, extra))
    return table


def show_result(result: dict[str, Any]) -> None:
    """The table, and a line for each row that has no figures."""
    from hasten.bench.schema import short_label

    console.print(_bench_table(result))
    for row in result["rows"]:
        if row["error"]:
            name = short_label(row["method"]) if row["library"] == "hasten" else f"{row['library']} {row['method']}"
            console.print(
                Text.assemble(
                    (f"not measured: {name}, {row['computed_steps']} computed steps: ", "yellow"), row["error"]
                )
            )
