"""Which run, step and pass a forward belongs to, with and without help from the pipeline."""

import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from leap_pipelines import dit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hasten
from hasten.errors import AdapterError
from hasten.pipeline.caller import Caller, Owner, alive, current_owner, joined_passes
from hasten.pipeline.runs import Runs
from hasten.pipeline.view import PipelineView

LATENTS = torch.zeros(1, 64, 48)


def runs(home=None):
    return Runs(nn.Identity(), home)


def labels(tracker, calls):
    """(run, step, pass) of each (timestep, name) or (timestep, name, latents)."""
    infos = [tracker.label(call[0], call[2] if len(call) > 2 else LATENTS, call[1])[1] for call in calls]
    return [(info.run, info.step, info.pass_name) for info in infos]


def steps(tracker, times, names=(None,)):
    return [(run, step) for run, step, _ in labels(tracker, [(t, name) for t in times for name in names])]


class Pipe(DiffusionPipeline):
    """A loop over the scheduler's list; `forward` stands for the transformer's call."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, forward, steps, passes=1, stop=None, begin=0):
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(begin)
        latents = torch.zeros(1, 4)
        for i, t in enumerate(self.scheduler.timesteps[begin:]):
            if i == stop:
                raise KeyboardInterrupt
            for _ in range(passes):
                forward(t.expand(1))
            latents = self.scheduler.step(latents, t, latents)[0]


def pipe(kind=FlowMatchEulerDiscreteScheduler):
    return Pipe(kind())


def watched(tracker, log, name=None):
    return lambda t: log.append(tracker.label(t, LATENTS, name)[1])


# --- loops of the user's own


def test_a_new_timestep_is_a_new_step_and_a_repeated_one_the_next_pass():
    calls = [(1.0, None), (1.0, None), (0.5, None), (0.5, None)]
    assert labels(runs(), calls) == [(0, 0, "pass0"), (0, 0, "pass1"), (0, 1, "pass0"), (0, 1, "pass1")]


@pytest.mark.parametrize("times", [(1.0, 0.6, 0.2), (0.0, 0.4, 0.8)])
def test_going_back_against_the_direction_is_a_new_run(times):
    assert steps(runs(), times * 2) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_another_shape_is_a_new_run_for_a_bare_transformer():
    got = labels(runs(), [(1.0, None), (0.5, None), (0.4, None, torch.zeros(1, 256, 48))])
    assert [(run, step) for run, step, _ in got] == [(0, 0), (0, 1), (1, 0)]


def test_guidance_that_ends_in_mid_run_does_not_disturb_the_count():
    calls = [(1.0, "cond"), (1.0, "uncond"), (0.7, "cond"), (0.7, "uncond"), (0.4, "cond"), (0.1, "cond")]
    assert [step for _, step, _ in labels(runs(), calls)] == [0, 0, 1, 1, 2, 3]


def test_a_repeated_name_is_a_new_step_even_at_the_same_timestep():
    # A second-order sampler evaluates twice at one time.
    calls = [(1.0, "cond"), (0.7, "cond"), (0.7, "cond"), (0.4, "cond")]
    assert [step for _, step, _ in labels(runs(), calls)] == [0, 1, 2, 3]


def test_a_repeated_time_with_other_latents_is_the_next_step():
    # Stages of several sizes that go back in time may meet a value twice, in bfloat16 above all.
    tracker = runs(PipelineView(SimpleNamespace(scheduler=listed([1.0, 0.6, 0.6, 0.2]))))
    calls = [(1.0, 64, 1), (0.6, 64, 1), (0.6, 64, 2), (0.6, 256, 1), (0.6, 256, 1), (0.2, 256, 1)]
    got = labels(tracker, [(time, None, torch.zeros(batch, tokens, 48)) for time, tokens, batch in calls])
    assert [(step, name) for _, step, name in got] == [
        (0, "pass0"),
        (1, "pass0"),
        (1, "pass1"),  # a pass may have a batch of its own
        (2, "pass0"),
        (2, "pass1"),
        (3, "pass0"),
    ]


def listed(times):
    return SimpleNamespace(timesteps=torch.tensor(times), num_inference_steps=len(times))


def test_times_that_wander_stay_in_the_run_that_the_scheduler_knows():
    owner = SimpleNamespace(scheduler=listed([1.0, 0.4, 0.6, 0.2]))
    tracker = runs(PipelineView(owner))
    assert steps(tracker, [1.0, 0.4, 0.6, 0.2]) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert steps(tracker, [1.0]) == [(1, 0)]  # back at the start, though the list is the same object


def test_the_schedulers_list_marks_the_runs_of_a_users_own_loop():
    owner = SimpleNamespace(scheduler=listed([1.0, 0.5, 0.0]))
    tracker = runs(PipelineView(owner))
    assert steps(tracker, [1.0, 0.5]) == [(0, 0), (0, 1)]
    owner.scheduler.timesteps = torch.tensor([0.4, 0.2])  # begun again, at a time that goes on downwards
    run, info = tracker.label(0.4, LATENTS)
    assert (info.run, info.step, info.total, info.first_step) == (1, 0, 2, True)
    assert run.timesteps == pytest.approx((0.4, 0.2))


def test_a_list_that_nobody_set_is_not_a_runs():
    owner = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())  # a thousand steps by construction
    assert runs(PipelineView(owner)).label(1000.0, LATENTS)[1].total is None


def test_finish_begins_again():
    tracker = runs()
    steps(tracker, [1.0, 0.5])
    tracker.end()
    assert steps(tracker, [0.4]) == [(1, 0)]


def test_threads_have_runs_of_their_own():
    tracker, got = runs(), {}
    steps(tracker, [1.0, 0.8, 0.6])

    def other():
        got["other"] = steps(tracker, [1.0, 0.8])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert got["other"] == [(1, 0), (1, 1)]
    assert steps(tracker, [0.4]) == [(0, 3)]
    steps(tracker, [1.0])  # a new run drops what belongs to a thread that has ended
    assert [run.number for run in tracker.under_way] == [2]


# --- calls of pipelines


@pytest.mark.parametrize("begin", [0, 3])
def test_a_call_counts_its_steps_and_knows_its_end(begin):
    tracker, log = runs(), []
    pipe()(watched(tracker, log), 8, passes=2, begin=begin)
    total = 8 - begin
    assert [(info.step, info.pass_name) for info in log] == [(i, f"pass{k}") for i in range(total) for k in range(2)]
    assert {info.total for info in log} == {total}
    assert [info.last for info in log] == [False] * (2 * total - 1) + [True]


def test_a_cancelled_call_leaves_nothing_to_the_next_wherever_it_begins():
    tracker, log, caller = runs(), [], pipe()
    for stop in (1, 2, 5):
        with pytest.raises(KeyboardInterrupt):
            caller(watched(tracker, log), 8, stop=stop)
        log.clear()
        caller(watched(tracker, log), 8, begin=stop)  # goes on at the time where the other one stopped
        assert [info.step for info in log] == list(range(8 - stop))
        assert len({info.run for info in log}) == 1
    assert len(tracker.under_way) == 1


def test_a_call_that_takes_its_scheduler_back_to_the_start_begins_a_run():
    """Sections of a long video, with the list of the first one."""
    tracker, log = runs(), []

    class Sections(Pipe):
        def __call__(self, forward, steps):
            self.scheduler.set_timesteps(steps)
            for _ in range(2):
                self.scheduler._step_index = None
                latents = torch.zeros(1, 4)
                for t in self.scheduler.timesteps:
                    forward(t.expand(1))
                    latents = self.scheduler.step(latents, t, latents)[0]

    Sections(FlowMatchEulerDiscreteScheduler())(watched(tracker, log), 5)
    assert [(info.run, info.step) for info in log] == [(run, step) for run in range(2) for step in range(5)]


def test_a_users_own_loop_does_not_go_by_a_scheduler_that_a_call_goes_by():
    caller, own, log = pipe(), [], []
    tracker = runs(PipelineView(caller))

    def loop():
        own.extend(tracker.label(t, LATENTS)[1] for t in (1.0, 0.5))

    def forward(t):
        log.append(tracker.label(t, LATENTS)[1])
        if len(log) == 3:
            thread = threading.Thread(target=loop)
            thread.start()
            thread.join()

    caller(forward, 5)
    assert [(info.run, info.step, info.total) for info in log] == [(0, step, 5) for step in range(5)]
    assert [(info.run, info.step, info.total) for info in own] == [(1, 0, None), (1, 1, None)]


def test_calls_inside_calls_and_shared_transformers_do_not_mix():
    tracker, outer, inner, one, other = runs(), [], [], pipe(), pipe()

    def forward(t):
        outer.append(tracker.label(t, LATENTS)[1])
        if len(outer) == 4:
            other(watched(tracker, inner), 5)

    one(forward, 7)
    assert [(info.run, info.step, info.total) for info in outer] == [(0, step, 7) for step in range(7)]
    assert [(info.run, info.step, info.total) for info in inner] == [(1, step, 5) for step in range(5)]


def test_a_scheduler_that_evaluates_twice_is_counted_by_its_own_count():
    """Heun's list has every time but the first twice; without names the second would pass for a second pass."""
    tracker, log = runs(), []
    caller = pipe(FlowMatchHeunDiscreteScheduler)
    caller(watched(tracker, log), 4, passes=2)
    assert len(caller.scheduler.timesteps) == 7
    assert [(info.step, info.pass_name) for info in log] == [(i, f"pass{k}") for i in range(7) for k in range(2)]


