"""Every block of Python on every page runs as it stands, in order, and whatever it says about its results holds.

The large models that pages name are stood in for by tiny ones of the same classes, and the GPU by the CPU: what is shown
is that the lines work, not what they gain. A block that cannot run without what no test has (a second GPU, a service)
is marked on its page, `<!-- not run: why -->`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pages import ROOT, blocks, pages
from pipelines import make_pipe
from test_variants import VARIANTS

import hasten
from hasten.errors import HastenWarning

SIZE = {"height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["red apple", "green pear", "fish", "rose"]
CALLS = [{"prompt": prompt, "num_inference_steps": 20, **SIZE} for prompt in PROMPTS[:2]]
# Run by tests of their own, with what they need: `test_docs.py`, `test_tokens_*.py`.
ELSEWHERE = {"docs/add-a-method.md", "docs/add-a-model.md"}
SLOW = {"docs/leap.md", "docs/which-method.md", "docs/methods/leapcache.md", "docs/quality.md", "docs/how-to/compile.md"}


def small(pipe: Any, **defaults: Any) -> Any:
    """The pipeline, called with these arguments unless told otherwise."""
    kind = type(pipe)

    class Small(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **{**defaults, **kwargs})

    Small.__name__ = kind.__name__
    pipe.__class__ = Small
    pipe.set_progress_bar_config(disable=True)
    return pipe


def texts(pipe: Any, **embeds: Any) -> Any:
    """A pipeline without a text encoder takes any prompt."""
    found = small(pipe, **embeds)
    kind = type(found)

    class Told(kind):  # type: ignore[misc, valid-type]
        def __call__(self, prompt: Any = None, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    Told.__name__ = kind.__name__
    found.__class__ = Told
    return found


def flux() -> Any:
    """FLUX.1."""
    return small(make_pipe(), **SIZE)


def variant(name: str, **more: Any) -> Callable[[], Any]:
    """A pipeline of the tests of families, with the arguments of its call."""

    def make() -> Any:
        known = VARIANTS[name]
        return texts(known.make(), **{**known.call, **more})

    return make


MODELS: dict[str, Callable[[], Any]] = {"black-forest-labs/FLUX.1-dev": flux}
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {}


def _load(kind: Any, name: Any, **_: Any) -> Any:
    return MODELS[str(name)]()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hub ids are tiny models, `cuda` is the CPU, and a second acceleration takes the place of the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HASTEN_CERTIFICATES", str(tmp_path / "certificates"))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(_load))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda self, *_, **__: self)
    accelerate = hasten.accelerate

    def instead(target: Any, *methods: Any, **params: Any) -> Any:
        hasten.remove(target)  # a page shows one way after the other
        return accelerate(target, *methods, **params)

    monkeypatch.setattr(hasten, "accelerate", instead)


def _cases() -> list[Any]:
    cases = []
    for page in pages():
        name = str(page.relative_to(ROOT))
        if name not in ELSEWHERE and any(block.kind == "python" for block in blocks(page)):
            cases.append(pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else []))
    return cases


@pytest.mark.parametrize("page", _cases())
def test_the_code_of_a_page_runs(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    scope: dict[str, Any] = {"hasten": hasten, "torch": torch, "prompts": PROMPTS, "calls": CALLS, "prompt": "red apple"}
    given = GIVEN.get(name, lambda: {"pipe": flux()})
    scope |= given()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HastenWarning)
        for block in blocks(page):
            if block.kind == "python" and block.run:
                exec(compile(block.code, name, "exec"), scope)


def test_a_block_that_does_not_run_says_why_and_there_are_few() -> None:
    left = [str(page) for page in pages() for block in blocks(page) if block.kind == "python" and not block.run]
    assert len(left) < 12
