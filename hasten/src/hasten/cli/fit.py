"""`hasten calibrate` and `hasten tune`: what is learned of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from hasten.bench.row import Row
from hasten.cli.common import BAR, ModelName, console, names, numbers, own_prompts, show_result
from hasten.errors import ConfigError

Prompts = Annotated[int, typer.Option(min=1, help="How many prompts to learn from (the model's last ones).")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts-file", "--from-prompts", help="Own prompts, one a line.", exists=True, dir_okay=False),
]
SeedFrom = Annotated[int, typer.Option("--seed", help="Prompt i is drawn with seed SEED + i.")]
Steps = Annotated[int, typer.Option(min=2, help="Steps of the plain sampler.")]
Height = Annotated[int | None, typer.Option(help="Height in pixels; the model's own by default.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels; the model's own by default.")]
Guidance = Annotated[float | None, typer.Option(help="True classifier-free guidance with an empty negative prompt.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda.")]


def calibrate(
    model: ModelName = "emoji-flux",
    methods: Annotated[
        str, typer.Option(help="Names with commas; options of the fit after colons: hyca:clusters=4.")
    ] = "l2p,hyca,svdcache,magcache,teacache",
    prompts: Prompts = 12,
    prompts_file: PromptsFile = None,
    seed: SeedFrom = 1000,
    steps: Steps = 50,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a feature that are kept while recording.")] = 512,
    device: Device = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for one file a method.")] = Path("calibrations"),
) -> None:
    """Record a model once, uncached, and fit the methods that have to be fitted.

    Use the steps, size and guidance that you will draw with. Under `accelerate launch` the prompts are shared among the
    processes.

    Example: hasten calibrate --model emoji-flux --methods l2p,hyca:clusters=4 --prompts 12 --out calibrations
    """
    from accelerate.utils import gather_object

    from hasten.bench.arms import parse_options
    from hasten.bench.environment import processes
    from hasten.bench.tune import tuning_calls
    from hasten.fitting import calibrate as recording

    wanted = [parse_options(text) for text in names(methods)]
    sites = {"module" if options.get("site") == "module" else "hidden" for _, options in wanted}
    if len(sites) > 1:
        raise ConfigError("methods at site=module are recorded apart: calibrate them in a command of their own")
    (site,) = sites
    model_ = _opened(model, device)
    known = own_prompts(prompts_file) or model_.prompts
    if prompts > len(known):
        raise ConfigError(f"--prompts {prompts} asks for more than the {len(known)} prompts there are")
    calls = tuning_calls(model_, known[-prompts:], seed, steps, _call(height, width, guidance), batch=1)
    state = processes()
    with state.split_between_processes(calls) as own, Progress(*BAR, console=console) as bar:
        task = bar.add_task("recording", total=len(own))
        trace = recording.record(
            model_.pipe, own, site=site, tokens=tokens, progress=lambda done, total: bar.update(task, completed=done)
        )
    trace = recording.merge(gather_object([trace]))
    if not state.is_main_process:
        return
    table = Table("method", "fitted", "file", title=f"{model_.name}: {len(calls)} runs of {steps} steps")
    for name, options in wanted:
        calibration = recording.fit(trace, name, **options)
        path = calibration.save(out / f"{name}.safetensors")
        table.add_row(name, _figures(calibration.report), str(path))
    console.print(table)
    first = wanted[0][0]
    console.print(f"use: [bold]hasten.accelerate(pipe, {first!r}, calibration='{out / first}.safetensors')[/bold]")


def tune(
    model: ModelName = "emoji-flux",
    computed_steps: Annotated[str, typer.Option(help="Numbers of computed steps.")] = "12,9,7",
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Instead of a number: the largest root mean squared error of an image, 0 to 1 (0.01 is 40 dB)."
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Candidates, as for bench, or all; leap is a scheduler, the others are caches.")
    ] = "leap,leapcache,foca,taylorseer:order=2",
    search: Annotated[
        str, typer.Option(help="What finds the steps for the caches: leap, or a caching method to search with.")
    ] = "leap",
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts to learn from (the last ones).")] = 8,
    held_out: Annotated[int, typer.Option(min=1, help="How many other prompts to compare on.")] = 8,
    prompts_file: PromptsFile = None,
    seed: SeedFrom = 1000,
    steps: Steps = 50,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    trials: Annotated[int, typer.Option(min=1, help="Lists of steps to look at for each number.")] = 40,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of LEAP's refinement.")] = 3,
    device: Device = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.")] = Path("calibrations"),
) -> None:
    """Find the best image that a budget can buy on a model: learn, compare on other prompts, say what to take.

    Learns LEAP (a scheduler with learned times and coefficients), gives its times to the caches, and measures all of
    them against the plain samplers. Started again with the same options, it goes on where it was cut short.

    Example: hasten tune --model emoji-flux --computed-steps 9
    """
    from hasten.bench.tune import TuneSettings, run_tune

    settings = TuneSettings(
        computed_steps=tuple(numbers(computed_steps, "--computed-steps")),
        max_error=max_error,
        methods=tuple(names(methods)),
        search=search,
        prompts=prompts,
        held_out=held_out,
        prompt_list=own_prompts(prompts_file),
        seed=seed,
        steps=steps,
        call=_call(height, width, guidance),
        trials=trials,
        rounds=rounds,
    )
    model_ = _opened(model, device)
    with Progress(*BAR, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def tick(label: str, done: int, total: int) -> None:
            phase = label.partition(":")[0]
            if phase not in tasks:
                tasks[phase] = bar.add_task(label, total=total)
            bar.update(tasks[phase], description=label, completed=done, total=total)

        result = run_tune(model_, settings, out, tick)
    show_result(result)
    for count, best in (result.tune or {})["best"].items():
        for row in result.rows:
            if row.id == best:
                console.print(f"[bold]{count} computed steps[/bold]: {_use(row, out)}", highlight=False)
    console.print(f"figures: [bold]{out / 'tune.json'}[/bold]   report: [bold]{out / 'tune.html'}[/bold]")


def _use(row: Row, folder: Path) -> str:
    """How to use what a row measured, as Python."""
    from hasten import registry
    from hasten.bench.arms import parse_options
    from hasten.bench.labels import split_methods

    name, options = parse_options(row.method)
    if name == "leap":
        file = folder / "leap.safetensors"
        return f"pipe.scheduler = hasten.LeapScheduler.load('{file}', pipe)   # num_inference_steps={row.steps}"
    if row.staged:
        parts = [parse_options(part) for part in split_methods(row.method)]
        built = [f"hasten.{registry.info(part).config.__name__}({_arguments(given)})" for part, given in parts]
        return f"hasten.accelerate(pipe, {', '.join(built)})   # num_inference_steps={row.steps}"
    decided = {key: row.params[key] for key in ("computed_steps", "threshold") if row.params.get(key) is not None}
    return f"hasten.accelerate(pipe, '{name}', {_arguments(options | decided)})"


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _opened(name: str, device: str | None) -> Any:
    from hasten.bench.runner import open_model

    with console.status(f"loading {name}"):
        return open_model(name, device=device)


def _call(height: int | None, width: int | None, guidance: float | None) -> dict[str, Any]:
    """Arguments of the pipeline's call that the user gave."""
    call: dict[str, Any] = {key: value for key, value in (("height", height), ("width", width)) if value is not None}
    return call if guidance is None else call | {"true_cfg_scale": guidance, "negative_prompt": ""}


def _figures(report: dict[str, Any]) -> str:
    """A report in a few lines: single figures as they are, curves as a line of bars with their range."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict):
            lines.append(f"[dim]{key}[/dim] {_figures(value)}" if len(report) <= 3 else "")
        elif isinstance(value, list) and len(value) > 8:
            lines.append(f"{key.replace('_', ' ')} {_bars(value)} {min(value):.3g} to {max(value):.3g}")
        else:
            lines.append(f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "\n".join(line for line in lines if line) or f"{len(report)} slots"


def _bars(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (v - low) / max(high - low, 1e-12)))] for v in values)
