"""What each part of LEAP is worth, how many trajectories it needs, and where a fit may be used.

    python benchmarks/leap_ablation.py --plain calibrations/leap.safetensors --guided guided/leap.safetensors

The files are what `hasten tune --computed-steps 12,9,7,5` wrote without guidance and with `--guidance 3`. Figures are
medians over held-out prompts: PSNR in dB against the plain sampler's image of the same prompt and seed. Writes
benchmarks/leap-ablation.json part by part, and goes on where it was cut short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from hasten import Calibration, LeapScheduler, fit_leap
from hasten.bench import subject
from hasten.bench.environment import environment
from hasten.bench.tune import tuning_calls
from hasten.caching.schedule import spread
from hasten.fitting.leap_fitter import STARTS, Fitter
from hasten.fitting.references import References, record_references
from hasten.fitting.search import search_steps
from hasten.io import write_atomically
from hasten.pipeline.replay import Replay
from hasten.quality.metrics import psnr
from hasten.solvers.multistep import NormalEquations
from torch import Tensor
from torch.nn import functional

OUT = Path(__file__).parent / "leap-ablation.json"
LEARN, HELD_OUT, STEPS, BATCH, SEED = 16, 24, 50, 4, 1000
GUIDED = {"true_cfg_scale": 3.0, "negative_prompt": ""}
RIDGE, EULER = 1e-6, 1e9  # a huge ridge leaves the plain sampler's coefficients
BOUND = 12  # images that get coefficients of their own
BANDS = (3, 7)  # limits of three bands of the 16 x 16 tokens' DCT, by the larger of the two frequencies


class Ablation:
    """The model, prompts, and the parts that were measured so far."""

    def __init__(self, plain: Path, guided: Path) -> None:
        self.model = subject.load("emoji-flux")
        self.model.pipe.set_progress_bar_config(disable=True)
        self.files = {"plain": Calibration.load(plain), "guided": Calibration.load(guided)}
        self.parts: dict[str, Any] = json.loads(OUT.read_text())["parts"] if OUT.exists() else {}

    def part(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        if name in self.parts:
            return
        started = time.perf_counter()
        self.parts[name] = measure() | {"seconds": round(time.perf_counter() - started, 1)}
        self.write()
        print(name, json.dumps(self.parts[name]), flush=True)

    def write(self) -> None:
        about = {"model": "emoji-flux", "learned_from": LEARN, "held_out": HELD_OUT, "steps": STEPS}
        fits = {name: fit.report for name, fit in self.files.items()}
        prompts = {name: fit.options["prompts"] for name, fit in self.files.items()}
        content = {"environment": environment(), **about, "fits": fits, "fit_prompts": prompts, "parts": self.parts}
        write_atomically(OUT, json.dumps(content, indent=1) + "\n")

    # --- drawing

    def learn(self, count: int = LEARN, prompts: Sequence[str] = (), **call: Any) -> list[dict[str, Any]]:
        return tuning_calls(self.model, prompts or self.model.prompts[-count:], SEED, STEPS, call, BATCH)

    def held_out(self, prompts: Sequence[str] = (), **call: Any) -> list[dict[str, Any]]:
        return tuning_calls(self.model, prompts or self.model.prompts[:HELD_OUT], 0, STEPS, call, 8)

    def draw(self, calls: Sequence[dict[str, Any]], scheduler: Any = None, steps: int = STEPS) -> Tensor:
        pipe = self.model.pipe
        original, replay = pipe.scheduler, Replay(calls)
        pipe.scheduler = scheduler or original
        try:
            own = {"output_type": "pt", "num_inference_steps": steps}
            return torch.cat([pipe(**{**arguments, **own}).images for arguments in replay])
        finally:
            pipe.scheduler = original
            replay.rewind()  # the next draw begins with the same noise

    def quality(self, calls: Sequence[dict[str, Any]], reference: Tensor, scheduler: Any, steps: int) -> float:
        drawn = self.draw(calls, scheduler, steps)
        return round(statistics.median(psnr(a, b) for a, b in zip(drawn, reference, strict=True)), 2)

    def solver(self, fit: Calibration) -> LeapScheduler:
        return LeapScheduler.of(fit, self.model.pipe)

    # --- parts

    def components(self, count: int) -> dict[str, Any]:
        """Coefficients, times, both, bands, refinement."""
        fitted = self.files["plain"]
        held = self.held_out()
        reference, calls = self.draw(held), self.learn()
        even, found = (spread(count, STEPS, STARTS[0]), tuple(fitted.report[str(count)]["steps"]))
        result: dict[str, Any] = {"plain Euler": self.quality(held, reference, None, count)}
        for name, steps, ridge in (
            ("neither (Euler on the spread that a search starts from)", even, EULER),
            ("coefficients only", even, RIDGE),
            ("times only", self._searched(calls, count), EULER),
            ("both", found, RIDGE),
        ):
            result[name] = self.quality(held, reference, self._closed(calls, steps, ridge), count)
        result["both + bands"] = self._bands(calls, held, reference, found)
        result["both + refinement"] = self.quality(held, reference, self.solver(fitted), count)
        return result

    def _closed(self, calls: list[dict[str, Any]], steps: tuple[int, ...], ridge: float) -> LeapScheduler:
        """The closed form on a list of steps."""
        replay = Replay(calls)
        return self._solver(replay, record_references(self.model.pipe, replay), steps, ridge)

    def _solver(self, replay: Replay, references: References, steps: tuple[int, ...], ridge: float) -> LeapScheduler:
        fitter = Fitter(self.model.pipe, replay, references, ridge)
        with fitter.probing():
            leap = fitter.fit(steps)
        replay.rewind()
        table = {"timesteps": leap.timesteps, "sigmas": leap.sigmas, "coefficients": leap.coefficients}
        return LeapScheduler({str(len(steps)): table}, shift_mu=references.mu)

    def _searched(self, calls: list[dict[str, Any]], count: int) -> tuple[int, ...]:
        """Steps that are best with the plain sampler's coefficients."""
        replay = Replay(calls)
        fitter = Fitter(self.model.pipe, replay, record_references(self.model.pipe, replay), EULER)
        with fitter.probing():
            found = search_steps(spread(count, STEPS, STARTS[0]), STEPS, fitter.loss, trials=20)
        replay.rewind()
        return found.steps

    def _bands(
        self, calls: list[dict[str, Any]], held: list[dict[str, Any]], reference: Tensor, steps: tuple[int, ...]
    ) -> float:
        """The closed form with coefficients of their own for each of three frequency bands over the token grid."""
        pipe, goals = self.model.pipe, (*steps[1:], STEPS)
        learn, test = Replay(calls), Replay(held)
        known, other = record_references(pipe, learn), record_references(pipe, test)
        fitters = [Fitter(pipe, learn, known, RIDGE), Fitter(pipe, test, other, RIDGE)]
        starts = [torch.cat([path[0] for path in r.states]) for r in (known, other)]
        states, velocities = list(starts), [[], []]
        for step, goal in zip(steps, goals, strict=True):
            for i, fitter in enumerate(fitters):
                chunks = states[i].split([path.shape[1] for path in fitter.references.states])
                timestep, sigma = known.timesteps[step], known.sigmas[step]
                with fitter.probing():
                    found = [fitter._evaluate(call, x, timestep, sigma) for call, x in enumerate(chunks)]
                velocities[i].append(torch.cat(found))
            aim = torch.cat([path[goal] for path in known.states]) - starts[0]
            plain = [known.sigmas[b] - known.sigmas[a] for a, b in zip(steps, goals, strict=True)][: len(velocities[0])]
            states = [x.clone() for x in starts]
            for band in range(len(BANDS) + 1):
                equations = NormalEquations(len(plain))
                split = [_band(v, band) for v in velocities[0]]
                equations.add(torch.zeros_like(aim), split, _band(aim, band))
                row = equations.solve(plain, RIDGE)
                for i, own in enumerate(velocities):
                    states[i] = states[i] + sum(c * _band(v, band) for c, v in zip(row, own, strict=True))
        learn.rewind()
        test.rewind()
        latents = pipe._unpack_latents(states[1], 64, 64, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        drawn = (pipe.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        return round(statistics.median(psnr(a, b) for a, b in zip(drawn, reference, strict=True)), 2)

    def coarse(self, fit: Calibration, count: int, numbers: Sequence[int]) -> dict[str, Any]:
        """The closed form where the first evaluations see a quarter of the tokens."""
        held, replay = self.held_out(), Replay(self.learn())
        steps, pipe = tuple(fit.report[str(count)]["steps"]), self.model.pipe
        reference, references = self.draw(held), record_references(pipe, replay)
        result = {}
        for coarse in numbers:
            levels = [references.sigmas[step] for step in steps[:coarse]]
            with _coarse_grid(pipe.transformer, levels):
                scheduler = self._solver(replay, references, steps, RIDGE)
                result[f"{coarse} of {count} coarse"] = self.quality(held, reference, scheduler, count)
        return result

    def trajectories(self, count: int, learn: int) -> dict[str, Any]:
        """A fit to another number of prompts."""
        held = self.held_out()
        fit = fit_leap(self.model.pipe, self.learn(learn), [count], trials=20, rounds=2)
        figures = fit.report[str(count)]
        return {
            "held out": self.quality(held, self.draw(held), self.solver(fit), count),
            "closed_form": figures["closed_form"],
            "relative_squared_error": figures["relative_squared_error"],
            "evaluations": figures["evaluations_of_references"] + figures["evaluations_of_fit"],
        }

    def elsewhere(self, fit: Calibration, counts: Sequence[int], **call: Any) -> dict[str, Any]:
        """A fit used with other settings than it was made for, beside the plain sampler there."""
        held = self.held_out(**call)
        reference = self.draw(held)
        result: dict[str, Any] = {}
        for count in counts:
            result[f"leap, {count}"] = self.quality(held, reference, self.solver(fit), count)
            result[f"plain Euler, {count}"] = self.quality(held, reference, None, count)
        return result

    def bound(self, fit: Calibration, count: int, **call: Any) -> dict[str, Any]:
        """What no multistep formula with these steps can pass by much: coefficients fitted to each image itself."""
        steps = tuple(fit.report[str(count)]["steps"])
        images = tuning_calls(self.model, self.model.prompts[:BOUND], 0, STEPS, call, 1)
        references = [self.draw([one]) for one in images]
        shared = self._closed(self.learn(**call), steps, RIDGE)

        def over_images(solver_of: Callable[[dict[str, Any]], LeapScheduler]) -> float:
            pairs = zip(images, references, strict=True)
            return statistics.median(self.quality([one], drawn, solver_of(one), count) for one, drawn in pairs)

        return {
            "one formula for all": over_images(lambda _: shared),
            "each image its own": over_images(lambda one: self._closed([one], steps, RIDGE)),
            "one for all, refined": over_images(lambda _: self.solver(fit)),
        }

    def domains(self, count: int) -> dict[str, Any]:
        """Fitted to animals and plants, used on food and drink, and the other way round."""
        from hasten_zoo.emoji_flux.data import load_emoji_set

        captions = (
            load_emoji_set().captions
        )  # in the order of the emoji tables: animals and plants, then food and drink
        first_food = captions.index("grapes")
        groups = {
            "animals and plants": [p for p in self.model.prompts if captions.index(p) < first_food],
            "food and drink": [p for p in self.model.prompts if captions.index(p) >= first_food],
        }
        result: dict[str, Any] = {}
        for learned, own in groups.items():
            fit = fit_leap(self.model.pipe, self.learn(prompts=own[-LEARN:]), [count], trials=40, rounds=2)
            for used, others in groups.items():
                held = self.held_out(prompts=others[:HELD_OUT])
                quality = self.quality(held, self.draw(held), self.solver(fit), count)
                result[f"learned on {learned}, used on {used}"] = quality
        return result


@contextmanager
def _coarse_grid(transformer: Any, levels: Sequence[float]) -> Iterator[None]:
    """While this lasts, the transformer answers at these noise levels from a quarter of the tokens.

    Averages of 2x2 latent pixels of `(1 - s) x_0 + s e` have the noise `s / 2`: scaled to unit sum they are what the
    model knows at `s / (2 - s)`. Its clean estimate there, enlarged, gives the velocity on the fine grid.
    """
    plain = transformer.forward

    def forward(hidden_states: Tensor, timestep: Tensor, img_ids: Tensor, **others: Any) -> Any:
        sigma = float(timestep[0])
        if all(abs(sigma - level) > 1e-4 for level in levels):
            return plain(hidden_states=hidden_states, timestep=timestep, img_ids=img_ids, **others)
        side = int(hidden_states.shape[1] ** 0.5)
        pixels = rearrange(hidden_states, "b (h w) (c i j) -> b c (h i) (w j)", h=side, i=2, j=2)
        level, small = sigma / (2 - sigma), functional.avg_pool2d(pixels, 2) / (1 - sigma / 2)
        tokens = rearrange(small, "b c (h i) (w j) -> b (h w) (c i j)", i=2, j=2)
        grid = img_ids.unflatten(0, (side, side))[: side // 2, : side // 2].flatten(0, 1)
        velocity = plain(hidden_states=tokens, timestep=timestep * (level / sigma), img_ids=grid, **others)[0]
        clean = small - level * rearrange(velocity, "b (h w) (c i j) -> b c (h i) (w j)", h=side // 2, i=2, j=2)
        large = functional.interpolate(clean, scale_factor=2, mode="nearest")
        return (rearrange((pixels - large) / sigma, "b c (h i) (w j) -> b (h w) (c i j)", i=2, j=2),)

    transformer.forward = forward
    try:
        yield
    finally:
        del transformer.forward


def _band(x: Tensor, band: int) -> Tensor:
    """A band of the two-dimensional DCT over the token grid of `[B, 256, C]`."""
    size = int(x.shape[1] ** 0.5)
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(torch.pi * (k[None] + 0.5) * k[:, None] / size) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    limits = (0, *BANDS, size)
    radius = torch.maximum(k[:, None], k[None])
    mask = ((radius >= limits[band]) & (radius < limits[band + 1])).to(x)[None, :, :, None]
    both = basis.to(x)
    spectrum = torch.einsum("uh,vw,bhwc->buvc", both, both, x.unflatten(1, (size, size)))
    return torch.einsum("uh,vw,buvc->bhwc", both, both, spectrum * mask).flatten(1, 2)


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, required=True)
    parser.add_argument("--guided", type=Path, required=True)
    parser.add_argument("--larger", type=Path, required=True, help="a guided fit to more prompts, with a longer search")
    paths = parser.parse_args()
    own = Ablation(paths.plain, paths.guided)
    plain, guided = own.files["plain"], own.files["guided"]
    own.part("at home", lambda: own.elsewhere(plain, (12, 9, 7, 5)))
    own.part("other resolution (32x32)", lambda: own.elsewhere(plain, (9, 7), height=32, width=32))
    own.part("guided, at home (3)", lambda: own.elsewhere(guided, (12, 9, 7, 5), **GUIDED))
    larger = Calibration.load(paths.larger)
    facts = f"{larger.options['prompts']} prompts, {larger.options['trials']} trials, {larger.options['rounds']} rounds"
    own.part(f"guided, {facts}", lambda: own.elsewhere(larger, (12, 9, 7, 5), **GUIDED))
    for scale in (2.1, 3.9):
        name = f"guided, at guidance {scale}"
        own.part(name, lambda scale=scale: own.elsewhere(guided, (9, 7), **GUIDED | {"true_cfg_scale": scale}))
    own.part("without guidance's fit used with guidance 3", lambda: own.elsewhere(plain, (9, 7), **GUIDED))
    for count in (9, 7):
        own.part(f"components, {count}", lambda count=count: own.components(count))
    own.part("bound, 9", lambda: own.bound(plain, 9))
    own.part("bound with guidance 3, 9", lambda: own.bound(guided, 9, **GUIDED))
    own.part("early evaluations on a coarse grid, 9", lambda: own.coarse(plain, 9, (0, 1, 2, 3)))
    for learn in (4, 8, 16, 32):
        own.part(f"trajectories, {learn}", lambda learn=learn: own.trajectories(7, learn))
    own.part("prompt domains, 7", lambda: own.domains(7))
    own.write()


if __name__ == "__main__":
    main()
