"""Subjects that tests install in the place of those that other distributions bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hasten.bench import subject


class _Entry:
    """As much of an entry point as `hasten.bench.subject` uses."""

    def __init__(self, loader: Callable[[], Any]) -> None:
        self._loader = loader

    def load(self) -> Callable[[], Any]:
        return self._loader


def install(monkeypatch: pytest.MonkeyPatch, group: str, name: str, loader: Callable[[], Any]) -> None:
    """Make `loader` known under `name` in an entry point group, beside what is installed."""
    before = subject._known

    def known(asked: str) -> dict[str, Any]:
        return {**before(asked), name: _Entry(loader)} if asked == group else dict(before(asked))

    monkeypatch.setattr(subject, "_known", known)
