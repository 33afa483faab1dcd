"""Resolution methods where the coarse model is right: the exact denoiser of Gaussian images, at equal operations.

    python benchmarks/resolution_toy.py --json benchmarks/resolution-toy.json

Images are Gaussian with the power spectrum `P(k) = (1 + (k/3)^2)^-1.5`, so that the best denoiser is known for any
set of coarse and fine tokens: the posterior mean, by the covariance of what the tokens stand for (a coarse pixel is the
mean of four). The methods run as they are, on a pipeline whose transformer is that denoiser. What is left is the error
of the steps and of the changes of resolution alone. Operations are tokens times steps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from hasten import RALU, Bottleneck, Fresco, Spectral
from hasten.bench.environment import environment
from hasten.io import write_atomically
from hasten.resolution import RegionMethod
from hasten.resolution.positions import ImageTokens, flux_ids, pack, unpack
from rich.progress import track
from torch import Tensor, nn

SIDE, SHIFT, REFERENCE = 32, 3.0, 50
LOW, HIGH = 6, 10  # limits of the bands whose energy is compared with the true spectrum
TOKENS = SIDE // 2  # along each side, of 2x2 pixels
METHODS: dict[str, RegionMethod] = {
    "bottleneck:stages=9/9": Bottleneck(stages=(9, 9)),
    "bottleneck:stages=9/9:noise=field": Bottleneck(stages=(9, 9), noise="field"),
    "ralu:preset=18": RALU(preset="18"),
    "spectral:stages=6/12": Spectral(stages=(6, 12)),
    "fresco:preset=18:jump=r1": Fresco(preset="18", jump="r1"),
    "fresco:preset=18:jump=r1:noise=independent": Fresco(preset="18", jump="r1", noise="independent"),
    "fresco:preset=18": Fresco(preset="18"),
    "fresco:preset=18:noise=anchor": Fresco(preset="18", noise="anchor"),
    "fresco:stages=6/2/10:shares=0.3": Fresco(stages=(6, 2, 10), shares=0.3),
    "ralu:preset=10": RALU(preset="10"),
    "bottleneck:stages=5/6": Bottleneck(stages=(5, 6)),
    "fresco:preset=11": Fresco(preset="11"),
    "fresco:preset=9": Fresco(preset="9"),
}


def radius() -> Tensor:
    """Whole radial frequency of each coefficient, `[SIDE, SIDE]`."""
    frequency = torch.fft.fftfreq(SIDE, dtype=torch.float64) * SIDE
    return (frequency[:, None].square() + frequency[None].square()).sqrt().round()


def spectrum() -> Tensor:
    """Power of each coefficient, with the mean 1."""
    power = (1 + (radius() / 3).square()) ** -1.5
    return power / power.mean()


class Denoiser(nn.Module):
    """The posterior mean for tokens of two sizes, as a velocity; called as `FluxTransformer2DModel` is."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Buffer(torch.zeros(()))
        first = torch.fft.ifft2(spectrum()).real  # covariance of a pixel with the first one
        rows, columns = (
            torch.arange(SIDE).repeat_interleave(SIDE),
            torch.arange(SIDE).repeat(SIDE),
        )
        self.covariance = first[(rows[:, None] - rows) % SIDE, (columns[:, None] - columns) % SIDE]
        self.known: dict[bytes, tuple[Tensor, Tensor]] = {}
        self.tokens = 0  # seen in all forwards

    def forward(self, hidden_states: Tensor, timestep: Tensor, img_ids: Tensor, **_: Any) -> tuple[Tensor]:
        """Velocities of the tokens `[B, S, 4]` at `sigma = timestep`."""
        self.tokens += hidden_states.shape[1]
        sigma = float(timestep.flatten()[0])
        values, vectors = self._modes(img_ids[:, 1:])
        state = hidden_states.double().flatten(1)
        gain = (1 - sigma) * values / ((1 - sigma) ** 2 * values + sigma**2)
        clean = (state @ vectors * gain) @ vectors.T
        return (((state - clean) / sigma).view_as(hidden_states).to(hidden_states.dtype),)

    def _modes(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues and vectors of the covariance of the tokens' values, `[4 S]` and `[4 S, 4 S]`."""
        key = places.numpy().tobytes()
        if key not in self.known:
            seen = torch.cat([self._weights(row, column, size) for row, column, size in self._cells(places)])
            self.known = {k: v for k, v in self.known.items() if len(v[0]) in (SIDE**2, SIDE**2 // 4)}
            self.known[key] = torch.linalg.eigh(seen @ self.covariance @ seen.T)
        return self.known[key]

    @staticmethod
    def _cells(places: Tensor) -> list[tuple[int, int, int]]:
        """Top left pixel of each token and pixels along a side of what one of its values is the mean of."""
        if len(places) in (TOKENS**2, TOKENS**2 // 4):
            size = 1 if len(places) == TOKENS**2 else 2
            return [(int(2 * size * row), int(2 * size * column), size) for row, column in places.tolist()]
        found = set(map(tuple, places.tolist()))  # in units of coarse tokens: children have neighbours half a unit away
        fine = [(row // 1, column // 1 + 0.5) in found for row, column in places.tolist()]
        return [
            (int(4 * row), int(4 * column), 1 if small else 2)
            for (row, column), small in zip(places.tolist(), fine, strict=True)
        ]

    @staticmethod
    def _weights(row: int, column: int, size: int) -> Tensor:
        """What the four values of a token are of the image: `[4, SIDE^2]`, in the order of packed tokens."""
        weights = torch.zeros(4, SIDE, SIDE, dtype=torch.float64)
        for value in range(4):
            top, left = row + size * (value // 2), column + size * (value % 2)
            weights[value, top : top + size, left : left + size] = 1 / size**2
        return weights.flatten(1)


class Identity(nn.Module):
    """A VAE whose latents are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Buffer(torch.zeros(()))
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0)

    def decode(self, latents: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """The latents."""
        return (latents,)


class Gaussian(FluxPipeline):  # type: ignore[misc]
    """The loop of `FluxPipeline` around the denoiser, with nothing else."""

    def __init__(self) -> None:
        self.transformer, self.vae = Denoiser(), Identity()
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    def __call__(self, noise: Tensor, steps: int) -> Tensor:  # type: ignore[override]
        """From unit noise `[1, 1, SIDE, SIDE]` to an image."""
        self.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        latents, ids = pack(noise), flux_ids([ImageTokens.uniform(TOKENS, TOKENS)])
        for timestep in self.scheduler.timesteps:
            velocity = self.transformer(hidden_states=latents, timestep=timestep[None] / 1000, img_ids=ids)[0]
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return unpack(latents, (TOKENS, TOKENS))


def measured(pipe: Gaussian, noises: list[Tensor], steps: int, references: list[Tensor]) -> dict[str, float]:
    """Figures of a sampler against the full run, and its operations in full-size steps."""
    pipe.transformer.tokens = 0
    images = [pipe(noise, steps) for noise in track(noises, transient=True)]
    power = torch.stack([torch.fft.fft2(p.double()).abs().square()[0, 0] for p in images]).mean(0) / SIDE**2
    k, true = radius(), spectrum()
    distance = [float((p - r).norm() / r.norm()) for p, r in zip(images, references, strict=True)]
    return {
        "evaluations": steps,
        "operations": pipe.transformer.tokens / len(noises) / TOKENS**2,
        "distance": statistics.fmean(distance),
        "distance_deviation": statistics.stdev(distance),
        "low_band": float(power[k < LOW].sum() / true[k < LOW].sum()),
        "high_band": float(power[k >= HIGH].sum() / true[k >= HIGH].sum()),
    }


def run(samples: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """All rows: plain samplers of any length, then the methods."""
    pipe = Gaussian()
    noises = [torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in range(samples)]
    references = [pipe(noise, REFERENCE) for noise in noises]
    found = []
    for label, method in METHODS.items():
        say(label)
        assert method.num_inference_steps is not None
        with method.attach(pipe):
            found.append({"method": label} | measured(pipe, noises, method.num_inference_steps, references))
    below = {math.floor(row["operations"]) for row in found}
    counts = {row["evaluations"] for row in found} | below | {count + 1 for count in below} | {REFERENCE}
    plain = [{"method": "euler"} | measured(pipe, noises, n, references) for n in sorted(counts, reverse=True)]
    return plain + found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = run(options.samples, print)
    result = {
        "environment": environment(),
        "samples": options.samples,
        "side": SIDE,
        "shift": SHIFT,
        "rows": rows,
    }
    write_atomically(options.json, json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['method']:45} {row['evaluations']:3} {row['operations']:6.2f} {row['distance']:.3f}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
