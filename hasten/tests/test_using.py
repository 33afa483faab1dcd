"""The settings of single calls hold for the pipeline that `using` gives, wherever it is called, and for nobody else."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pipelines import draw, make_pipe

import hasten
from hasten.errors import ConfigError

EVEN = {"schedule": "even"}


@pytest.fixture(scope="module")
def right():
    """Latents by computed steps."""
    found = {}
    for count in (4, 6, 8):
        with hasten.accelerate(pipe := make_pipe(), "hicache", computed_steps=count, **EVEN):
            found[count] = draw(pipe)
    return found


@pytest.fixture
def accelerated():
    pipe = make_pipe()
    return pipe, hasten.accelerate(pipe, "hicache", computed_steps=8, **EVEN)


def test_settings_end_in_whichever_order_and_let_go_of_the_model(accelerated, right):
    pipe, run = accelerated
    first, second = run.using(computed_steps=4), run.using(computed_steps=6)
    first.__enter__()
    own = second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(draw(own), right[6])
    assert torch.equal(draw(pipe), right[6])
    second.__exit__(None, None, None)
    assert torch.equal(draw(pipe), right[8])


def test_a_setting_that_nobody_ends_lets_go_of_the_model_when_the_acceleration_is_removed():
    pipe = make_pipe()
    run, model = hasten.accelerate(pipe, "hicache", computed_steps=8, **EVEN), weakref.ref(pipe.transformer)

    using = run.using(computed_steps=4)
    contextvars.Context().run(using.__enter__)
    (entry,) = run._requests._open_entries
    run.remove()
    assert not entry.hooks
    using.__exit__(None, None, None)
    del run, pipe, using
    gc.collect()
    assert model() is None


def of_its_own(run, call, count):
    """A generator with a setting of its own."""
    with run.using(computed_steps=count) as own:
        for _ in range(2):
            yield draw(call or own)


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("contexts", [False, True])
def test_a_generators_setting_is_not_its_consumers(itself, contexts, accelerated, right):
    """Servers go on with generators in another context each time."""
    pipe, run = accelerated

    def advance(generator):
        return contextvars.copy_context().run(next, generator, None) if contexts else next(generator, None)

    four, six = (of_its_own(run, pipe if itself else None, count) for count in (4, 6))
    for _ in range(2):
        assert torch.equal(advance(four), right[4])
        assert torch.equal(draw(pipe), right[8])
        assert torch.equal(advance(six), right[6])
    assert advance(four) is None
    six.close()
    assert torch.equal(draw(pipe), right[8])


def test_a_generator_that_awaits_a_thread_has_its_setting_there(accelerated, right):
    """Servers stream so. What the consumer itself asks of a thread between two results has none."""
    pipe, run = accelerated

    async def images():
        with run.using(computed_steps=4):
            for _ in range(2):
                yield await asyncio.to_thread(draw, pipe)

    async def consumed():
        async for image in images():
            assert torch.equal(image, right[4])
            assert torch.equal(await asyncio.to_thread(draw, pipe), right[8])
            assert torch.equal(draw(pipe), right[8])

    asyncio.run(consumed())
    assert torch.equal(draw(pipe), right[8])


def test_a_generators_setting_holds_on_a_thread_that_it_waits_for(accelerated, right):
    pipe, run = accelerated

    def images():
        with run.using(computed_steps=4), ThreadPoolExecutor(1) as pool:
            for _ in range(2):
                yield pool.submit(contextvars.copy_context().run, draw, pipe).result()

    for image in images():
        assert torch.equal(image, right[4])
        assert torch.equal(draw(pipe), right[8])


def test_a_run_goes_on_with_the_setting_that_it_began_with(accelerated, right):
    pipe, run = accelerated
    using = run.using(quality="exact")  # at another site

    def enter(_pipe, index, _timestep, kwargs):
        if index == 4:
            using.__enter__()
        return kwargs

    assert torch.equal(draw(pipe, callback_on_step_end=enter), right[8])
    using.__exit__(None, None, None)


def test_a_pipeline_that_using_gave_is_refused_when_its_with_is_over(accelerated):
    with accelerated[1].using(computed_steps=4) as own:
        pass
    with pytest.raises(ConfigError, match="call it within that `with`"):
        draw(own)
