"""`hasten bench`: runs every arm on every prompt, interleaved, and writes what it measured as JSON and images.

All arms see the same prompts and seeds in one process; for each prompt the arms take turns in a rotating order, so
that the machine's drift hits all alike. The reference of every quality figure is the plain sampler's image of the
same prompt and seed in the same process. Several processes (`accelerate launch`, `torchrun`) share the prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate.utils import broadcast_object_list, gather_object

from hasten.bench import subject
from hasten.bench.arms import Arm, merged, method_arms, plain_arms
from hasten.bench.budget import Trials
from hasten.bench.edits import vae_unedited, with_image
from hasten.bench.environment import environment, processes
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
from hasten.bench.peers import chosen_peers, one_line, peer_arms
from hasten.bench.result import Result, Settings
from hasten.bench.sampling import Sample, count_flops, draw_sample
from hasten.bench.staged import is_staged, parse_combination, staged_arms
from hasten.bench.subject import Subject
from hasten.errors import ConfigError, HastenError, ModelError, unknown

__all__ = ["BenchSettings", "open_model", "run_bench"]

Progress = Callable[[int, int, str], None]
TRIAL_PROMPTS = 2  # on which thresholds and settings are matched to a number of computed steps


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        methods: caches as `parse_method` reads them, resolution methods and combinations as `parse_combination` does.
        computed_steps: numbers of computed steps.
        prompts: how many prompts (the model's first ones, or those of `prompt_list`).
        prompt_list: own prompts instead of the model's.
        seed: prompt `i` is drawn with seed `seed + i`.
        steps: steps of the baseline and of every cached method.
        call: further arguments of the pipeline's call, such as `true_cfg_scale`.
        peers: measure the other libraries too.
        only_peers: names of those to measure; all of them if empty.
        image: the user's own source image for an editing pipeline, in the place of the model's.
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

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise ConfigError(f"--prompts must be at least 1, got {self.prompts}")
        if not self.methods or not self.computed_steps:
            raise ConfigError("give at least one method and one number of computed steps")


def open_model(name: str, *, dtype: torch.dtype | None = None, device: str | None = None) -> Subject:
    """A reference model by name, or any diffusers pipeline by folder or hub id.

    Raises:
        UnknownNameError: if the name is neither a reference model, nor a folder, nor of the form `owner/model`.
        ModelError: if the pipeline cannot be loaded.
    """
    if name in subject.names():
        model = subject.load(name)
    elif Path(name).is_dir() or "/" in name:
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=dtype or torch.bfloat16)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the pipeline {name!r}: {error}") from error
        prompts = [
            "a red apple on a wooden table",
            "a lighthouse at dusk",
            "a cat reading a newspaper",
            "a bowl of ramen",
        ]
        model = Subject(name=name, pipe=pipe, prompts=prompts)
    else:
        raise unknown("model", name, subject.names())
    model.pipe.set_progress_bar_config(disable=True)
    if device is not None:
        model.pipe.to(device)
    return model


@dataclass
class _Measured:
    """What one process measured."""

    measurements: dict[str, list[Measurement]]
    flops: dict[str, int]
    failures: dict[str, str]


def _prompts(model: Subject, settings: BenchSettings) -> list[str]:
    available = list(settings.prompt_list) or model.prompts
    if settings.prompts > len(available):
        raise ConfigError(f"--prompts {settings.prompts} asks for more than the {len(available)} prompts there are")
    return available[: settings.prompts]


def _arms(model: Subject, settings: BenchSettings, prompts: list[str], say: Callable[[str], None]) -> list[Arm]:
    """The baseline, then all others; those with a threshold are matched to their number of computed steps here."""
    trials = Trials(model, prompts[:TRIAL_PROMPTS], settings.seed, settings.steps, settings.call, say)
    staged = [text for text in settings.methods if is_staged(text)]
    caches = [text for text in settings.methods if text not in staged]
    combinations = [parse_combination(text) for text in staged]  # a wrong name is told before anything is drawn
    methods = method_arms(caches, list(settings.computed_steps), settings.steps, trials)
    counts = list(dict.fromkeys(arm.computed_steps for arm in methods))
    (plain,) = plain_arms([settings.steps], ("euler",))
    arms = [replace(plain, id="baseline"), *plain_arms(counts), *methods, *staged_arms(combinations, trials)]
    if settings.peers:
        arms += peer_arms(counts, trials, chosen_peers(settings.only_peers))
    return merged(arms)


def _measure(
    model: Subject,
    settings: BenchSettings,
    arms: list[Arm],
    mine: list[tuple[int, str]],
    images: Path,
    progress: Progress,
) -> _Measured:
    """Warm every arm up, then draw this process's prompts (number, prompt) with all of them in turn."""
    measured = _Measured({arm.id: [] for arm in arms}, {}, {})
    total, done = len(arms) * (len(mine) + 1), 0

    def attempt(arm: Arm, label: str, action: Callable[[], Any]) -> Any:
        """A peer that raises loses its row, and so does a resolution method that refuses the model, and nothing more.

        Another error of our own ends the bench.
        """
        nonlocal done
        done += 1
        progress(done, total, f"{label}: {arm.id}")
        if arm.id in measured.failures:
            return None
        try:
            return action()
        except Exception as error:
            refused = arm.staged and isinstance(error, HastenError)
            if arm.library in ("plain", "hasten") and not refused:
                raise
            measured.failures[arm.id] = one_line(error)
            return None

    first = (_prompts(model, settings)[0], settings.seed, settings.call)
    for arm in arms:
        counted = attempt(arm, "warm-up", partial(count_flops, model, arm.attach, arm.steps, *first))
        if counted is not None:
            measured.flops[arm.id] = counted[0]
    for number, prompt in mine:
        turn, seed = number % len(arms), settings.seed + number
        samples: dict[str, Sample] = {}
        for arm in arms[turn:] + arms[:turn]:
            draw = partial(draw_sample, model, arm.attach, arm.steps, prompt, seed, settings.call)
            sample = attempt(arm, prompt, draw)
            if sample is not None:
                samples[arm.id] = sample
        for arm in arms:
            if arm.id in samples:
                sample, reference = samples[arm.id], samples["baseline"]
                save_image(sample, images / image_name(arm) / f"{number:02d}.png")
                flops = _flops(model, settings, arm, prompt, seed, measured.flops[arm.id], number)
                found = measure(model, sample, reference, prompt, number, seed, settings.steps, flops)
                measured.measurements[arm.id].append(found)
    return measured


