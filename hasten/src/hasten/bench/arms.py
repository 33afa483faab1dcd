"""What is compared: one `Arm` for each way of sampling, each switched on for one call and off again.

Arms can be pickled, so that several processes can work with the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from diffusers import UniPCMultistepScheduler

from hasten import registry
from hasten.acceleration import accelerate
from hasten.bench.budget import Trials, match_computed_steps
from hasten.bench.sampling import Attach, plain
from hasten.caching import CachingMethod, ScheduledMethod, computed_steps
from hasten.calibration import Calibration
from hasten.errors import ConfigError, unknown
from hasten.pipeline.handle import Acceleration
from hasten.solvers.scheduler import LEAP, LeapScheduler

__all__ = [
    "Accelerated",
    "Arm",
    "Attach",
    "build_method",
    "merged",
    "method_arms",
    "parse_method",
    "parse_options",
    "plain_arms",
    "reported",
]

WORDS = {"true": True, "false": False, "none": None}
NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Arm:
    """One way of sampling.

    Attributes:
        id: unique in a result, such as `"hicache-9"`.
        method: name, such as `"hicache"` or `"euler"`.
        library: `"hasten"`, `"plain"` or a peer's name.
        params: parameters, as they are reported.
        steps: sampler steps.
        computed_steps: steps whose blocks run; where a threshold decides, the number that it was matched to.
        attach: switches the arm on for a pipeline, for the length of a `with`.
        note: what a reader has to know about the figures.
        error: why it cannot run; it then has a row without figures.
        staged: whether steps run on fewer tokens, so that only counted operations tell what it saves.
        groups: numbers of computed steps that a table shows it under; its own if empty.
    """

    id: str
    method: str
    library: str
    params: dict[str, Any]
    steps: int
    computed_steps: int
    attach: Attach = plain
    note: str = ""
    error: str = ""
    staged: bool = False
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Accelerated:
    """Switches a cache of hasten on, a resolution method, or both."""

    method: CachingMethod | None
    staged: Any = None

    def __call__(self, pipe: Any) -> Acceleration:
        return accelerate(pipe, *(method for method in (self.staged, self.method) if method is not None))


@dataclass(frozen=True)
class Solved:
    """Puts a LEAP scheduler in the place of the pipeline's own."""

    calibration: Calibration

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        original = pipe.scheduler
        pipe.scheduler = LeapScheduler.of(self.calibration, pipe)
        try:
            yield
        finally:
            pipe.scheduler = original


