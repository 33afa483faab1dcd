"""Which part of Fresco costs what: its runs as they are, and with the coarse stage taken from the full run.

    python benchmarks/resolution_parts.py --json benchmarks/resolution-parts.json
    python benchmarks/resolution_parts.py --model emoji-styles --json benchmarks/resolution-parts.json

`given` replaces the coarse state, where the first promotion finds it, by the low-pass of the full run's own state at
the level that the jump leads to. What is then lost is lost by the change of resolution and by steps on tokens of two
sizes; the difference to the run as it is was lost by the coarse model, which draws another image. Stages of two sizes
of tokens, and later changes of resolution without them, tell what the mixed stage costs and what its time.

PSNR to the full run of the same noise, prompt `i` with seed `i`; each model is a part of the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hasten import Fresco
from hasten.bench import subject
from hasten.bench.environment import environment
from hasten.io import write_atomically
from hasten.quality.metrics import psnr
from hasten.resolution.noise import Rewind
from hasten.resolution.packed import MixedState
from hasten.resolution.regions import PromotionInput
from held_out import weights_of
from leads import paired
from rich.progress import track
from torch import Tensor

STEPS, COUNT = 50, 18
SIDES = ("height", "width")
PLAIN = (18, 13, 12, 10)
SPLITS: dict[str, dict[str, Any]] = {
    "6 coarse, 12 fine": {"stages": (6, 12)},
    "9 coarse, 9 fine": {"stages": (9, 9)},
    "12 coarse, 6 fine": {"stages": (12, 6)},
    "6 coarse, 2 mixed, 10 fine": {"stages": (6, 2, 10), "shares": 0.3},
    "6 coarse, 6 mixed, 6 fine": {"stages": (6, 6, 6), "shares": 0.3},
    "6 coarse, 6 mixed, 6 fine, hr_units": {"stages": (6, 6, 6), "shares": 0.3, "units": "hr_units"},
}


@dataclass(frozen=True)
class Full:
    """The full run: noise levels `[steps + 1]`, and the state at each."""

    levels: Tensor
    states: list[Tensor]

    def at(self, level: float) -> Tensor:
        """The state at a level, linear between steps."""
        before = int((self.levels > level).sum()) - 1
        share = float((self.levels[before] - level) / (self.levels[before] - self.levels[before + 1]))
        return torch.lerp(self.states[before], self.states[before + 1], share)


@dataclass(frozen=True, kw_only=True)
class Given(Fresco):
    """Fresco whose coarse stage is the full run's low-pass."""

    full: Full

    def promote(self, state: MixedState, new: Tensor, promotion: PromotionInput) -> float:
        if not bool(state.tokens.fine.any()):
            wanted = self.full.at(Rewind(promotion.level).level)
            state.coarse = (1 + promotion.level) * promotion.pixels.shrink(wanted, promotion.fine_size)
        return super().promote(state, new, promotion)


def noise_of(model: subject.Subject, seed: int) -> Tensor:
    """What a run of this seed begins with, as the pipeline itself draws it."""
    sizes = [model.call.get(side) or model.pipe.default_sample_size * model.pipe.vae_scale_factor for side in SIDES]
    channels, generator = model.pipe.transformer.config.in_channels // 4, torch.Generator().manual_seed(seed)
    return model.pipe.prepare_latents(1, channels, *sizes, torch.float32, torch.device("cpu"), generator)[0]


def draw(model: subject.Subject, prompt: str, noise: Tensor, steps: int, method: Fresco | None) -> Any:
    """An image, and the full run where there is no method."""
    states = [noise]

    def keep(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        states.append(kwargs["latents"].clone())
        return {}

    call = model.call | {"num_inference_steps": steps, "output_type": "pt", "latents": noise.clone()}
    if method is not None:
        with method.attach(model.pipe):
            return model.pipe(prompt, **call).images[0]
    image = model.pipe(prompt, **call, callback_on_step_end=keep).images[0]
    return image, Full(model.pipe.scheduler.sigmas.clone(), states)


def measured(model: subject.Subject, prompts: int) -> dict[str, Any]:
    """PSNR of all splits and of plain steps: medians, and what is lost where the coarse stage is the model's own."""
    figures: dict[str, dict[str, list[float]]] = {name: {"own": [], "given": []} for name in SPLITS}
    plain: dict[int, list[float]] = {count: [] for count in PLAIN}
    for seed, prompt in enumerate(track(model.prompts[:prompts])):
        noise = noise_of(model, seed)
        reference, full = draw(model, prompt, noise, STEPS, None)
        for count, values in plain.items():
            values.append(psnr(draw(model, prompt, noise, count, None)[0], reference))
        for name, split in SPLITS.items():
            for kind, method in (("own", Fresco(**split)), ("given", Given(**split, full=full))):
                figures[name][kind].append(psnr(draw(model, prompt, noise, COUNT, method), reference))
    rows: dict[str, Any] = {}
    for name, kinds in figures.items():
        rows[name] = {kind: round(statistics.median(values), 2) for kind, values in kinds.items()}
        rows[name]["lost"] = paired([given - own for own, given in zip(*kinds.values(), strict=True)])
    return {
        "environment": environment(),
        "weights": weights_of(model),
        "prompts": prompts,
        "plain": {str(count): round(statistics.median(values), 2) for count, values in plain.items()},
        "rows": rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-flux", choices=["emoji-flux", "emoji-styles"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    model = subject.load(options.model)
    model.pipe.set_progress_bar_config(disable=True)
    result = json.loads(options.json.read_text()) if options.json.exists() else {}
    result[options.model] = measured(model, options.prompts)
    write_atomically(options.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result[options.model], indent=1))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
