"""A setting as a file: `hasten.yaml`, for the library, the command line and whatever runs it.

quality: high            # or a method, and perhaps computed_steps
audit: 0.01

method: foca:schedule=even
computed_steps: 9

model: black-forest-labs/FLUX.1-dev      # of the command line alone, as are steps, height, width and guidance
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from hasten import registry
from hasten.errors import ConfigError, UnknownNameError, unknown
from hasten.io import describe, parse_json, read_bytes, write_atomically
from hasten.parameters import (
    MOST_GUIDANCE,
    MOST_PIXELS,
    MOST_STEPS,
    Declared,
    Parameter,
    Range,
    Text,
    from_text,
    parameters,
)
from hasten.quality.tolerance import EXACT

__all__ = ["Configuration", "configuration_of", "load", "read", "schema"]

MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Configuration(Declared):
    """What to do and, for the command line, with which model and call."""

    quality: Annotated[
        str | None, Text(1), "a certified tier (lossless, high, draft), a certificate's path, or exact"
    ] = None
    method: Annotated[str | None, Text(1), "a method expression, such as foca:schedule=even"] = None
    computed_steps: Annotated[int | None, Range(1, MOST_STEPS), "steps that the method computes"] = None
    audit: Annotated[float, Range(0, 1), "share of calls that are checked against the full run"] = 0.0
    model: Annotated[str | None, Text(1), "an installed model, a pipeline's folder, or a hub id"] = None
    steps: Annotated[int | None, Range(1, MOST_STEPS), "steps that the pipeline is called with"] = None
    height: Annotated[int | None, Range(1, MOST_PIXELS), "height in pixels"] = None
    width: Annotated[int | None, Range(1, MOST_PIXELS), "width in pixels"] = None
    guidance: Annotated[float | None, Range(0, MOST_GUIDANCE), "true classifier-free guidance"] = None

    def check(self) -> None:
        if self.quality is not None and (self.method is not None or self.computed_steps is not None):
            raise ConfigError("Configuration: quality decides on method and computed_steps; leave them or it out")
        if self.steps is not None and self.computed_steps is not None and self.computed_steps > self.steps:
            raise ConfigError(
                f"Configuration: {self.computed_steps} of {self.steps} steps cannot be computed; give smaller "
                "computed_steps, or more steps"
            )
        if self.audit and self.quality is None:
            raise ConfigError("Configuration: audit checks the tolerance of a quality; give one, or leave audit out")
        if self.audit and self.quality == EXACT:
            raise ConfigError("Configuration: audit checks a tolerance, and quality exact has none; leave audit out")
        if self.method is not None:
            for name, texts in registry.split(self.method):
                from_text(registry.info(name).config, texts, name)

    def save(self, path: str | Path) -> Path:
        """Write it as YAML, or as JSON to a name that ends so; returns the path.

        Files in it are named so that `load` finds them from anywhere: those below its folder as seen from there.

        Raises:
            FileError: if it cannot be written.
        """
        folder = Path(os.path.abspath(path)).parent
        stored = _with_files(self, Path(), lambda text: _seen_from(folder, text))
        defaults = {name: parameter.default for name, parameter in parameters(Configuration).items()}
        content = {name: value for name, value in asdict(stored).items() if value != defaults[name]}
        if Path(path).suffix == ".json":
            return write_atomically(path, json.dumps(content, indent=1) + "\n")
        import yaml

        return write_atomically(path, yaml.safe_dump(content, sort_keys=False))


def load(path: str | Path) -> Configuration:
    """Read a configuration, YAML or JSON; paths of files in it are relative to its folder.

    Example:
        >>> run = hasten.accelerate(pipe, hasten.load("hasten.yaml"))

    Raises:
        ConfigError: if there is no such file, or it is no configuration.
        UnknownNameError: for an entry or a method that does not exist.
    """
    path = Path(path)
    return configuration_of(read(path), str(path), path.parent)


def read(path: Path) -> Any:
    """The content of a YAML or JSON file.

    Raises:
        ConfigError: if there is none that can be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML without entries that are there twice, of which the last one would count."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
            for twice in (name for name, count in names.most_common(1) if count > 1):
                raise ValueError(f"the entry {twice!r} is there twice")
            return super().construct_mapping(node, deep)

    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8-sig")
        return parse_json(text) if path.suffix == ".json" else yaml.load(text, Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `run.save({str(path)!r})` writes one") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: no usable configuration ({describe(error)})") from error


def configuration_of(content: Any, origin: str, folder: Path) -> Configuration:
    """The configuration in plain values that were read.

    Args:
        content: entries by name.
        origin: where they come from, for messages.
        folder: that paths in them are relative to.

    Raises:
        ConfigError, UnknownNameError: if they are none.
    """
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{origin}: expected entries such as `quality: high`, got {type(content).__name__}")
    known = parameters(Configuration)
    for name, value in content.items():
        if name not in known:
            raise unknown(f"entry of {origin}", name, known)
        if not isinstance(value, (str, int, float, NoneType)):  # lists may be short to write and endless to show
            raise ConfigError(f"{origin}: {name} is a {type(value).__name__}, expected text or a number")
    try:
        return _with_files(Configuration(**content), folder, lambda text: str(folder / text))
    except (ConfigError, UnknownNameError) as error:
        raise type(error)(f"{origin}: {str(error).removeprefix('Configuration: ')}") from error


def _with_files(made: Configuration, folder: Path, named: Callable[[str], str]) -> Configuration:
    """The configuration with the files in it, whose paths are relative to a folder, named in another way."""
    changes: dict[str, Any] = {}
    if made.quality is not None and made.quality.endswith(".json"):
        changes["quality"] = named(made.quality)
    if made.method is not None:
        parts = []
        for name, texts in registry.split(made.method):
            found = {key: named(text) if (folder / text).is_file() else text for key, text in texts.items()}
            parts.append(":".join([name, *(f"{key}={text}" for key, text in found.items())]))
        changes["method"] = "+".join(parts)
    return replace(made, **changes)


def _seen_from(folder: Path, path: str) -> str:
    """A file by its path relative to a folder that it lies below, else by its absolute one."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration's file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hasten",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property(parameter) for name, parameter in parameters(Configuration).items()},
    }


def _property(parameter: Parameter) -> dict[str, Any]:
    inner, *extras = get_args(parameter.hint)  # all of them are annotated
    limits = [extra for extra in extras if isinstance(extra, Range)]
    kinds = [kind for kind in (get_args(inner) or (inner,)) if kind is not NoneType]
    names = {int: "integer", float: "number", str: "string"}
    found: dict[str, Any] = {"type": names[kinds[0]], "description": parameter.meaning}
    for limit in limits:
        bounds = {"minimum": limit.least, "maximum": limit.most}
        found |= {key: value for key, value in bounds.items() if value is not None}
    return found
