"""`hasten tune`: fit what can be fitted to a model, compare on other prompts, and say what to take for a budget.

Everything that is learned goes to one folder, file by file as it is finished, so that a run that was cut short goes on
where it stopped. The comparison is a `hasten bench` on held-out prompts, written beside the files with its report.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from hasten import registry
from hasten.bench.arms import Solved
from hasten.bench.report import render_report
from hasten.bench.requests import caching_method, check_counts, parse_request
from hasten.bench.result import Result
from hasten.bench.runner import BenchSettings, run_bench
from hasten.bench.sampling import call_arguments, draw_sample, plain
from hasten.bench.subject import Subject
from hasten.caching.method import SEARCHED
from hasten.caching.methods.leapcache import LeapCache
from hasten.calibration import Calibration, Fingerprint
from hasten.errors import ConfigError
from hasten.fitting.calibrate import fit, record
from hasten.fitting.leap import fit_leap
from hasten.fitting.leapcache import fit_leapcache
from hasten.fitting.schedules import tune_steps
from hasten.io import check_target
from hasten.parameters import from_text
from hasten.pipeline.replay import Replay
from hasten.solvers.content import LEAP

__all__ = ["TuneSettings", "run_tune", "tuning_calls"]

Progress = Callable[[str, int, int | None], None]
COMPUTED_STEPS = (12, 9, 7)
LADDER = (4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 25)  # numbers of evaluations that a bound on the error is tried with
SWEEPS = 3
DRAWING = "drawing the plain sampler's trajectories"


@dataclass(frozen=True)
class TuneSettings:
    """What to learn, from what, and what to compare.

    Args:
        computed_steps: numbers of computed steps, 12, 9 and 7 by default; or
        max_error: the largest root mean squared error of an image (0 to 1) that is allowed; the fewest evaluations of
            LEAP that stay below it are searched.
        methods: candidates, as `parse_request` reads them, or `("all",)`; those that have to be fitted are, and those
            with a schedule get the learned steps.
        search: `"leap"`, whose steps the other methods take over, or a caching method to search their lists with.
        prompts: how many prompts to learn from: the last of the list.
        held_out: how many prompts to compare on: those before them.
        prompt_list: own prompts instead of the model's.
        seed: prompt `i` of those to learn from is drawn with seed `seed + i`; the held-out ones start from 0.
        steps: of the plain sampler.
        call: further arguments of the pipeline's call, such as `true_cfg_scale`.
        batch: prompts that are drawn at a time while learning.
        trials: lists of steps to look at for each number.
        rounds: of LEAP's refinement.
        guidances: scales that one LEAP file is to serve, and all between; that of the calls by default.
    """

    computed_steps: tuple[int, ...] = ()
    max_error: float | None = None
    methods: tuple[str, ...] = ("leap", "leapcache", "foca", "taylorseer:order=2")
    search: str = LEAP
    prompts: int = 8
    held_out: int = 8
    prompt_list: tuple[str, ...] = ()
    seed: int = 1000
    steps: int = 50
    call: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    trials: int = 40
    rounds: int = 3
    guidances: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.held_out < 1:
            raise ConfigError("--prompts and --held-out must be at least 1")
        if self.max_error is not None and not 0 < self.max_error < math.inf:
            raise ConfigError(f"--max-error must be positive, got {self.max_error}")
        if self.max_error is not None and self.computed_steps:
            raise ConfigError(
                "--max-error finds the number of computed steps; leave out one of it and --computed-steps"
            )
        if self.max_error is None and not self.computed_steps:
            object.__setattr__(self, "computed_steps", COMPUTED_STEPS)
        if self.guidances and not self.call.keys() & {"true_cfg_scale", "guidance_scale"}:
            raise ConfigError("--guidances needs --guidance, the scale at which the methods are compared")
        check_counts(self.computed_steps, self.steps)
        if not self.methods:
            raise ConfigError("give at least one method")
        if self.methods == ("all",):
            caches = (info.name for info in registry.methods() if info.kind == "caching")
            object.__setattr__(self, "methods", (LEAP, *caches))
        for text in self.methods:
            self._check(text)
        if self.search != LEAP:
            caching_method(self.search)

    def _check(self, text: str) -> None:
        """Read a candidate before anything is learned; what it is fitted with need not be there yet."""
        ((name, given), *more) = registry.split(text)
        info = registry.info(name)
        if more or name == LEAP or "calibration" in given or not info.needs_calibration:
            parse_request(text)
        else:
            from_text(info.config, given, name)

    def check_prompts(self, known: Sequence[str]) -> None:
        """Raise a `ConfigError` if there are fewer prompts than asked for, or one is among them twice."""
        if self.prompts + self.held_out > len(known):
            raise ConfigError(
                f"--prompts {self.prompts} and --held-out {self.held_out} ask for more than the {len(known)} prompts "
                "there are"
            )
        used = Counter(known[-self.prompts - self.held_out :])
        if twice := [prompt for prompt, count in used.items() if count > 1]:
            raise ConfigError(
                f"the prompt {twice[0]!r} occurs {used[twice[0]]} times: what was learned from a prompt must not be "
                "compared on it, and one that counts twice decides twice; remove the duplicates"
            )


def tuning_calls(
    model: Subject, prompts: Sequence[str], seed: int, steps: int, call: dict[str, Any], batch: int
) -> list[dict[str, Any]]:
    """One call for each batch of prompts, each with generators of its own."""
    calls = []
    for first in range(0, len(prompts), batch):
        group = list(prompts[first : first + batch])
        own = call_arguments(model, group, call)
        own |= {"num_inference_steps": steps, "output_type": "latent", "prompt": group}
        if "negative_prompt" in own:
            own["negative_prompt"] = [own["negative_prompt"]] * len(group)
        own["generator"] = [torch.Generator().manual_seed(seed + first + i) for i in range(len(group))]
        calls.append(own)
    return calls


def run_tune(
    model: Subject, settings: TuneSettings, folder: Path, progress: Progress | None = None, command: str = ""
) -> Result:
    """Learn, compare, write; returns the content of `tune.json`: a bench result with `tune` beside it.

    Args:
        model: from `open_model`.
        settings: what to do.
        folder: where `leap.safetensors`, `steps.safetensors`, other calibrations, `tune.json` and `tune.html` go.
        progress: called with (what is being done, done, of how many); the last is None while nobody knows it.
        command: the command line that asked for it.

    Raises:
        ConfigError: if there are too few prompts, or no number of evaluations keeps the bound.
    """
    return _Tuning(model, settings, folder, progress or (lambda label, done, total: None), command).run()


class _Tuning:
    """One run of `hasten tune`."""

    def __init__(self, model: Subject, settings: TuneSettings, folder: Path, progress: Progress, command: str) -> None:
        self._model, self._settings, self._folder, self._progress = model, settings, folder, progress
        self._command = command
        wanted = settings.prompts + settings.held_out
        known = list(settings.prompt_list) or model.prompts
        settings.check_prompts(known)
        model.check_call(settings.call)
        for name in ("tune.json", "leap.safetensors"):
            check_target(folder / name)
        learn = known[-settings.prompts :]
        self._held_out = known[-wanted : -settings.prompts]
        self._calls = tuning_calls(model, learn, settings.seed, settings.steps, settings.call, settings.batch)
        self._names = [name for text in settings.methods for name, _ in registry.split(text)]
        self._fitted: Calibration | None = None

    def run(self) -> Result:
        started = time.perf_counter()
        counts = self._settings.computed_steps if self._settings.max_error is None else (self._enough(),)
        if LEAP in self._names or self._settings.search == LEAP:
            self._leap(counts)
        lists = self._lists(counts)
        texts = [self._prepared(text, lists) for text in self._settings.methods]
        learned = time.perf_counter() - started
        bench = BenchSettings(
            methods=tuple(texts),
            computed_steps=tuple(counts),
            prompts=len(self._held_out),
            prompt_list=tuple(self._held_out),
            steps=self._settings.steps,
            call=self._settings.call,
            best_plain=True,
        )
        file = self._folder / "tune.json"
        result = run_bench(
            self._model,
            bench,
            file,
            lambda done, total, label: self._progress("comparing", done, total),
            self._command,
        )
        result.tune = {
            "best": {str(count): _best(result, count) for count in counts},
            "learned_from": self._settings.prompts,
            "seconds_to_learn": round(learned, 1),
            "max_error": self._settings.max_error,
        }
        result.write(file)
        render_report(file, file.with_suffix(".html"))
        return result

    # --- what is learned

    def _leap(self, counts: Sequence[int]) -> Calibration:
        if self._fitted is not None and {str(count) for count in counts} <= self._fitted.report.keys():
            return self._fitted
        file = self._folder / "leap.safetensors"

        def tick(count: int, done: int, total: int, error: float) -> None:
            found = f"leap, {count} evaluations: {-10 * math.log10(max(error, 1e-30)):.1f} dB"
            self._progress(found if count else DRAWING, done, total)

        self._progress(DRAWING, 0, len(self._calls))
        self._fitted = fit_leap(
            self._model.pipe,
            self._calls,
            counts,
            trials=self._settings.trials,
            rounds=self._settings.rounds,
            guidances=self._settings.guidances,
            known=Calibration.load(file) if file.exists() else None,
            keep=lambda result: result.save(file),
            progress=tick,
        )
        return self._fitted

    def _lists(self, counts: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Computed steps for the caching methods, written to `steps.safetensors`."""
        if set(self._names) == {LEAP}:
            return {}
        if self._settings.search != LEAP:

            def tick(count: int, done: int, total: int, error: float) -> None:
                self._progress(f"{self._settings.search}, {count} steps", done, total)

            chosen = caching_method(self._settings.search)
            found = tune_steps(
                self._model.pipe, chosen, self._calls, counts, trials=self._settings.trials, progress=tick
            )
        else:
            found = _steps_of(self._leap(counts), counts)
        found.save(self._folder / "steps.safetensors")
        return {int(count): tuple(figures["steps"]) for count, figures in found.report.items()}

    def _prepared(self, text: str, lists: dict[int, tuple[int, ...]]) -> str:
        """The text of a method with the files that it needs, which are made where they are missing."""
        ((name, given), *more) = registry.split(text)
        info = registry.info(name)
        if more or info.kind == "resolution":
            return text
        if name == LEAP:
            return text if given else f"{text}:calibration={self._folder / 'leap.safetensors'}"
        if info.needs_calibration and "calibration" not in given:
            text += f":calibration={self._calibrated(name, lists)}"
        takes_lists = name != LeapCache.name and "searched" in info.parameters
        if takes_lists and not given.keys() & {"searched", "steps", "schedule", "published"}:
            text += f":searched={self._folder / 'steps.safetensors'}"
        return text

    def _calibrated(self, name: str, lists: dict[int, tuple[int, ...]]) -> Path:
        self._progress(f"fitting {name}", 0, None)
        if name == LeapCache.name:

            def tick(count: int, done: int, error: float) -> None:
                self._progress(f"leapcache, {count} steps", done, SWEEPS)

            made = fit_leapcache(self._model.pipe, self._calls, list(lists.values()), sweeps=SWEEPS, progress=tick)
        else:
            made = fit(self._trace, name)
        return made.save(self._folder / f"{name}.safetensors")

    @cached_property
    def _trace(self) -> Any:
        pipe, tick = self._model.pipe, partial(self._progress, "recording")
        with Replay(self._calls) as replay:
            return record(pipe, replay.runs(pipe), progress=tick)

    # --- a bound instead of a number

    def _enough(self) -> int:
        """The fewest evaluations with which LEAP stays below the bound on the held-out prompts."""
        bound = self._settings.max_error
        assert bound is not None
        ladder = [count for count in LADDER if count < self._settings.steps]
        error = math.inf
        for count in ladder:
            error = self._error(self._leap([count]), count)
            self._progress(f"{count} evaluations: error {error:.4f}", 1, 1)
            if error <= bound:
                return count
        raise ConfigError(
            f"with {ladder[-1]} evaluations the error is still {error:.4f}, more than --max-error {bound:g}; allow "
            "more, or use the plain sampler"
        )

    def _error(self, leap: Calibration, count: int) -> float:
        """Root mean squared error of the held-out images."""
        squares = []
        for i, (prompt, reference) in enumerate(zip(self._held_out, self._references, strict=True)):
            sample = draw_sample(self._model, Solved(leap), count, prompt, i, self._settings.call)
            squares.append(float((sample.image - reference).square().mean()))
        return math.sqrt(sum(squares) / len(squares))

    @cached_property
    def _references(self) -> list[torch.Tensor]:
        images = []
        for i, prompt in enumerate(self._held_out):
            self._progress("drawing the held-out prompts", i, len(self._held_out))
            images.append(draw_sample(self._model, plain, self._settings.steps, prompt, i, self._settings.call).image)
        return images


def _steps_of(leap: Calibration, counts: Sequence[int]) -> Calibration:
    """The steps that LEAP's search found, as lists for caching methods."""
    report = {str(count): leap.report[str(count)] for count in counts}
    tensors = {f"steps/{count}": torch.tensor(figures["steps"]) for count, figures in report.items()}
    fingerprint = Fingerprint(**{**vars(leap.fingerprint), "site": "hidden"})
    return Calibration(SEARCHED, tensors, fingerprint, report, {"method": LEAP})


def _best(result: Result, count: int) -> str | None:
    """Id of the row of hasten that comes nearest to the plain sampler at a number of computed steps."""
    rows = [row for row in result.measured if row.budget == count and row.library == "hasten"]
    return max(rows, key=lambda row: math.inf if row.psnr is None else row.psnr).id if rows else None
