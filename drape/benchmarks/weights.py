"""Why weights over frames gain nothing against frames that count alike, measured with the textures of `drape bench`.

python drape/benchmarks/weights.py WORK [WALKS] [SEEDS]    WORK is the folder of `drape bench`; 6 walks, 3 seeds

For each seed and three textures (the beginning, and those optimised over sequences and over single frames) every frame
of some training walks is followed backwards to the texture by itself, in whole frames without changes. From that come
exactly: the weights of the frames, dL/dd_t, under both losses; both gradients to the texture and their cosine; and the
cosine of what one step draws with the gradient that it stands for. Into `weights.json` beside this file, after every
texture; when it is started again it goes on with those that are missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from drape.bench import FIGURES, BenchSpec, rounded
from drape.controls import load_images, random_textures
from drape.detectors import load_detector
from drape.detectors.base import Detector
from drape.gamut import Gamut
from drape.io import load_record, write_text
from drape.objective import ensemble_confidence, smooth_step
from drape.optimise import OptimiseSpec, draw_frames, frame_gradient
from drape.scene.scene import Scene
from drape.walks import Walk, scenes

BENCH, FILE = (Path(__file__).with_name(name) for name in ("bench.json", "weights.json"))
DRAWS = 200  # of a step's frames
FOUND = 0.5


def effective(weights: Tensor) -> float:
    """How many frames of equal weight these come to: (sum |w|)^2 / sum w^2."""
    return float(weights.abs().sum() ** 2 / weights.square().sum().clamp_min(1e-30))


def in_common(first: Tensor, second: Tensor) -> float:
    """Share of the weight that two weightings have on the same frames."""
    return float(torch.minimum(first.abs() / first.abs().sum(), second.abs() / second.abs().sum()).sum())


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Between vectors `[..., P]`."""
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)


def followed(detector: Detector, walks: Sequence[Scene], images: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Confidences of each walk `[T]`, and the gradient of each frame's to the texture `[all frames, P]`."""
    confidences, gradients = [], []
    for scene in walks:
        own = []
        for frame in range(scene.buffers.frames):
            leaves = [image.clone().requires_grad_() for image in images.values()]
            shown = scene.render(dict(zip(images, leaves, strict=True)), [frame])
            d = ensemble_confidence([detector], shown, scene.buffers.boxes[[frame]])[0]
            parts = torch.autograd.grad(d, leaves, allow_unused=True)
            filled = [
                torch.zeros_like(leaf) if part is None else part for part, leaf in zip(parts, leaves, strict=True)
            ]
            gradients.append(torch.cat([part.flatten() for part in filled]))
            own.append(d.detach())
        confidences.append(torch.stack(own))
    return confidences, torch.stack(gradients)


def told(d: Sequence[Tensor], gradients: Tensor, spec: OptimiseSpec) -> tuple[dict[str, float], dict[str, list[float]]]:
    """What the weights and gradients of one texture say, and the weights of all frames under both losses."""
    sequence = frame_gradient(d, d, spec)
    every = torch.cat(list(d)).requires_grad_()
    (uniform,) = torch.autograd.grad(smooth_step(spec.temporal, every).mean(), every)
    whole = {"sequence": sequence @ gradients, "uniform": uniform @ gradients}
    generator = torch.Generator().manual_seed(0)
    steps: dict[str, list[Tensor]] = {"sequence": [], "uniform": []}
    for _ in range(DRAWS):
        chosen, share = draw_frames(sequence, spec.views, generator)
        steps["sequence"].append((sequence[chosen] / share) @ gradients[chosen])
        drawn = torch.randint(len(uniform), (spec.views,), generator=generator)
        steps["uniform"].append(uniform[drawn] @ gradients[drawn])
    numbers = {
        "frames": len(every),
        "effective_sequence": effective(sequence),
        "effective_uniform": effective(uniform),
        "weight_in_common": in_common(sequence, uniform),
        "cosine": float(cosine(whole["sequence"], whole["uniform"])),
        **{f"step_{name}": float(cosine(torch.stack(drawn), whole[name]).mean()) for name, drawn in steps.items()},
    }
    return numbers, {"d": every.tolist(), "sequence": sequence.tolist(), "uniform": uniform.tolist()}


def flips(begin: Mapping[str, list[float]], end: Mapping[str, list[float]]) -> dict[str, float]:
    """Of the frames that the optimisation turns from found to missed: their share, the share of either weight that they
    had at the beginning, and how weights go with the fall of the confidence (Spearman).
    """
    before, after = np.array(begin["d"]), np.array(end["d"])
    turned = (before >= FOUND) & (after < FOUND)
    result = {"frames": float(turned.mean())}
    for name in ("sequence", "uniform"):
        weight = np.abs(begin[name])
        result[f"weight_{name}"] = float(weight[turned].sum() / weight.sum())
        result[f"rank_{name}"] = float(spearmanr(weight, before - after).statistic)
    return result


def main(work: Path, walks: int, seeds: int) -> None:
    about = load_record(BENCH, FIGURES, "run `drape bench`")["about"]
    settings = about["spec"]
    names = BenchSpec.__dataclass_fields__
    bench = BenchSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in names})
    conditions = {"walks": walks, "fps": bench.fps, "size": bench.size, "detector": bench.detector}
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    rows: dict[str, Any] = kept["textures"] if kept.get("conditions") == conditions else {}
    detector = load_detector(bench.detector)
    shown = scenes([Walk(**w) for w in about["training_walks"][:walks]], bench.fps, bench.size, bench.cloth)
    for seed in range(seeds):
        spec = bench.optimisation("sequence", seed)
        begin = random_textures(Gamut.proxy(), seed)
        textures = {f"begin-{seed}": {name: texture(hard=True).detach() for name, texture in begin.items()}}
        textures |= {name: load_images(work / f"{name}.npz") for name in (f"sequence-{seed}", f"frames-{seed}")}
        for name, images in textures.items():
            if name not in rows:
                numbers, weights = told(*followed(detector, shown, images), spec)
                rows[name] = {**numbers, "weights": weights}
                print(name, json.dumps(numbers), flush=True)
                write_text(FILE, json.dumps(rounded({"conditions": conditions, "textures": rows}, 6)) + "\n")
    found = {
        mode: [flips(rows[f"begin-{s}"]["weights"], rows[f"{mode}-{s}"]["weights"]) for s in range(seeds)]
        for mode in ("sequence", "frames")
    }
    summary = {
        "textures": {
            kind: {
                key: mean([rows[f"{kind}-{s}"][key] for s in range(seeds)])
                for key in rows["begin-0"]
                if key != "weights"
            }
            for kind in ("begin", "sequence", "frames")
        },
        "flips": {mode: {key: mean([row[key] for row in each]) for key in each[0]} for mode, each in found.items()},
        "seeds": seeds,
    }
    everything = {"conditions": conditions, "summary": summary, "textures": rows}
    write_text(FILE, json.dumps(rounded(everything, 6), indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    given = [*sys.argv[2:], *("6", "3")[len(sys.argv) - 2 :]]
    main(Path(sys.argv[1]), int(given[0]), int(given[1]))
