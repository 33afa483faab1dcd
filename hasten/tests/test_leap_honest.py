"""LEAP refuses what it would get wrong without a word: calls it cannot fit, runs that a fit does not serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from leap_pipelines import PIPELINES
from pipelines import draw, make_pipe
from solvable import Net, Toy, curved, relative, toy_call
from test_leap import TABLE, call, euler_tables
from torch import Tensor

import hasten
from hasten.errors import AlreadyAcceleratedError, CalibrationError, ConfigError, ScheduleError
from hasten.fitting.evaluator import Evaluator
from hasten.fitting.leap import fit_leap
from hasten.fitting.references import record_references
from hasten.pipeline.replay import Replay
from hasten.solvers import LeapScheduler
from hasten.solvers.scales import scale_of_run
from hasten.solvers.tables import Axis

QUICK = {"trials": 1, "rounds": 0}


# --- answers that depend on more than state and time


class Counting(Toy):
    """A pipeline that knows the number of its step."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        self.index, self.total = -1, given["num_inference_steps"]
        return super().__call__(*args, **given)

    def _answer(self, x: Tensor, t: float, scale: float | None) -> Tensor:
        self.index += 1
        return self._at(self.index, super()._answer(x, t, scale))

    def _at(self, index: int, answer: Tensor) -> Tensor:
        return answer


class Ending(Counting):
    """A control that ends halfway through the steps."""

    def _at(self, index: int, answer: Tensor) -> Tensor:
        return 1.1 * answer if (index + 1) / self.total <= 0.5 else answer


def test_a_control_that_ends_early_is_refused_with_the_reason() -> None:
    with pytest.raises(CalibrationError, match=r"step 0 of call 0 is another one.*Ending.*control_guidance_end=1"):
        fit_leap(Ending(), [toy_call(0)], [4], **QUICK)
    fit_leap(Counting(), [toy_call(0)], [4], **QUICK)


def test_guidance_that_a_callback_cuts_off_is_refused() -> None:
    from diffusers.callbacks import SDCFGCutoffCallback

    make, arguments = PIPELINES["stable diffusion, ddim"]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    cut = {"callback_on_step_end": SDCFGCutoffCallback(0.4), "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(CalibrationError, match=r"StableDiffusionPipeline asks it there alone.*a callback"):
        fit_leap(pipe, [toy_call(0, **arguments, **cut)], [3], **QUICK)


class Keeping(Net):
    """A denoiser that reads a reference image in the first forward of a call, and remembers it for the others."""

    loud, first, kept = True, False, None

    def forward(self, sample: Tensor, timestep: float) -> tuple[Tensor]:
        if self.first:
            self.kept = 0.3
        if self.loud and self.kept is None:
            raise RuntimeError("the cache has not been populated yet")
        return (self.field(sample, timestep) + (self.kept or 0.0),)


class Reading(Counting):
    def __call__(self, *args: Any, **given: Any) -> Any:
        self.transformer.kept = None
        return super().__call__(*args, **given)

    def _answer(self, x: Tensor, t: float, scale: float | None) -> Tensor:
        self.transformer.first = self.index < 0
        return super()._answer(x, t, scale)


@pytest.mark.parametrize("loud", [True, False])
def test_a_model_whose_first_forward_is_needed_is_fitted_as_it_runs(loud: bool) -> None:
    pipe = Reading()
    pipe.transformer = Keeping(curved)
    pipe.transformer.loud = loud
    fit = fit_leap(pipe, [toy_call(0)], [5], trials=3, rounds=1)
    (reference,) = pipe(**toy_call(9))
    assert relative(pipe, LeapScheduler.of(fit), 5, reference) < 0.5 * relative(pipe, None, 5, reference)
    told = fit.report["5"]["relative_squared_error"] ** 0.5
    (reference,) = pipe(**toy_call(0))
    assert relative(pipe, LeapScheduler.of(fit), 5, reference, seed=0) == pytest.approx(told, rel=0.01, abs=1e-6)


# --- calls and scales that do not go together


class Single(Toy):
    """Guidance of 1 and below makes one pass, as pipelines have it."""

    def _answer(self, x: Tensor, t: float, scale: float | None) -> Tensor:
        return super()._answer(x, t, scale if scale is not None and scale > 1 else None)


def test_scales_with_another_number_of_passes_are_refused_before_the_search() -> None:
    seen: list[tuple[Any, ...]] = []
    with pytest.raises(ConfigError, match="makes 1 at guidance 1 and 2 at 3: leave out the scales with one pass"):
        fit_leap(
            Single(),
            [toy_call(0, guidance_scale=3.0)],
            [3],
            guidances=(3.0, 5.0, 1.0),
            progress=lambda *told: seen.append(told),
            **QUICK,
        )
    assert [told[:2] for told in seen] == [(0, 1), (0, 2)]


def test_scales_may_stand_in_any_order_and_progress_ends_at_its_end() -> None:
    seen: list[tuple[Any, ...]] = []
    fit = fit_leap(
        Toy(),
        [toy_call(i, guidance_scale=3.0) for i in range(3)],
        [3],
        guidances=(5.0, 1.5, 3.0),
        held_out=[toy_call(7, guidance_scale=3.0)],
        progress=lambda *told: seen.append(told),
        **QUICK,
    )
    assert fit.options["guidances"] == [1.5, 3.0, 5.0]
    assert fit.fingerprint.guidance == 3.0
    assert [told[1:3] for told in seen if told[0] == 0][-1] == (14, 14)


def test_guidances_without_an_argument_that_takes_them_are_refused() -> None:
    with pytest.raises(ConfigError, match="give the calls that argument of the pipeline"):
        fit_leap(Toy(), [toy_call(0)], [3], guidances=(1.5, 3.0))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"height": 64, "width": 64}, "call 1 is of another size than call 0"),
        ({"num_inference_steps": 3}, r"call 1 has another number of steps \(3\) than call 0 \(4\)"),
        ({"sigmas": [1.0, 0.8, 0.3, 0.1]}, "call 1 has other sigmas or timesteps"),
    ],
)
def test_a_call_that_differs_from_the_first_is_named(other: dict[str, Any], says: str) -> None:
    first = call(0, num_inference_steps=4)
    with pytest.raises(CalibrationError, match=f"{says}.*fit that call by itself"):
        record_references(make_pipe(), Replay([first, {**call(1, num_inference_steps=4), **other}]))


