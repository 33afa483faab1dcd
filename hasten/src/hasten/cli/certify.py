"""`hasten certify` and `hasten certificates`: a tolerance in, a certified setting out."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from hasten.cli import options
from hasten.cli.boundary import resumable
from hasten.cli.common import BAR, command_line, console, opened
from hasten.errors import ConfigError
from hasten.io import check_target
from hasten.parameters import MOST_GUIDANCE, MOST_STEPS, Range

if TYPE_CHECKING:
    from hasten.bench.certify_settings import CertifySettings
    from hasten.bench.subject import Subject
    from hasten.quality.certificate import Certificate
    from hasten.quality.tolerance import Tolerance

__all__ = [
    "Confidence",
    "MaxFlip",
    "MaxLpips",
    "Mean",
    "MinPsnr",
    "MinSsim",
    "Quality",
    "Share",
    "certificates",
    "certified",
    "certify",
    "tolerance_of",
]

WHOLE = re.compile(r"[+-]?[0-9]{1,9}")

Quality = Annotated[
    str | None, typer.Option(help="A tier (lossless, high, draft), or a name for the bounds that you give.")
]
MaxLpips = Annotated[float | None, typer.Option(help="Largest LPIPS of an image against the full run's.")]
MaxFlip = Annotated[float | None, typer.Option(help="Largest mean FLIP.")]
MinPsnr = Annotated[float | None, typer.Option(help="Smallest PSNR in dB.")]
MinSsim = Annotated[float | None, typer.Option(help="Smallest SSIM.")]
Share = Annotated[float | None, typer.Option(help="Share of requests that keep all bounds; 0.95 by default.")]
Mean = Annotated[bool, typer.Option("--mean", help="Bound the mean over requests instead of a share of them.")]
Confidence = Annotated[float | None, typer.Option(help="Of the certificate; 0.9 by default.")]


def tolerance_of(
    quality: str | None,
    max_lpips: float | None,
    max_flip: float | None,
    min_psnr: float | None,
    min_ssim: float | None,
    share: float | None,
    mean: bool,
    confidence: float | None,
) -> tuple[str, Tolerance]:
    """The name and the tolerance that options mean.

    Raises:
        ConfigError, UnknownNameError: for what means none.
    """
    from hasten.quality.tolerance import TIERS, Tolerance, check_name, tier

    if quality is not None:
        check_name(quality)
    given: dict[str, Any] = {"max_lpips": max_lpips, "max_flip": max_flip, "min_psnr": min_psnr, "min_ssim": min_ssim}
    given = {name: bound for name, bound in given.items() if bound is not None}
    if mean and share is not None:
        raise ConfigError("--mean bounds the mean over requests, --share a share of them; give one")
    how: dict[str, Any] = {} if confidence is None else {"confidence": confidence}
    if mean or share is not None:
        how["share"] = None if mean else share
    if not given:
        if quality is None:
            raise ConfigError(f"give a tolerance such as --max-lpips 0.02, or --quality {', '.join(TIERS)}")
        own = tier(quality)
        return quality, Tolerance(**{item.name: getattr(own, item.name) for item in fields(own)} | how)
    if quality in TIERS:
        raise ConfigError(f"--quality {quality} has bounds of its own; give your bounds another name, or leave it out")
    return quality or "custom", Tolerance(**given, **how)


def certify(
    model: options.ModelName = "emoji-flux",
    quality: Quality = None,
    max_lpips: MaxLpips = None,
    max_flip: MaxFlip = None,
    min_psnr: MinPsnr = None,
    min_ssim: MinSsim = None,
    share: Share = None,
    mean: Mean = False,
    confidence: Confidence = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Candidates, as for bench; foca:schedule=even, hicache, and leap where it is fitted."),
    ] = None,
    computed_steps: Annotated[
        str | None,
        typer.Option(help="Exact numbers of computed steps; those of 25,20,16,12,9,7,5 below the steps by default."),
    ] = None,
    prompts: Annotated[
        int, options.number(Range(1, options.MOST_COUNT), "How many prompts test, one image each.")
    ] = 100,
    screen: Annotated[
        int, options.number(Range(1, options.MOST_COUNT), "How many other prompts choose the order (the first ones).")
    ] = 8,
    prompts_file: options.PromptsFile = None,
    seed: options.Seed = 3000,
    steps: options.Steps = 50,
    height: options.Height = None,
    width: options.Width = None,
    guidance: Annotated[
        str | None, typer.Option(help="True classifier-free guidance: a scale, or a range that requests have: 2:5.")
    ] = None,
    arguments: Annotated[
        list[str],
        typer.Option("--set", help="Further argument of the pipeline's call: guidance_scale=2.5; repeatable."),
    ] = [],  # noqa: B006 - typer makes a list of its own
    procedure: Annotated[
        str, typer.Option(help="sequence (from the most expensive on, until one fails) or holm (all of them).")
    ] = "sequence",
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, float16 or bfloat16; a pipeline's by default bfloat16.")
    ] = None,
    device: options.Device = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The certificate's file; in this machine's store by default.")
    ] = None,
) -> None:
    """Find the cheapest setting that keeps a tolerance, shown on held-out prompts.

    The chance that the certificate is wrong is at most 1 - confidence, over all settings tested together, for requests
    like the prompts. Started again with the same prompts, seeds and steps, it goes on where it was cut short.

    Example: hasten certify --model emoji-flux --max-lpips 0.02 --min-psnr 30 --share 0.95 --confidence 0.9
    """
    from hasten.bench.certify_settings import CertifySettings

    name, tolerance = tolerance_of(quality, max_lpips, max_flip, min_psnr, min_ssim, share, mean, confidence)
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out}: a certificate is a JSON file; give a name that ends with .json")
    if out is not None:
        check_target(out, prompts_file)
    settings = CertifySettings(
        quality=name,
        tolerance=tolerance,
        methods=None if methods is None else tuple(options.names(methods)),
        computed_steps=None
        if computed_steps is None
        else tuple(options.numbers(computed_steps, "--computed-steps", Range(1, MOST_STEPS))),
        prompts=prompts,
        screen=screen,
        prompt_list=options.own_prompts(prompts_file),
        seed=seed,
        steps=steps,
        call=options.call_of(height, width, None) | _arguments(arguments),
        guidance=None if guidance is None else _range(guidance),
        procedure=procedure,  # type: ignore[arg-type]
    )
    certified(opened(model, device, dtype), settings, out)


def certified(model: Subject, settings: CertifySettings, out: Path | None) -> Certificate:
    """Certify, and show what came of it."""
    from hasten.bench.certify import run_certify

    with resumable(), Progress(*BAR, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def tick(label: str, done: int, total: int | None) -> None:
            phase = label.partition(":")[0] if label.startswith("screening") else label
            if phase not in tasks:
                tasks[phase] = bar.add_task(label, total=total)
            bar.update(tasks[phase], description=label, completed=done, total=total)

        certificate, path = run_certify(model, settings, out, tick, command_line())
    _show(certificate)
    console.print(f"certificate: [bold]{path}[/bold]", soft_wrap=True)
    how = f"'{path}'" if out is not None else f"{certificate.quality!r}"
    console.print(f"use: [bold]hasten.accelerate(pipe, quality={how})[/bold]", soft_wrap=True)
    return certificate


def _show(certificate: Certificate) -> None:
    table = Table("setting", "computed steps", "FLOPs ratio", "kept", "p", "", title=str(certificate.tolerance))
    for one in certificate.evidence.tried:
        table.add_row(
            one.setting,
            f"{one.computed_steps:g}",
            f"{one.flops_ratio:.2f}",
            f"{one.kept} of {one.requests}",
            f"{one.p_value:.2g}",
            "passed" if one.passed else "failed",
        )
    console.print(table)
    console.print(str(certificate), highlight=False)


def _arguments(texts: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name.strip()] = int(value) if WHOLE.fullmatch(value) else float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip().isidentifier() or not math.isfinite(found[name.strip()]):
            raise ConfigError(f"--set takes an argument and a number, such as guidance_scale=2.5; got {text!r}")
    return found


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high or low)
    except ValueError:
        found = 1.0, 0.0
    limits = Range(0, MOST_GUIDANCE)
    if found[0] > found[1] or not all(scale in limits for scale in found):
        raise ConfigError(f"--guidance must be a number {limits} or a range such as 2:5, got {text!r}")
    return found


def certificates() -> None:
    """List the certificates of this machine."""
    from hasten.quality.certificate import certificates as known
    from hasten.quality.certificate import shipped, store

    table = Table("quality", "model", "setting", "computed", "FLOPs ratio", "steps", "size", "guidance", "made")
    found = known() + shipped()
    for one in found:
        conditions = one.conditions
        size = f"{conditions.height}x{conditions.width}" + (f"x{conditions.frames}" if conditions.frames else "")
        table.add_row(
            one.quality,
            ", ".join(facts.model for facts in conditions.models.values()),
            one.setting,
            str(one.computed_steps),
            f"{one.flops_ratio:.2f}",
            str(conditions.steps),
            size,
            ", ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in conditions.guidance.items()),
            one.created,
        )
    console.print(table)
    console.print(f"{len(found)} in {store()} and from installed distributions", soft_wrap=True)
