"""`hasten calibrate` and `hasten tune`: what is learned of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from hasten.bench.usage import python_line
from hasten.cli import certify, options
from hasten.cli.boundary import resumable
from hasten.cli.common import BAR, command_line, console, opened, show_result
from hasten.errors import ConfigError
from hasten.io import check_target
from hasten.parameters import MOST_STEPS, Range

if TYPE_CHECKING:
    from hasten.bench.tune_method import MethodTuning

SCREEN = 8  # prompts that choose the order of the settings to certify

LearnFrom = Annotated[
    int, options.number(Range(1, options.MOST_COUNT), "How many prompts to learn from (the last ones).", "--prompts")
]


def calibrate(
    model: options.ModelName = "emoji-flux",
    methods: Annotated[
        str, typer.Option(help="Names with commas; options of the fit after colons: hyca:clusters=4.")
    ] = "l2p,hyca,svdcache,magcache,teacache",
    prompts: LearnFrom = 12,
    prompts_file: options.PromptsFile = None,
    seed: options.Seed = 1000,
    steps: options.Steps = 50,
    height: options.Height = None,
    width: options.Width = None,
    guidance: options.Guidance = None,
    tokens: Annotated[
        int, options.number(Range(1, options.MOST_COUNT), "Tokens of a feature that are kept while recording.")
    ] = 512,
    device: options.Device = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for one file per method.")] = Path("calibrations"),
) -> None:
    """Record a model once, uncached, and fit the methods that have to be fitted.

    Use the steps, size and guidance that you will draw with. Under `accelerate launch` the prompts are shared among the
    processes. Started again with the same options after it was cut short, it goes on where it stopped.

    Example: hasten calibrate --model emoji-flux --methods l2p,hyca:clusters=4 --prompts 12 --out calibrations
    """
    from accelerate.utils import gather_object

    from hasten.bench.environment import environment, processes
    from hasten.bench.recording import Recording
    from hasten.bench.tune import tuning_calls
    from hasten.fitting.calibrate import check_length, fit, merge

    wanted = _fits(options.names(methods))
    for name, _ in wanted:
        check_length(name, steps)
    (site,) = {"module" if chosen.get("site") == "module" else "hidden" for _, chosen in wanted}
    call, own = options.call_of(height, width, guidance), options.own_prompts(prompts_file)
    _check_prompts(prompts, own)
    files = [check_target(out / f"{name}.safetensors") for name, _ in wanted]
    model_ = opened(model, device)
    model_.check_call(call)
    known = list(own) or model_.prompts
    _check_prompts(prompts, known)
    calls = tuning_calls(model_, known[-prompts:], seed, steps, call, batch=1)
    state = processes()
    identity = {"model": model_.name, "prompts": known[-prompts:], "seed": seed, "steps": steps, "call": call}
    recording = Recording(out, {**identity, "environment": environment()}, site, tokens)
    with (
        state.split_between_processes(list(enumerate(calls))) as mine,
        resumable(),
        Progress(*BAR, console=console) as bar,
    ):
        task = bar.add_task("recording", total=len(mine))
        own_trace = recording.run(model_.pipe, mine, lambda done, total: bar.update(task, completed=done, total=total))
    trace = merge(gather_object([own_trace]))
    if not state.is_main_process:
        return
    table = Table("method", "fitted", "file", title=f"{model_.name}: {len(calls)} runs of {steps} steps")
    for (name, chosen), file in zip(wanted, files, strict=True):
        with console.status(f"fitting {name}"):
            calibration = fit(trace, name, **chosen)
        table.add_row(name, _figures(calibration.report), str(calibration.save(file)))
    recording.remove()
    console.print(table)
    first = wanted[0][0]
    console.print(f"use: [bold]hasten.accelerate(pipe, {first!r}, calibration='{files[0]}')[/bold]")


def _fits(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Methods to fit with the options of their fits.

    Raises:
        ConfigError: for none, for one that needs no fit, or for methods that have to be recorded apart.
    """
    from hasten import methods, registry
    from hasten.parameters import from_text

    if not texts:
        raise ConfigError("--methods names what to fit, such as l2p,hyca; got nothing")
    able = [info.name for info in methods() if hasattr(info.config, "fit")]
    wanted = []
    for text in texts:
        for name, given in registry.split(text):
            fitter = getattr(registry.info(name).config, "fit", None)
            if fitter is None:
                raise ConfigError(f"{name} has nothing to calibrate; the methods that have are {', '.join(able)}")
            wanted.append((name, from_text(fitter, given, f"the fit of {name}")))
    named = [name for name, _ in wanted]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise ConfigError(
            f"--methods has {twice} twice, and both would be {twice}.safetensors: fit one of them with another --out"
        )
    if len({options.get("site") == "module" for _, options in wanted}) > 1:
        raise ConfigError("methods at site=module are recorded apart: calibrate them in a command of their own")
    return wanted


