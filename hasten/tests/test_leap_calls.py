"""LEAP in calls that ask for more than steps: levels of their own, two experts, numbers that go wrong."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import draw, make_pipe
from solvable import Toy, toy_call
from test_leap import call
from test_real_life import film, make_wan
from tiny import randn
from torch import Tensor

import hasten
from hasten.calibration import Calibration
from hasten.errors import AlreadyAcceleratedError, CalibrationError, HastenWarning, NonFiniteError, ScheduleError
from hasten.fitting.leap import fit_leap
from hasten.pipeline.numbers import CHECK
from hasten.solvers import LeapScheduler

Fit = Calibration


@pytest.fixture(scope="module")
def fitted() -> Fit:
    return fit_leap(make_pipe(), [call(0, 1)], [3, 5], trials=1, rounds=0)


def said(action: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in caught if issubclass(one.category, HastenWarning)]


# --- switched on and off in the middle of a call


def at(step: int, act: Callable[[], Any]) -> Callable[..., Any]:
    def callback(_pipe: Any, index: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            act()
        return kwargs

    return callback


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("used", [False, True])
def test_a_call_goes_on_as_it_began_when_leap_comes(fitted: Fit, step: int, used: bool) -> None:
    pipe = make_pipe()
    plain = draw(make_pipe(), 5)
    if used:
        draw(pipe, 3)
    handles: list[Any] = []
    switch = at(step, lambda: handles.append(hasten.accelerate(pipe, hasten.Leap(fitted))))
    assert torch.equal(draw(pipe, 5, callback_on_step_end=switch), plain)
    learned = draw(pipe, 5)
    assert not torch.equal(learned, plain)
    assert len(handles[0].records) == 0
    assert handles[0].summary().computed_steps == 5
    assert "step" not in vars(pipe.scheduler)
    handles[0].remove()
    assert torch.equal(draw(pipe, 5), plain)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("then", ["remove", "replace", "cache", "twice"])
def test_a_call_goes_on_as_it_began_when_leap_goes(fitted: Fit, used: bool, then: str) -> None:
    pipe = make_pipe()
    plain = draw(make_pipe(), 5)
    if used:
        draw(pipe, 3)
    own = pipe.scheduler
    hasten.accelerate(pipe, hasten.Leap(fitted))
    learned = draw(pipe, 5)

    def act() -> None:
        if then == "replace":
            hasten.accelerate(pipe, hasten.Leap(fitted), replace=True)
            return
        hasten.remove(pipe)
        if then == "cache":
            hasten.accelerate(pipe, "reuse", interval=1)
        if then == "twice":
            hasten.accelerate(pipe, hasten.Leap(fitted))
            hasten.remove(pipe)

    assert torch.equal(draw(pipe, 5, callback_on_step_end=at(1, act)), learned)
    assert torch.equal(draw(pipe, 5), learned if then == "replace" else plain)
    hasten.remove(pipe)
    assert pipe.scheduler is own
    assert torch.equal(draw(pipe, 5), plain)
    assert not any(callable(value) for value in vars(own).values())


def test_a_call_that_needs_both_passes_ends_with_a_reason_when_leap_goes() -> None:
    guided = {"negative_prompt": "banana", "true_cfg_scale": 3.0}
    pipe = make_pipe()
    plain = draw(pipe, 3, **guided)
    hasten.accelerate(pipe, hasten.Leap(fit_leap(make_pipe(), [call(0, **guided)], [3], trials=1, rounds=0)))
    switch = at(0, lambda: hasten.remove(pipe))
    with pytest.raises(ScheduleError, match="LEAP was taken away in the middle of this call"):
        draw(pipe, 3, callback_on_step_end=switch, **guided)
    copied = copy.deepcopy(pipe.scheduler)
    assert torch.equal(draw(pipe, 3, **guided), plain)
    pipe.scheduler = copied
    assert torch.equal(draw(pipe, 3, **guided), plain)


class CancelledError(Exception):
    pass


def cancelled(step: int) -> Callable[..., Any]:
    def stop() -> None:
        raise CancelledError

    return at(step, stop)


def sharing(pipe: Any, scheduler: Any = None) -> Any:
    """Another pipeline of the same components."""
    other = type(pipe)(**{**pipe.components, "scheduler": scheduler or pipe.scheduler})
    other.set_progress_bar_config(disable=True)
    return other


def in_thread(act: Callable[[], Any]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


@pytest.mark.parametrize("ends", ["cancelled", "whole", "thread"])
def test_a_call_goes_on_with_leap_whoever_sets_the_scheduler_that_came(fitted: Fit, ends: str) -> None:
    pipe, found = make_pipe(), []
    own, other, plain = pipe.scheduler, sharing(pipe), draw(make_pipe(), 7)
    hasten.accelerate(pipe, hasten.Leap(fitted))
    learned = draw(pipe, 5)

    def act() -> None:
        hasten.remove(pipe)
        if ends == "cancelled":
            with pytest.raises(CancelledError):
                draw(other, 7, callback_on_step_end=cancelled(0))
        elif ends == "whole":
            found.append(draw(other, 7))
        else:
            in_thread(lambda: found.append(draw(other, 7)))

    assert torch.equal(draw(pipe, 5, callback_on_step_end=at(1, act)), learned)
    assert all(torch.equal(one, plain) for one in (*found, draw(pipe, 7)))
    assert not any(callable(value) for value in vars(own).values())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
@pytest.mark.parametrize("home", [False, True])
def test_copies_of_a_scheduler_that_hands_over_are_their_own(fitted: Fit, copied: Any, home: bool) -> None:
    """A call was cut short, of which something might still come."""
    plain, pipe = draw(make_pipe(), 9), make_pipe()
    draw(pipe, 7)
    run = hasten.accelerate(pipe, hasten.Leap(fitted))
    with pytest.raises(CancelledError):
        draw(pipe, 5, callback_on_step_end=cancelled(1))
    run.remove()
    scheduler = copied(pipe.scheduler)
    if home:
        pipe.scheduler = scheduler
    other = pipe if home else sharing(pipe, scheduler)
    assert torch.equal(draw(other, 9), plain)
    assert torch.equal(draw(pipe, 9), plain)
    assert torch.equal(draw(other, 9), plain)


def test_leap_itself_can_be_pickled(fitted: Fit) -> None:
    pipe = make_pipe()
    hasten.accelerate(pipe, hasten.Leap(fitted))
    learned = draw(pipe, 5)
    other = sharing(make_pipe(), pickle.loads(pickle.dumps(pipe.scheduler)))
    assert torch.equal(draw(other, 5), learned)


@pytest.mark.parametrize("comes", [False, True])
def test_a_loop_of_the_users_own_over_a_copy_of_the_list_goes_on_as_it_began(fitted: Fit, comes: bool) -> None:
    switches = {"on": lambda pipe: hasten.accelerate(pipe, hasten.Leap(fitted)), "off": hasten.remove}
    first, then = ("off", "on") if comes else ("on", "off")

    def loop(switch: bool) -> Tensor:
        pipe = make_pipe()
        draw(pipe, 7)
        if comes:
            with pytest.raises(CancelledError):
                draw(pipe, 5, callback_on_step_end=cancelled(1))
        switches[first](pipe)
        pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 5).tolist(), mu=0.5)
        x = randn(1, 4, 8)
        for index, t in enumerate(pipe.scheduler.timesteps.clone()):
            if index == 2 and switch:
                switches[then](pipe)
            x = pipe.scheduler.step(torch.sin(x + index), t, x, return_dict=False)[0]
        return x

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this run starts", HastenWarning)
        assert torch.equal(loop(True), loop(False))


def test_a_step_after_the_last_is_refused(fitted: Fit) -> None:
    scheduler = LeapScheduler.of(fitted)
    scheduler.set_timesteps(3)
    x = randn(1, 4, 8)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ScheduleError, match="taken all 3 steps"):
        scheduler.step(x, t, x)


@pytest.mark.parametrize("fused", [False, True])
def test_forwards_of_another_thread_are_no_passes(fused: bool) -> None:
    guided = {"guidance_scale": 3.0}
    fit = fit_leap(Toy(fused=fused), [toy_call(0, **guided)], [4], trials=5, rounds=0)

    def made(probed: bool) -> Tensor:
        pipe = Toy(fused=fused)
        with hasten.accelerate(pipe, hasten.Leap(fit)):
            own_step = pipe.scheduler.step

            def step(output: Tensor, t: Any, x: Tensor, **rest: Any) -> Any:
                result = own_step(output, t, x, **rest)
                in_thread(lambda: pipe.transformer(x, t))
                return result

            if probed:
                pipe.scheduler.step = step
            return pipe(**toy_call(9, **guided) | {"num_inference_steps": 4})[0]

    assert torch.equal(made(True), made(False))


# --- levels of the user's own


@pytest.mark.parametrize("way", ["scheduler", "accelerate"])
@pytest.mark.parametrize("sigmas", [[1.0, 0.9, 0.5, 0.3, 0.1], np.linspace(1, 0.6, 5)], ids=["listed", "even"])
def test_sigmas_of_the_users_own_are_left_out_with_one_warning(fitted: Fit, way: str, sigmas: Any) -> None:
    pipe = make_pipe()
    if way == "scheduler":
        pipe.scheduler = LeapScheduler.of(fitted, pipe)
    else:
        hasten.accelerate(pipe, hasten.Leap(fitted))
    learned = draw(pipe, 5)
    assert said(lambda: draw(pipe, 5)) == []
    assert said(lambda: draw(pipe, 5, sigmas=None)) == []
    (message,) = said(lambda: draw(pipe, 5, sigmas=sigmas))
    assert "not at the sigmas of this call" in message
    assert "leave them out" in message
    with pytest.warns(HastenWarning):
        assert torch.equal(draw(pipe, 5, sigmas=sigmas), learned)


def test_sigmas_that_begin_with_less_noise_or_are_of_another_number_are_refused(fitted: Fit) -> None:
    pipe = make_pipe()
    pipe.scheduler = LeapScheduler.of(fitted, pipe)
    with pytest.raises(ScheduleError, match=r"begin at 0.6, and LEAP's coefficients hold from 1 on; leave them out"):
        draw(pipe, 5, sigmas=[0.6, 0.5, 0.3, 0.2, 0.1])
    with pytest.raises(ScheduleError, match="not for 4; use num_inference_steps=3, 5 and leave sigmas out"):
        draw(pipe, 5, sigmas=[1.0, 0.5, 0.3, 0.1])


@pytest.mark.parametrize("name", ["sigmas", "timesteps"])
def test_levels_in_a_loop_of_the_users_own(fitted: Fit, name: str) -> None:
    """What a pipeline would propose is spread evenly, and that is no wish of a user's."""
    scheduler, unit = LeapScheduler.of(fitted), 1 if name == "sigmas" else 1000
    own = getattr(scheduler, name)[:5]
    assert said(lambda: scheduler.set_timesteps(**{name: own})) == []
    assert said(lambda: scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))) == []
    levels = [one * unit for one in (1.0, 0.9, 0.5, 0.3, 0.1)]
    (message,) = said(lambda: scheduler.set_timesteps(**{name: levels}))
    assert f"not at the {name} of this call" in message
    with pytest.raises(ScheduleError, match=f"{name} of this call begin at"):
        scheduler.set_timesteps(**{name: [0.7 * unit, 0.6 * unit, 0.1 * unit]})


