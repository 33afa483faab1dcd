"""The `hasten` command."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from hasten.bench.result import Result, StreamSettings
from hasten.cli import fit as cli_fit
from hasten.cli import stream as cli_stream
from hasten.cli import tokens as cli_tokens
from hasten.cli.common import BAR, ModelName, Seed, command_line, console, names, numbers, own_prompts, show_result
from hasten.errors import HastenError
from hasten.io import write_atomically

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Faster visual generation on diffusers pipelines, without retraining.\n\n"
    "Start with [bold]hasten demo[/bold]: it draws with the bundled model, plain and accelerated, and shows both.",
)
app.command()(cli_fit.calibrate)
app.command()(cli_fit.tune)
app.add_typer(cli_tokens.app, name="tokens")


CACHES = "reuse,taylorseer,hicache,foca"
DEMO = ("reuse", "taylorseer", "hicache", "foca", "foca:schedule=even", "leap")
DEMOS = {
    "emoji-flux": DEMO,
    "emoji-kontext": (
        "taylorseer",
        "foca",
        "specedit:discrepancy=latent",
        "specedit:discrepancy=latent+foca:interval=2",
    ),
    "sprites-wan": ("reuse", "taylorseer", "foca", "dvg", "dvg+foca:interval=3"),
}


def _quiet() -> None:
    """Other libraries' notices about optional parts would bury our own output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _bench(model_name: str, settings: Any, out: Path, device: str | None = None) -> Result:
    """Measure; of several processes, each has a device of its own, and only the main one shows how far it is."""
    from hasten.bench.environment import processes
    from hasten.bench.runner import open_model, run_bench

    state = processes()
    if device is None and state.num_processes > 1:
        device = str(state.device)
    with console.status(f"loading {model_name}"):
        model = open_model(model_name, device=device)
    with Progress(*BAR, console=console, disable=not state.is_main_process) as bar:
        task = bar.add_task("measuring", total=None)
        return run_bench(
            model,
            settings,
            out,
            lambda done, total, label: bar.update(task, completed=done, total=total, description=label),
            command_line(),
        )


def _version(wanted: bool) -> None:
    if wanted:
        from hasten import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the images, the figures and the report.")] = Path("out/demo"),
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 6,
    computed_steps: Annotated[str, typer.Option(help="How many of the steps are computed.")] = "9",
    seed: Seed = 0,
    model: Annotated[str, typer.Option(help="A reference model: images, edits or clips.")] = "emoji-flux",
    steps: Annotated[int, typer.Option(min=2, help="Steps of the plain sampler.")] = 50,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Stream a video instead, with all of its history and with less, into this .mp4, .webp or .gif."
        ),
    ] = None,
) -> None:
    """Draw with a bundled model, plain and accelerated; show the table, a contact sheet and a report."""
    if video is not None:
        cli_stream.demo_video("sprites-stream" if model == "emoji-flux" else model, video, out, seed)
        return
    from hasten.bench.report import render_report
    from hasten.bench.runner import BenchSettings
    from hasten.bench.sheet import bench_sheet

    counts = numbers(computed_steps, "--computed-steps")
    result_file = out / "result.json"
    settings = BenchSettings(
        methods=DEMOS.get(model, DEMO), computed_steps=tuple(counts), prompts=prompts, seed=seed, steps=steps
    )
    result = _bench(model, settings, result_file)
    show_result(result)
    for count in result.groups():
        path = out / f"contact_sheet_{count}.png"
        sheet = bench_sheet(result, out, count)
        write_atomically(path, partial(sheet.save, format="png"))
        console.print(f"contact sheet: [bold]{path}[/bold]")
    console.print(f"report:        [bold]{render_report(result_file, out / 'report.html')}[/bold]")


@app.command("methods")
def list_methods() -> None:
    """List the methods with their papers and parameters."""
    from hasten import methods

    table = Table()
    for heading in ("name", "kind", "what it does", "paper", "parameters and defaults", "calibration"):
        table.add_column(heading, overflow="fold")
    for info in methods():
        parameters = ", ".join(f"{p.name}={p.default}" for p in info.parameters.values() if p.default is not None)
        table.add_row(
            f"[bold]{info.name}[/bold]",
            info.kind,
            info.summary,
            info.paper,
            parameters,
            "needed" if info.needs_calibration else "-",
        )
    console.print(table)