def test_a_second_evaluation_within_a_counted_step_is_a_pass_of_its_own():
    tracker, log = runs(), []

    def forward(t):
        for name in ("cond", "cond", "uncond"):
            log.append(tracker.label(t, LATENTS, name)[1])

    pipe()(forward, 3)
    assert [(info.step, info.pass_name) for info in log] == [
        (step, name) for step in range(3) for name in ("cond", "cond#1", "uncond")
    ]


def test_frames_with_times_of_their_own_are_steps_though_the_latest_time_stays():
    """Diffusion forcing copies the scheduler for each frame: the pipeline's own never counts."""
    tracker, log = runs(), []

    class Forcing(Pipe):
        def __call__(self):
            self.scheduler.set_timesteps(4)
            for first in (1000.0, 750.0, 500.0, 250.0):
                for name in ("cond", "uncond"):
                    log.append(tracker.label(torch.tensor([[first, 1000.0]]), LATENTS, name)[1])

    Forcing(FlowMatchEulerDiscreteScheduler())()
    assert [(info.step, info.pass_name) for info in log] == [(i, name) for i in range(4) for name in ("cond", "uncond")]
    assert not any(info.last for info in log)


def test_the_owner_is_the_nearest_call():
    seen = []

    def forward(_):
        caller = Caller()
        seen.append((caller.owner, caller.pipe, caller.owner in alive([caller.owner])))

    one = pipe()
    one(forward, 2)
    assert {(found is one, living) for _, found, living in seen} == {(True, True)}
    assert len({owner for owner, _, _ in seen}) == 1
    assert alive([seen[0][0]]) == set()  # the call is over
    here = current_owner()
    assert here == Owner(weakref.ref(threading.current_thread()), None)
    assert Caller().pipe is None
    assert alive([here]) == {here}


