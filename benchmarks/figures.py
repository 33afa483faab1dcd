"""Figures in the sentences of the README and the docs: looked up in the JSON files, or known to come from elsewhere.

A figure is written `<!-- = emoji-flux leap 9 psnr -->0.0<!-- / -->`: file, method, computed steps and field of a result
of `hasten bench`, with as many digits as are written. `over unipc` behind it asks for the lead over another method
(`best-plain`: over the plain sampler that is nearest to the full run), `%` behind the field for per cent. With the path
of an entry in the place of method, steps and field any JSON file will do: `leap-limits.json rows/0/error`. In a path
`name=value` is the entry of a list that has it (`&` joins several), and `median`, `mean`, `least`, `most` and `count`
behind a list are of its numbers; `over PATH` and `per PATH` behind it ask for the difference and the ratio.
`benchmarks/tables.py` writes the values in.

A figure without such a mark is a default that the method of the page declares, or it is in `stated.json`, page by page,
with the paper or the definition that it comes from. No figure of the README may be there.

python benchmarks/figures.py          list the figures that come from nowhere
python benchmarks/figures.py --state  take out of stated.json what is on its page no more
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

from hasten import registry
from hasten.bench.result import Result, read_result
from hasten.errors import UnknownNameError
from hasten.io import write_atomically

ROOT = Path(__file__).resolve().parents[1]
STATED = ROOT / "benchmarks" / "stated.json"
MARK = re.compile(r"<!-- = ([^>]+?) -->([^<]*)<!-- / -->")
GENERATED = re.compile(r"<!-- (?:table|curve|tokens|cli|schema|drape) .*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", re.DOTALL | re.MULTILINE)
# Not measured: versions of models and packages, and numbers of papers.
NAMES = re.compile(
    r"\b(?:Stable Diffusion|FLUX|Wan|LTX|Emu|Qwen-Image|CogView|Lumina|ComfyUI|vLLM-Omni|SGLang|hasten|drape|torch|"
    r"diffusers|[Pp]ython|release|cache-dit|Apache|Ideogram|Kandinsky|arXiv:|SkyReels|version)[ -]?v?\d+(?:\.\d+)+"
)
UNIT = r"dB|per cent|%|times|ms|[KMG]i?B|[GT]?FLOPs?|seconds|minutes|s\b"
FIGURE = re.compile(rf"(?<![\w.,:/])(\d[\d,]*\.\d+(?![\w.]|,\d)|\d[\d,]*(?= ?(?:{UNIT})(?!\w)))")


def pages() -> list[Path]:
    """The pages whose figures are checked."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fill_figures(text: str) -> str:
    """`text` with every marked figure as the JSON files say."""
    return MARK.sub(lambda match: f"<!-- = {match[1]} -->{_written(match[1], match[2])}<!-- / -->", text)


def _written(expression: str, before: str) -> str:
    digits = len(before.strip().partition(".")[2])
    sign = "+" if before.strip().startswith("+") else ""
    return f"{value_of(expression):{sign},.{digits}f}"


