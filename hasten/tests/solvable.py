"""The smallest pipelines for tests of LEAP: a field in the place of the denoiser, unmodified schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

STEPS = 20
Field = Callable[[Tensor, float], Tensor]


def curved(x: Tensor, t: float) -> Tensor:
    """A field that bends with time and depends on the state."""
    return torch.sin(x + t / 200) - 0.3 * x + t / 1000


def noise(x: Tensor, t: float) -> Tensor:
    """What a model of noise might say."""
    return torch.tanh(x) * (0.5 + t / 2000)


class Net(nn.Module):
    """A field as a module; its weight is there for the fingerprint."""

    def __init__(self, field: Field, weight: float = 1.0) -> None:
        super().__init__()
        self.field, self.weight = field, nn.Parameter(torch.full((3,), weight))

    def forward(self, sample: Tensor, timestep: float) -> tuple[Tensor]:
        return (self.field(sample, timestep),)


class Toy:
    """A pipeline of two channels of eight numbers per image.

    Args:
        field: of the denoiser.
        scheduler: unmodified.
        fused: whether guidance makes one batch of two, else two calls.
        name: under which the denoiser is kept.
        steps: of every run, whatever is asked for; None for as many as asked for.
    """

    def __init__(
        self,
        field: Field = curved,
        scheduler: Any = None,
        fused: bool = False,
        name: str = "transformer",
        steps: int | None = None,
    ) -> None:
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.fused, self.name, self.steps = fused, name, steps
        setattr(self, name, Net(field))

    def _answer(self, x: Tensor, t: float, scale: float | None) -> Tensor:
        net = getattr(self, self.name)
        if scale is None:
            return net(x, t)[0]
        other = 0.9 * x + 0.1  # a state stands for a prompt
        if self.fused:
            uncond, cond = net(torch.cat([other, x]), t)[0].chunk(2)
        else:
            cond, uncond = net(x, t)[0], net(other, t)[0]
        return uncond + scale * (cond - uncond)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return self.run(*args, **kwargs)

    def run(
        self,
        generator: torch.Generator | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float | None = None,
        output_type: str = "latent",
        batch: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor]:
        x = torch.randn(batch, 2, 8, generator=generator).to(dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.scheduler.set_timesteps(self.steps or num_inference_steps)
        for t in self.scheduler.timesteps:
            scale = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
            output = self._answer(scale(x, t), float(t), guidance_scale).to(dtype)
            x = self.scheduler.step(output, t, x, return_dict=False)[0]
        return (x,)


class Called(Toy, DiffusionPipeline):
    """The same as a pipeline of diffusers, whose call shows its arguments."""

    def __init__(self, **kwargs: Any) -> None:
        DiffusionPipeline.__init__(self)
        self.register_to_config()
        Toy.__init__(self, **kwargs)

    def __call__(
        self,
        generator: torch.Generator | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float | None = None,
    ) -> tuple[Tensor]:
        return self.run(generator, num_inference_steps, guidance_scale)


def toy_call(seed: int = 0, **more: Any) -> dict[str, Any]:
    """Arguments of a call."""
    return {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": STEPS, **more}


def relative(pipe: Any, scheduler: Any, count: int, reference: Tensor, seed: int = 9, **more: Any) -> float:
    """Relative error of a run with another scheduler (None: as the pipeline is)."""
    original, pipe.scheduler = pipe.scheduler, scheduler or pipe.scheduler
    try:
        (x,) = pipe(**{**toy_call(seed, **more), "num_inference_steps": count})
    finally:
        pipe.scheduler = original
    return float((x - reference).norm() / reference.norm())