def test_looking_for_the_owner_keeps_no_tensor_of_the_call_alive():
    gone = []

    class Holds(Pipe):
        def __call__(self, forward):
            big = torch.zeros(3)
            gone.append(weakref.ref(big))
            forward(torch.ones(1))
            del big
            gone.append(gone[0]() is None)

    tracker = runs()
    Holds(FlowMatchEulerDiscreteScheduler())(lambda t: tracker.label(t, LATENTS))
    assert gone[1]


def test_a_timestep_without_numbers_is_named():
    latents = torch.zeros(1, 4, device="meta")
    with pytest.raises(AdapterError, match="without numbers"):
        Runs(nn.Identity()).label(torch.ones(1, device="meta"), latents)
    with FakeTensorMode(), pytest.raises(AdapterError, match="without numbers"):
        Runs(nn.Identity()).label(torch.ones(1), latents)
    assert Runs(nn.Identity()).label(torch.ones(1), latents)[1].timestep == 1.0


@pytest.mark.parametrize("images", [1, 2, 4, 8])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_time_of_every_image_is_not_taken_for_the_list_of_steps(images, guidance):
    """DiT's pipeline has the time of the step, once per image and pass, under the name that others have the list."""
    pipe = dit()
    pipe.set_progress_bar_config(disable=True)
    with hasten.accelerate(pipe, "reuse", schedule="even", computed_steps=3) as run:
        pipe([3] * images, guidance_scale=guidance, num_inference_steps=8, output_type="np")
        facts = run.engines["transformer"].facts
    assert facts.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert [record.step for record in run.records if record.computed] == [0, 4, 7]


class _Probe(torch.nn.Module):
    """A denoiser that says how many passes its batch joins."""

    def forward(self, hidden):
        return joined_passes(hidden)


class _Loops(DiffusionPipeline):
    """Calls its denoiser itself, or in a loop of another function, where frames stand in the batch."""

    def __init__(self, guides):
        super().__init__()
        self.probe, self.guides = _Probe(), guides

    @property
    def do_classifier_free_guidance(self):
        return self.guides

    def frames(self, latents):
        return self.probe(latents)

    def __call__(self, repeats, elsewhere=False):
        latents = torch.zeros(2, 4)
        batch = latents.repeat(repeats, 1)
        return self.frames(batch) if elsewhere else self.probe(batch)


def test_a_batch_joins_passes_where_its_own_loop_repeats_its_latents_to_guide():
    guided, plain = _Loops(guides=True), _Loops(guides=False)
    assert [guided(1), guided(2), guided(3)] == [1, 2, 3]
    assert guided(3, elsewhere=True) == 1  # frames of one image in a loop of their own
    assert plain(4) == 1  # views of one image in a batch