OF_LISTS: dict[str, Callable[[list[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "least": min,
    "most": max,
    "count": len,
}


def value_of(expression: str) -> float:
    """What the JSON files say; see the head of this module.

    Raises:
        LookupError: if there is no such figure.
    """
    name, *rest = shlex.split(expression)
    if name.endswith(".json"):
        value = _entry(name, rest[0])
        if len(rest) == 3:
            other = _entry(name, rest[2])
            return value - other if rest[1] == "over" else value / other
        return value
    method, count, field, *over = rest
    value = _figure(name, method, int(count), field)
    return value - _figure(name, over[1], int(count), field) if over else value


def _entry(name: str, path: str) -> float:
    """The number at a path of a JSON file."""
    entry: Any = _content(name)
    for key in path.removesuffix("%").split("/"):
        if not isinstance(entry, list):
            entry = entry[key]
        elif "=" in key:
            pairs = [pair.split("=", 1) for pair in key.split("&")]
            fitting = [item for item in entry if all(str(item.get(name)) == value for name, value in pairs)]
            if len(fitting) != 1:
                raise LookupError(f"benchmarks/{name}: {len(fitting)} entries with {key}, expected one")
            entry = fitting[0]
        else:
            numbers = [float(item) for item in entry if item is not None] if key in OF_LISTS else []
            entry = OF_LISTS[key](numbers) if key in OF_LISTS else entry[int(key)]
    return float(entry) * (100 if path.endswith("%") else 1)


@cache
def _content(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text())


def _figure(name: str, method: str, count: int, field: str) -> float:
    """A field of a row; `plain` is the full run, `best-plain` the plain sampler with as many steps that is nearest."""
    rows = [_bench(name).baseline] if method == "plain" else [row for row in _bench(name).rows if row.budget == count]
    if method == "best-plain":
        rows = sorted((row for row in rows if row.library == "plain"), key=lambda row: -(row.psnr or 0.0))[:1]
    elif method != "plain":
        rows = [row for row in rows if row.method == method]
    for row in rows:
        value = getattr(row, field.removesuffix("%"), None)
        if value is not None:
            return float(value) * (100 if field.endswith("%") else 1)
    raise LookupError(f"benchmarks/{name}.json has no {field} of {method} at {count} computed steps")


@cache
def _bench(name: str) -> Result:
    result = read_result(ROOT / "benchmarks" / f"{name}.json")
    assert isinstance(result, Result)
    return result


def figures(text: str) -> list[str]:
    """The figures of a page that are neither generated nor marked, as they are written, in order."""
    for pattern in (GENERATED, MARK, CODE, NAMES):
        text = pattern.sub(" ", text)
    return FIGURE.findall(text)


def _numbers(entry: Any) -> Iterator[float]:
    """All numbers in a value, however deep."""
    if isinstance(entry, dict | list | tuple):
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from _numbers(value)
    elif isinstance(entry, int | float) and not isinstance(entry, bool):
        yield float(entry)


def declared(page: Path) -> frozenset[float]:
    """The defaults of the method that a page is about, and of its fit."""
    try:
        info = registry.info(page.stem)
    except UnknownNameError:
        return frozenset()
    found = [item.default for item in fields(info.config)]
    if hasattr(info.config, "fit"):
        found += [parameter.default for parameter in signature(info.config.fit).parameters.values()]
    return frozenset(number for default in found for number in _numbers(default))


def unsourced(page: Path) -> list[str]:
    """The figures of a page that are neither looked up nor declared."""
    known = declared(page)
    return [
        number
        for number in figures(page.read_text(encoding="utf-8"))
        if not {float(number.replace(",", "")), float(number.replace(",", "")) / 100} & known
    ]


def stated() -> dict[str, dict[str, list[str]]]:
    """Figures that are in no JSON file, by page and by where they come from."""
    content: dict[str, dict[str, list[str]]] = json.loads(STATED.read_text())["figures"]
    return content


def unknown_figures(page: Path) -> list[str]:
    """The figures of a page that come from nowhere."""
    known = [number for numbers in stated().get(str(page.relative_to(ROOT)), {}).values() for number in numbers]
    found = []
    for number in unsourced(page):
        if number in known:
            known.remove(number)
        else:
            found.append(number)
    return found


def _without_what_is_gone() -> dict[str, dict[str, list[str]]]:
    kept: dict[str, dict[str, list[str]]] = {}
    for name, sources in stated().items():
        left = unsourced(ROOT / name) if (ROOT / name).exists() else []
        for source, numbers in sources.items():
            for number in numbers:
                if number in left:
                    left.remove(number)
                    kept.setdefault(name, {}).setdefault(source, []).append(number)
    return kept


def main() -> None:
    """List them, or write them down."""
    if "--state" in sys.argv:
        content = json.loads(STATED.read_text()) | {"figures": _without_what_is_gone()}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomically(STATED, re.sub(r"\[\s+([^\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n")
        return
    for page in pages():
        for number in unknown_figures(page):
            print(f"{page.relative_to(ROOT)}: {number}")


if __name__ == "__main__":
    main()
