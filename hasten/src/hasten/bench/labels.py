"""Methods as text: how people read them."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["sampler_label", "short_label", "split_methods"]

SAMPLERS = {"euler": "Euler", "unipc": "UniPC", "dpmpp": "DPM-Solver++ 2M"}

# A plus before a name, not one within a number (1e+3) or a file's name.
PLUS = re.compile(r"\+(?=[A-Za-z][\w-]*(?:[:+]|$))")


def split_methods(text: str) -> list[str]:
    """`dvg:budget=0.5+foca:interval=4` as the texts of its methods."""
    return PLUS.split(text.strip())


def sampler_label(method: str) -> str:
    """A plain sampler as people read it: `unipc:spacing=karras` is UniPC, karras."""
    name, _, spacing = method.partition(":spacing=")
    return ", ".join(part for part in (SAMPLERS.get(name, name), spacing) if part)


def short_label(label: str) -> str:
    """A method's text as people read it: without the paths of its files, but with names that tell them apart."""
    return " + ".join(_short(part) for part in split_methods(label))


def _short(label: str) -> str:
    name, *params = label.split(":")
    words = []
    for param in params:
        key, _, value = param.partition("=")
        if param == "interval=1":
            continue  # the number of computed steps decides
        if key == "calibration":
            words += [_spoken(value)] if Path(value).stem.startswith(f"{name}-") else []
        elif key == "searched":
            words.append("searched steps" if Path(value).stem == "steps" else _spoken(value))
        else:
            words.append(f"{value} steps" if key == "schedule" else param)
    return ", ".join([name, *(word.removeprefix(f"{name} ") for word in words)])


def _spoken(path: str) -> str:
    return Path(path).stem.replace("-", " ")
