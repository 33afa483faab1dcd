"""A pipeline so small that it can be called a hundred thousand times, and what grows while it is."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

__all__ = ["Endless", "Growth"]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states) + temb)


class _Denoiser(nn.Module, CacheMixin):
    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([_Block() for _ in range(3)])

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden_states = self.embedder(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep[:, None, None])
        return hidden_states


class Endless(DiffusionPipeline):
    """Two passes per step; a call takes milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
        self.transformer = _Denoiser().eval()

    @torch.no_grad()
    def __call__(self, steps: int = 4, tokens: int = 16) -> Tensor:
        """Latents `[1, tokens, 8]`."""
        self.scheduler.set_timesteps(steps)
        latents = torch.ones(1, tokens, 8)
        for t in self.scheduler.timesteps:
            predictions = []
            for name in ("cond", "uncond"):
                with self.transformer.cache_context(name):
                    predictions.append(self.transformer(latents, t.expand(1) / 1000))
            velocity = 2 * predictions[0] - predictions[1]
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        self.transformer._reset_stateful_cache()  # as the pipelines of diffusers do
        return latents


class Growth:
    """Memory of the process, objects of the interpreter and processor time per call, block by block of calls."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def run(self, call: Callable[[int], Any], calls: int) -> None:
        """Make so many calls and write down where that leads."""
        done = int(self.rows[-1]["calls"]) if self.rows else 0
        started = time.process_time()
        for i in range(done, done + calls):
            call(i)
        spent = time.process_time() - started
        gc.collect()
        row = {"calls": done + calls, "ms_per_call": 1e3 * spent / calls, "objects": len(gc.get_objects())}
        self.rows.append(row | {"resident_mib": _resident() / 2**20})


def _resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
