"""Do the premises of the caching systems hold on a model? Errors of forecasts, component by component.

    python benchmarks/caching_premises.py --model emoji-flux --out benchmarks/caching-premises.json

SVD-Cache reuses what lies outside a subspace, FreqCa a band of frequencies, because a forecast of them would be worse;
HyCa forecasts clusters of channels by solvers of their own, because one solver for all would be worse. On features of
held-out prompts, with the components of a fit to other prompts, each component is forecast by each rule from the
computed steps of a schedule. A row tells the mean squared error over the skipped steps, divided by that of reusing the
whole feature: where reuse of a component has the smallest error, its premise holds. `oracle` takes the best solver of
every cluster on the held-out prompts themselves: no choice of HyCa can have a smaller error of features.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import hasten
import torch
from hasten import models
from hasten.bench.environment import environment
from hasten.bench.subject import open_model
from hasten.caching.arguments import Arguments
from hasten.caching.calibrated import CalibratedMethod, gram_of
from hasten.caching.methods import FreqCa, HyCa
from hasten.caching.methods.freqca import Bands
from hasten.caching.methods.hyca import CANDIDATES, candidate
from hasten.calibration import Calibration
from hasten.io import write_atomically
from hasten.models import TokenLayout
from hasten.pipeline.view import denoisers
from held_out import HeldOut, weights_of
from torch import Tensor

KEY = "hidden"


def components(features: Tensor, name: str, fit: Calibration | None, pass_name: str, layout: TokenLayout) -> Any:
    """The components of features `[S, T, N, D]`, by name; they sum to the whole in energy.

    N counts the tokens of all images of a call, one image after the other, each in the order of `layout`.
    """
    if name == "svdcache":
        assert fit is not None
        basis = fit.tensors[f"basis/{pass_name}/{KEY}"]
        principal = features @ basis @ basis.T
        return {"principal": principal, "residual": features - principal}
    if name == "freqca":
        bands = Bands(layout, "dct", FreqCa().cutoff)
        images = features.reshape(-1, math.prod(layout.grid), features.shape[-1])
        low = bands.combine([images], {"low": [1.0], "high": [0.0]}).view_as(features)
        return {"low": low, "high": features - low}
    assert fit is not None
    labels = fit.tensors[f"clusters/{KEY}"].long()
    return {f"cluster {c}": features[..., labels == c] for c in range(int(labels.max()) + 1)}


def layout_in(held_out: HeldOut) -> TokenLayout:
    """Where the tokens of an image lie, as the transformer is called."""
    ((_, transformer),) = denoisers(held_out.model.pipe).items()
    adapter, seen = models.find(transformer), []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(models.layout_of(module, adapter, Arguments(module, adapter).named(args, kwargs)))

    handle = transformer.register_forward_pre_hook(look, with_kwargs=True)
    held_out.draw(held_out.calls(None, many=1), steps=1)
    handle.remove()
    return seen[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--guidance", type=float, help="true classifier-free guidance; none by default")
    parser.add_argument("--count", type=int, default=9, help="computed steps")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--learn", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/caching-premises.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = open_model(options.model)
    work = Path("runs/premises")
    held_out = HeldOut(model, options.steps, options.learn, options.held_out, 4, work)
    learned = held_out.recorded(options.guidance, learn=True)
    fits = {name: hasten.fit(learned, name) for name in ("svdcache", "hyca")}
    trace = held_out.recorded(options.guidance, learn=False)
    layout, rows = layout_in(held_out), []
    for schedule in ("uniform", "even", "auto"):
        judge = HyCa(calibration=fits["hyca"], schedule=schedule, computed_steps=options.count)
        first = judge.first_difference
        for name in ("svdcache", "freqca", "hyca"):
            for pass_name, features in trace.steps(KEY, "normed").items():
                parts = components(features, name, fits.get(name), pass_name, layout)
                rows += errors(judge, features, parts, first, {"schedule": schedule, "of": name, "pass": pass_name})
    content = {
        "environment": environment(),
        "model": options.model,
        "guidance": options.guidance,
        "computed_steps": options.count,
        "steps": options.steps,
        "weights": weights_of(held_out.model),
        "prompts": options.held_out,
        "rows": rows,
    }
    write_atomically(options.out, json.dumps(content, indent=1) + "\n")


def errors(
    judge: CalibratedMethod, whole: Tensor, parts: dict[str, Tensor], first: int, about: dict[str, str]
) -> list[dict[str, Any]]:
    """A row for each component, and one for the whole with the oracle's error."""
    solvers = {name: candidate(name, first) for name in CANDIDATES}

    def of(features: Tensor) -> dict[str, float]:
        gram = gram_of(features)
        share = features.shape[-1] / whole.shape[-1]
        return {name: judge.mean_error(gram, solver.weights) * share for name, solver in solvers.items()}

    reused = of(whole)
    found = {component: of(part) for component, part in parts.items()}
    unit = reused["hold"]
    rows = [
        about | {"component": component} | {name: round(error / unit, 5) for name, error in by_solver.items()}
        for component, by_solver in found.items()
    ]
    oracle = sum(min(by_solver.values()) for by_solver in found.values())
    entire = {name: round(error / unit, 5) for name, error in reused.items()}
    rows.append(about | {"component": "whole", "oracle": round(oracle / unit, 5)} | entire)
    for row in rows:
        print({key: value for key, value in row.items() if key != "pass"}, flush=True)
    return rows


if __name__ == "__main__":
    main()
