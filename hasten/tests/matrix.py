"""Every caching method on every family: what `test_matrix.py` asserts and `benchmarks/matrix.py` writes down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import tiny
import torch
from torch import nn

import hasten
from hasten import registry

STEPS = 12
# Thresholds that skip something on random weights; the other methods take an interval.
THRESHOLDS = {"fbcache": 0.6, "teacache": 0.3, "magcache": 1.0, "easycache": 1.0, "speca": 0.2}


def caching_methods() -> list[str]:
    """Names of all caching methods."""
    return [info.name for info in registry.methods() if info.kind == "caching"]


@dataclass(frozen=True)
class Cell:
    """What was seen of one method on one family.

    Attributes:
        computed: computed steps of 12.
        linears: calls of linear layers, as a share of the plain run's.
        error: relative error of the final latents.
        exact: whether interval 1 and the model after removal are bit-identical to the plain one.
        traces: whether removal left hooks or modules behind.
    """

    computed: int
    linears: float
    error: float
    exact: bool
    traces: bool


class Family:
    """A tiny transformer, its plain result, and what calibrations need."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = tiny.build(name)
        self.plain = self.sample()
        self.linear_calls = 0
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._count)
        self.sample()
        self.plain_calls, self.linear_calls = self.linear_calls, 0

    def _count(self, *_: Any) -> None:
        self.linear_calls += 1

    def sample(self) -> torch.Tensor:
        return tiny.sample(self.name, self.model, steps=STEPS)

    @cache  # noqa: B019 - a family lives as long as the test session
    def trace(self) -> Any:
        return hasten.record(self.model, [self.sample])

    def parameters(self, method: str) -> dict[str, Any]:
        """Parameters that make the method skip about half of the steps."""
        params: dict[str, Any] = {"threshold": THRESHOLDS[method]} if method in THRESHOLDS else {"interval": 3}
        info = next(info for info in registry.methods() if info.name == method)
        if info.needs_calibration:
            params["calibration"] = hasten.fit(self.trace(), method)
        if method == "magcache":
            params["retention"] = 0.0
        return params

    def check(self, method: str) -> Cell:
        """Run the method on the family."""
        params = self.parameters(method)
        before = _state(self.model)
        with hasten.accelerate(self.model, method, **{**params, "interval": 1}):
            exact = torch.equal(self.sample(), self.plain)
        self.linear_calls = 0
        with hasten.accelerate(self.model, method, **params) as run:
            fast = self.sample()
            computed = run.summary().computed_steps
        calls = self.linear_calls
        traces = _state(self.model) != before
        exact = exact and torch.equal(self.sample(), self.plain)
        error = float((fast - self.plain).norm() / self.plain.norm())
        return Cell(computed, calls / self.plain_calls, error, exact, traces)


@cache
def family(name: str) -> Family:
    """The family of that name, built once."""
    return Family(name)


def _state(model: nn.Module) -> Any:
    """What an acceleration could leave behind: modules of the tree, and attributes of the transformer."""
    tree = {name: id(module) for name, module in model.named_modules()}
    return tree, {key for key in model.__dict__ if key not in ("_diffusers_hook",)}
