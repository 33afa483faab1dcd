"""Forwards that began on other threads before the hooks came: they run as if nothing stood in the model's tree."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from denoisers.unets import SDXL
from test_positions import QWEN, coarse, placed
from test_positions import arguments as qwen_arguments
from test_probe import WIDTH, DiT
from torch import Tensor, nn

import hasten
from hasten.errors import HastenWarning

TIMES = [1.0, 0.85, 0.7, 0.55, 0.4, 0.25]
FLUX = "FluxTransformer2DModel"


class Meetings:
    """Forwards on threads of their own, which wait at their beginning until this thread's forward is at some place.

    Args:
        model: whose forwards they are.
        forward: makes one.
        entry: path of the submodule at which they wait.
        places: paths of submodules; whenever this thread comes to one, the next forward runs to its end.
        waiting: how many there are.
    """

    def __init__(
        self, model: nn.Module, forward: Callable[[], Tensor], entry: str, places: list[str], waiting: int
    ) -> None:
        self._model, self._forward, self._waiting = model, torch.no_grad()(forward), waiting
        self._entry, self._places = entry, places
        self._here = threading.get_ident()
        self._entered = threading.Semaphore(0)
        self._gates: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self.results: list[Tensor | BaseException] = []
        self.met = 0

    def _work(self, go: threading.Event) -> None:
        thread = threading.current_thread()

        def wait(*_: Any) -> None:
            if threading.current_thread() is thread:
                self._entered.release()
                assert go.wait(20)

        holding = self._model.get_submodule(self._entry).register_forward_pre_hook(wait)
        try:
            self.results.append(self._forward())
        except BaseException as error:
            self.results.append(error)
        finally:
            holding.remove()

    def _meet(self, *_: Any) -> None:
        if threading.get_ident() == self._here and self._gates:
            self.met += 1
            self.release()

    def release(self) -> None:
        """Let the next one run to its end."""
        self._gates.pop().set()
        self._threads.pop().join()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Within it they wait, or run when this thread's forwards come to the places."""
        places = [self._model.get_submodule(place).register_forward_pre_hook(self._meet) for place in self._places]
        for _ in range(self._waiting):
            self._gates.append(threading.Event())
            self._threads.append(threading.Thread(target=self._work, args=(self._gates[-1],)))
            self._threads[-1].start()
            assert self._entered.acquire(timeout=20)
        try:
            yield
        finally:
            while self._threads:
                self.release()
            for handle in places:
                handle.remove()

    def check(self, plain: Tensor) -> None:
        """Every one of them ended with what a plain forward gives."""
        assert self.met
        assert len(self.results) == self._waiting
        for result in self.results:
            assert isinstance(result, Tensor), result
            assert torch.equal(result, plain)


def flux() -> tuple[Any, Callable[[float], Tensor]]:
    model = tiny.build(FLUX)
    described = tiny.TINY[FLUX]
    latent = tiny.randn(*described.latent)
    return model, lambda t: tiny.first(model(**described.arguments(latent, t)))


def unet() -> tuple[Any, Callable[[float], Tensor]]:
    model = tiny.build("UNet2DConditionModel", tiny.Tiny(SDXL, (), dict))
    given = {"text_embeds": tiny.randn(1, 16), "time_ids": torch.ones(1, 6)}
    latent, text = tiny.randn(1, 4, 8, 8), tiny.randn(1, 5, model.config.cross_attention_dim)
    return model, lambda t: model(latent, 1000 * t, encoder_hidden_states=text, added_cond_kwargs=given)[0]


def unknown() -> tuple[Any, Callable[[float], Tensor]]:
    model, latent = DiT().eval(), tiny.randn(1, 4, WIDTH)
    return model, lambda t: model.call(latent, torch.tensor([t]))


CASES = {
    "hidden": (flux, "taylorseer", {"warmup": 1, "interval": 2}),
    "module": (flux, "taylorseer", {"warmup": 1, "interval": 2, "site": "module"}),
    "output": (flux, "taylorseer", {"warmup": 1, "interval": 2, "site": "output"}),
    "span": (flux, "fbcache", {"threshold": 10.0}),
    "verified": (flux, "speca", {"warmup": 1}),
    "modulated": (flux, hasten.TeaCache(threshold=10.0, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0)), {}),
    "deep": (unet, "taylorseer", {"warmup": 1, "interval": 2, "site": "deep"}),
    "watched": (unknown, "taylorseer", {"warmup": 1, "interval": 2}),
}
ENTRIES = {flux: "x_embedder", unet: "conv_in", unknown: "t_embedder"}
PLACES = {
    flux: ["transformer_blocks.0.norm1", "single_transformer_blocks.1.norm", "norm_out"],
    unet: ["down_blocks.0", "mid_block.resnets.0", "conv_out"],
    unknown: ["blocks.1.mlp", "final_layer"],
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_forward_that_began_before_the_hooks_came_meets_nothing_of_theirs(case: str) -> None:
    """Neither its result nor that of the calls beside it changes, and nobody is told that it came past the hooks."""
    build, method, params = CASES[case]
    model, forward = build()
    plain = forward(0.5)
    with hasten.accelerate(model, method, **params) as run:
        alone = [forward(t) for t in TIMES]
    assert any(not record.computed for record in run.records)
    meetings = Meetings(model, lambda: forward(0.5), ENTRIES[build], PLACES[build], waiting=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HastenWarning)
        with meetings.under_way(), hasten.accelerate(model, method, **params):
            beside = [forward(t) for t in TIMES]
    meetings.check(plain)
    assert all(map(torch.equal, beside, alone))
    assert torch.equal(forward(0.5), plain)


@torch.no_grad()
def test_a_call_that_began_before_the_hooks_came_did_not_come_past_them() -> None:
    model, forward = flux()
    plain = forward(0.5)
    called = Meetings(model, lambda: forward(0.5), "x_embedder", [], waiting=1)
    arguments = tiny.TINY[FLUX].arguments(tiny.randn(*tiny.TINY[FLUX].latent), 0.5)
    past = Meetings(model, lambda: tiny.first(model.forward(**arguments)), "x_embedder", [], waiting=1)
    with called.under_way(), past.under_way(), hasten.accelerate(model, "taylorseer"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", HastenWarning)
            called.release()
        with pytest.warns(HastenWarning, match="called directly"):
            past.release()
    for meetings in (called, past):
        (result,) = meetings.results
        assert isinstance(result, Tensor), result
        assert torch.equal(result, plain)


@torch.no_grad()
def test_positions_are_of_one_thread() -> None:
    model, called = tiny.build(QWEN), qwen_arguments([(1, 4, 4)], 16)
    plain = tiny.first(model(**called))
    meetings = Meetings(model, lambda: tiny.first(model(**called)), "img_in", ["norm_out"], waiting=2)
    with meetings.under_way(), placed(model, [coarse(4, 4, "hr_units")]):
        assert not torch.equal(tiny.first(model(**called)), plain)
    meetings.check(plain)
