"""The tables of the README and the docs say what the JSON files say."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def script(name):
    """A script of `benchmarks/`, which imports those beside it."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return runpy.run_path(f"{folder}/{name}")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_json_files(page):
    fill = script("tables.py")["fill"]
    text = page.read_text(encoding="utf-8")
    assert sum(
        text.count(f"<!-- {kind} ") for kind in ("table", "curve", "tokens", "drape", "cli", "schema")
    ) == text.count("<!-- end -->")
    assert fill(text) == text


def test_tables_of_vocabularies_are_those_of_their_json_files():
    tokens = script("tokens.py")
    for page in tokens["PAGES"]:
        text = page.read_text(encoding="utf-8")
        assert "<!-- tokens " in text
        assert tokens["fill"](text) == text


def test_the_readme_has_tables():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("<!-- table ") >= 2
