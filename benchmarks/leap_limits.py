"""What holds LEAP back: one solver for all images, or what its evaluations span?

    python benchmarks/leap_limits.py --model emoji-flux --guidance 3 --out benchmarks/leap-limits.json

At the times of a fit, the closed form for all images together stands beside the closed form for each image alone, which
is nobody's solver in use but the best that shared coefficients could come near. Where the two are near, other prompts,
weights or more of them can gain no more than the difference; only other evaluations can.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hasten.bench.environment import environment
from hasten.bench.subject import open_model
from hasten.bench.tune import tuning_calls
from hasten.fitting.evaluator import Evaluator
from hasten.fitting.leap_fitter import Fitter, Leap
from hasten.fitting.references import record_references
from hasten.fitting.surrogate import Surrogate
from hasten.io import write_atomically
from hasten.pipeline.replay import Replay
from hasten.solvers.multistep import combine
from hasten.solvers.tables import COLUMNS

STEPS, WEIGHT, RESAMPLES = 50, 0.02, 2000


def decibels(fitter: Fitter, leap: Leap) -> list[float]:
    """Distance of the final state of each call to its reference's, in decibels below the reference's own size."""
    found = []
    for call, columns in zip(leap.calls, leap.columns, strict=True):
        goal = fitter.references.states[call][-1]
        off = combine(columns, leap.rows[-1]) - goal
        found.append(float(-10 * (off.double().square().sum() / goal.double().square().sum()).log10()))
    return found


def interval(gains: list[float]) -> list[float]:
    """A 90 % bootstrap interval of the mean."""
    drawn = np.random.default_rng(0).choice(gains, (RESAMPLES, len(gains))).mean(1)
    return [round(float(q), 2) for q in np.quantile(drawn, (0.05, 0.95))]


def measured(fitter: Fitter, times: list[float]) -> dict[str, Any]:
    """Both closed forms with these columns."""
    together = decibels(fitter, fitter.fit(times))
    alone = []
    for call in fitter.calls:
        one = fitter.narrowed(fitter.width)
        one.calls = (call,)
        alone += decibels(one, one.fit(times))
    gains = [a - b for a, b in zip(alone, together, strict=True)]
    return {
        "together": [round(d, 2) for d in together],
        "alone": [round(d, 2) for d in alone],
        "mean_together": round(float(np.mean(together)), 2),
        "mean_alone": round(float(np.mean(alone)), 2),
        "mean_gain": round(float(np.mean(gains)), 2),
        "interval_90": interval(gains),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--guidance", type=float, help="true classifier-free guidance; none by default")
    parser.add_argument("--counts", type=int, nargs="+", default=[9, 7])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/leap-limits.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = open_model(options.model)
    guided = {} if options.guidance is None else {"true_cfg_scale": options.guidance, "negative_prompt": ""}
    replay = Replay(tuning_calls(model, model.prompts[: options.images], 0, STEPS, guided, 1))
    references = record_references(model.pipe, replay, lambda _done, _total: None)
    guided_alone = Fitter(Evaluator(model.pipe, replay), references, 1e-6, COLUMNS["guided"])
    rows = []
    for count in options.counts:
        for form, width in COLUMNS.items():
            if form == "passes" and not references.differences:
                continue
            fitter = guided_alone.narrowed(width)
            steps = Surrogate(references, width, fitter.roots).best(count, WEIGHT)
            times = [references.plain.timesteps[step] for step in steps]
            with fitter.evaluator.probing():
                rows.append({"evaluations": count, "columns": form, **measured(fitter, times)})
            print({name: value for name, value in rows[-1].items() if name not in ("together", "alone")}, flush=True)
    about = {"model": options.model, "guidance": options.guidance, "images": options.images, "steps": STEPS}
    write_atomically(options.out, json.dumps({"environment": environment(), **about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