def test_plain_solvers_are_asked_for_without_the_calls_own_levels() -> None:
    evaluator = Evaluator(make_pipe(), Replay([call(0, sigmas=[1.0, 0.9, 0.7, 0.5, 0.3, 0.1])]))
    with evaluator.probing():
        asked = evaluator.arguments(3)
    assert asked["num_inference_steps"] == len(asked["sigmas"]) == 3


def test_a_scheduler_that_is_leap_already_teaches_nothing() -> None:
    with pytest.raises(AlreadyAcceleratedError, match="put the plain scheduler back first"):
        fit_leap(Toy(scheduler=LeapScheduler({"2": TABLE})), [toy_call(0)], [2])


# --- a fit that is known


class Prompted(Toy):
    """A pipeline that takes embeddings in the place of a prompt."""

    def __call__(self, *args: Any, prompt_embeds: Tensor, **given: Any) -> Any:
        self.embeds = float(prompt_embeds.mean())
        return super().__call__(*args, **given)

    def _answer(self, x: Tensor, t: float, scale: float | None) -> Tensor:
        return super()._answer(x, t, scale) + self.embeds * torch.sin(x)


def test_a_known_fit_of_other_embeddings_is_not_taken_over() -> None:
    one, other = ([toy_call(0, prompt_embeds=torch.full((2,), value))] for value in (0.1, 0.9))
    known = fit_leap(Prompted(), one, [3], **QUICK)
    again, afresh = fit_leap(Prompted(), other, [3], known=known, **QUICK), fit_leap(Prompted(), other, [3], **QUICK)
    assert torch.equal(again.tensors["3/guided"], afresh.tensors["3/guided"])
    assert not torch.equal(again.tensors["3/guided"], known.tensors["3/guided"])


