"""The docs say what the benchmark's JSON file says, and their commands and code are those that exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

from drape import cli

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "benchmarks" / "bench.json"
DOCS, README = ROOT / "docs" / "drape.md", ROOT / "README.md"
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="only in a checkout of the repository")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drape_tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_hold_what_the_figures_say(tables: ModuleType) -> None:
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else None
    for path in tables.PAGES:
        assert tables.filled(path.read_text(), found) == path.read_text(), f"run drape/benchmarks/tables.py: {path}"
    assert len(tables.BLOCK.findall(DOCS.read_text())) == len(tables.TABLES)


def test_an_unknown_table_is_refused(tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no table"):
        tables.filled("<!-- drape nothing -->\n\n<!-- end -->", {})


@pytest.mark.parametrize("page", [DOCS, README], ids=lambda path: path.name)
def test_commands_and_options_of_the_pages_exist(page: Path) -> None:
    known = {
        name: {o for p in c.params for o in p.opts} for name, c in typer.main.get_command(cli.app).commands.items()
    }  # type: ignore[attr-defined]
    blocks = "\n".join(re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    calls = re.findall(r"^drape (\w+)([^#\n]*)", blocks, re.MULTILINE)
    assert len(calls) >= 4
    for name, rest in calls:
        assert set(re.findall(r"--[\w-]+", rest)) <= known[name], (name, rest)


def test_names_that_the_example_imports_exist() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drape"):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_images_of_the_page_are_there() -> None:
    for name in re.findall(r"\]\((images/[^)]+)\)", DOCS.read_text()):
        assert (DOCS.parent / name).stat().st_size > 1000, name
