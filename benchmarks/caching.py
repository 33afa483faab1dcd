"""The caching methods on a trained model, on held-out prompts: PSNR of every prompt to 50 plain steps.

python benchmarks/caching.py --model emoji-flux --out benchmarks/caching-emoji-flux.json
python benchmarks/caching.py --model emoji-flux --guidance 3 --out benchmarks/caching-emoji-flux-guided.json
python benchmarks/caching.py --arms "foca;hicache:sigma=0.6" --schedules even --counts 9 --held-out 8 --out try.json
python benchmarks/caching.py --arms "foca:site=module;hyca:site=module" --counts 9 --out module.json
python benchmarks/caching.py --arms SINGLES --tune hyca --counts 9 --out benchmarks/caching-emoji-flux.json
python benchmarks/caching.py --arms DEFAULT --plain --schedules auto,even --out benchmarks/default-emoji-flux.json

`SINGLES` are the solvers that HyCa chooses from, each of them for all clusters; `DEFAULT` is what `accelerate(pipe)`
takes, without its schedule. What `--tune` names is measured as
`hasten tune` leaves it: chosen by whole runs of prompts to learn from, for each schedule and number of steps anew.

Prompts are drawn in batches, prompt `i` with seed `i`; what is fitted learns from the last prompts of the list, with
seeds from 1000. Every row is written as soon as it is measured: the same command goes on where it was cut short.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hasten
import numpy as np
from hasten import registry
from hasten.bench.arms import one_line
from hasten.bench.environment import environment
from hasten.bench.requests import caching_method, reported
from hasten.bench.subject import open_model
from hasten.caching.method import CachingMethod
from hasten.caching.methods.hyca import CANDIDATES
from hasten.calibration import Trace
from hasten.errors import ConfigError, ScheduleError
from hasten.io import write_atomically
from held_out import HeldOut, check_asked, check_weights, is_settled, weights_of
from page_tables.caching import SHIPPED
from torch import Tensor

ARMS = (
    "reuse;taylorseer:order=1;taylorseer:order=2;taylorseer:order=2:domain=normed;hicache;hicache:order=1:sigma=0.66;foca;"
    "foca:domain=normed;freqca;freqca:split=none;freqca:mode=paper;svdcache;svdcache:mode=taylor;hyca;"
    "l2p;l2p:history=full:fit_by=gradient:published=true"
)

NAMED = {
    "SINGLES": ";".join(f"hyca:solvers={name}" for name in CANDIDATES),  # with one solver to choose from
    "DEFAULT": SHIPPED,
}
SHARED = ("model", "guidance", "steps", "learn", "held_out", "batch")  # what all rows of a file have in common
TRIALS = 80  # most settings that a tuner looks at


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--guidance", type=float, help="true classifier-free guidance; none by default")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--counts", default="12,9,7,5")
    parser.add_argument("--schedules", default="uniform,even")
    parser.add_argument("--arms", default=ARMS, help=f"method expressions with semicolons, or {' or '.join(NAMED)}")
    parser.add_argument("--tune", default="", help="method expressions with semicolons, to be tuned first")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="the best plain sampler for each number of steps as well",
    )
    parser.add_argument("--learn", type=int, default=16, help="prompts to learn from, a multiple of the batch")
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/caching"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.learn % options.batch:
        parser.error(f"--learn must be a multiple of --batch, got {options.learn} and {options.batch}")
    Measure(options).run()


class Measure:
    """One model at one guidance scale."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.model = open_model(options.model)
        self.pipe = self.model.pipe
        known = json.loads(self.out.read_text()) if self.out.exists() else {}
        check_weights(known, self.model, self.out)
        asked = {name: getattr(options, name) for name in SHARED}
        if known:
            check_asked(dict.fromkeys(SHARED) | known.get("options", {}), asked, self.out, "--out")
        self.rows: dict[str, Any] = known.get("rows", {})
        scale = "" if options.guidance is None else f"-{options.guidance:g}"
        self.scale: float | None = options.guidance
        learned = f"{options.learn}-{options.batch}-{weights_of(self.model)}"  # what the fits in it depend on
        self.work = options.work / f"{options.model}{scale}-{options.steps}-{learned}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.held_out = HeldOut(self.model, options.steps, options.learn, options.held_out, options.batch, self.work)

    def run(self) -> None:
        """Measure what is not there yet."""
        counts = [int(count) for count in self.options.counts.split(",")]
        for count in counts:
            self.plain(count)
        arms = NAMED.get(self.options.arms, self.options.arms)
        for schedule in self.options.schedules.split(","):
            for count in counts:
                for arm in filter(None, arms.split(";")):
                    self.arm(arm, schedule, count)
                for arm in filter(None, self.options.tune.split(";")):
                    self.tuned(arm, schedule, count)

    # --- rows

    def note(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row, with the commit that it was measured on, and write all of them."""
        here = environment()
        self.rows[key] = row | {"commit": here["commit"]}
        about = {name: getattr(self.options, name) for name in SHARED}
        content = {"environment": here, "options": about, "weights": weights_of(self.model), "rows": self.rows}
        write_atomically(self.out, json.dumps(content, indent=1) + "\n")
        print(
            key,
            row.get("refused") or f"{row['median']:.2f}  mean {row['mean']:.2f}  worst {row['worst']}",
            flush=True,
        )

    def has(self, key: str) -> bool:
        """Whether a row is not to be measured."""
        return is_settled(self.rows.get(key), environment()["commit"])

    def measured(self, images: Sequence[Tensor]) -> dict[str, Any]:
        """Figures of a row: PSNR of every prompt, and what they come to."""
        values = self.held_out.quality(images, self.scale)
        worst = int(np.argmin(values))
        return {
            "median": round(float(np.median(values)), 3),
            "mean": round(float(np.mean(values)), 3),
            "worst": [self.model.prompts[worst], values[worst]],
            "psnr": list(values),
        }

    def arm(self, expression: str, schedule: str, count: int) -> None:
        """A caching method on a schedule with a number of computed steps."""
        key = f"{expression} @ {schedule} {count}"
        if self.has(key):
            return
        row: dict[str, Any] = {
            "method": expression,
            "schedule": schedule,
            "count": count,
        }
        try:
            method = self.method(expression, schedule, count)
        except (ConfigError, ScheduleError) as error:
            self.note(key, row | {"refused": one_line(error)})
            return
        self.note(key, row | self.drawn(method))

    def tuned(self, expression: str, schedule: str, count: int) -> None:
        """A caching method as whole runs of a batch of prompts to learn from choose its parameters."""
        key = f"{expression}, tuned @ {schedule} {count}"
        if self.has(key):
            return
        calls = [call | {"output_type": "pt"} for call in self.held_out.calls(self.scale, learn=True)[:1]]
        row: dict[str, Any] = {"method": f"{expression}, tuned", "schedule": schedule, "count": count}
        try:
            start = self.method(expression, schedule, count)
            found = hasten.tune_method(self.pipe, start, calls, trials=TRIALS)
        except (ConfigError, ScheduleError) as error:
            self.note(key, row | {"refused": one_line(error)})
            return
        before = reported(start)
        row["chosen"] = {name: value for name, value in reported(found.method).items() if value != before.get(name)}
        row |= {"trials": len(found.trials), "settled": found.settled, "tuned_on": len(calls[0]["prompt"])}
        self.note(key, row | self.drawn(found.method))

    def method(self, expression: str, schedule: str, count: int) -> CachingMethod:
        """A caching method on a schedule with a number of computed steps."""
        return caching_method(f"{self.fitted(expression)}:schedule={schedule}:computed_steps={count}")

    def drawn(self, method: CachingMethod) -> dict[str, Any]:
        """Figures of a method on the held-out prompts."""
        with hasten.accelerate(self.pipe, method):
            images = self.held_out.draw(self.held_out.calls(self.scale))
        return self.measured(images)  # which may have to draw the full run first

    def fitted(self, expression: str) -> str:
        """The expression with its calibration, which is made where it is missing."""
        ((name, given),) = registry.split(expression)
        if not registry.info(name).needs_calibration or "calibration" in given:
            return expression
        site = {"site": given["site"]} if "site" in given else {}
        file = self.work / ("-".join((name, *site.values())) + ".safetensors")
        if not file.exists():
            hasten.fit(self.trace(**site), name, **site).save(file)
        return f"{expression}:calibration={file}"

    @cache  # noqa: B019 (one object, for as long as the process)
    def trace(self, site: str = "hidden") -> Trace:
        """What the methods that are fitted learn from; one call at the module site, whose traces are large."""
        return self.held_out.recorded(self.scale, learn=True, site=site, many=None if site == "hidden" else 1)

    def plain(self, count: int) -> None:
        """The pipeline's own sampler with as many steps; and the best of all, chosen on a few prompts."""
        calls = self.held_out.calls(self.scale)
        if self.options.plain and f"best plain @ {count}" not in self.rows:
            best, tried = self.held_out.best_plain(count, self.scale)
            about = {"method": "best plain", "count": count, "sampler": best, "tried": tried}
            images = self.held_out.plain(best)(calls, count)
            self.note(f"best plain @ {count}", about | self.measured(images))
        if f"plain @ {count}" not in self.rows:
            images = self.held_out.draw(calls, count)
            self.note(f"plain @ {count}", {"method": "plain", "count": count} | self.measured(images))


if __name__ == "__main__":
    main()
