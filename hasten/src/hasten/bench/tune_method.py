"""`hasten tune --method`: choose a caching method's parameters for a model by whole runs, and keep every trial.

One JSON file for a method: what was tried at each number of computed steps, and the best setting as a method
expression. A run that was cut short goes on from it; another request begins it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hasten import registry
from hasten.bench.environment import environment
from hasten.bench.requests import caching_method, check_counts, file_facts
from hasten.bench.subject import Subject
from hasten.bench.tune import tuning_calls
from hasten.errors import ConfigError
from hasten.fitting.calibrate import calibrate
from hasten.fitting.closed_loop import tune_method
from hasten.io import check_target, digest_of, read_json, write_atomically
from hasten.parameters import parameters
from hasten.pipeline.replay import Replay
from hasten.pipeline.view import denoisers
from hasten.solvers.content import LEAP
from hasten.weights import weights_digest

__all__ = ["MethodTuning", "run_tune_method", "values_of"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MethodTuning:
    """What to tune, on what.

    Args:
        method: an expression of one caching method, with the parameters that stay.
        computed_steps: numbers of computed steps; each is tuned for itself.
        values: the values to try, by parameter; those that the method declares by default.
        prompts: how many prompts to tune on: the last of the list.
        prompt_list: own prompts instead of the model's.
        seed: prompt `i` is drawn with seed `seed + i`.
        steps: of the plain sampler.
        call: further arguments of the pipeline's call.
        batch: prompts that are drawn at a time.
        trials: settings to look at for each number.
    """

    method: str
    computed_steps: tuple[int, ...]
    values: Mapping[str, Sequence[Any]] | None = None
    prompts: int = 8
    prompt_list: tuple[str, ...] = ()
    seed: int = 1000
    steps: int = 50
    call: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    trials: int = 60

    def __post_init__(self) -> None:
        check_counts(self.computed_steps, self.steps)
        if len(registry.split(self.method)) != 1:
            raise ConfigError(f"--method tunes one caching method, such as foca:schedule=even; got {self.method!r}")
        if self.name == LEAP:
            raise ConfigError("--method tunes a caching method; LEAP is fitted by hasten tune without --method")
        if "computed_steps" not in registry.info(self.name).parameters:
            raise ConfigError(
                f"--method tunes a method for numbers of computed steps, and how many {self.name} computes its "
                "threshold says: take one with a schedule, such as foca"
            )

    @property
    def name(self) -> str:
        """Name of the method."""
        return registry.split(self.method)[0][0]


def values_of(method: str, texts: Sequence[str]) -> dict[str, list[Any]] | None:
    """The values to try out of texts such as `sigma=0.4,0.5`; None for no text.

    Raises:
        UnknownNameError, ConfigError: for a parameter or a value that the method does not have.
    """
    if not texts:
        return None
    ((name, _),) = registry.split(method)
    declared, values = registry.info(name).parameters, {}
    for text in texts:
        parameter, _, listed = text.partition("=")
        if parameter not in declared or not listed:
            raise ConfigError(
                f"--try takes a parameter of {name} ({', '.join(declared)}), = and values with commas between; got "
                f"{text!r}"
            )
        if parameter in values:
            raise ConfigError(f"--try has {parameter} twice: give all its values at once, {parameter}=A,B,C")
        values[parameter] = [declared[parameter].read(one, name) for one in listed.split(",")]
    return values


def run_tune_method(model: Subject, tuning: MethodTuning, folder: Path, progress: Progress) -> dict[str, Any]:
    """Tune, write `tuned-<method>.json` after every trial, and return its content.

    Args:
        model: from `open_model`.
        tuning: what to do.
        folder: where the file goes, and the calibration of a method that needs one and was given none.
        progress: called with (what is being done, done, of how many).

    Raises:
        ConfigError: if there are too few prompts, or the method cannot work on the model.
    """
    known = list(tuning.prompt_list) or model.prompts
    if tuning.prompts > len(known):
        raise ConfigError(f"--prompts {tuning.prompts} asks for more than the {len(known)} prompts there are")
    model.check_call(tuning.call)
    file = check_target(folder / f"tuned-{tuning.name}.json")
    prompts = known[-tuning.prompts :]
    calls = tuning_calls(model, prompts, tuning.seed, tuning.steps, tuning.call, tuning.batch)
    calls = [{**call, "output_type": "pt"} for call in calls]
    facts = {
        "model": model.name,
        "weights": {name: weights_digest(denoiser) for name, denoiser in denoisers(model.pipe).items()},
        "prompts": prompts,
        "seed": tuning.seed,
        "steps": tuning.steps,
        "call": tuning.call,
    }
    text = _calibrated(model, tuning, calls, folder, facts, progress)
    values = None if tuning.values is None else {name: [*map(str, tried)] for name, tried in tuning.values.items()}
    given = registry.split(text)[0][1].values()
    identity = facts | {
        "method": text,
        "values": values,
        "files": file_facts([*given, *(one for tried in (values or {}).values() for one in tried)]),
        "environment": environment(),
    }
    content: dict[str, Any] = {"identity": identity, "environment": identity["environment"], "best": {}, "trials": {}}
    if file.exists():
        earlier = read_json(file, remedy="Take it away to begin again.")
        if earlier.get("identity") == identity:
            content |= {"best": earlier["best"], "trials": earlier["trials"]}
    methods = {count: caching_method(f"{text}:computed_steps={count}") for count in tuning.computed_steps}
    for count, method in methods.items():
        label = f"{tuning.name}, {count} steps"

        def keep(figures: dict[str, float | None], count: int = count) -> None:
            content["trials"][str(count)] = figures
            write_atomically(file, json.dumps(content, indent=1) + "\n")

        def tick(done: int, most: int, best: float, label: str = label) -> None:
            progress(f"{label}: {best:.1f} dB", done, most)

        progress(label, 0, tuning.trials)
        tuned = tune_method(
            model.pipe,
            method,
            calls,
            values=tuning.values,
            trials=tuning.trials,
            known=content["trials"].get(str(count)),
            keep=keep,
            progress=tick,
        )
        content["best"][str(count)] = {
            "method": registry.format(tuned.method),
            "decibels": round(tuned.decibels, 3),
            "at_the_start": round(tuned.start, 3),
            "settled": tuned.settled,
        }
        keep(tuned.trials)
    return content


def _calibrated(
    model: Subject,
    tuning: MethodTuning,
    calls: Sequence[dict[str, Any]],
    folder: Path,
    facts: dict[str, Any],
    progress: Progress,
) -> str:
    """The expression of the method, with a calibration where it needs one: one of these facts, whose file bears their
    digest, so that none of another model, guidance or number of steps is taken for it."""
    ((name, given),) = registry.split(tuning.method)
    info = registry.info(name)
    if not info.needs_calibration or "calibration" in given:
        return tuning.method
    file = folder / f"{name}-{digest_of([facts, given.get('site'), environment()['hasten']])[:8]}.safetensors"
    if not file.exists():
        pipe = model.pipe
        site: dict[str, Any] = (
            {"site": given["site"]} if "site" in given and "site" in parameters(info.config.fit) else {}
        )
        with Replay(calls) as replay:
            made = calibrate(pipe, name, replay.runs(pipe), progress=partial(progress, f"recording for {name}"), **site)
        made.save(file)
    return f"{tuning.method}:calibration={file}"
