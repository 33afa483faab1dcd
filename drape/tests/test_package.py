"""The package can be imported, knows its version, and states its ground rules."""

from importlib.metadata import version

import drape


def test_version_is_that_of_the_installed_package() -> None:
    assert drape.__version__ == version("drape")


def test_docstring_states_the_ground_rules() -> None:
    assert drape.__doc__ is not None
    assert "Simulation only" in drape.__doc__
    assert "paired with defences" in drape.__doc__
