"""Which run, step and pass a forward belongs to, with and without help from the pipeline."""

import pytest
import torch
from hasten.pipeline.steps import StepTracker

SHAPE = (1, 64, 48)


def labels(tracker, calls):
    """(run, step, pass) of each (timestep, name) or (timestep, name, shape)."""
    infos = [tracker.begin(call[0], call[2] if len(call) > 2 else SHAPE, call[1]) for call in calls]
    return [(info.run, info.step, info.pass_name) for info in infos]


def test_a_new_timestep_is_a_new_step_and_a_repeated_one_the_next_pass():
    calls = [(1.0, None), (1.0, None), (0.5, None), (0.5, None)]
    assert labels(StepTracker(), calls) == [(0, 0, "pass0"), (0, 0, "pass1"), (0, 1, "pass0"), (0, 1, "pass1")]


@pytest.mark.parametrize("times", [(1.0, 0.6, 0.2), (0.0, 0.4, 0.8)])
def test_going_back_against_the_direction_is_a_new_run(times):
    got = labels(StepTracker(), [(t, None) for t in times] * 2)
    assert [(run, step) for run, step, _ in got] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_another_shape_is_a_new_run_for_a_bare_transformer():
    got = labels(StepTracker(), [(1.0, None), (0.5, None), (0.4, None, (1, 256, 48))])
    assert [(run, step) for run, step, _ in got] == [(0, 0), (0, 1), (1, 0)]


def test_guidance_that_ends_in_mid_run_does_not_disturb_the_count():
    calls = [(1.0, "cond"), (1.0, "uncond"), (0.7, "cond"), (0.7, "uncond"), (0.4, "cond"), (0.1, "cond")]
    assert [step for _, step, _ in labels(StepTracker(), calls)] == [0, 0, 1, 1, 2, 3]


def test_a_repeated_name_is_a_new_step_even_at_the_same_timestep():
    # A second-order sampler evaluates twice at one time.
    calls = [(1.0, "cond"), (0.7, "cond"), (0.7, "cond"), (0.4, "cond")]
    assert [step for _, step, _ in labels(StepTracker(), calls)] == [0, 1, 2, 3]


def test_the_schedulers_timesteps_mark_the_runs_and_their_length():
    sampler = {"timesteps": torch.linspace(1, 0, 4)}
    tracker = StepTracker(lambda: sampler["timesteps"], lambda: 1)
    assert labels(tracker, [(1.0, None), (0.5, None)]) == [(0, 0, "pass0"), (0, 1, "pass0")]
    sampler["timesteps"] = torch.linspace(1, 0, 4)  # aborted and begun again: equal values, another object
    info = tracker.begin(1.0, SHAPE, None)
    assert (info.run, info.step, info.total, info.first_step) == (1, 0, 3, True)


def test_times_that_wander_stay_in_the_run_that_the_scheduler_knows():
    times = torch.tensor([1.0, 0.4, 0.6, 0.2])
    tracker = StepTracker(lambda: times)
    assert [step for _, step, _ in labels(tracker, [(float(t), None) for t in times])] == [0, 1, 2, 3]


def test_a_repeated_time_with_other_latents_is_the_next_step():
    # Stages of several sizes that go back in time may meet a value twice, in bfloat16 above all.
    times = torch.tensor([1.0, 0.6, 0.6, 0.2])
    tracker = StepTracker(lambda: times)
    calls = [(1.0, 64, 1), (0.6, 64, 1), (0.6, 64, 2), (0.6, 256, 1), (0.6, 256, 1), (0.2, 256, 1)]
    infos = [tracker.begin(time, (batch, tokens, 48), None, (tokens, 48)) for time, tokens, batch in calls]
    assert [(info.step, info.pass_name) for info in infos] == [
        (0, "pass0"),
        (1, "pass0"),
        (1, "pass1"),  # a pass may have a batch of its own
        (2, "pass0"),
        (2, "pass1"),
        (3, "pass0"),
    ]


def test_finish_begins_anew():
    tracker = StepTracker()
    labels(tracker, [(1.0, None), (0.5, None)])
    tracker.finish()
    assert labels(tracker, [(0.4, None)]) == [(1, 0, "pass0")]
