"""`hasten calibrate` and `hasten tune`: fit methods, and the steps at which to compute, to a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from rich.table import Table

from hasten.cli_common import BAR, ModelName, console, names, numbers, own_prompts
from hasten.errors import ConfigError

Prompts = Annotated[int, typer.Option(min=1, help="How many prompts to learn from (the model's last ones).")]
PromptsFile = Annotated[Path | None, typer.Option(help="Own prompts, one a line.", exists=True, dir_okay=False)]
SeedFrom = Annotated[int, typer.Option("--seed", help="Prompt i is drawn with seed SEED + i.")]
Steps = Annotated[int, typer.Option(min=2, help="Steps of the plain sampler.")]
Height = Annotated[int | None, typer.Option(help="Height in pixels; the model's own by default.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels; the model's own by default.")]
Guidance = Annotated[float | None, typer.Option(help="True classifier-free guidance with an empty negative prompt.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda.")]
BATCH = 4  # prompts that a trial of `tune` draws at a time


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

    from hasten import recording
    from hasten.bench.arms import parse_options
    from hasten.bench.runner import processes

    wanted = [parse_options(text) for text in names(methods)]
    sites = {"module" if options.get("site") == "module" else "hidden" for _, options in wanted}
    if len(sites) > 1:
        raise ConfigError("methods at site=module are recorded apart: calibrate them in a command of their own")
    (site,) = sites
    model_, calls = _calls(model, prompts, prompts_file, seed, steps, height, width, guidance, device)
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
    method: Annotated[
        str, typer.Option(help="leap (a scheduler), or the caching method to search steps with, as for bench.")
    ] = "foca",
    full_steps: Annotated[str, typer.Option(help="Numbers of computed steps to find lists for.")] = "12,9,7",
    prompts: Prompts = 8,
    prompts_file: PromptsFile = None,
    seed: SeedFrom = 1000,
    steps: Steps = 50,
    height: Height = None,
    width: Width = None,
    guidance: Guidance = None,
    trials: Annotated[int, typer.Option(min=2, help="Lists to look at for each number.")] = 80,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; calibrations/steps or leap.safetensors by default.")
    ] = None,
) -> None:
    """Find the steps at which a model is best computed, for each number of computed steps.

    A trial draws all prompts with another list of steps and compares with the plain sampler. The lists serve every
    caching method: give the file as `tuned=...`. With `--method leap` the file holds a scheduler instead, with
    learned coefficients: `pipe.scheduler = hasten.LeapScheduler.load(file)`.

    Example: hasten tune --model emoji-flux --method foca --full-steps 12,9,7 --prompts 8 --trials 80
    """
    from hasten.bench.arms import parse_method
    from hasten.solvers import fit_leap
    from hasten.tuning import tune_steps

    leap = method == "leap"
    chosen = None if leap else parse_method(method)[1]
    out = out or Path("calibrations") / ("leap.safetensors" if leap else "steps.safetensors")
    model_, calls = _calls(model, prompts, prompts_file, seed, steps, height, width, guidance, device, BATCH)
    counts = numbers(full_steps, "--full-steps")
    with Progress(*BAR, console=console) as bar:
        tasks = {count: bar.add_task(f"{count} computed steps", total=trials) for count in counts}

        def tick(count: int, done: int, most: int, best: float) -> None:
            bar.update(tasks[count], completed=done, description=f"{count} computed: {_decibels(best):.1f} dB")

        if chosen is None:
            calibration = fit_leap(model_.pipe, calls, counts, trials=trials, progress=tick)
        else:
            calibration = tune_steps(model_.pipe, chosen, calls, counts, trials=trials, progress=tick)
        for task in tasks.values():
            bar.update(task, completed=trials)
    path = calibration.save(out)
    table = Table("computed", "steps", "spread", "found", "trials", title=f"{model_.name}, searched with {method}")
    table.caption = "spread, found: signal to error in dB over the final latents, before and after the search"
    for count in counts:
        figures = calibration.report[str(count)]
        before, after = figures["at_the_start"], figures["relative_squared_error"]
        table.add_row(
            str(count),
            " ".join(map(str, figures["steps"])),
            f"{_decibels(before):.1f}",
            f"{_decibels(after):.1f}",
            f"{figures['trials']}{'' if figures['settled'] else ' (all used)'}",
        )
    console.print(table)
    use = f"hasten.accelerate(pipe, 'foca', tuned='{path}', interval=7)"
    console.print(f"use: [bold]{f'pipe.scheduler = hasten.LeapScheduler.load({str(path)!r})' if leap else use}[/bold]")


def _decibels(relative_squared_error: float) -> float:
    return -10 * math.log10(max(relative_squared_error, 1e-30))


def _calls(
    name: str,
    prompts: int,
    prompts_file: Path | None,
    seed: int,
    steps: int,
    height: int | None,
    width: int | None,
    guidance: float | None,
    device: str | None,
    batch: int = 1,
) -> tuple[Any, list[dict[str, Any]]]:
    """The model, and one call for each batch of prompts; the last prompts, since `bench` takes the first ones."""
    from hasten.bench.runner import open_model

    with console.status(f"loading {name}"):
        model = open_model(name, device=device)
    chosen: Sequence[str] = own_prompts(prompts_file) or model.prompts
    if prompts > len(chosen):
        raise ConfigError(f"--prompts {prompts} asks for more than the {len(chosen)} prompts there are")
    common = {**model.call, "num_inference_steps": steps, "output_type": "latent"}
    common |= {key: value for key, value in (("height", height), ("width", width)) if value is not None}
    if guidance is not None:
        common |= {"true_cfg_scale": guidance, "negative_prompt": ""}
    picked, calls = list(chosen[-prompts:]), []
    for first in range(0, prompts, batch):
        group = picked[first : first + batch]
        seeds = [torch.Generator().manual_seed(seed + first + i) for i in range(len(group))]
        negative = {"negative_prompt": [""] * len(group)} if guidance is not None else {}
        calls.append({**common, **negative, "prompt": group, "generator": seeds})
    return model, calls


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
