"""Sixteen families of diffusers transformers, by their entry and by the probe."""

import pytest
import tiny
import torch
from test_engine import leftovers

import hasten
from hasten import models
from hasten.caching import Uniform, computed_steps
from hasten.models import probe
from hasten.models import registry as host_registry

SITES = ("hidden", "output", "module")


@pytest.fixture(scope="module", params=tiny.TINY)
def family(request):
    model = tiny.build(request.param)
    return request.param, model, tiny.sample(request.param, model)


def count_work(model, site):
    """Hooks what the site has to skip; returns the list that grows each time it runs, and the hooks."""
    ran, modules = [], []
    for stack in models.find(model).stacks:
        for block in stack.blocks(model):
            if site == "module":
                modules += [getattr(block, name, None) for name, _ in stack.modules.forecast]
            else:
                modules.append(block)
    return ran, [m.register_forward_hook(lambda *_: ran.append(1)) for m in modules if m is not None]


@pytest.mark.parametrize("site", SITES)
def test_interval_one_is_bit_identical(family, site):
    name, model, plain = family
    with hasten.accelerate(model, "taylorseer", interval=1, site=site):
        assert torch.equal(tiny.sample(name, model), plain)


@pytest.mark.parametrize("site", SITES)
def test_a_skip_skips_and_removal_is_exact(family, site):
    name, model, plain = family
    before = leftovers(model)
    ran, handles = count_work(model, site)
    tiny.sample(name, model, steps=1)
    per_forward = len(ran)
    assert per_forward >= 4
    with hasten.accelerate(model, "taylorseer", interval=4, site=site) as run:
        ran.clear()
        fast = tiny.sample(name, model)
        assert len(ran) == per_forward * len(computed_steps(Uniform(4, 3), 12))
        assert torch.equal(tiny.sample(name, model), fast)
        assert run.summary().skipped_steps == 7
        assert run.summary().cache_bytes > 0
    for handle in handles:
        handle.remove()
    # How far a forecast may be off says little on random weights; garbage is off by all of it.
    assert 0 < (fast - plain).norm() / plain.norm() < 0.2
    assert leftovers(model) == before
    assert torch.equal(tiny.sample(name, model), plain)


def test_two_forwards_a_step_have_one_schedule(family):
    name, model, _ = family
    with hasten.accelerate(model, "reuse", interval=4) as run:
        tiny.sample(name, model, guided=True)
    for name in ("pass0", "pass1"):
        assert [r.step for r in run.records if r.computed and r.pass_name == name] == computed_steps(Uniform(4, 3), 12)


def test_the_probe_wires_every_family_as_its_entry_does(family, monkeypatch):
    name, model, _ = family
    with hasten.accelerate(model, "taylorseer", interval=4):
        known = tiny.sample(name, model)
    entry = models.find(model)
    for share in ("_LEAST_SHARE", "_MOST"):  # a tiny model's time embedding may be larger than all of its blocks
        monkeypatch.setattr(probe, share, 0.0)
    monkeypatch.delitem(host_registry._HOSTS, name)
    with hasten.accelerate(model, "taylorseer", interval=4) as run:
        assert torch.equal(tiny.sample(name, model), known)
        (engine,) = run._engines.values()
        found = {stack.name: stack for stack in engine.site.adapter.stacks}
    for stack in entry.stacks:
        assert (found[stack.name].returns, found[stack.name].hidden) == (stack.returns, stack.hidden)


@pytest.mark.parametrize(
    "name",
    ["QwenImageTransformer2DModel", "SD3Transformer2DModel", "Flux2Transformer2DModel", "WanTransformer3DModel"],
)
@pytest.mark.parametrize("site", SITES)
def test_memory_is_what_was_estimated(name, site):
    model = tiny.build(name)
    tokens = {"WanTransformer3DModel": 2 * 4 * 4}.get(name, 4 * 4)
    with hasten.accelerate(model, "taylorseer", interval=4, site=site) as run:
        tiny.sample(name, model)
        expected = run.estimate_bytes(tokens, text_tokens=tiny.TEXT, dtype=torch.float32)
        assert run.summary().cache_bytes == expected


def test_memory_of_a_model_with_patches_to_choose_from_is_what_was_estimated():
    model = tiny.build("ZImageTransformer2DModel")  # whose tokens are padded between the blocks, but not after them
    with hasten.accelerate(model, "taylorseer", interval=4, site="output") as run:
        tiny.sample("ZImageTransformer2DModel", model)
        assert run.summary().cache_bytes == run.estimate_bytes(4 * 4, dtype=torch.float32)