# --- two experts


def film_call(seed: int, steps: int = 12) -> dict[str, Any]:
    text = {"prompt_embeds": randn(1, 5, 32), "negative_prompt_embeds": randn(1, 5, 32, seed=1)}
    size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": steps, "guidance_scale": 2.0}
    return {**text, **size, "generator": torch.Generator().manual_seed(seed)}


@pytest.fixture(scope="module")
def of_experts() -> Fit:
    return fit_leap(make_wan(), [film_call(0), film_call(1)], [5], trials=4, rounds=1)


def test_two_experts_are_served_each_at_its_own_times(of_experts: Fit) -> None:
    pipe, asked = make_wan(), []
    reference, plain = film(pipe, 12), film(pipe, 5)
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(
            lambda _m, _a, given, name=name: asked.append((name, float(given["timestep"][0]))), with_kwargs=True
        )
    with hasten.accelerate(pipe, hasten.Leap(of_experts)) as run:
        latents = film(pipe, 5)
        assert run.summary().computed_steps == 5
    assert (latents - reference).norm() < 0.6 * (plain - reference).norm()
    assert {name for name, time in asked if time >= 700} == {"transformer"}
    assert {name for name, time in asked if time < 700} == {"transformer_2"}


@pytest.mark.parametrize("change", ["weights of the second", "no second"])
def test_another_second_expert_is_refused(of_experts: Fit, change: str) -> None:
    pipe = make_wan()
    if change == "no second":
        pipe.transformer_2 = None
    else:
        with torch.no_grad():
            for parameter in pipe.transformer_2.parameters():
                parameter.mul_(2)
    with pytest.raises(CalibrationError, match=r"fitted for (other weights|WanTransformer3DModel\+Wan)"):
        LeapScheduler.of(of_experts, pipe)


