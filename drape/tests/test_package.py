"""The package can be imported and knows its version; there is nothing else in it yet."""

from importlib.metadata import version

import drape


def test_version_is_that_of_the_installed_package() -> None:
    assert drape.__version__ == version("drape")


def test_docstring_says_that_there_is_nothing_to_call_yet() -> None:
    assert drape.__doc__ is not None
    assert "no functions yet" in drape.__doc__
