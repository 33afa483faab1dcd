"""LEAP of the second generation on a trained model: fitted, then measured on held-out prompts beside the plain samplers
and the learned solvers of the literature.

python benchmarks/leap_measure.py --model emoji-flux --guidance 3 --counts 9,7 --out benchmarks/leap-flux-guided.json
python benchmarks/leap_measure.py --model emoji-flux --counts 16,14,12,10,9,8,7,6,5,4 --out leap-flux.json

Everything that is finished is kept in `--work` and in the JSON: the same command goes on where it was cut short.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hasten
import numpy as np
import torch
from hasten.bench.environment import environment
from hasten.bench.learned_solvers import SOLVERS, fit_learned_solver
from hasten.bench.subject import open_model
from hasten.calibration import Calibration
from hasten.fitting import leap
from hasten.fitting.evaluator import Evaluator
from hasten.fitting.leap import fit_leap
from hasten.fitting.leap_fitter import Fitter
from hasten.fitting.references import record_references
from hasten.io import write_atomically
from hasten.pipeline.replay import Replay
from hasten.quality.metrics import over_frames, psnr
from hasten.solvers import Leap, LeapScheduler
from held_out import HeldOut, check_asked, check_weights, weights_of
from torch import Tensor

STEPS = 50
RESAMPLES = 2000


def main() -> None:
    """Fit and measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--guidance", type=float, help="true classifier-free guidance; none by default")
    parser.add_argument("--guidances", type=number_list, default="", help="scales for one file, such as 1.5,3,5")
    parser.add_argument(
        "--at",
        type=number_list,
        default="",
        help="further scales at which that file is used, beside a fit of its own",
    )
    parser.add_argument("--counts", type=number_list, default="9,7,5")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the full runs")
    parser.add_argument("--learn", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--learned",
        default="",
        help=f"learned solvers to fit as well: {','.join(SOLVERS)}",
    )
    parser.add_argument("--learned-counts", type=number_list, default="9,7")
    parser.add_argument("--old", type=Path, help="a file of release 0.1.0 to measure as well: from its tag")
    parser.add_argument("--half", action="store_true", help="measure LEAP in bfloat16 as well")
    parser.add_argument(
        "--ablation",
        type=number_list,
        default="",
        help="one number of evaluations to take the fit apart at",
    )
    parser.add_argument(
        "--alone",
        type=number_list,
        default="",
        help="numbers of evaluations to fit by themselves as well, with no others to begin with",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/leap"))
    parser.add_argument("--out", type=Path, required=True)
    Measure(parser.parse_args()).run()


def number_list(text: str) -> str:
    """Numbers with commas as they were written, which is how the results name them."""
    numbers(text)
    return text


def numbers(text: str) -> list[float]:
    """Numbers with commas."""
    return [float(one) for one in text.split(",") if one]


class Measure:
    """One model at one guidance scale, or several."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.model = open_model(options.model)
        self.pipe = self.model.pipe
        self.counts = [int(count) for count in numbers(options.counts)]
        self.guidances = numbers(options.guidances)
        known = json.loads(self.out.read_text()) if self.out.exists() else {}
        check_weights(known, self.model, options.out)
        check_asked(known, {"steps": options.steps}, options.out, "--out")
        self.rows: dict[str, Any] = known.get("rows", {})
        self.fits: dict[str, Any] = known.get("fits", {})
        self.work = options.work / self.out.stem
        self.work.mkdir(parents=True, exist_ok=True)
        self.held_out = HeldOut(self.model, options.steps, options.learn, options.held_out, options.batch, self.work)

    def write(self) -> None:
        """Write everything measured so far, with what can be computed from it."""
        about = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.options).items()}
        content = {
            "environment": environment(),
            "options": about,
            "steps": self.options.steps,
            "weights": weights_of(self.model),
            "fits": self.fits,
            "rows": self.rows,
        }
        content["against"] = self.against()
        write_atomically(self.out, json.dumps(content, indent=1) + "\n")

    # --- drawing

    def measure(
        self,
        name: str,
        count: int,
        scale: float | None,
        draw: Callable[[list[dict[str, Any]]], list[Tensor]],
        **more: Any,
    ) -> None:
        """A row: PSNR of every held-out prompt."""
        key = f"{name}, {count}" + ("" if scale is None else f", guidance {scale:g}")
        if key in self.rows:
            return
        drawn = draw(self.held_out.calls(scale))
        values = self.held_out.quality(drawn, scale)
        self.rows[key] = {
            "name": name,
            "count": count,
            "guidance": scale,
            "median": float(np.median(values)),
        } | more
        self.rows[key]["psnr"] = values
        self.write()
        print(key, round(self.rows[key]["median"], 2), flush=True)

    def leap(
        self,
        fit: Calibration,
        count: int,
        scale: float | None,
        name: str,
        *,
        hook: bool = True,
    ) -> None:
        """A row of LEAP, with the hook or as a scheduler alone."""

        def draw(calls: list[dict[str, Any]]) -> list[Tensor]:
            if hook:
                with hasten.accelerate(self.pipe, Leap(fit)):
                    return self.held_out.draw(calls, count)
            return self.scheduled(LeapScheduler.of(fit, self.pipe, guidance=scale), calls, count)

        self.measure(name, count, scale, draw)

    def scheduled(self, scheduler: Any, calls: list[dict[str, Any]], count: int) -> list[Tensor]:
        """Images with another scheduler."""
        original, self.pipe.scheduler = self.pipe.scheduler, scheduler
        try:
            return self.held_out.draw(calls, count)
        finally:
            self.pipe.scheduler = original

    # --- parts

    def run(self) -> None:
        """Fit and measure what is not there yet."""
        scale = self.options.guidance
        for count in self.counts:
            self.plain(count, scale)
        fit = self.fit("leap", self.counts, [scale])
        for count in self.counts:
            self.leap(fit, count, scale, "leap")
            if fit.fingerprint.passes[1:]:
                self.leap(fit, count, scale, "leap, scheduler alone", hook=False)
        if self.options.old is not None:
            self.old(self.options.old, scale)
        if self.guidances:
            self.range()
        for name in filter(None, self.options.learned.split(",")):
            for count in numbers(self.options.learned_counts):
                self.learned(name, int(count), scale)
        if self.options.ablation:
            self.ablation(int(self.options.ablation), scale)
        for count in numbers(self.options.alone):
            self.alone(int(count), scale)
        if self.options.half:
            self.half(fit, scale)
        self.write()

    def fit(
        self,
        name: str,
        counts: Sequence[int],
        scales: Sequence[float | None],
        **settings: Any,
    ) -> Calibration:
        """A fit, or what an earlier run kept of it."""
        file = self.work / f"{name}.safetensors"
        known = Calibration.load(file) if file.exists() else None
        asked = {"trials": self.options.trials, "rounds": self.options.rounds} | settings
        check_asked(self.fits.get(name, {}).get("options", {}), asked, self.out, "--out")
        started = time.process_time()
        scale = scales[len(scales) // 2]
        fitted = fit_leap(
            self.pipe,
            self.held_out.calls(scale, learn=True),
            counts,
            guidances=[one for one in scales if one is not None] if len(scales) > 1 else (),
            known=known,
            keep=lambda fit: fit.save(file),
            progress=lambda count, done, total, error: print(name, count, done, total, f"{error:.3g}", flush=True),
            **asked,
        )
        seconds = self.fits.get(name, {}).get("cpu_seconds", 0.0) + time.process_time() - started
        self.fits[name] = {
            "report": fitted.report,
            "options": asked,
            "prompts": fitted.options["prompts"],
        }
        self.fits[name]["cpu_seconds"] = round(seconds, 1)
        self.write()
        return fitted

    def plain(self, count: int, scale: float | None) -> None:
        """Euler, and the best of all solvers and spacings on the first prompts."""
        self.measure("euler", count, scale, lambda calls: self.held_out.draw(calls, count))
        if any(
            row["name"].startswith("best plain") and (row["count"], row["guidance"]) == (count, scale)
            for row in self.rows.values()
        ):
            return
        best, tried = self.held_out.best_plain(count, scale)
        draw = self.held_out.plain(best)
        self.measure("best plain", count, scale, lambda calls: draw(calls, count), sampler=best, tried=tried)

    def old(self, file: Path, scale: float | None) -> None:
        """Coefficients of release 0.1.0, fitted without guidance."""
        fit = Calibration.load(file)
        for count in (count for count in self.counts if str(count) in fit.report):
            self.leap(fit, count, scale, "leap 0.1.0", hook=False)

    def range(self) -> None:
        """One file for a range of guidance, beside fits of their own."""
        counts = [int(count) for count in numbers(self.options.learned_counts)]
        shared = self.fit("range", counts, self.guidances)
        for scale in [*self.guidances, *numbers(self.options.at)]:
            own = self.fit(f"own-{scale:g}", counts, [scale])
            for count in counts:
                self.measure("euler", count, scale, lambda calls, n=count: self.held_out.draw(calls, n))
                self.leap(shared, count, scale, "leap, one file")
                self.leap(own, count, scale, "leap, own fit")

    def learned(self, name: str, count: int, scale: float | None) -> None:
        """A learned solver of the literature, at LEAP's rounds of refinement."""
        replay = Replay(self.held_out.calls(scale, learn=True))  # of calls that nobody else has
        evaluator, table = Evaluator(self.pipe, replay), None

        def draw(calls: list[dict[str, Any]]) -> list[Tensor]:
            nonlocal table
            fitter = Fitter(evaluator, record_references(self.pipe, replay), 1e-6, 1)
            with evaluator.probing():
                found = fit_learned_solver(name, fitter, count, self.options.rounds + 1)
            levels = [fitter.references.level_at(time) for time in found.timesteps]
            table = {
                str(count): {
                    "timesteps": list(found.timesteps),
                    "levels": levels,
                    "guided": [found.rows],
                }
            }
            self.fits[f"{name}, {count}"] = {
                **found.figures,
                "evaluations_of_fit": evaluator.made,
            }
            return self.scheduled(
                LeapScheduler(table, prediction_type=fitter.references.kind),
                calls,
                count,
            )

        self.measure(name, count, scale, draw)

    def ablation(self, count: int, scale: float | None) -> None:
        """The fit without one part at a time."""
        parts = {
            "no search": {"trials": 1},
            "no refinement": {"rounds": 0},
            "neither": {"trials": 1, "rounds": 0},
        }
        for name, settings in parts.items():
            fit = self.fit(f"ablation {name}", [count], [scale], **settings)
            self.leap(fit, count, scale, name)
            if fit.fingerprint.passes[1:]:
                self.leap(fit, count, scale, f"{name}, scheduler alone", hook=False)

    def alone(self, count: int, scale: float | None) -> None:
        """A number of evaluations by itself, also without the start that is made of one evaluation more."""
        for name, ways in {"alone": leap.BOTH_WAYS, "alone, nothing longer": math.inf}.items():
            with patch.object(leap, "BOTH_WAYS", ways):
                fit = self.fit(f"{name}, {count}", [count], [scale])
            self.leap(fit, count, scale, name)

    def half(self, fit: Calibration, scale: float | None) -> None:
        """LEAP in bfloat16, against the plain sampler in bfloat16 and in float32."""
        truth = self.held_out.references(scale)
        self.pipe.to(torch.bfloat16)
        plain = self.held_out.draw(self.held_out.calls(scale))
        for count in self.counts:
            with hasten.accelerate(self.pipe, Leap(fit)):
                drawn = self.held_out.draw(self.held_out.calls(scale), count)
            key = f"leap in bfloat16, {count}"
            against = {"its own precision": plain, "float32": truth}
            self.rows[key] = {
                "name": "leap in bfloat16",
                "count": count,
                "guidance": scale,
            } | {
                name: float(np.median([over_frames(psnr, a, b) for a, b in zip(drawn, images, strict=True)]))
                for name, images in against.items()
            }
            self.write()
        self.pipe.to(torch.float32)

    # --- what it comes to

    def against(self) -> dict[str, Any]:
        """LEAP's lead over every other row of the same number and guidance: medians with 95 % of a paired bootstrap.

        It is that of the file for a range of guidance, where there is one.
        """
        found, subjects = {}, ("leap, one file", "leap")
        rng = np.random.default_rng(0)
        leaps = {(row["name"], row["count"], row["guidance"]): row for row in self.rows.values()}
        for key, row in self.rows.items():
            place = row["count"], row["guidance"]
            own = next((leaps[name, *place] for name in subjects if (name, *place) in leaps), None)
            if own is None or "psnr" not in row or row["name"] in subjects:
                continue
            lead = np.asarray(own["psnr"]) - np.asarray(row["psnr"])
            means = np.median(lead[rng.integers(len(lead), size=(RESAMPLES, len(lead)))], axis=1)
            low, high = np.quantile(means, (0.025, 0.975))
            found[key] = {
                "lead": float(np.median(lead)),
                "low": float(low),
                "high": float(high),
            }
        return found


if __name__ == "__main__":
    main()
