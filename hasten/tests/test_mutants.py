"""The list of mutations (`hasten/mutants/mutants.toml`) fits the source and the tests as they are.

Whether tests notice the mutations is what `make mutants` finds out, in a quarter of an hour.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FEWEST = 95
HERE = Path(__file__).resolve().parent


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants_run", HERE.parent / "mutants" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = loaded()
MUTATIONS = run.load()


def test_there_are_enough_of_them_and_none_is_there_twice() -> None:
    assert len(MUTATIONS) >= FEWEST
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    files = {mutation.file.split("/")[0] for mutation in MUTATIONS}
    assert files >= {"caching", "streaming", "solvers", "fitting", "resolution", "pipeline"}


@pytest.mark.parametrize("file", sorted({mutation.file for mutation in MUTATIONS}))
def test_mutations_change_the_source_and_name_their_tests(file: str) -> None:
    source = (run.SOURCE / "hasten" / file).read_text(encoding="utf-8")
    for mutation in (mutation for mutation in MUTATIONS if mutation.file == file):
        ast.parse(mutation.applied(source))  # which refuses a text that does not stand there exactly once
        assert mutation.after != mutation.before
        assert mutation.tests, f"{mutation.name}: no test is named"
        for test in mutation.tests:
            name, _, function = test.partition("::")
            text = (run.TESTS / name).read_text(encoding="utf-8")
            assert not function or f"def {function}(" in text, f"{mutation.name}: {name} has no {function}"


def test_a_text_that_is_not_there_or_there_twice_is_refused() -> None:
    mutation = run.Mutation("a.py", "x = 1", "x = 2")
    assert mutation.applied("x = 1\n") == "x = 2\n"
    for source in ("y = 1\n", "x = 1\nx = 1\n"):
        with pytest.raises(ValueError, match=r"a\.py: x = 1 -> x = 2: the text stands [02] times"):
            mutation.applied(source)