def test_a_known_fit_by_other_errors_is_not_taken_over() -> None:
    """Such as one from before errors were relative to yardsticks."""
    calls = [toy_call(0)]
    known = fit_leap(Toy(), calls, [3, 4], **QUICK)
    options = {name: value for name, value in known.options.items() if name != "yardstick"}
    again = fit_leap(Toy(), calls, [5], known=replace(known, options=options), **QUICK)
    assert list(again.report) == ["5"]
    assert list(fit_leap(Toy(), calls, [5], known=known, **QUICK).report) == ["3", "4", "5"]


def test_calls_held_out_later_are_told_for_what_was_known() -> None:
    held_out = [toy_call(7)]
    known = fit_leap(Toy(), [toy_call(0)], [3], **QUICK)
    again = fit_leap(Toy(), [toy_call(0)], [3], known=known, held_out=held_out, **QUICK)
    afresh = fit_leap(Toy(), [toy_call(0)], [3], held_out=held_out, **QUICK)
    assert torch.equal(again.tensors["3/guided"], known.tensors["3/guided"])
    for name in ("held_out", "held_out_relative_to_first_order"):
        assert again.report["3"][name] == pytest.approx(afresh.report["3"][name])


# --- half precision


def test_a_fit_in_half_precision_is_as_near_as_one_in_single_where_it_is_used() -> None:
    half = {"dtype": torch.bfloat16}
    reference = Toy()(**toy_call(9, batch=64, **half))[0].float()
    errors = []
    for more in (half, {}):
        fit = fit_leap(Toy(), [toy_call(i, batch=16, **more) for i in range(4)], [5], trials=1, rounds=3)
        errors.append(relative(Toy(), LeapScheduler.of(fit), 5, reference, batch=64, **half))
    assert errors[0] < 1.3 * errors[1]  # 2.3 with the steps of single precision


# --- guidance that the fit does not serve


def test_a_fit_without_guidance_is_refused_where_there_are_two_passes() -> None:
    pipe = Toy()
    with (
        hasten.accelerate(pipe, hasten.Leap(fit_leap(pipe, [toy_call(0)], [4], **QUICK))),
        pytest.raises(ScheduleError, match=r"fitted without guidance.*this run makes two"),
    ):
        pipe(**{**toy_call(9, guidance_scale=3.0), "num_inference_steps": 4})


@pytest.mark.parametrize("fused", [False, True])
def test_guidance_is_told_as_the_pipeline_calls_it(fused: bool) -> None:
    """Fused, the negative pass comes first, and its weight is 1 minus the scale."""
    pipe = Toy(fused=fused)
    fit = fit_leap(pipe, [toy_call(0, guidance_scale=3.0)], [4], **QUICK)
    with (
        hasten.accelerate(pipe, hasten.Leap(fit)),
        pytest.raises(ScheduleError, match="fitted for guidance 3, and this run has 5:"),
    ):
        pipe(**{**toy_call(9, guidance_scale=5.0), "num_inference_steps": 4})


def test_a_scheduler_alone_reads_the_guidance_of_the_call() -> None:
    pipe = make_pipe()
    draw(pipe, 3)
    tables = euler_tables(pipe.scheduler)
    pipe.scheduler = LeapScheduler(tables, guidances=[3.5])
    draw(pipe, 3)
    draw(pipe, 3, guidance_scale=3.5)
    with pytest.raises(ScheduleError, match=r"fitted for guidance 3\.5, and this run has 30: call the pipeline with"):
        draw(pipe, 3, guidance_scale=30.0)
    pipe.scheduler = LeapScheduler(tables, guidances=[3.0])
    draw(pipe, 3, true_cfg_scale=3.0, negative_prompt="banana")
    with pytest.raises(ScheduleError, match=r"fitted for guidance 3, and this run has 1\.5"):
        draw(pipe, 3, true_cfg_scale=1.5, negative_prompt="banana")


def test_a_mixture_that_differs_with_the_prompt_is_served_by_what_the_call_asks_for() -> None:
    """Pipelines may bring the mixture to the length of one pass."""
    content = LeapScheduler({"2": TABLE}, guidances=[3.0], mixtures=[2.0])._checked
    assert scale_of_run(content, 8.6, (3.0,), True) == (3.0, Axis((3.0,)))
    with pytest.raises(ScheduleError, match="fitted for another guidance than this run has: ") as refused:
        scale_of_run(content, 8.6, (), True)
    assert "8.6" not in str(refused.value)