def test_methods_that_look_at_one_transformer_refuse_two_before_any_call() -> None:
    pipe = make_wan()
    for part in (pipe.transformer, pipe.transformer_2):
        part.register_forward_pre_hook(lambda *_: pytest.fail("a call was made"))
    for learn in (
        lambda: hasten.calibrate(pipe, "l2p", [film_call(0)]),
        lambda: hasten.fit_leapcache(pipe, [film_call(0)], [(0, 3)]),
        lambda: hasten.tune_steps(pipe, "foca", [film_call(0)], [4]),
    ):
        with pytest.raises(CalibrationError, match=r"2 transformers \(transformer, transformer_2\)"):
            learn()


# --- an accelerated pipeline teaches nothing


def test_a_pipeline_that_is_accelerated_is_not_learned_from() -> None:
    pipe = make_pipe()
    with (
        hasten.accelerate(pipe, "taylorseer"),
        pytest.raises(AlreadyAcceleratedError, match="has to come from plain runs"),
    ):
        fit_leap(pipe, [call(0)], [3])


# --- numbers that go wrong


class Spoilt(Toy):
    """A pipeline whose model says NaN at a step."""

    at = 2

    def _answer(self, x: Tensor, t: float, scale: float | None) -> Tensor:
        answer = super()._answer(x, t, scale)
        self.asked = getattr(self, "asked", -1) + 1
        return answer * float("nan") if self.asked == self.at else answer


