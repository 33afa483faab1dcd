"""Options that several commands share, and readers of their values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.bench import subject
from hasten.errors import ConfigError

if TYPE_CHECKING:
    from hasten.quality.configuration import Configuration

__all__ = [
    "MOST_SEED",
    "Audit",
    "CallSteps",
    "ComputedSteps",
    "ConfigFile",
    "Device",
    "Guidance",
    "Height",
    "Method",
    "ModelName",
    "OwnModel",
    "PromptsFile",
    "Quality",
    "Seed",
    "SomeSteps",
    "Steps",
    "Width",
    "Workers",
    "call_of",
    "configured",
    "names",
    "numbers",
    "own_prompts",
    "refuse_given",
    "scales",
]

MODELS = ", ".join([*subject.names(), *subject.streaming_names()]) or "none installed"
MOST_PIXELS = 16_384  # of a side; tokens beyond take memory that no machine has
MOST_SEED = 2**62  # every prompt adds its number, and generators take 64 bits

Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Prompt i is drawn with seed SEED + i.")]
ModelName = Annotated[
    str, typer.Option("--model", help=f"An installed model ({MODELS}), a pipeline's folder, or a hub id.")
]
ComputedSteps = Annotated[str, typer.Option(help="Exact numbers of computed steps, with commas.")]
Steps = Annotated[int, typer.Option(min=2, help="Steps of the plain sampler.")]
Height = Annotated[int | None, typer.Option(help="Height in pixels; the model's own by default.")]
Width = Annotated[int | None, typer.Option(help="Width in pixels; the model's own by default.")]
Guidance = Annotated[
    float | None,
    typer.Option(help="True classifier-free guidance (two forwards per step) with an empty negative prompt."),
]
Device = Annotated[str | None, typer.Option(help="Such as cuda or cuda:1; where the model is by default.")]
PromptsFile = Annotated[
    Path | None, typer.Option("--prompts-file", "--from-prompts", help="Own prompts, one per line.")
]

# One setting for many images: a configuration, or what is said instead.
OwnModel = Annotated[
    str | None,
    typer.Option("--model", help=f"An installed model ({MODELS}), a pipeline's folder, a hub id."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A configuration (hasten.yaml); options take precedence.")
]
Quality = Annotated[
    str | None, typer.Option(help="A certified tier (lossless, high, draft), a certificate's path, or exact.")
]
Method = Annotated[str | None, typer.Option(help="A method expression, such as foca:schedule=even.")]
SomeSteps = Annotated[int | None, typer.Option("--computed-steps", min=1, help="Steps to compute.")]
Audit = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of images that are checked against the full run.")
]
CallSteps = Annotated[int | None, typer.Option("--steps", min=1, help="Steps that the pipeline is called with.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Of Ray: one per GPU by default, else per CPU.")]


def names(text: str) -> list[str]:
    """`a,b` as names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """`12,9,7` as whole numbers of `least` or more, at least one.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        found = [int(part) for part in names(text)]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise ConfigError(f"{option} takes whole numbers of {least} or more with commas, such as 12,9,7; got {text!r}")
    return found


def scales(text: str, option: str) -> list[float]:
    """`1.5,3,5` as different finite numbers of 0 or more; none for an empty text.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        found = [float(part) for part in names(text)] if text else []
    except ValueError:
        found = [-1.0]
    if len(set(found)) < len(found) or not all(math.isfinite(scale) and scale >= 0 for scale in found):
        raise ConfigError(f"{option} takes different numbers with commas, such as 1.5,3,5; got {text!r}")
    return found


def own_prompts(file: Path | None) -> tuple[str, ...]:
    """The lines of a file of prompts; none without a file.

    Raises:
        ConfigError: if it cannot be read, or holds none.
    """
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {file}: not readable as text ({error}); give one prompt per line") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--prompts-file {file}: no prompts in it; write one per line")
    return prompts


def call_of(height: int | None, width: int | None, guidance: float | None) -> dict[str, Any]:
    """Arguments of a pipeline's call.

    Raises:
        ConfigError: for a size or guidance that no model can have.
    """
    call: dict[str, Any] = {}
    for name, length in (("height", height), ("width", width)):
        if length is not None:
            if length < 1:
                raise ConfigError(f"--{name} must be at least 1 pixel, got {length}")
            if length > MOST_PIXELS:
                raise ConfigError(f"--{name} must be at most {MOST_PIXELS} pixels, got {length}")
            call[name] = length
    if guidance is not None:
        if not math.isfinite(guidance) or guidance < 0:
            raise ConfigError(f"--guidance must be a finite number of 0 or more, got {guidance}")
        call |= {"true_cfg_scale": guidance, "negative_prompt": ""}
    return call


def configured(file: Path | None, **given: Any) -> Configuration:
    """The configuration of a file with the options that were given besides, which take precedence.

    Raises:
        ConfigError: if they do not go together, or name no model.
    """
    from hasten.integrations.batch import overridden
    from hasten.quality.configuration import Configuration, load

    call_of(given["height"], given["width"], given["guidance"])  # refuses what no model can draw
    configuration = overridden(Configuration() if file is None else load(file), **given)
    if configuration.model is None:
        raise ConfigError("a model is needed: give --model, or `model:` in the configuration")
    return configuration


def refuse_given(context: typer.Context, options: dict[str, str], why: str) -> None:
    """Refuse options that would do nothing.

    Args:
        context: of the command.
        options: as they are written on the command line, by name of the parameter.
        why: what the command does instead of heeding them.

    Raises:
        ConfigError: if one of them was given.
    """
    for name, option in options.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"{why}; leave {option} out")
