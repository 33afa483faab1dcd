"""Wrong inputs are refused in one line: what the tests of several rooms ask of their public functions."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from hasten.errors import HastenError


def assert_refused(call: Callable[[Any], object], inputs: Mapping[str, Any]) -> None:
    """Each input, by its name, has to raise one of our errors, as one short line and without a warning."""
    for name, wrong in inputs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that imaginary parts are dropped
            with pytest.raises(HastenError) as refused:
                call(wrong)
        assert len(str(refused.value).splitlines()) == 1, name
        assert len(str(refused.value)) < 400, name
