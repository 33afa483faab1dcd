"""`hasten demo`, `hasten bench` and `hasten report`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from hasten import registry
from hasten.bench import subject
from hasten.bench.result import Result, StreamSettings
from hasten.cli import stream
from hasten.cli.boundary import resumable
from hasten.cli.common import BAR, command_line, console, opened, show_result
from hasten.cli.options import (
    MOST_COUNT,
    ComputedSteps,
    Device,
    Guidance,
    Height,
    ModelName,
    PromptsFile,
    Seed,
    Steps,
    Width,
    call_of,
    names,
    number,
    numbers,
    own_prompts,
    refuse_given,
)
from hasten.errors import ConfigError
from hasten.io import check_target, write_atomically
from hasten.parameters import MOST_STEPS, Range

if TYPE_CHECKING:
    from hasten.bench.runner import BenchSettings

MOST_FRAMES = 100_000
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
# Options of bench that mean nothing to a model that streams, and of demo to one that streams a video.
NOT_OF_STREAMS = {
    "computed_steps": "--computed-steps",
    "prompts_file": "--prompts-file",
    "height": "--height",
    "width": "--width",
    "guidance": "--guidance",
    "device": "--device",
    "peers": "--peers",
    "only_peers": "--only-peers",
    "image": "--image",
    "best_plain": "--best-plain",
}
NOT_OF_VIDEO = {"prompts": "--prompts", "computed_steps": "--computed-steps", "steps": "--steps"}


def _measured(model_name: str, settings: BenchSettings, out: Path, device: str | None = None) -> Result:
    """Measure; of several processes only the main one shows how far it is."""
    from hasten.bench.environment import processes
    from hasten.bench.runner import prepared, run_bench

    check_target(out)
    model = prepared(opened(model_name, device), settings)
    with resumable(), Progress(*BAR, console=console, disable=not processes().is_main_process) as bar:
        task = bar.add_task("measuring", total=None)

        def tick(done: int, total: int | None, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        return run_bench(model, settings, out, tick, command_line())


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder; each model has a folder of its own in it, for images, figures and report.")
    ] = Path("out/demo"),
    prompts: Annotated[int, number(Range(1, MOST_COUNT), "How many prompts.")] = 6,
    computed_steps: ComputedSteps = "9",
    seed: Seed = 0,
    model: ModelName = "emoji-flux",
    steps: Steps = 50,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Stream a video instead, with the whole history and with less, into this .mp4, .webp or .gif."
        ),
    ] = None,
) -> None:
    """Draw with a bundled model, plain and accelerated; show the table, a contact sheet and a report."""
    if video is not None or model in subject.streaming_names():
        refuse_given(context, NOT_OF_VIDEO, "a demo that streams a video takes --seed and --out alone")
        streaming = "sprites-stream" if model == "emoji-flux" else model
        if streaming not in subject.streaming_names():
            raise ConfigError(f"--video streams a video, which {model} does not; leave --model or --video out")
        stream.demo_video(streaming, video or out / streaming / "video.webp", out / streaming, seed)
        return
    from hasten.bench.report import render_report
    from hasten.bench.runner import BenchSettings
    from hasten.bench.sheet import bench_sheet

    folder = out / Path(model).name
    settings = BenchSettings(
        methods=DEMOS.get(model, DEMO if model in subject.names() else DEMO[:-1]),
        computed_steps=tuple(numbers(computed_steps, "--computed-steps", Range(1, MOST_STEPS))),
        prompts=prompts,
        seed=seed,
        steps=steps,
    )
    result = _measured(model, settings, folder / "result.json")
    show_result(result)
    for count in result.groups():
        path = folder / f"contact_sheet_{count}.png"
        sheet = bench_sheet(result, folder, count)
        write_atomically(path, partial(sheet.save, format="png"))
        console.print(f"contact sheet: [bold]{path}[/bold]")
    console.print(f"report:        [bold]{render_report(folder / 'result.json', folder / 'report.html')}[/bold]")


def bench(
    context: typer.Context,
    model: ModelName = "emoji-flux",
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas; parameters after colons: hicache:order=1:sigma=0.7; a resolution method and a "
            "cache with a plus: dvg:budget=0.5+foca:interval=4. For a streaming model all that choose history, unless "
            "told otherwise."
        ),
    ] = CACHES,
    computed_steps: ComputedSteps = "12,9,7",
    prompts: Annotated[int, number(Range(1, MOST_COUNT), "How many prompts; of a streaming model, worlds.")] = 16,
    prompts_file: PromptsFile = None,
    seed: Seed = 0,
    steps: Annotated[
        int | None,
        number(
            Range(1, MOST_STEPS),
            "Steps of the plain sampler and of every cached method, 50; of each chunk of a stream, 8.",
        ),
    ] = None,
    frames: Annotated[int, number(Range(1, MOST_FRAMES), "Frames of a streaming model's videos.")] = 48,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    device: Device = None,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also cache-dit, diffusers' caches and hicache-pp, at as many computed steps."),
    ] = False,
    only_peers: Annotated[
        str, typer.Option(help="Names of the peers to measure with --peers, with commas; all of them by default.")
    ] = "",
    best_plain: Annotated[
        bool,
        typer.Option(help="Look for the best plain sampler too: three solvers with up to five spacings, two prompts."),
    ] = True,
    image: Annotated[
        Path | None,
        typer.Option(help="Own source image for an editing pipeline.", exists=True, dir_okay=False),
    ] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Where the figures go; images go beside it.")] = Path(
        "out/bench.json"
    ),
) -> None:
    """Measure methods against the plain sampler on the same prompts and seeds, and write JSON.

    Every method computes exactly the steps asked for; one that cannot is listed with the reason. A method with a
    threshold gets the one at which it computes as many, found on the first two prompts. A resolution method runs at its
    own number of steps, beside plain samplers with as many evaluations and as many counted operations. Under
    `accelerate launch` the prompts are shared among the processes. After Ctrl-C the same command goes on.

    On a streaming model --prompts are worlds, and the reference is the whole history.

    Example: hasten bench --model emoji-flux --methods reuse,taylorseer,hicache --computed-steps 12,9,7 --prompts 16
        --seed 0 --json out.json
    """
    if model in subject.streaming_names():
        refuse_given(context, NOT_OF_STREAMS, f"{model} streams video")
        chosen = () if methods == CACHES else names(methods)
        stream.bench_streams(model, chosen, StreamSettings(prompts, frames, steps or 8, seed), json_file)
        console.print(f"figures: [bold]{json_file}[/bold]   report: hasten report {json_file}")
        return
    from hasten.bench.environment import processes
    from hasten.bench.runner import BenchSettings

    refuse_given(context, {"frames": "--frames"}, f"{model} streams no video")
    settings = BenchSettings(
        methods=tuple(names(methods)),
        computed_steps=tuple(numbers(computed_steps, "--computed-steps", Range(1, MOST_STEPS))),
        prompts=prompts,
        prompt_list=own_prompts(prompts_file),
        seed=seed,
        steps=steps or 50,
        call=call_of(height, width, guidance),
        peers=peers,
        only_peers=tuple(names(only_peers)),
        image=image,
        best_plain=best_plain,
    )
    files = [Path(text) for one in names(methods) for _, given in registry.split(one) for text in given.values()]
    check_target(json_file, prompts_file, image, *files)
    result = _measured(model, settings, json_file, device)
    if processes().is_main_process:
        show_result(result)
        console.print(f"figures: [bold]{json_file}[/bold]   report: hasten report {json_file}")


def report(
    results: Annotated[list[Path], typer.Argument(help="JSON files that `hasten bench` wrote: one report of all.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; beside the first JSON by default.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="html (table, curves and images), md or csv (the table alone).")
    ] = "html",
) -> None:
    """Make a report of one or several results: one self-contained HTML file, Markdown tables, or CSV."""
    from hasten.bench.report import render_report

    first = results[0]
    file = out or first.parent / f"{first.stem}.{form}"
    console.print(f"report: [bold]{render_report(results, file, form)}[/bold]")
