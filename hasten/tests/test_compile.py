"""torch.compile: blocks that are compiled one by one stay whole, are compiled once, and are skipped like any other."""

from __future__ import annotations

import shutil

import pytest
import torch
from pipelines import draw, make_pipe
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import hasten
from hasten.caching import Uniform, computed_steps
from hasten.errors import HastenError, HastenWarning


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_blocks(model, how, **options):
    """The three ways in which people compile blocks."""
    stacks = model.transformer_blocks, model.single_transformer_blocks
    if how == "repeated":
        model.compile_repeated_blocks(**options)
        return
    for stack in stacks:
        for i, block in enumerate(stack):
            if how == "in place":
                block.compile(**options)
            else:
                stack[i] = torch.compile(block, **options)


def frames_without_hasten(how):
    """How often blocks are compiled in a plain pipeline."""
    pipe, counter = make_pipe(), CompileCounter()
    compile_blocks(pipe.transformer, how, backend=counter, fullgraph=True)
    draw(pipe, 2)
    torch._dynamo.reset()
    return counter.frame_count


WAYS = [
    ("repeated", "before", "hidden"),
    *(
        pytest.param(*way, marks=pytest.mark.slow)
        for way in [
            ("repeated", "after", "output"),
            ("in place", "before", "output"),
            ("in place", "after", "hidden"),
            ("wrapped", "before", "hidden"),
            ("wrapped", "after", "output"),
        ]
    ),
]


@pytest.mark.parametrize(("how", "when", "site"), WAYS)
def test_compiled_blocks_stay_whole_and_are_compiled_once(pipe, how, when, site):
    plain = draw(pipe)
    with hasten.accelerate(pipe, "taylorseer", interval=3, site=site):
        fast = draw(pipe)
    frames, counter = frames_without_hasten(how), CompileCounter()
    assert frames > 0

    def compiled():
        # fullgraph: a graph break inside a block is an error
        compile_blocks(pipe.transformer, how, backend=counter, fullgraph=True)

    if when == "before":
        compiled()
    run = hasten.accelerate(pipe, "taylorseer", interval=3, site=site)
    if when == "after":
        compiled()
    assert torch.allclose(draw(pipe), fast, atol=1e-5)
    assert run.summary().computed_steps == len(computed_steps(Uniform(3, 3), 12))
    assert torch.allclose(draw(pipe), fast, atol=1e-5)
    run.remove()
    assert torch.allclose(draw(pipe), plain, atol=1e-5)
    assert counter.frame_count == frames
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_guidance_and_another_method_compile_nothing_more(pipe):
    counter = CompileCounter()
    guidance = {"true_cfg_scale": 2.0, "negative_prompt": "banana"}
    with hasten.accelerate(pipe, "hicache", interval=3):
        fast = draw(pipe, **guidance)
    compile_blocks(pipe.transformer, "repeated", backend=counter, fullgraph=True)
    draw(pipe, 2)
    frames = counter.frame_count
    for method, params in (("hicache", {"interval": 3}), ("foca", {"interval": 4}), ("reuse", {"steps": (0, 5)})):
        with hasten.accelerate(pipe, method, **params):
            image = draw(pipe, **guidance)
            if method == "hicache":
                assert torch.allclose(image, fast, atol=1e-5)
    assert counter.frame_count == frames


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
@pytest.mark.parametrize("site", ["hidden", "output"])
def test_inductor(pipe, site):
    with hasten.accelerate(pipe, "hicache", interval=3, site=site):
        fast = draw(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    with hasten.accelerate(pipe, "hicache", interval=3, site=site) as run:
        assert torch.allclose(draw(pipe), fast, atol=1e-4)
        assert run.summary().computed_steps == len(computed_steps(Uniform(3, 3), 12))
    assert not counters["graph_break"]


@pytest.mark.parametrize("how", [pytest.param("repeated", marks=pytest.mark.slow), "wrapped"])
def test_the_module_site_refuses_compiled_blocks(pipe, how):
    compile_blocks(pipe.transformer, how, backend="eager")
    with pytest.raises(HastenError, match="hidden"), hasten.accelerate(pipe, "taylorseer", interval=3, site="module"):
        draw(pipe, 4)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["hidden", "output"])
@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_transformer_compiled_as_a_whole_is_right_and_warned_of(pipe, how, site):
    with hasten.accelerate(pipe, "taylorseer", interval=3, site=site):
        fast = draw(pipe, 8)
    if how == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.warns(HastenWarning, match="compile_repeated_blocks"):
        run = hasten.accelerate(pipe, "taylorseer", interval=3, site=site)
    assert torch.allclose(draw(pipe, 8), fast, atol=1e-5)
    run.remove()