@pytest.fixture(scope="module")
def toy_fit() -> Fit:
    return fit_leap(Toy(), [toy_call(0)], [4], trials=1, rounds=0)


@pytest.mark.parametrize("at", [0, 3])
def test_latents_that_are_not_finite_are_told_with_step_and_method(toy_fit: Fit, at: int) -> None:
    pipe = Spoilt(scheduler=LeapScheduler.of(toy_fit))
    pipe.at = at
    call = {**toy_call(1), "num_inference_steps": 4}
    (message,) = said(lambda: pipe(**call))
    assert "a run with LEAP ended with latents that are not finite (step 3, the last one)" in message
    assert said(lambda: pipe(**call)) == []  # the model is well again


def test_every_step_is_checked_if_asked(toy_fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK, "1")
    call = {**toy_call(1), "num_inference_steps": 4}
    with pytest.raises(NonFiniteError, match="step 2, with LEAP: the model's own prediction is not finite"):
        Spoilt(scheduler=LeapScheduler.of(toy_fit))(**call)
    scheduler = LeapScheduler.of(toy_fit)
    scheduler.set_timesteps(4)
    with pytest.raises(NonFiniteError, match="step 0, with LEAP: the latents that it made are not finite"):
        scheduler.step(torch.ones(1, 2), scheduler.timesteps[0], torch.full((1, 2), torch.inf))