@app.command()
def bench(
    model: ModelName = "emoji-flux",
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas; parameters after colons: hicache:order=1:sigma=0.7; a resolution method and a "
            "cache with a plus: dvg:budget=0.5+foca:interval=4. For a streaming model all that choose history, unless "
            "told otherwise."
        ),
    ] = CACHES,
    computed_steps: Annotated[
        str, typer.Option(help="How many steps are computed; each method takes the schedule of its kind with so many.")
    ] = "12,9,7",
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 16,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Own prompts, one a line.", exists=True, dir_okay=False)
    ] = None,
    seed: Seed = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps of the plain sampler and of every cached method, 50; of each chunk of a stream, 8."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a streaming model's videos.")] = 48,
    height: Annotated[int | None, typer.Option(help="Height in pixels; the model's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels; the model's own by default.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="True classifier-free guidance (two forwards a step) with an empty negative prompt."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda.")] = None,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also cache-dit, diffusers' caches and hicache-pp, at as many computed steps."),
    ] = False,
    only_peers: Annotated[
        str, typer.Option(help="Names of the peers to measure with --peers, with commas; all of them by default.")
    ] = "",
    image: Annotated[
        Path | None,
        typer.Option(help="Own source image for an editing pipeline.", exists=True, dir_okay=False),
    ] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Where the figures go; images go beside it.")] = Path(
        "out/bench.json"
    ),
) -> None:
    """Measure methods against the plain sampler on the same prompts and seeds, and write JSON.

    A method with a threshold gets the one at which it computes as many steps, found on the first two prompts. A
    resolution method runs at its own number of steps, beside plain samplers with as many evaluations and as many
    counted operations. Under `accelerate launch` the prompts are shared among the processes.

    On a streaming model --prompts are worlds, and the reference is the whole history.

    Example: hasten bench --model emoji-flux --methods reuse,taylorseer,hicache --computed-steps 12,9,7 --prompts 16
        --seed 0 --json out.json
    """
    from hasten.bench import subject
    from hasten.bench.environment import processes
    from hasten.bench.runner import BenchSettings

    if model in subject.streaming_names():
        _bench_streams(model, "" if methods == CACHES else methods, prompts, frames, steps or 8, seed, json_file)
        return
    call: dict[str, Any] = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    if guidance is not None:
        call |= {"true_cfg_scale": guidance, "negative_prompt": ""}
    own = own_prompts(prompts_file)
    settings = BenchSettings(
        methods=tuple(names(methods)),
        computed_steps=tuple(numbers(computed_steps, "--computed-steps")),
        prompts=prompts,
        prompt_list=own,
        seed=seed,
        steps=steps or 50,
        call=call,
        peers=peers,
        only_peers=tuple(names(only_peers)),
        image=image,
    )
    result = _bench(model, settings, json_file, device)
    if not processes().is_main_process:
        return
    show_result(result)
    console.print(f"figures: [bold]{json_file}[/bold]   report: hasten report {json_file}")


def _bench_streams(model: str, methods: str, worlds: int, frames: int, steps: int, seed: int, out: Path) -> None:
    cli_stream.bench_streams(model, names(methods), StreamSettings(worlds, frames, steps, seed), out)
    console.print(f"figures: [bold]{out}[/bold]   report: hasten report {out}")


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A JSON file that `hasten bench` wrote.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; beside the JSON by default.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="html (table, curves and images), md or csv (the table alone).")
    ] = "html",
) -> None:
    """Make a report of a result: one self-contained HTML file, a Markdown table, or CSV."""
    from hasten.bench.report import render_report

    console.print(f"report: [bold]{render_report(result, out or result.with_suffix(f'.{form}'), form)}[/bold]")


def main() -> None:
    """Entry point: purposeful errors are shown as one line, without a traceback."""
    _quiet()
    try:
        app(standalone_mode=True)
    except HastenError as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        sys.exit(2)