def _flops(
    model: Subject, settings: BenchSettings, arm: Arm, prompt: str, seed: int, first: int, number: int
) -> int | None:
    """Counted operations where they depend on the image, in a call apart, since counting takes time."""
    if not arm.staged:
        return None
    return first if number == 0 else count_flops(model, arm.attach, arm.steps, prompt, seed, settings.call)[0]


def _gather(own: _Measured) -> _Measured:
    """What all processes measured together, in the order of the prompts; operations are the first process's."""
    parts: list[_Measured] = gather_object([own])
    return _Measured(
        {
            name: sorted((f for part in parts for f in part.measurements[name]), key=lambda f: f.prompt)
            for name in own.measurements
        },
        parts[0].flops,
        {name: error for part in parts for name, error in part.failures.items()},
    )


def run_bench(
    model: Subject, settings: BenchSettings, out: Path, progress: Progress | None = None, command: str = ""
) -> Result:
    """Measure, and write `out` (JSON) and a folder of images beside it.

    Under `accelerate launch` or `torchrun` the processes share the prompts and the main one writes the file (images
    are written by the process that drew them, so that all have to see the same folder); all of them return it.

    Args:
        model: from `open_model`.
        settings: what to measure.
        out: path of the JSON file; images go to `<stem>.images/`.
        progress: called with (done, total, label) as the work goes on.
        command: the command line that asked for it.
    """
    state = processes()
    tick = progress or (lambda done, total, label: None)
    model = with_image(model, settings.image)
    prompts = _prompts(model, settings)
    # Every process searches, so that none waits in a collective for longer than its time limit, and all use what the
    # main one found.
    found = [_arms(model, settings, prompts, lambda label: tick(0, 1, label))]
    arms: list[Arm] = broadcast_object_list(found)[0]
    running = [arm for arm in arms if not arm.error]
    images = out.parent / f"{out.stem}.images"
    mine = list(enumerate(prompts))[state.process_index :: state.num_processes]
    measured = _gather(_measure(model, settings, running, mine, images, tick))
    result = _result(model, settings, arms, measured, images, command)
    if state.is_main_process:
        result.write(out)
    return result


def _result(
    model: Subject, settings: BenchSettings, arms: list[Arm], measured: _Measured, images: Path, command: str
) -> Result:
    """The content of the JSON file."""
    baseline, *others = arms
    prompts = _prompts(model, settings)
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
    return Result(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        environment=environment(),
        model=model.name,
        settings=Settings(
            prompts=prompts,
            seed=settings.seed,
            height=height,
            width=width,
            frames=plain[0].frames,
            steps=settings.steps,
            guidance=float(settings.call.get("true_cfg_scale", settings.call.get("guidance_scale", 1.0))),
            call=settings.call,
            image=None if settings.image is None else settings.image.name,
            processes=processes().num_processes,
        ),
        baseline=baseline_row(
            baseline, plain, measured.flops["baseline"], images, vae_unedited(model, prompts, plain[0].size)
        ),
        rows=rows,
        missing=missing_columns(),
    )
