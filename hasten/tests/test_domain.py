"""The normed domain of the hidden site: image tokens are kept as the model's final norm leaves them."""

from __future__ import annotations

import pytest
import tiny
import torch
from pipelines import draw, make_pipe
from test_hosts import Toy, sample
from torch import nn

import hasten
from hasten import models
from hasten.errors import AdapterError, ConfigError
from hasten.models import BlockStack, FinalNorm, ModelAdapter
from hasten.models import registry as host_registry

FLUX = "FluxTransformer2DModel"


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_final_norm_passes_on_what_is_kept(name):
    """Reuse is the same in both domains, up to rounding, if nothing but the norm comes behind the blocks."""
    model, results = tiny.build(name), {}
    for method, domain in (("reuse", "plain"), ("reuse", "normed"), ("foca", "plain"), ("foca", "normed")):
        with torch.no_grad(), hasten.accelerate(model, method, interval=4, domain=domain):
            results[method, domain] = tiny.sample(name, model)
    plain, normed = results["reuse", "plain"], results["reuse", "normed"]
    assert (plain - normed).norm() < 1e-5 * plain.norm()
    assert (results["foca", "plain"] - results["foca", "normed"]).norm() > 1e-5 * plain.norm()


@pytest.mark.parametrize("method", ["freqca", "foca"])
def test_computed_steps_never_see_what_is_kept(method):
    pipe = make_pipe()
    plain = draw(pipe, 8)
    with hasten.accelerate(pipe, method, interval=1, domain="normed"):
        assert torch.equal(draw(pipe, 8), plain)
    with hasten.accelerate(pipe, method, interval=3, domain="normed") as run:
        draw(pipe, 8)
        assert run.summary().skipped_steps > 0
    assert torch.equal(draw(pipe, 8), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_of_its_own_result_changes_nothing(kind, dtype):
    tokens = (3 + 10 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    norm = FinalNorm(kind, 1e-6)
    once = norm(tokens)
    assert once.dtype == dtype
    module = nn.LayerNorm(64, 1e-6) if kind == "layer" else nn.RMSNorm(64, 1e-6)
    assert torch.allclose(once.float(), module(tokens.float()), atol=torch.finfo(dtype).eps * 4)
    assert torch.allclose(norm(once).float(), once.float(), atol=torch.finfo(dtype).eps * 4)


class Normed(Toy):
    """A transformer with a norm behind its blocks."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states, timestep):
        temb = timestep[:, None, None].expand(-1, 1, 16)
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return self.head(self.norm(hidden_states)) * (1 + temb)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(host_registry, "_HOSTS", dict(host_registry._HOSTS))

    def register(final_norm):
        stack = BlockStack("blocks", returns=("hidden",), encoder=None)
        models.register("Normed", ModelAdapter(stacks=(stack,), final_norm=final_norm))

    return register


@pytest.mark.parametrize(("norm", "kind"), [(nn.LayerNorm(16, bias=False), "layer"), (nn.RMSNorm(16), "rms")])
def test_the_kind_is_the_models_own(registered, norm, kind):
    registered("norm")
    model = Normed(norm)
    assert models.final_norm(model, models.find(model)).kind == kind
    results = []
    for domain in ("plain", "normed"):
        with torch.no_grad(), hasten.accelerate(model, "reuse", interval=4, domain=domain):
            results.append(sample(model))
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize(
    ("final_norm", "norm", "says"),
    [
        (None, nn.LayerNorm(16), "the final norm of Normed is not known; use domain='plain'"),
        ("norm_out", nn.LayerNorm(16), "Normed has no 'norm_out'"),
        ("norm", nn.Tanh(), "'norm' of Normed is a Tanh, no LayerNorm or RMSNorm"),
    ],
)
def test_an_unknown_norm_is_refused_by_name_and_no_default(registered, final_norm, norm, says):
    registered(final_norm)
    model = Normed(norm)
    with pytest.raises(AdapterError, match=says):
        hasten.accelerate(model, "foca", domain="normed")
    with torch.no_grad(), hasten.accelerate(model, "foca", interval=4, domain=None) as run:
        sample(model)
        assert run.summary().skipped_steps > 0


@pytest.mark.parametrize("site", ["output", "module"])
def test_other_sites_are_refused(site):
    with pytest.raises(ConfigError, match=f"use site='hidden' with it, got site='{site}'"):
        hasten.FoCa(site=site, domain="normed")


def test_freqca_keeps_normed_tokens_and_the_papers_does_not():
    pipe, results = make_pipe(), {}
    for params in ({}, {"domain": "normed"}, {"domain": "plain"}, {"mode": "paper"}):
        with hasten.accelerate(pipe, "freqca", interval=3, **params):
            results[str(params)] = draw(pipe, 8)
    usual, normed, plain, paper = results.values()
    assert torch.equal(usual, normed)
    assert torch.equal(plain, paper)
    assert not torch.equal(usual, plain)
    with pytest.raises(
        ConfigError, match=r"cutoff=0\.3 does nothing with mode='paper'; leave it out, or use mode='given'"
    ):
        hasten.FreqCa(mode="paper", cutoff=0.3)
