"""Families of transformers, and the probe for those that have no entry."""

import pytest
import torch
from pipelines import draw
from torch import nn

import hasten
from hasten import models
from hasten.errors import AdapterError
from hasten.models import registry as host_registry


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.mix, self.ff = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_states, temb):
        return hidden_states + torch.tanh(self.ff(self.mix(hidden_states) + temb))


class TwoStream(Block):
    def forward(self, x, context, temb):
        return super().forward(x, temb) + 0.1 * context.mean(1, keepdim=True), context * 0.9


class Toy(nn.Module):
    """A transformer that nobody registered."""

    def __init__(self, block=Block, blocks=4):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block() for _ in range(blocks)])
        self.head = nn.Linear(16, 16)


class PlainLoop(Toy):
    def forward(self, hidden_states, timestep):
        temb = timestep[:, None, None].expand(-1, 1, 16)
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return self.head(hidden_states) * (1 + temb)


class TwoStreamLoop(Toy):
    def __init__(self):
        super().__init__(TwoStream)

    def forward(self, hidden_states, timestep):
        temb = timestep[:, None, None].expand(-1, 1, 16)
        context = hidden_states[:, :3]
        for block in self.blocks:
            hidden_states, context = block(hidden_states, context, temb)
        return self.head(hidden_states) * (1 + temb)


def sample(model, steps=12):
    torch.manual_seed(1)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        for i in range(steps):
            x = x - 0.1 * model(x, torch.full((2,), 1 - i / steps))
    return x


@pytest.mark.parametrize("model_class", [PlainLoop, TwoStreamLoop])
def test_the_probe_wires_an_unknown_transformer(model_class):
    model = model_class()
    plain = sample(model)
    with hasten.accelerate(model, "taylorseer", interval=1):
        assert torch.equal(sample(model), plain)
    with hasten.accelerate(model, "taylorseer", interval=4) as run:
        ran = []
        handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in model.blocks]
        fast = sample(model)
        for handle in handles:
            handle.remove()
        summary = run.summary()
    assert len(ran) == len(model.blocks) * summary.computed_steps
    assert summary.skipped_steps > 0
    assert 0 < (fast - plain).norm() / plain.norm() < 0.05
    assert torch.equal(sample(model), plain)


def test_the_probe_finds_what_the_flux_entry_says(pipe, monkeypatch):
    with hasten.accelerate(pipe, "hicache", interval=4):
        known = draw(pipe)
    monkeypatch.delitem(host_registry._HOSTS, "FluxTransformer2DModel")
    with hasten.accelerate(pipe, "hicache", interval=4) as run:
        assert torch.equal(draw(pipe), known)
        (engine,) = run._engines.values()
        found = engine.site.adapter
    assert [(s.name, s.returns, s.hidden, s.encoder) for s in found.stacks] == [
        (s.name, s.returns, s.hidden, s.encoder)
        for s in models.registered().get("FluxTransformer2DModel", models.flux.FLUX).stacks
    ]


def test_a_transformer_without_stacks_is_refused_with_the_remedy():
    class Flat(nn.Module):
        def forward(self, hidden_states, timestep):
            return hidden_states

    with pytest.raises(AdapterError, match=r"models\.register\('Flat'"):
        hasten.accelerate(Flat(), "hicache")
    with pytest.raises(AdapterError, match="timestep"):
        hasten.accelerate(nn.Linear(1, 1), "hicache")


def test_the_output_site_needs_no_stacks():
    class Flat(nn.Module):
        def forward(self, hidden_states, timestep):
            return hidden_states * timestep[:, None, None]

    with hasten.accelerate(Flat(), "taylorseer", interval=3, site="output") as run:
        sample(next(iter(run._engines.values())).model)
        assert run.summary().skipped_steps > 0


def test_what_the_model_does_between_the_blocks_does_not_matter():
    class Copying(PlainLoop):
        def forward(self, hidden_states, timestep):
            for block in self.blocks:
                hidden_states = block(hidden_states, timestep[:, None, None].expand(-1, 1, 16)).clone()
            return hidden_states

    model = Copying()
    plain = sample(model)
    with hasten.accelerate(model, "hicache", interval=4) as run:
        assert 0 < (sample(model) - plain).norm() / plain.norm() < 0.1
        assert run.summary().skipped_steps > 0
    assert torch.equal(sample(model), plain)


def test_blocks_that_feed_the_result_by_other_ways_are_refused_with_what_was_seen():
    class Skipping(PlainLoop):
        """Adds up what every block returns, which no forecast of the last one gives back."""

        def forward(self, hidden_states, timestep):
            total = 0
            for block in self.blocks:
                hidden_states = block(hidden_states, timestep[:, None, None].expand(-1, 1, 16))
                total = total + hidden_states
            return total

    model = Skipping()
    run = hasten.accelerate(model, "hicache")
    with pytest.raises(AdapterError, match=r"'blocks' \(Block.*89% of the parameters.*register\('Skipping'.*'blocks'"):
        sample(model)
    assert all(isinstance(block, Block) for block in model.blocks)
    run.remove()


def test_the_module_site_asks_for_an_entry():
    with pytest.raises(AdapterError, match="site='hidden'"):
        hasten.accelerate(PlainLoop(), "hicache", site="module")


def test_a_registered_family_is_found_by_its_bases(monkeypatch):
    spec = models.ModelAdapter(stacks=(models.BlockStack("blocks", returns=("hidden",), encoder=None),))
    monkeypatch.setitem(host_registry._HOSTS, "Toy", spec)
    assert models.find(PlainLoop()) is spec
    assert "FluxTransformer2DModel" in models.registered()
