"""Options that several commands share, and readers of their values."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from hasten.bench import subject
from hasten.errors import ConfigError, HastenError, ModelError
from hasten.io import describe, read_lines
from hasten.parameters import MOST_GUIDANCE, MOST_PIXELS, MOST_STEPS, Range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hasten.bench.token_plots import Decode
    from hasten.quality.configuration import Configuration

__all__ = [
    "MOST_COUNT",
    "MOST_SEED",
    "Audit",
    "CallSteps",
    "ComputedSteps",
    "ConfigFile",
    "Device",
    "Guidance",
    "Height",
    "Host",
    "Method",
    "ModelName",
    "OwnModel",
    "Port",
    "PromptsFile",
    "Quality",
    "Seed",
    "SomeSteps",
    "Steps",
    "Width",
    "Workers",
    "as_options",
    "call_of",
    "configured",
    "load_decoder",
    "names",
    "number",
    "numbers",
    "own_prompts",
    "refuse_given",
    "scales",
]

MODELS = ", ".join([*subject.names(), *subject.streaming_names()]) or "none installed"
MOST_SEED = 2**62  # every prompt adds its number, and generators take 64 bits
MOST_COUNT = 1_000_000  # of prompts, trials and the like
MOST_WORKERS = 100_000


def number(limits: Range, text: str, *names: str) -> Any:
    """An option that takes a number within limits; another one is refused in one line, before any work.

    Args:
        limits: of the number; not finite ones lie outside of all.
        text: its help, to which the limits are added.
        names: as they are written, where they are not the parameter's.
    """

    def check(context: typer.Context, option: typer.CallbackParam, given: Any) -> Any:
        if given is not None and given not in limits:
            kind = "whole number" if isinstance(given, int) else "number"
            where = context.command_path
            raise ConfigError(f"{option.opts[0]} must be a {kind} {limits}, got {given} (see {where} --help)")
        return given

    return typer.Option(*names, help=f"{text} A number {limits}.", callback=check)


Seed = Annotated[int, number(Range(0, MOST_SEED), "Prompt i is drawn with seed SEED + i.")]
ModelName = Annotated[
    str, typer.Option("--model", help=f"An installed model ({MODELS}), a pipeline's folder, or a hub id.")
]
ComputedSteps = Annotated[str, typer.Option(help="Exact numbers of computed steps, with commas.")]
Steps = Annotated[int, number(Range(2, MOST_STEPS), "Steps of the plain sampler.")]
Height = Annotated[int | None, number(Range(1, MOST_PIXELS), "Height in pixels; the model's own by default.")]
Width = Annotated[int | None, number(Range(1, MOST_PIXELS), "Width in pixels; the model's own by default.")]
Guidance = Annotated[
    float | None,
    number(
        Range(0, MOST_GUIDANCE),
        "True classifier-free guidance (two forwards per step) with an empty negative prompt.",
    ),
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
SomeSteps = Annotated[int | None, number(Range(1, MOST_STEPS), "Steps to compute.", "--computed-steps")]
Audit = Annotated[float | None, number(Range(0, 1), "Share of images that are checked against the full run.")]
CallSteps = Annotated[int | None, number(Range(1, MOST_STEPS), "Steps that the pipeline is called with.", "--steps")]
Host = Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for all of the machine's networks.")]
Port = Annotated[int, number(Range(1, 65_535), "Where to listen.")]
Workers = Annotated[int | None, number(Range(1, MOST_WORKERS), "Of Ray: one per GPU by default, else per CPU.")]


def names(text: str) -> list[str]:
    """`a,b` as names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, option: str, limits: Range) -> list[int]:
    """`12,9,7` as whole numbers within limits, at least one.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        found = [int(part) for part in text.split(",")]  # nothing between two commas is none of them
    except ValueError:
        found = []
    if not found or not all(count in limits for count in found):
        raise ConfigError(f"{option} takes whole numbers {limits} with commas, such as 12,9,7; got {text!r}")
    return found


def scales(text: str, option: str) -> list[float]:
    """`1.5,3,5` as different numbers from 0 to `MOST_GUIDANCE`; none for an empty text.

    Raises:
        ConfigError: if it is something else.
    """
    try:
        found = [float(part) for part in names(text)] if text else []
    except ValueError:
        found = [-1.0]
    limits = Range(0, MOST_GUIDANCE)
    if len(set(found)) < len(found) or not all(scale in limits for scale in found):
        raise ConfigError(f"{option} takes different numbers {limits} with commas, such as 1.5,3,5; got {text!r}")
    return found


def own_prompts(file: Path | None) -> tuple[str, ...]:
    """The lines of a file of prompts; none without a file.

    Raises:
        ConfigError: if it cannot be read, or holds none.
    """
    if file is None:
        return ()
    try:
        lines = read_lines(file)
    except (OSError, ValueError) as error:
        reason = describe(error)
        raise ConfigError(
            f"--prompts-file {file}: not readable as text ({reason}); give one prompt per line"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--prompts-file {file}: no prompts in it; write one per line")
    return prompts


def call_of(height: int | None, width: int | None, guidance: float | None) -> dict[str, Any]:
    """Arguments of a pipeline's call."""
    call: dict[str, Any] = {name: x for name, x in (("height", height), ("width", width)) if x is not None}
    if guidance is not None:
        call |= {"true_cfg_scale": guidance, "negative_prompt": ""}
    return call


def configured(file: Path | None, **given: Any) -> Configuration:
    """The configuration of a file with the options that were given besides, which take precedence.

    Raises:
        ConfigError, UnknownNameError: if they do not go together, cannot be had on any model, or name no model.
    """
    from hasten.acceleration import check_configuration
    from hasten.integrations.batch import overridden
    from hasten.quality.configuration import Configuration, load

    configuration = overridden(Configuration() if file is None else load(file), **given)
    if configuration.model is None:
        raise ConfigError("a model is needed: give --model, or `model:` in the configuration")
    check_configuration(configuration)
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


@contextmanager
def as_options(words: dict[str, str]) -> Iterator[None]:
    """Name options in the library's messages: each text on the left becomes the one on the right."""
    try:
        yield
    except (ConfigError, ModelError) as error:
        message = str(error)
        for text, option in words.items():
            message = message.replace(text, option)
        raise type(error)(message) from error


def load_decoder(name: str) -> Decode:
    """The function `module:function` that draws tokens as images `[n, H, W, 3]` in [0, 1].

    For `inspect` it gets tokens `[n]`, each to be drawn alone; for `sample` the tokens `[n, L]` of images.

    Raises:
        ConfigError: if there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--decoder {name}: {error}; give module:function, such as hasten_zoo.emoji_tokens:swatches"
        ) from error
    if not callable(found):
        raise ConfigError(f"--decoder {name} is a {type(found).__name__}, expected a function of tokens")
    return _drawing(name, found)


def _drawing(name: str, draw: Callable[..., Any]) -> Decode:
    """A decoder whose failures, and whatever is not images, name it."""

    def decode(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        try:
            images = np.asarray(draw(tokens), np.float32)
        except HastenError:
            raise
        except Exception as error:  # whatever it raises, it is no decoder of these tokens
            raise ConfigError(
                f"--decoder {name}: cannot draw tokens {tokens.shape} ({describe(error)}); give a function of them, "
                "such as hasten_zoo.emoji_tokens:decode"
            ) from error
        if images.ndim != 4 or images.shape[0] != len(tokens) or images.shape[-1] not in (1, 3, 4):
            raise ConfigError(f"--decoder {name}: gave {images.shape}, expected images [{len(tokens)}, H, W, 3]")
        return images

    return decode
