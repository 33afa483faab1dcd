"""Fixtures: a FLUX pipeline with random weights (small enough for hundreds of steps a second) and the trained one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from pipelines import make_pipe

from hasten.bench import subject

# A busy machine is slow, and that is no error of the code.
hypothesis.settings.register_profile("hasten", deadline=None)
hypothesis.settings.load_profile("hasten")


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """Commands that a test calls set the level of hasten's logger, for their process."""
    logger = logging.getLogger("hasten")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture
def pipe() -> Any:
    return make_pipe()


@pytest.fixture(scope="session")
def emoji() -> subject.Subject:
    model = subject.load("emoji-flux")
    model.pipe.set_progress_bar_config(disable=True)
    return model
