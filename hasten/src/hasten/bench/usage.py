"""A row as the line of Python that uses what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten import registry
from hasten.bench.row import Row
from hasten.parameters import from_text

__all__ = ["python_line"]

BUNDLED = "from hasten.bench.subject import load; "


def python_line(row: Row, model: str) -> str:
    """How to use what a row measured.

    Args:
        row: of a method of hasten; LEAP without a file was measured with the fit that comes with the model.
        model: what it was measured on, as the result names it.

    Raises:
        UnknownNameError, ConfigError: for a row of another version, whose method or parameters are not known.
    """
    parts = registry.split(row.method)
    name, given = parts[0]
    if name == "leap":
        bring, fit = ("", repr(given["calibration"])) if given else (BUNDLED, f"load({model!r}).fitted['leap']")
        return f"{bring}hasten.accelerate(pipe, hasten.Leap({fit}))   # num_inference_steps={row.steps}"
    if row.staged:
        chosen = [(registry.info(part).config, texts) for part, texts in parts]
        built = [f"hasten.{config.__name__}({_arguments(config, texts)})" for config, texts in chosen]
        return f"hasten.accelerate(pipe, {', '.join(built)})   # num_inference_steps={row.steps}"
    decided = {key: str(row.params[key]) for key in ("computed_steps", "threshold") if row.params.get(key) is not None}
    if "threshold" not in decided and row.budget is not None:
        decided.setdefault("computed_steps", str(row.budget))
        given = {key: text for key, text in given.items() if key != "interval"}
    return f"hasten.accelerate(pipe, '{name}', {_arguments(registry.info(name).config, given | decided)})"


def _arguments(config: Any, texts: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in from_text(config, texts).items())
