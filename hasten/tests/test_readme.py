"""The README's tables say what the JSON files say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_those_of_the_json_files():
    fill = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["fill"]
    readme = (ROOT / "README.md").read_text()
    assert readme.count("<!-- table ") == readme.count("<!-- end -->") > 0
    assert fill(readme) == readme
