"""`hasten bench`: runs every arm on every prompt, interleaved, and writes what it measured as JSON and images.

All arms see the same prompts and seeds in one process; for each prompt the arms take turns in a rotating order, so
that the machine's drift hits all alike. The reference of every quality figure is the plain sampler's image of the
same prompt and seed in the same process. Several processes (`accelerate launch`, `torchrun`) share the prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from hasten import registry
from hasten.bench.arms import Arm, merged, method_arms, one_line
from hasten.bench.edits import edit_of, vae_unedited, with_image
from hasten.bench.environment import environment, load, processes
from hasten.bench.measurements import (
    Measurement,
    baseline_row,
    failed_row,
    image_name,
    measure,
    measured_row,
    missing_columns,
    save_image,
)
from hasten.bench.partial import Partial
from hasten.bench.peers import Peer, chosen_peers, peer_arms
from hasten.bench.plain import best_plain_arms, plain_arms
from hasten.bench.requests import Request, check_counts, file_facts, parse_request
from hasten.bench.resolution_arms import staged_arms
from hasten.bench.result import Result, Settings
from hasten.bench.sampling import Sample, count_flops, draw_sample
from hasten.bench.subject import Subject
from hasten.bench.thresholds import Trials
from hasten.errors import ConfigError, ModelError
from hasten.io import alone, check_target

__all__ = ["BenchSettings", "prepared", "run_bench"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None, str], None]
TRIAL_PROMPTS = 2  # on which thresholds and settings are matched to a number of computed steps


@dataclass(frozen=True)
class BenchSettings:
    """What to measure; whatever can be wrong without a model is found out when it is made.

    Args:
        methods: method expressions, as `parse_request` reads them.
        computed_steps: numbers of computed steps.
        prompts: how many prompts (the model's first ones, or those of `prompt_list`).
        prompt_list: own prompts instead of the model's.
        seed: prompt `i` is drawn with seed `seed + i`.
        steps: steps of the baseline and of every cached method.
        call: further arguments of the pipeline's call, such as `true_cfg_scale`.
        peers: measure the other libraries too.
        only_peers: names of those to measure; all of them if empty.
        image: the user's own source image for an editing pipeline, in the place of the model's.
        best_plain: look for the best plain sampler too, among all solvers and spacings, on the first prompts.

    Raises:
        UnknownNameError, ConfigError: for what cannot be measured.
    """

    methods: tuple[str, ...] = ("reuse", "taylorseer", "hicache", "foca")
    computed_steps: tuple[int, ...] = (12, 9, 7)
    prompts: int = 16
    prompt_list: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 50
    call: dict[str, Any] = field(default_factory=dict)
    peers: bool = False
    only_peers: tuple[str, ...] = ()
    image: Path | None = None
    best_plain: bool = False

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"--prompts must be at least 1, got {self.prompts}")
        if not self.methods or not self.computed_steps:
            raise ConfigError("give at least one method and one number of computed steps")
        if any(request.resolution is None for request in self.requests):  # others have steps of their own
            check_counts(self.computed_steps, self.steps)
        if self.only_peers and not self.peers:
            raise ConfigError("--only-peers says which peers to measure; give --peers as well, or leave it out")
        self.check_prompts(self.prompt_list)
        scheduled = method_arms(self.requests, self.computed_steps, self.steps, None)
        if len(scheduled) == len(self.requests) * len(self.computed_steps) and all(arm.error for arm in scheduled):
            raise ConfigError(f"{scheduled[0].method}: {scheduled[0].error}")
        _ = self.chosen_peers

    def check_prompts(self, available: tuple[str, ...] | list[str]) -> None:
        """Raise a `ConfigError` if there are prompts, but fewer than asked for."""
        if available and self.prompts > len(available):
            raise ConfigError(f"--prompts {self.prompts} asks for more than the {len(available)} prompts there are")

    @cached_property
    def requests(self) -> list[Request]:
        """The methods, read."""
        return [parse_request(text) for text in self.methods]

    @cached_property
    def chosen_peers(self) -> tuple[Peer, ...]:
        """The peers to measure, if any."""
        return chosen_peers(self.only_peers) if self.peers else ()

    def prompts_of(self, model: Subject) -> list[str]:
        """The prompts to draw."""
        return (list(self.prompt_list) or model.prompts)[: self.prompts]


@dataclass(frozen=True)
class _Plan:
    """The baseline and all other arms, and what every plain sampler came to in the trials."""

    arms: list[Arm]
    plain: dict[str, dict[str, float | None]]


@dataclass
class _Measured:
    """What one process measured."""

    measurements: dict[str, list[Measurement]]
    flops: dict[str, int]
    failures: dict[str, str]


def _planned(settings: BenchSettings, trials: Trials) -> _Plan:
    """The baseline, then all others; those with a threshold are matched to their number of computed steps here."""
    staged = [request for request in settings.requests if request.resolution is not None]
    others = [request for request in settings.requests if request.resolution is None]
    methods = method_arms(others, settings.computed_steps, settings.steps, trials)
    counts = list(dict.fromkeys(arm.computed_steps for arm in methods if not arm.error))
    (plain,) = plain_arms([settings.steps], ("euler",))
    best, tried = best_plain_arms(counts, trials) if settings.best_plain else ([], {})
    arms = [replace(plain, id="baseline"), *plain_arms(counts), *best, *methods, *staged_arms(staged, trials)]
    return _Plan(merged([*arms, *peer_arms(counts, trials, settings.chosen_peers)]), tried)


def _measure(
    model: Subject,
    settings: BenchSettings,
    arms: list[Arm],
    mine: list[tuple[int, str]],
    images: Path,
    kept: Partial,
    progress: Progress,
) -> None:
    """Warm every arm up, then draw this process's prompts (number, prompt) with all of them in turn, into `kept`."""
    rest = [(number, prompt) for number, prompt in mine if not kept.measured(number)]
    total, done = len(arms) * (len(rest) + 1), 0

    def attempt(arm: Arm, label: str, action: Callable[[], Any]) -> Any:
        """An arm that raises loses its row, and nothing more; without the baseline there is nothing to compare with."""
        nonlocal done
        done += 1
        progress(done, total, f"{label}: {arm.id}")
        if arm.id in kept.failures:
            return None
        try:
            return action()
        except Exception as error:
            fail(arm, error)
            return None

    def fail(arm: Arm, error: Exception) -> None:
        if arm.id == "baseline":
            raise error
        log.warning("%s cannot be measured", arm.id, exc_info=error)
        kept.failures[arm.id] = one_line(error)

    if not rest and kept.flops:
        return
    first = (settings.prompts_of(model)[0], settings.seed, settings.call)
    for arm in arms:
        counted = attempt(arm, "warm-up", partial(count_flops, model, arm.attach, arm.steps, *first))
        if counted is not None:
            kept.flops[arm.id] = counted[0]
    asked = [arm for arm in arms if arm.library == "hasten"]
    if asked and all(arm.id in kept.failures for arm in asked):
        raise ConfigError(f"none of the methods can be measured; {asked[0].method}: {kept.failures[asked[0].id]}")
    for number, prompt in rest:
        turn, seed = number % len(arms), settings.seed + number
        samples: dict[str, Sample] = {}
        for arm in arms[turn:] + arms[:turn]:
            sample = attempt(arm, prompt, partial(_drawn, model, settings, arm, prompt, seed))
            if sample is not None:
                samples[arm.id] = sample
        found = {}
        for arm in arms:
            if arm.id in samples:
                sample, reference = samples[arm.id], samples["baseline"]
                save_image(sample, images / image_name(arm) / f"{number:02d}.png")
                try:
                    flops = _flops(model, settings, arm, prompt, seed, kept.flops[arm.id], number)
                    found[arm.id] = measure(model, sample, reference, prompt, number, seed, settings.steps, flops)
                except Exception as error:
                    fail(arm, error)
        kept.add(number, found)


def _drawn(model: Subject, settings: BenchSettings, arm: Arm, prompt: str, seed: int) -> Sample:
    sample = draw_sample(model, arm.attach, arm.steps, prompt, seed, settings.call)
    if not bool(sample.image.isfinite().all()):
        raise ModelError(f"the image of {prompt!r} with seed {seed} has values that are not finite")
    return sample


def _flops(
    model: Subject, settings: BenchSettings, arm: Arm, prompt: str, seed: int, first: int, number: int
) -> int | None:
    """Counted operations where they depend on the image, in a call apart, since counting takes time."""
    if not arm.staged:
        return None
    return first if number == 0 else count_flops(model, arm.attach, arm.steps, prompt, seed, settings.call)[0]


def _gather(arms: list[Arm], kept: Partial) -> _Measured:
    """What all processes measured together, in the order of the prompts; operations are the first process's."""
    own = _Measured({arm.id: kept.measurements(arm.id) for arm in arms}, kept.flops, kept.failures)
    parts: list[_Measured] = gather_object([own])
    return _Measured(
        {
            name: sorted((m for part in parts for m in part.measurements[name]), key=lambda m: m.prompt)
            for name in own.measurements
        },
        parts[0].flops,
        {name: error for part in parts for name, error in part.failures.items()},
    )


def _identity(model: Subject, settings: BenchSettings, process: int) -> dict[str, Any]:
    """All that decides the figures, as plain data."""
    texts = [text for label in settings.methods for _, given in registry.split(label) for text in given.values()]
    return {
        "settings": asdict(settings) | {"image": str(settings.image)},
        "model": model.name,
        "files": file_facts(texts),
        "environment": environment(),
        "process": process,
    }


def prepared(model: Subject, settings: BenchSettings) -> Subject:
    """The model as the settings want it.

    Raises:
        ConfigError: for settings that it cannot serve: too many prompts, a size, an image, an edit without one.
    """
    model.check_call(settings.call)
    settings.check_prompts(settings.prompt_list or model.prompts)
    for request in settings.requests:
        if request.leap:
            request.fit(model)
    model = with_image(model, settings.image)
    for prompt in settings.prompts_of(model):
        edit_of(model, prompt)
    return model


def run_bench(
    model: Subject, settings: BenchSettings, out: Path, progress: Progress | None = None, command: str = ""
) -> Result:
    """Measure, and write `out` (JSON) and a folder of images beside it.

    Under `accelerate launch` or `torchrun` the processes share the prompts and the main one writes the file (images
    are written by the process that drew them, so that all have to see the same folder); all of them return it. What is
    measured is kept in `<stem>.partial.json` until the end: called again with the same settings, a bench that was cut
    short goes on where it stopped.

    Args:
        model: from `open_model`.
        settings: what to measure.
        out: path of the JSON file; images go to `<stem>.images/`.
        progress: called with (done, total, label) as the work goes on; total is None while nobody knows it.
        command: the command line that asked for it.

    Raises:
        ConfigError: for settings that the model cannot serve, before anything is drawn.
        FileError: if `out` cannot be written, or another process is measuring into it, likewise.
        KeyboardInterrupt: with a line on how to go on.
    """
    state = processes()
    tick = progress or (lambda done, total, label: None)
    check_target(out)
    model = prepared(model, settings)
    prompts = settings.prompts_of(model)
    rank = "" if state.num_processes == 1 else f".{state.process_index}"
    unfinished = out.parent / f"{out.stem}.partial{rank}.json"
    with alone(unfinished):
        kept = Partial(unfinished, _identity(model, settings, state.process_index))
        trials = Trials(
            model, prompts[:TRIAL_PROMPTS], settings.seed, settings.steps, settings.call,
            lambda label: tick(0, None, label), kept.trial,
        )  # fmt: skip
        images = out.parent / f"{out.stem}.images"
        mine = list(enumerate(prompts))[state.process_index :: state.num_processes]
        try:
            # Every process searches, so that none waits in a collective for longer than its time limit, and all
            # use what the main one found.
            plan: _Plan = broadcast_object_list([_planned(settings, trials)])[0]
            running = [arm for arm in plan.arms if not arm.error]
            _measure(model, settings, running, mine, images, kept, tick)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{kept.finished} of {len(mine)} prompts are kept in {kept.file}; the same command goes on from there"
            ) from None
        result = _result(model, settings, plan, _gather(running, kept), images, command)
        if state.is_main_process:
            result.write(out)
        kept.remove()
        return result


