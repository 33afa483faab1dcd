"""`hasten generate`: many images into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from hasten.cli import options
from hasten.cli.boundary import resumable
from hasten.cli.common import BAR, console, opened
from hasten.errors import ConfigError
from hasten.io import check_target

__all__ = ["generate"]

SHOWN = 5  # failures


def generate(
    prompts_file: Annotated[
        Path,
        typer.Option("--prompts-file", help='One prompt per line, or JSON: {"id": "a1", "prompt": "...", "seed": 7}.'),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for an image and a JSON file per job.")],
    model: options.OwnModel = None,
    config: options.ConfigFile = None,
    quality: options.Quality = None,
    method: options.Method = None,
    computed_steps: options.SomeSteps = None,
    audit: options.Audit = None,
    steps: options.CallSteps = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance: options.Guidance = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="Share the jobs among the workers of a Ray cluster: its address, or local."),
    ] = None,
    workers: options.Workers = None,
) -> None:
    """Draw every prompt of a file into a folder, with where each image came from.

    Without a setting nothing is accelerated. Jobs may have sizes, steps, guidance, a quality or computed steps of their
    own. Started again after it was cut short in any way, the same command leaves out the images that are there.

    Example: hasten generate --model emoji-flux --prompts-file prompts.jsonl --out images --quality high
    """
    from hasten.integrations.batch import Worker, read_jobs
    from hasten.integrations.batch import generate as run

    jobs = read_jobs(prompts_file, seed)
    names = {f"{job.id}{suffix}" for job in jobs for suffix in (".json", ".png", ".webp")}
    for source in (prompts_file, config):
        if source is not None and source.name in names:
            check_target(out / source.name, source)
    check_target(out / f"{jobs[0].id}.json")
    configuration = options.configured(
        config,
        model=model,
        quality=quality,
        method=method,
        computed_steps=computed_steps,
        audit=audit,
        steps=steps,
        height=height,
        width=width,
        guidance=guidance,
    )
    if workers is not None and ray is None:
        raise ConfigError("--workers is how many workers a Ray cluster has; give --ray as well, or leave it out")
    if device is not None and ray is not None:
        raise ConfigError("Ray gives each worker a device of its own; leave --device or --ray out")
    worker = None if ray is not None else Worker(configuration, model=opened(str(configuration.model), device))
    with resumable(), Progress(*BAR, console=console) as bar:
        task = bar.add_task("generating", total=len(jobs))

        def tick(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        if worker is not None:
            failures = run(worker, jobs, out, tick)
        else:
            from hasten.integrations.ray_batch import generate as share

            failures = share(configuration, jobs, out, None if ray == "local" else ray, workers, tick)
    console.print(f"{len(jobs) - len(failures)} of {len(jobs)} images: [bold]{out}[/bold]", soft_wrap=True)
    if failures:
        reasons = "; ".join(f"{one.id}: {one.error}" for one in failures[:SHOWN])
        raise ConfigError(f"{len(failures)} of {len(jobs)} jobs could not be done ({reasons})")
