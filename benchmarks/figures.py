"""Figures in the sentences of the README and the docs: looked up in the JSON files, or known to come from elsewhere.

A figure is written `<!-- = emoji-flux leap 9 psnr -->0.0<!-- / -->`: file, method, computed steps and field of a result
of `hasten bench`, with as many digits as are written. `over unipc` behind it asks for the lead over another method, `%`
behind the field for per cent; with the path of an entry in its place, `leap-limits.json rows/0/error`, any JSON file
will do. `benchmarks/tables.py` writes the values in.

A figure without such a mark has to be in a JSON file that the page's tables are made from, or in `stated.json`: what
was measured by hand, page by page, with how. No figure of the README may be there.

python benchmarks/figures.py          list the figures that are in no JSON file
python benchmarks/figures.py --state  write what is in none of them into stated.json, and take out what is gone
"""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hasten.bench.result import Result, read_result
from hasten.io import write_atomically

ROOT = Path(__file__).resolve().parents[1]
STATED = ROOT / "benchmarks" / "stated.json"
MARK = re.compile(r"<!-- = ([^>]+?) -->([^<]*)<!-- / -->")
GENERATED = re.compile(r"<!-- (?:table|curve|tokens|cli|schema|drape) .*?<!-- end -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", re.DOTALL | re.MULTILINE)
# Not measured: versions of models and packages, and numbers of papers.
NAMES = re.compile(
    r"\b(?:FLUX|Wan|LTX|Emu|Qwen-Image|CogView|Lumina|ComfyUI|vLLM-Omni|SGLang|hasten|drape|torch|diffusers|[Pp]ython|release|"
    r"cache-dit|Apache|Ideogram|Kandinsky|arXiv:|SkyReels|version)[ -]?v?\d+(?:\.\d+)+"
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
    return f"{value_of(expression):,.{digits}f}"


def value_of(expression: str) -> float:
    """What the JSON files say; see the head of this module.

    Raises:
        LookupError: if there is no such figure.
    """
    name, *rest = expression.split()
    if name.endswith(".json"):
        entry: Any = json.loads((ROOT / "benchmarks" / name).read_text())
        for key in rest[0].removesuffix("%").split("/"):
            entry = entry[int(key)] if isinstance(entry, list) else entry[key]
        return float(entry) * (100 if rest[0].endswith("%") else 1)
    method, count, field, *over = rest
    value = _figure(name, method, int(count), field)
    return value - _figure(name, over[1], int(count), field) if over else value


def _figure(name: str, method: str, count: int, field: str) -> float:
    rows = [_bench(name).baseline] if method == "plain" else _bench(name).rows
    for row in rows:
        value = getattr(row, field.removesuffix("%"), None)
        if value is not None and (method == "plain" or (row.method == method and row.budget == count)):
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


@cache
def _numbers(name: str) -> frozenset[float]:
    """All numbers of a JSON file."""

    def walk(entry: Any) -> Any:
        if isinstance(entry, dict | list):
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from walk(value)
        elif isinstance(entry, int | float) and not isinstance(entry, bool):
            yield float(entry)

    return frozenset(walk(json.loads((ROOT / "benchmarks" / name).read_text())))


def _sources(text: str) -> list[str]:
    """JSON files that a page's tables are made from, and those that it names."""
    named = {*re.findall(r"benchmarks/([\w-]+\.json)", text)}
    tables = {f"{name}.json" for name in re.findall(r"<!-- table ([\w-]+) -->", text)}
    tables |= {f"tokens-{name}.json" for name in re.findall(r"<!-- tokens ([\w-]+) -->", text)}
    tables |= {"emoji-flux.json"} if "<!-- curve " in text else set()
    return sorted(name for name in named | tables if (ROOT / "benchmarks" / name).exists())


def _in(number: str, names: list[str]) -> bool:
    value, digits = float(number.replace(",", "")), len(number.partition(".")[2])
    if digits == 0:
        return False  # a whole number is in every file
    return any(round(scale * known, digits) == value for n in names for known in _numbers(n) for scale in (1, 100))


def unsourced(page: Path) -> list[str]:
    """The figures of a page that are in none of its JSON files."""
    text = page.read_text(encoding="utf-8")
    sources = _sources(text)
    return [number for number in figures(text) if not _in(number, sources)]


def stated() -> dict[str, list[str]]:
    """Figures that were measured by hand, by page."""
    content: dict[str, list[str]] = json.loads(STATED.read_text())["figures"]
    return content


def unknown_figures(page: Path) -> list[str]:
    """The figures of a page that come from nowhere."""
    known = list(stated().get(str(page.relative_to(ROOT)), []))
    found = []
    for number in unsourced(page):
        if number in known:
            known.remove(number)
        else:
            found.append(number)
    return found


def main() -> None:
    """List them, or write them down."""
    if "--state" in sys.argv:
        content = json.loads(STATED.read_text())
        found = {str(page.relative_to(ROOT)): unsourced(page) for page in pages() if page.name != "README.md"}
        content["figures"] = {name: numbers for name, numbers in found.items() if numbers}
        text = json.dumps(content, indent=1)
        write_atomically(STATED, re.sub(r"\[\s+([^\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n")
        return
    for page in pages():
        for number in unknown_figures(page):
            print(f"{page.relative_to(ROOT)}: {number}")


if __name__ == "__main__":
    main()
