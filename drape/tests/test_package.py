"""The package can be imported, knows its version, and states its ground rules."""

import ast
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import drape

SOURCE = Path(drape.__file__).parent


def test_version_is_that_of_the_installed_package() -> None:
    assert drape.__version__ == version("drape")


def test_docstring_states_the_ground_rules() -> None:
    assert drape.__doc__ is not None
    assert "Simulation only" in drape.__doc__
    assert "paired with defences" in drape.__doc__


def imports_of(path: Path) -> set[str]:
    """Modules of drape that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    parts = {path.relative_to(SOURCE.parent).with_suffix("").parts: path for path in SOURCE.rglob("*.py")}
    files = {".".join(p[:-1] if p[-1] == "__init__" else p): path for p, path in parts.items()}
    arrows = {name: (imports_of(path) & files.keys()) - {name} for name, path in files.items()}
    assert sum(map(len, arrows.values())) > 60
    order = list(TopologicalSorter(arrows).static_order())  # CycleError names the circle
    assert order.index("drape.scene.cloth") < order.index("drape.scene.newton_cloth")


def test_every_module_is_short_enough_to_read() -> None:
    assert {p.name: n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400} == {}
