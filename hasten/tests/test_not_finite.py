"""Numbers that are not finite: a warning at the end of a run, step, pass and method if everything is checked."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pipelines import draw, make_pipe

import hasten
from hasten.caching.memory import PassMemory
from hasten.errors import HastenError, HastenWarning, NonFiniteError
from hasten.pipeline.numbers import CHECK, finite


class Spoiler:
    """Puts a NaN or an infinity into what the transformer computes at a step."""

    def __init__(self, pipe: Any, step: int, value: float = float("nan")) -> None:
        self.calls, self.step, self.value = 0, step, value
        pipe.transformer.proj_out.register_forward_hook(self)

    def __call__(self, _module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls != self.step + 1:
            return output
        changed = output.clone()
        changed.view(-1)[5] = self.value
        return changed


def caught(pipe: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        draw(pipe)
    return [str(w.message) for w in found if issubclass(w.category, HastenWarning)]


@pytest.mark.parametrize(("method", "params"), [("taylorseer", {}), ("fbcache", {"threshold": 1.0}), ("reuse", {})])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_ends_badly_is_told_once(method: str, params: dict[str, Any], value: float) -> None:
    pipe = make_pipe()
    with hasten.accelerate(pipe, method, interval=3, **params) as run:
        assert caught(pipe) == []
        Spoiler(pipe, 0, value)
        (message,) = caught(pipe)
        assert caught(pipe) == []
        assert type(run.method).__name__ in message
    assert CHECK in message


def test_every_forward_is_checked_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK, "1")
    pipe = make_pipe()
    with hasten.accelerate(pipe, "taylorseer", interval=3):
        plain = draw(pipe)
        Spoiler(pipe, 6)
        with pytest.raises(NonFiniteError, match=r"step 6, pass 'cond', with TaylorSeer: .*not finite") as error:
            draw(pipe)
        assert isinstance(error.value, HastenError)
        assert str(error.value).isprintable()
        assert torch.equal(draw(pipe), plain)  # the run that failed left nothing behind


def test_whose_number_it_was_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK, "1")
    pipe = make_pipe()
    with hasten.accelerate(pipe, "taylorseer", interval=3) as run:
        draw(pipe)
        computed = {record.step: record.computed for record in run.records}
        skipped = min(step for step, yes in computed.items() if not yes)
        forecast = PassMemory.forecast
        monkeypatch.setattr(PassMemory, "forecast", lambda *args: forecast(*args) * float("inf"))
        with pytest.raises(NonFiniteError, match=rf"step {skipped}, .*the forecast of TaylorSeer .*lower order"):
            draw(pipe)
        monkeypatch.setattr(PassMemory, "forecast", forecast)
        Spoiler(pipe, 0)
        with pytest.raises(NonFiniteError, match=r"step 0, .*the model's own prediction .*wider precision"):
            draw(pipe)

        def spoil(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if step == 4:
                kwargs["latents"] = kwargs["latents"] * float("nan")
            return kwargs

        with pytest.raises(NonFiniteError, match=r"step 5, .*the latents that the sampler made"):
            draw(pipe, callback_on_step_end=spoil)


@pytest.mark.parametrize("value", ["", "0"])
def test_nothing_is_raised_unless_asked(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(CHECK, value)
    pipe = make_pipe()
    Spoiler(pipe, 0)
    with hasten.accelerate(pipe, "reuse", interval=3):
        assert len(caught(pipe)) == 1


def test_a_run_reads_one_scalar_and_no_skipped_step_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading waits for a device, the flag of the last forward is read as the pipeline's call ends."""
    pipe = make_pipe()
    reads: list[int] = []

    class Flag:
        device = torch.device("cuda")

        def __bool__(self) -> bool:
            reads.append(forwards[0])
            return False

    forwards = [0]
    monkeypatch.setattr("hasten.pipeline.numbers.finite", lambda *_: Flag())
    with hasten.accelerate(pipe, "taylorseer", interval=3):
        pipe.transformer.proj_out.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
        (message,) = caught(pipe)
        assert reads == [forwards[0]]
    assert "TaylorSeer" in message


def test_finite_looks_into_lists() -> None:
    good, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert bool(finite(good, [good, good]))
    assert not bool(finite(good, [good, bad]))
    assert not bool(finite(bad))
