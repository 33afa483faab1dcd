"""The caching methods on a trained model, on held-out prompts: PSNR of every prompt to 50 plain steps.

python benchmarks/caching.py --model emoji-flux --out benchmarks/caching-emoji-flux.json
python benchmarks/caching.py --model emoji-flux --guidance 3 --out benchmarks/caching-emoji-flux-guided.json
python benchmarks/caching.py --arms "foca;hicache:sigma=0.6" --schedules even --counts 9 --held-out 8 --out try.json

Prompts are drawn in batches, prompt `i` with seed `i`; what is fitted learns from the last prompts of the list, with
seeds from 1000. Every row is written as soon as it is measured: the same command goes on where it was cut short.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import hasten
import numpy as np
from hasten import registry
from hasten.bench.environment import environment
from hasten.bench.plain import plain_samplers
from hasten.bench.requests import caching_method
from hasten.bench.subject import open_model
from hasten.bench.tune import tuning_calls
from hasten.errors import ConfigError, ScheduleError
from hasten.io import write_atomically
from hasten.pipeline.replay import Replay
from hasten.quality.metrics import over_frames, psnr
from safetensors.torch import load_file, save
from torch import Tensor

SEED = 1000
TRIED = 4  # held-out prompts on which the best plain sampler is chosen
FAILS = (ConfigError, ValueError, TypeError, ImportError, AssertionError)  # of schedulers that do not fit a pipeline
ARMS = (
    "reuse;taylorseer:order=1;taylorseer:order=2;taylorseer:order=2:domain=normed;hicache;hicache:order=1:sigma=0.66;foca;"
    "foca:domain=normed;freqca;freqca:split=none;freqca:mode=paper;svdcache;svdcache:mode=taylor;hyca;"
    "l2p;l2p:history=full:fit_by=gradient:published=true"
)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--guidance", type=float, help="true classifier-free guidance; none by default")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--counts", default="12,9,7,5")
    parser.add_argument("--schedules", default="uniform,even")
    parser.add_argument("--arms", default=ARMS, help="method expressions with semicolons")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="the best plain sampler for each number of steps as well",
    )
    parser.add_argument("--learn", type=int, default=12)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("runs/caching"))
    parser.add_argument("--out", type=Path, required=True)
    Measure(parser.parse_args()).run()


class Measure:
    """One model at one guidance scale."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.model = open_model(options.model)
        self.pipe = self.model.pipe
        self.rows: dict[str, Any] = json.loads(self.out.read_text())["rows"] if self.out.exists() else {}
        scale = "" if options.guidance is None else f"-{options.guidance:g}"
        self.work = options.work / f"{options.model}{scale}-{options.steps}"
        self.work.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Measure what is not there yet."""
        counts = [int(count) for count in self.options.counts.split(",")]
        for count in counts:
            self.plain(count)
        for arm in self.options.arms.split(";"):
            for schedule in self.options.schedules.split(","):
                for count in counts:
                    self.arm(arm, schedule, count)

    # --- drawing

    def calls(self, learn: bool, count: int | None = None) -> list[dict[str, Any]]:
        """The calls to learn from, or the held-out ones."""
        prompts, scale = self.model.prompts, self.options.guidance
        chosen = prompts[-self.options.learn :] if learn else prompts[: count or self.options.held_out]
        call = {} if scale is None else {"true_cfg_scale": scale, "negative_prompt": ""}
        return tuning_calls(
            self.model,
            chosen,
            SEED if learn else 0,
            self.options.steps,
            call,
            self.options.batch,
        )

    def draw(
        self,
        attach: AbstractContextManager[Any],
        count: int | None = None,
        steps: int | None = None,
    ) -> list[Tensor]:
        """Images `[3, H, W]` or clips `[F, 3, H, W]` in [0, 1] of the held-out prompts, or of so many of them."""
        calls, images = self.calls(False, count), []
        with attach:
            for arguments in Replay(calls):
                given = {
                    "output_type": "pt",
                    "num_inference_steps": steps or self.options.steps,
                }
                images += list(self.pipe(**{**arguments, **given})[0].float())
        return images

    def references(self) -> list[Tensor]:
        """The full run of every held-out prompt."""
        file = self.work / f"references-{self.options.held_out}.safetensors"
        if not file.exists():
            images = self.draw(hasten.accelerate(self.pipe, "reuse", interval=1))
            write_atomically(
                file,
                save({f"{i:04d}": image.contiguous() for i, image in enumerate(images)}),
            )
        return [image for _, image in sorted(load_file(file).items())]

    def quality(self, images: Sequence[Tensor]) -> list[float]:
        """PSNR of every image."""
        pairs = zip(images, self.references(), strict=False)
        return [round(over_frames(psnr, a, b) if a.dim() == 4 else psnr(a, b), 3) for a, b in pairs]

    def note(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row and write all of them."""
        self.rows[key] = row
        about = {name: value for name, value in vars(self.options).items() if not isinstance(value, Path)}
        content = {"environment": environment(), "options": about, "rows": self.rows}
        write_atomically(self.out, json.dumps(content, indent=1) + "\n")
        print(
            key,
            row.get("refused") or f"{row['median']:.2f}  mean {row['mean']:.2f}  worst {row['worst']}",
            flush=True,
        )

    def measured(self, values: Sequence[float]) -> dict[str, Any]:
        """Figures of a row from the PSNR of every prompt."""
        worst = int(np.argmin(values))
        return {
            "median": round(float(np.median(values)), 3),
            "mean": round(float(np.mean(values)), 3),
            "worst": [self.model.prompts[worst], values[worst]],
            "psnr": list(values),
        }

    # --- rows

    def arm(self, expression: str, schedule: str, count: int) -> None:
        """A caching method on a schedule with a number of computed steps."""
        key = f"{expression} @ {schedule} {count}"
        if key in self.rows:
            return
        row: dict[str, Any] = {
            "method": expression,
            "schedule": schedule,
            "count": count,
        }
        try:
            method = caching_method(f"{self.fitted(expression)}:schedule={schedule}:computed_steps={count}")
        except (ConfigError, ScheduleError) as error:
            self.note(key, row | {"refused": str(error)})
            return
        images = self.draw(hasten.accelerate(self.pipe, method))
        self.note(key, row | self.measured(self.quality(images)))

    def fitted(self, expression: str) -> str:
        """The expression with its calibration, which is made where it is missing."""
        ((name, given),) = registry.split(expression)
        if not registry.info(name).needs_calibration or "calibration" in given:
            return expression
        file = self.work / f"{name}.safetensors"
        if not file.exists():
            hasten.fit(self.trace, name).save(file)
        return f"{expression}:calibration={file}"

    @cached_property
    def trace(self) -> Any:
        """What the methods that are fitted learn from."""
        replay = Replay(self.calls(True))
        calls = [partial(lambda i: self.pipe(**replay[i]), i) for i in range(len(replay))]
        return hasten.record(self.pipe, calls, tokens=4096)

    def plain(self, count: int) -> None:
        """The pipeline's own sampler with as many steps; and the best of all, chosen on a few prompts."""
        samplers = plain_samplers()
        if self.options.plain and f"best plain @ {count}" not in self.rows:
            tried = {}
            for label, sampler in samplers.items():
                try:
                    tried[label] = float(np.mean(self.quality(self.draw(sampler(self.pipe), TRIED, count))))
                except FAILS as error:
                    print(label, "not for this model:", " ".join(str(error).split())[:80])
            best = max(tried, key=lambda label: tried[label])
            row = self.measured(self.quality(self.draw(samplers[best](self.pipe), steps=count)))
            about = {"sampler": best, "tried": {label: round(value, 2) for label, value in tried.items()}}
            self.note(f"best plain @ {count}", {"method": "best plain", "count": count} | about | row)
        if f"plain @ {count}" not in self.rows:
            row = self.measured(self.quality(self.draw(samplers["euler"](self.pipe), steps=count)))
            self.note(f"plain @ {count}", {"method": "plain", "count": count} | row)


if __name__ == "__main__":
    main()
