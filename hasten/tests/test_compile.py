"""torch.compile: compiled blocks are compiled once and skipped like any other; a transformer compiled as a whole is one
graph for its computed steps and one for its skipped ones."""

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


# --- transformers compiled as a whole


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.kept = []

    def __call__(self, graph, _inputs):
        self.kept.append(graph)
        return graph.forward

    def calls(self, name):
        """How often a function or method of that name is called, by graph."""
        return [
            sum(name in (str(node.target), getattr(node.target, "__name__", "")) for node in graph.graph.nodes)
            for graph in self.kept
        ]


def compile_whole(pipe, how, **options):
    """The two ways in which people compile a transformer."""
    if how == "in place":
        pipe.transformer.compile(**options)
    else:
        pipe.transformer = torch.compile(pipe.transformer, **options)


@pytest.mark.parametrize(
    ("how", "when", "site", "method"),
    [
        ("in place", "before", "hidden", "hicache"),
        ("wrapped", "before", "hidden", "freqca"),
        *(
            pytest.param(*way, marks=pytest.mark.slow)
            for way in [
                ("in place", "after", "hidden", "taylorseer"),
                ("in place", "after", "output", "foca"),
                ("in place", "before", "output", "easycache"),
                ("wrapped", "before", "output", "reuse"),
                ("wrapped", "before", "hidden", "dmd"),
            ]
        ),
    ],
)
def test_a_whole_transformer_runs_as_one_graph_for_computed_and_one_for_skipped_steps(pipe, how, when, site, method):
    params = {"threshold": 0.5, "warmup": 2} if method == "easycache" else {"interval": 3}
    plain, graphs = draw(pipe), Graphs()
    with hasten.accelerate(pipe, method, site=site, **params) as run:
        fast = draw(pipe)
        computed = [record.computed for record in run.records]
    assert not all(computed)
    if when == "before":
        compile_whole(pipe, how, backend=graphs, fullgraph=True)
    run = hasten.accelerate(pipe, method, site=site, **params)
    if when == "after":
        compile_whole(pipe, how, backend=graphs, fullgraph=True)
    for _ in range(2):
        assert torch.allclose(draw(pipe), fast, atol=1e-5)
        assert [record.computed for record in run.records][-12:] == computed
    attentions = graphs.calls("scaled_dot_product_attention")
    assert sorted(map(bool, attentions)) == ([False, True] if site == "hidden" else [True])
    assert not counters["graph_break"]
    for waits in ("item", "tolist", "cpu", "numpy", "nonzero"):
        assert not any(graphs.calls(waits))
    run.remove()
    assert torch.allclose(draw(pipe), plain, atol=1e-5)
    before = len(graphs.kept)
    assert before <= len(attentions) + 1  # nothing of ours is in the tree: perhaps another graph, but the last one
    draw(pipe)
    assert len(graphs.kept) == before


def test_a_wrapper_that_comes_later_is_found_at_the_first_run(pipe):
    graphs = Graphs()
    with hasten.accelerate(pipe, "taylorseer", interval=3) as run:
        fast = draw(pipe)
        wrapper = pipe.transformer = torch.compile(pipe.transformer, backend=graphs)
        forward = wrapper.forward
        assert torch.allclose(draw(pipe), fast, atol=1e-5)
        assert run.summary().skipped_steps
        assert len(graphs.kept) == 2
        assert wrapper.forward is not forward
    assert wrapper.forward is forward


def test_guidance_and_other_methods_share_the_graphs_and_another_size_has_its_own(pipe):
    guidance, graphs = {"true_cfg_scale": 2.0, "negative_prompt": "banana"}, Graphs()
    with hasten.accelerate(pipe, "hicache", interval=3):
        fast = draw(pipe, **guidance)
    compile_whole(pipe, "in place", backend=graphs, fullgraph=True, dynamic=False)
    for method, params in (("hicache", {"interval": 3}), ("foca", {"schedule": "even"}), ("reuse", {"steps": (0, 5)})):
        with hasten.accelerate(pipe, method, **params):
            image = draw(pipe, **guidance)
            if method == "hicache":
                assert torch.allclose(image, fast, atol=1e-5)
        assert len(graphs.kept) == 2
    with hasten.accelerate(pipe, "hicache", interval=3):
        draw(pipe, 6, height=16)
    assert len(graphs.kept) == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler for the CPU")
@pytest.mark.parametrize(("site", "method"), [("hidden", "hicache"), ("output", "foca")])
def test_inductor_on_a_whole_transformer(pipe, site, method):
    with hasten.accelerate(pipe, method, interval=3, site=site):
        fast = draw(pipe)
    pipe.transformer.compile(fullgraph=True)
    with hasten.accelerate(pipe, method, interval=3, site=site):
        assert torch.allclose(draw(pipe), fast, atol=1e-4)
    assert not counters["graph_break"]


@pytest.mark.parametrize(("method", "params"), [("fbcache", {"threshold": 0.5}), ("reuse", {"site": "module"})])
def test_methods_that_work_between_the_blocks_run_a_whole_transformer_uncompiled_and_say_so(pipe, method, params):
    with hasten.accelerate(pipe, method, interval=3, **params):
        fast = draw(pipe, 8)
    graphs = Graphs()
    compile_whole(pipe, "in place", backend=graphs)
    with pytest.warns(HastenWarning, match="compile_repeated_blocks"):
        run = hasten.accelerate(pipe, method, interval=3, **params)
    assert torch.equal(draw(pipe, 8), fast)
    assert not graphs.kept
    run.remove()


def test_a_forward_that_leaves_out_the_last_block_is_computed_under_a_compiler():
    """The forecast is made beforehand there, and then has no place."""
    from tiny import TINY, build, first

    model, tiny, out = build("SD3Transformer2DModel"), TINY["SD3Transformer2DModel"], {}
    last = len(model.transformer_blocks) - 1

    def run():
        latents = torch.randn(*tiny.latent, generator=torch.Generator().manual_seed(1))
        return [
            first(model(**tiny.arguments(latents, 1 - i / 8), skip_layers=[last] if i == 5 else None)) for i in range(8)
        ]

    with torch.no_grad():
        for compiled in (False, True):
            if compiled:
                model.compile(backend="eager")
            with hasten.accelerate(model, "taylorseer", warmup=1, interval=8) as handle:
                out[compiled] = run()
            assert [r.step for r in handle.records if r.reason == "the forward has no place for a forecast"] == [5]
    for eager, compiled in zip(out[False], out[True], strict=True):
        assert torch.allclose(eager, compiled, atol=1e-5)
