"""Methods as text: how people read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hasten.registry import split

__all__ = ["sampler_label", "short_label"]

SAMPLERS = {"euler": "Euler", "unipc": "UniPC", "dpmpp": "DPM-Solver++ 2M"}


def sampler_label(method: str) -> str:
    """A plain sampler as people read it: `unipc:spacing=karras` is UniPC, karras."""
    name, _, spacing = method.partition(":spacing=")
    return ", ".join(part for part in (SAMPLERS.get(name, name), spacing) if part)


def short_label(label: str) -> str:
    """A method's text as people read it: without the paths of its files, but with names that tell them apart."""
    return " + ".join(_short(name, texts) for name, texts in split(label))


def _short(name: str, texts: Mapping[str, str]) -> str:
    words = []
    for key, value in texts.items():
        if key == "interval" and value == "1":
            continue  # the number of computed steps decides
        if key == "calibration":
            words += [_spoken(value)] if Path(value).stem.startswith(f"{name}-") else []
        elif key == "searched":
            words.append("searched steps" if Path(value).stem == "steps" else _spoken(value))
        else:
            words.append(f"{value} steps" if key == "schedule" else f"{key}={value}")
    return ", ".join([name, *(word.removeprefix(f"{name} ") for word in words)])


def _spoken(path: str) -> str:
    return Path(path).stem.replace("-", " ")