def _result(
    model: Subject, settings: BenchSettings, plan: _Plan, measured: _Measured, images: Path, command: str
) -> Result:
    """The content of the JSON file."""
    baseline, *others = plan.arms
    prompts = settings.prompts_of(model)
    plain = measured.measurements["baseline"]
    rows = []
    for arm in others:
        error = arm.error or measured.failures.get(arm.id, "")
        if error:
            rows.append(failed_row(arm, error))
            continue
        flops = (measured.flops[arm.id], measured.flops["baseline"])
        rows.append(measured_row(arm, measured.measurements[arm.id], plain, settings.steps, flops, images))
    height, width = plain[0].size
    call = model.call | settings.call
    return Result(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        environment=environment() | load(),
        model=model.name,
        settings=Settings(
            prompts=prompts,
            seed=settings.seed,
            height=height,
            width=width,
            frames=plain[0].frames,
            steps=settings.steps,
            guidance=float(call.get("true_cfg_scale", call.get("guidance_scale", 1.0))),
            call=settings.call,
            image=None if settings.image is None else settings.image.name,
            processes=processes().num_processes,
        ),
        baseline=baseline_row(
            baseline, plain, measured.flops["baseline"], images, vae_unedited(model, prompts, plain[0].size)
        ),
        rows=rows,
        missing=missing_columns(),
        plain=plan.plain,
    )