def _check_prompts(asked: int, known: Sequence[str]) -> None:
    if known and asked > len(known):
        raise ConfigError(f"--prompts {asked} asks for more than the {len(known)} prompts there are")


# What `tune --method` heeds.
OF_ONE_METHOD = {
    "model",
    "computed_steps",
    "method",
    "tried",
    "prompts",
    "prompts_file",
    "seed",
    "steps",
    "height",
    "width",
    "guidance",
    "trials",
    "device",
    "out",
}


def tune(
    context: typer.Context,
    model: options.ModelName = "emoji-flux",
    computed_steps: Annotated[
        str | None, typer.Option(help="Exact numbers of computed steps, with commas; 12,9,7 by default.")
    ] = None,
    max_error: Annotated[
        float | None,
        options.number(
            Range(above=0, most=1),
            "Instead of a number: the largest root mean squared error of an image, 0.01 is 40 dB.",
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Candidates, as for bench, or all; leap is a scheduler, the others are caches.")
    ] = "leap,leapcache,foca,taylorseer:order=2",
    search: Annotated[
        str, typer.Option(help="What finds the steps for the caches: leap, or a caching method to search with.")
    ] = "leap",
    method: Annotated[
        str,
        typer.Option(
            help="Instead of all this: one caching method, such as foca:schedule=even, whose parameters are chosen by "
            "whole runs."
        ),
    ] = "",
    tried: Annotated[
        list[str] | None,
        typer.Option("--try", help="With --method: a parameter and the values to try, sigma=0.4,0.5; may be repeated."),
    ] = None,
    prompts: LearnFrom = 8,
    held_out: Annotated[int, options.number(Range(1, options.MOST_COUNT), "How many other prompts to compare on.")] = 8,
    prompts_file: options.PromptsFile = None,
    seed: options.Seed = 1000,
    steps: options.Steps = 50,
    height: options.Height = None,
    width: options.Width = None,
    guidance: options.Guidance = None,
    trials: Annotated[
        int,
        options.number(
            Range(1, options.MOST_COUNT), "Lists of steps to look at for each number; of LEAP, six starts at most."
        ),
    ] = 40,
    rounds: Annotated[int, options.number(Range(0, options.MOST_COUNT), "Rounds of LEAP's refinement.")] = 3,
    guidances: Annotated[
        str,
        typer.Option(help="Scales that one LEAP file is to serve, and all between: 1.5,3,5; --guidance is compared."),
    ] = "",
    quality: certify.Quality = None,
    max_lpips: certify.MaxLpips = None,
    max_flip: certify.MaxFlip = None,
    min_psnr: certify.MinPsnr = None,
    min_ssim: certify.MinSsim = None,
    share: certify.Share = None,
    mean: certify.Mean = False,
    confidence: certify.Confidence = None,
    certify_on: Annotated[
        int, options.number(Range(1, options.MOST_COUNT), "With a tolerance: how many further prompts test it.")
    ] = 100,
    device: options.Device = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the files.")] = Path("calibrations"),
) -> None:
    """Find the best image that a budget can buy on a model: learn, compare on other prompts, say what to take.

    Learns LEAP (a scheduler with learned times and coefficients), gives its times to the caches, and measures all of
    them against the plain samplers. With a tolerance (a quality or bounds) it then certifies the cheapest setting that
    keeps it, on prompts that had no part so far; see `hasten certify`. Started again with the same options, it goes on
    where it was cut short.

    With --method it chooses the parameters of one caching method instead, and says the best setting as an expression.

    Example: hasten tune --model emoji-flux --computed-steps 9 --max-lpips 0.02
    """
    if method:
        others = {name: f"--{name.replace('_', '-')}" for name in context.params if name not in OF_ONE_METHOD}
        options.refuse_given(
            context, others, "--method chooses the parameters of one method for numbers of computed steps"
        )
        from hasten.bench.tune_method import MethodTuning, values_of

        tune_one(
            model,
            MethodTuning(
                method=method,
                computed_steps=tuple(
                    options.numbers(computed_steps or "12,9,7", "--computed-steps", Range(1, MOST_STEPS))
                ),
                values=values_of(method, tried or []),
                prompts=prompts,
                prompt_list=options.own_prompts(prompts_file),
                seed=seed,
                steps=steps,
                call=options.call_of(height, width, guidance),
                trials=trials,
            ),
            device,
            out,
        )
        return
    if tried:
        raise ConfigError("--try names values for --method; give one, such as --method hicache")
    from hasten.bench.tune import TuneSettings, run_tune

    settings = TuneSettings(
        computed_steps=()
        if computed_steps is None
        else tuple(options.numbers(computed_steps, "--computed-steps", Range(1, MOST_STEPS))),
        max_error=max_error,
        methods=tuple(options.names(methods)),
        search=search,
        prompts=prompts,
        held_out=held_out,
        prompt_list=options.own_prompts(prompts_file),
        seed=seed,
        steps=steps,
        call=options.call_of(height, width, guidance),
        trials=trials,
        rounds=rounds,
        guidances=tuple(options.scales(guidances, "--guidances")),
    )
    if settings.prompt_list:
        settings.check_prompts(settings.prompt_list)
    bounds = (quality, max_lpips, max_flip, min_psnr, min_ssim)
    wanted = None
    if any(value is not None for value in (*bounds, share, confidence)) or mean:
        wanted = certify.tolerance_of(*bounds, share, mean, confidence)
    model_ = opened(model, device)
    known = list(settings.prompt_list) or model_.prompts
    untouched = tuple(known[: len(known) - prompts - held_out])
    if wanted is not None and len(set(untouched)) < certify_on + SCREEN:
        raise ConfigError(
            f"--certify-on {certify_on} and {SCREEN} that screen ask for more than the {len(set(untouched))} prompts "
            "that are left after --prompts and --held-out; give more with --prompts-file, or a smaller number"
        )
    kept = f"what is learned so far is in {out}; the same command goes on from there"
    with resumable(kept), Progress(*BAR, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def tick(label: str, done: int, total: int | None) -> None:
            phase = label.partition(":")[0]
            if phase not in tasks:
                tasks[phase] = bar.add_task(label, total=total)
            bar.update(tasks[phase], description=label, completed=done, total=total)

        result = run_tune(model_, settings, out, tick, command_line())
    show_result(result)
    for count, best in (result.tune or {})["best"].items():
        for row in result.rows:
            if row.id == best:
                console.print(f"[bold]{count} computed steps[/bold]: {python_line(row, result.model)}", highlight=False)
    console.print(f"figures: [bold]{out / 'tune.json'}[/bold]   report: [bold]{out / 'tune.html'}[/bold]")
    if wanted is not None:
        from hasten.bench.certify_settings import CertifySettings

        measured = [row for row in result.rows if row.library == "hasten" and not row.failed and not row.staged]
        chosen = CertifySettings(
            quality=wanted[0],
            tolerance=wanted[1],
            methods=tuple(dict.fromkeys(row.method for row in measured)),
            computed_steps=tuple(dict.fromkeys(int(count) for count in (result.tune or {})["best"])),
            prompts=certify_on,
            screen=SCREEN,
            prompt_list=untouched,
            steps=steps,
            call=options.call_of(height, width, None),
            guidance=None if guidance is None else (guidance, guidance),
        )
        certify.certified(model_, chosen, None)


def tune_one(model: str, tuning: MethodTuning, device: str | None, out: Path) -> None:
    """Choose the parameters of one caching method."""
    from hasten.bench.tune_method import run_tune_method

    model_ = opened(model, device)
    tasks: dict[str, TaskID] = {}
    kept = f"what was tried so far is in {out}; the same command goes on from there"
    with resumable(kept), Progress(*BAR, console=console) as bar:

        def tick(label: str, done: int, total: int) -> None:
            phase = label.partition(":")[0]
            if phase not in tasks:
                tasks[phase] = bar.add_task(label, total=total)
            bar.update(tasks[phase], description=label, completed=done, total=total)

        found = run_tune_method(model_, tuning, out, tick)
    table = Table("computed steps", "dB", "at the start", "setting", title=f"{model_.name}: {tuning.prompts} prompts")
    for count, best in found["best"].items():
        table.add_row(count, f"{best['decibels']:.2f}", f"{best['at_the_start']:.2f}", best["method"])
    console.print(table)
    for count, best in found["best"].items():
        if not best["settled"]:
            tried = len(found["trials"][count])
            console.print(f"{count} computed steps: {tried} trials left settings untried; --trials takes more")
    console.print(f"all trials: [bold]{out / f'tuned-{tuning.name}.json'}[/bold]")


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
