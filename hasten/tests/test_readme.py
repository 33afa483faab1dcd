"""The tables of the README and the docs say what the JSON files say."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_json_files(page):
    fill = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["fill"]
    text = page.read_text(encoding="utf-8")
    assert sum(text.count(f"<!-- {kind} ") for kind in ("table", "curve", "tokens", "drape")) == text.count(
        "<!-- end -->"
    )
    assert fill(text) == text


def test_tables_of_vocabularies_are_those_of_their_json_files():
    script = runpy.run_path(str(ROOT / "benchmarks" / "tokens.py"))
    for page in script["PAGES"]:
        text = page.read_text(encoding="utf-8")
        assert "<!-- tokens " in text
        assert script["fill"](text) == text


def test_the_readme_has_tables():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("<!-- table ") >= 3