def _value(text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    if "/" in text and all(NUMBER.fullmatch(part) for part in text.split("/")):
        return tuple(_value(part) for part in text.split("/"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """Read `name` or `name:param=value:param=value` as a name and values.

    A value is a whole or a decimal number, `true`, `false` or `none`, numbers with slashes (`steps=0/1/2/4/9`), or else
    a text, such as a path.
    """
    name, *assignments = text.strip().split(":")
    params: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(
                f"{assignment!r} in {text!r} is not param=value; write for instance hicache:order=1:sigma=0.7"
            )
        params[key.strip()] = _value(value.strip())
    return name, params


def parse_method(text: str) -> tuple[str, CachingMethod]:
    """Read a method such as `hicache:order=1:site=module` (see `parse_options`).

    Returns:
        the text as a label, and the method.

    Raises:
        UnknownNameError: for a method or parameter that does not exist.
        ConfigError: for a method that is no cache.
    """
    name, params = parse_options(text)
    method = build_method(name, params)
    if not isinstance(method, CachingMethod):
        raise ConfigError(f"{name} is no caching method, and one is needed here, such as foca")
    return text.strip(), method


def build_method(name: str, params: dict[str, Any]) -> Any:
    """A method with values that were read from text; `18` stays a text where a parameter takes only texts.

    Raises:
        UnknownNameError: for a method or a parameter that does not exist.
    """
    hints = get_type_hints(registry.info(name).config)
    values = {key: str(value) if _only_text(hints.get(key)) else value for key, value in params.items()}
    return registry.build(name, **values)


def _only_text(hint: Any) -> bool:
    """Whether a type takes texts alone, such as `str` and `Literal["18", "9"]`."""
    return hint is str or (get_origin(hint) is Literal and all(isinstance(value, str) for value in get_args(hint)))


def reported(method: Any) -> dict[str, Any]:
    """Parameters as plain data; of a calibration, only that there is one; without those left at None."""
    params = {item.name: (getattr(method, item.name), item.default) for item in fields(method)}
    return {name: _plain(value) for name, (value, usual) in params.items() if value is not None or usual}


def _plain(value: Any) -> Any:
    """A parameter as plain data."""
    if isinstance(value, Calibration):
        return "given"
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def method_arms(texts: list[str], counts: list[int], total: int, trials: Trials | None = None) -> list[Arm]:
    """Every method at every number of computed steps.

    A method with a schedule computes exactly so many; one with listed steps (`steps=`) keeps them; one with a threshold
    is matched by `trials`. `leap:calibration=FILE` samples with a LEAP scheduler, `leap` alone with the one that comes
    with a reference model.

    Raises:
        ConfigError: if a method has a threshold and there are no trials to match it with.
        ScheduleError: if a schedule cannot have exactly so many computed steps.
    """
    solvers = [text.strip() for text in texts if parse_options(text)[0] == LEAP]
    methods = [parse_method(text) for text in texts if text.strip() not in solvers]
    arms = []
    for wanted in counts:
        arms += [_solver_arm(label, wanted, trials) for label in solvers]
        for label, method in methods:
            if not isinstance(method, ScheduledMethod):
                arms.append(_adaptive_arm(label, method, wanted, total, trials))
                continue
            fitted = method if method.steps is not None else method.with_computed_steps(wanted, total)
            count = len(computed_steps(fitted.plan(), total))
            arms.append(Arm(f"{label}-{count}", label, "hasten", reported(fitted), total, count, Accelerated(fitted)))
    return arms


def _solver_arm(label: str, wanted: int, trials: Trials | None) -> Arm:
    """LEAP with as many evaluations; an arm with an error where it was not fitted for them."""
    _, params = parse_options(label)
    shipped = trials.model.fitted.get(LEAP) if trials is not None else None
    calibration = Calibration.of(LEAP, params.get("calibration", shipped))
    arm = Arm(f"{label}-{wanted}", label, "hasten", {"calibration": "given"}, wanted, wanted, Solved(calibration))
    fitted = sorted(int(count) for count in calibration.report)
    if wanted in fitted:
        return arm
    return replace(arm, error=f"fitted for {', '.join(map(str, fitted))} evaluations; run hasten tune")


def _adaptive_arm(label: str, method: CachingMethod, wanted: int, total: int, trials: Trials | None) -> Arm:
    if trials is None:
        raise ConfigError(f"{label} decides by a threshold: give trials to find the one for {wanted} computed steps")
    trials.progress(f"matching {label} to {wanted} computed steps")
    arm = Arm(f"{label}-{wanted}", label, "hasten", reported(method), total, wanted)
    try:
        found = match_computed_steps(lambda value: trials.run(Accelerated(_with(method, value))), wanted)
    except ConfigError as error:
        return replace(arm, error=f"{error} (interval= and warmup= of the method)")
    fitted = _with(method, found.threshold)
    return replace(arm, params=reported(fitted), attach=Accelerated(fitted))


def _with(method: CachingMethod, threshold: float) -> CachingMethod:
    changes: dict[str, Any] = {"threshold": threshold}  # a field that only methods with a gate have
    return replace(method, **changes)


@contextmanager
def _unipc(pipe: Any) -> Iterator[None]:
    """UniPC of order 2 in place of the pipeline's scheduler, with the same noise levels where the model is a flow."""
    original = pipe.scheduler
    flow = original.config.get("prediction_type") is None  # flow-matching schedulers have no prediction type
    extra = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": original.config.get("shift", 1.0),
    }
    pipe.scheduler = UniPCMultistepScheduler.from_config(original.config, solver_order=2, **(extra if flow else {}))
    try:
        yield
    finally:
        pipe.scheduler = original


_PLAIN: dict[str, Attach] = {"euler": plain, "unipc": _unipc}


def plain_arms(counts: list[int], samplers: tuple[str, ...] = ("euler", "unipc")) -> list[Arm]:
    """The plain sampler with as many steps as the methods compute: the comparison that every method has to win.

    `"euler"` is the pipeline's own scheduler (Euler for flow-matching models), `"unipc"` a second-order multistep
    solver.
    """
    for name in samplers:
        if name not in _PLAIN:
            raise unknown("sampler", name, _PLAIN)
    return [Arm(f"{name}-{n}", name, "plain", {}, n, n, _PLAIN[name]) for n in counts for name in samplers]


def merged(arms: list[Arm]) -> list[Arm]:
    """The arms without repetitions: two requests may come to the same schedule, or to the same plain sampler."""
    kept: dict[str, Arm] = {}
    for arm in arms:
        first = kept.setdefault(arm.id, arm)
        if first is not arm:
            groups = dict.fromkeys([*(first.groups or (first.computed_steps,)), *(arm.groups or (arm.computed_steps,))])
            notes = dict.fromkeys(note for note in (first.note, arm.note) if note)
            kept[arm.id] = replace(first, groups=tuple(groups), note="; ".join(notes))
    return list(kept.values())
