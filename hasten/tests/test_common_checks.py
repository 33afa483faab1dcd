"""Checks that every method has to pass, made from the declarations of its parameters.

Of each parameter: a wrong type and a value out of range are one clear error, and another legal value changes what a
small fixed run does (its decisions, its selections or its result). A parameter that has no effect is no parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import test_dvg
import test_specedit
import torch
from pipelines import draw, make_pipe
from test_specedit import small_sources  # noqa: F401 - a fixture for all tests of this file
from torch import Tensor

import hasten
from hasten import registry
from hasten.caching import CachingMethod
from hasten.caching.effects import With
from hasten.calibration import Calibration
from hasten.errors import ConfigError, HastenError, brief
from hasten.fitting.calibrate import fingerprint_of
from hasten.parameters import Parameter, Range, choices
from hasten.resolution import fit_stages
from hasten.resolution.methods.specedit import SpecEdit
from hasten.streaming import KVStream, StreamingMethod
from hasten.streaming.rotation import undo_rotation

METHODS = {info.name: info for info in hasten.methods()}
EVERY = [
    pytest.param(name, parameter, id=f"{name}-{parameter}")
    for name in METHODS
    for parameter in METHODS[name].parameters
]


# --- declarations


@dataclass(frozen=True)
class Allowed:
    """What a declaration allows, taken apart by this file's own reading of it."""

    kinds: frozenset[Any]
    limits: tuple[Range, ...]
    listed: bool  # whether texts have to be one of some names


def allowed(hint: Any) -> Allowed:
    """The kinds of values of a hint: `int`, `float`, `bool`, `str`, `None`, tuples, classes."""
    kinds, limits, listed = set[Any](), list[Range](), False

    def walk(part: Any) -> None:
        nonlocal listed
        origin, args = get_origin(part), get_args(part)
        if origin is Annotated:
            limits.extend(extra for extra in args[1:] if isinstance(extra, Range))
            walk(args[0])
        elif origin in (Union, UnionType):
            for arg in args:
                walk(arg)
        elif origin is Literal:
            kinds.update(type(arg) for arg in args)
            listed = True
        elif origin is tuple:
            kinds.add((tuple, args))
        else:
            kinds.add(part)

    walk(hint)
    return Allowed(frozenset(kinds), tuple(limits), listed or bool(choices(hint)))


SAMPLES: dict[Any, Any] = {int: 3, float: 0.25, bool: True, str: "no such name", NoneType: None, object: object()}


def wrong_types(parameter: Parameter) -> Iterator[Any]:
    """Values of other types than the declared ones."""
    found = allowed(parameter.hint)
    tuples = [kind[1] for kind in found.kinds if isinstance(kind, tuple)]
    for kind, value in SAMPLES.items():
        integer = kind is int and float in found.kinds
        if (kind not in found.kinds or (kind is str and found.listed)) and not integer:
            yield value
    if not tuples:
        yield (3,)
        yield [0.5, 0.5]
    for items in tuples:
        yield ()
        yield (object(),)
        yield ("0", "1")
        if items[-1] is not ...:
            yield (1,) * (len(items) + 1)
    if found.kinds & {int, float}:
        if str not in found.kinds:
            yield "3"
        yield float("nan")
        yield float("inf")
    if int in found.kinds and float not in found.kinds:
        yield 2.0


def out_of_range(parameter: Parameter) -> Iterator[Any]:
    """Numbers, or tuples of them, just outside of the declared limits."""
    found = allowed(parameter.hint)
    for limit in found.limits:
        small = 1 if int in found.kinds or any((tuple, (int, ...)) == kind for kind in found.kinds) else 1e-6
        outside = [limit.least - small] if limit.least is not None else []
        outside += [limit.most + small] if limit.most is not None else []
        outside += [bound for bound in (limit.above, limit.below) if bound is not None]
        for value in outside:
            if found.kinds & {int, float}:
                yield value
            for kind in found.kinds:
                if isinstance(kind, tuple):
                    yield _tuple_of(kind[1], value)


def _tuple_of(items: tuple[Any, ...], value: float) -> tuple[Any, ...]:
    count = 3 if items[-1] is ... else len(items)
    inner = [_tuple_of(get_args(items[0]), value) if get_origin(items[0]) is tuple else value] * count
    return tuple(inner)


@pytest.mark.parametrize(("name", "parameter"), EVERY)
def test_a_parameter_is_declared_in_one_line(name: str, parameter: str) -> None:
    declared = METHODS[name].parameters[parameter]
    assert 0 < len(declared.meaning) < 160
    assert "\n" not in declared.meaning
    assert declared.accept(declared.default, name) == declared.default
    assert f"    {parameter}: {declared.meaning}" in METHODS[name].config.__doc__
    assert f"| `{parameter}` | {declared.expected.replace(chr(39), chr(34))} |" in registry.table(name)


@pytest.mark.parametrize(("name", "parameter"), EVERY)
def test_a_wrong_value_is_one_clear_error(name: str, parameter: str) -> None:
    """Before the method is built, hence before any work, and whatever else a method needs."""
    config, declared = METHODS[name].config, METHODS[name].parameters[parameter]
    for value in [*wrong_types(declared), *out_of_range(declared)]:
        with pytest.raises(HastenError) as error:
            config(**{parameter: value})
        assert type(error.value) is ConfigError, value
        message = str(error.value)
        assert message.startswith(f"{config.__name__}: {parameter} must be {declared.expected}, got "), value
        assert "; leave it out for " in message or "; did you mean " in message
        assert "\n" not in message


@pytest.mark.parametrize(("name", "parameter"), EVERY)
def test_a_wrong_text_is_one_clear_error(name: str, parameter: str) -> None:
    declared = METHODS[name].parameters[parameter]
    if str in allowed(declared.hint).kinds and not allowed(declared.hint).listed:
        pytest.skip("any text is the path of a file")
    with pytest.raises(ConfigError, match=rf"^{name}: {parameter} must be .*, got 'no such value'"):
        registry.parse(f"{name}:{parameter}=no such value")


# --- effects of caching methods

STEPS = 16
PROMPTS = ["red apple", "green leaf"]
THRESHOLDS = {"fbcache": 0.4, "teacache": 0.3, "magcache": 0.3, "easycache": 0.4, "speca": 0.05}


def generators(seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(2)]


def sample(pipe: Any, steps: int = STEPS, seed: int = 0) -> Tensor:
    return draw(pipe, steps, prompt=PROMPTS, generator=generators(seed), guidance_scale=1.0)


@cache
def pipe() -> Any:
    return make_pipe()


@cache
def trace(seed: int = 0, site: str = "hidden", guidance: float = 1.0) -> Any:
    call = {"prompt": PROMPTS, "num_inference_steps": STEPS, "output_type": "latent", "height": 32, "width": 32}
    call |= {"max_sequence_length": 8, "generator": generators(seed), "guidance_scale": guidance}
    return hasten.record(pipe(), [call], site=site)


@cache
def calibration(name: str, seed: int = 0, guidance: float = 1.0, **options: Any) -> Calibration:
    site = "module" if options.get("site") == "module" else "hidden"
    return hasten.fit(trace(seed, site, guidance), name, **options)


@cache
def other_ratios() -> Calibration:
    usual = calibration("magcache")
    return replace(usual, tensors={"ratios": 1.5 * usual.tensors["ratios"]})


@cache
def searched(lists: tuple[tuple[int, ...], ...]) -> Calibration:
    with hasten.accelerate(pipe(), "reuse", interval=1) as run:
        sample(pipe())
        fingerprint = fingerprint_of(pipe(), run, "hidden")
    return Calibration("steps", {f"steps/{len(steps)}": torch.tensor(steps) for steps in lists}, fingerprint)


def cached_run(method: CachingMethod) -> list[Any]:
    """What a run of two images decides and returns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hasten.accelerate(pipe(), method) as run:
            latents = sample(pipe())
    decisions = [(record.computed, record.cache_bytes) for record in run.records]
    return [decisions, latents.double().numpy().tobytes(), [str(w.message) for w in caught]]


# --- effects of resolution and streaming methods


def region_run(method: Any) -> list[Any]:
    pipe = make_pipe()
    with hasten.accelerate(pipe, method):
        latents = draw(pipe, method.num_inference_steps or 9, height=64, width=64)
    return [latents.double().numpy().tobytes()]


def video_run(method: Any) -> list[Any]:
    pipe = test_dvg.wan()
    with hasten.accelerate(pipe, method):
        return [test_dvg.film(pipe).double().numpy().tobytes()]


def edit_run(method: SpecEdit) -> list[Any]:
    host = "qwen edit plus" if method.source else "kontext"
    pipe = test_specedit.make(host)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with method.attach(pipe) as engine:
            latents = test_specedit.draw(pipe, host, method.num_inference_steps)
    return [latents.double().numpy().tobytes(), [record.fine for record in engine.records], len(caught)]


def streamed_run(method: StreamingMethod) -> list[Any]:
    """What two layers hold, choose and return in a rollout of eight chunks of two steps."""
    rotations = torch.polar(torch.ones(99, 8), 0.7 * torch.arange(99.0)[:, None].expand(99, 8))
    stream = KVStream(method, 2, unrotate=lambda keys, numbers: undo_rotation(keys, rotations[numbers]))
    make, seen = torch.Generator().manual_seed(0), []

    def frames() -> Tensor:
        return torch.randn(1, 2, 8, 4, 16, generator=make)

    with torch.no_grad():
        for _ in range(8):
            keys = frames()
            for _ in range(2):
                for layer in range(2):
                    out = stream.attend(layer, frames(), keys + 0.3 * frames(), frames())
                    seen.append(out.double().numpy().tobytes())
            for layer in range(2):
                stream[layer].append(keys + 0.1 * layer, frames())
                seen.append(list(stream[layer].cache.frames))
    return seen


# --- another value for each parameter

RUNS: dict[str, Callable[[Any], list[Any]]] = {
    **{name: cached_run for name, info in METHODS.items() if info.kind == "caching"},
    **{name: region_run for name, info in METHODS.items() if info.kind == "resolution"},
    **{name: streamed_run for name, info in METHODS.items() if info.kind == "streaming"},
    "dvg": video_run,
    "specedit": edit_run,
}


def lists(*counts: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(0, STEPS, STEPS // count))[:count] for count in counts)


# What all runs of a method are built with.
BASE: dict[str, dict[str, Any]] = {
    **{name: {"threshold": threshold} for name, threshold in THRESHOLDS.items()},
    "fresco": {"stages": (3, 3, 3), "shares": 0.3},
    "bottleneck": {"stages": (4, 5)},
    "ralu": {"stages": fit_stages((3, 3, 3), (0.7, 0.55, 0.0)), "share": 0.25},
    "spectral": {"stages": (4, 5)},
    "specedit": {**test_specedit.LOCAL, "discrepancy": "latent"},
    "focused-forcing": {"budget": 3},
    "topk-attention": {"k": 3},
    "dummy-forcing": {"history": 4},
    "forcing-kv": {"threshold": 0.5, "context": 1, "patches": 4},
}
# What a parameter needs besides to have an effect, and the value that it is changed to where one has to be said.
CONTEXT: dict[tuple[str, str], dict[str, Any]] = {
    ("hicache", "alpha"): {"scale": "adaptive", "alpha": 0.02},
    ("taylorseer", "ladder"): {"order": 2},
    ("dmd", "ridge"): {"warmup": 1, "interval": 3},
    ("magcache", "warmup"): {"retention": 0.0},
    ("teacache", "per_sample"): {"threshold": 0.4},
    ("freqca", "low_order"): {"cutoff": 0.5},
    ("hyca", "assigned"): {"calibration": lambda: calibration("hyca", clusters=2)},
    ("hyca", "criterion"): {"criterion": "rollout", "calibration": lambda: calibration("hyca", clusters=4)},
    ("hyca", "strict"): {"calibration": lambda: calibration("hyca", site="module")},
    ("svdcache", "strict"): {"calibration": lambda: calibration("svdcache", site="module")},
    ("svdcache", "order"): {"mode": "taylor"},
    ("l2p", "strict"): {"calibration": lambda: calibration("l2p", guidance=3.5)},
    ("l2p", "fit_by"): {"history": "full"},
    ("l2p", "ridge"): {"ridge": 0.1},
    ("leapcache", "strict"): {"calibration": lambda: calibration("leapcache", guidance=3.5)},
    ("fresco", "smooth"): {"jump": "r1"},
    ("fresco", "noise"): {"jump": "r1"},
    ("fresco", "threshold"): {"jump": "r1", "shares": None},
    ("dvg", "compress"): {"budget": 0.6},
    ("fresco", "preset"): {"stages": None, "shares": None},
    ("ralu", "preset"): {"stages": None, "share": None},
    ("spectral", "delta"): {"stages": None, "delta": 2.0},
    ("spectral", "power"): {"stages": None, "delta": 2.0},
    ("specedit", "floor"): {"selector": "threshold"},
    ("specedit", "threshold"): {"selector": "threshold"},
    ("specedit", "share"): {"selector": "top"},
    ("specedit", "cover_init"): {"coverage": 2},
    ("specedit", "keep_cover"): {"coverage": 2, "restore": False, "share": 0.03},
    ("specedit", "bounds"): {"selector": "two-means"},
    ("focused-forcing", "window"): {"budget": 2},
}
# Other values, where they do not follow from the default.
VALUES: dict[tuple[str, str], Any] = {
    ("dmd", "ridge"): [0.5],
    ("spectrum", "window"): [2],
    ("freqca", "domain"): ["plain"],  # normed is the default on this model
    ("hicache", "guided_sigma"): [0.3],
    ("hyca", "solvers"): [("hold",)],
    ("hyca", "assigned"): [("hold", "newton")],
    ("hyca", "calibration"): lambda: [calibration("hyca", clusters=8)],
    ("l2p", "window"): [1],
    ("leapcache", "warmup"): [5],
    ("bottleneck", "stages"): [(3, 6)],
    ("dvg", "budget"): [0.6],
    ("dvg", "rates"): [(0.25, 0.5, 0.8)],
    ("dvg", "shifts"): [None, (7.0, 7.0, 9.0, 9.0)],
    ("dvg", "spatial"): [0.6, 0.9],
    ("dvg", "temporal"): [4],
    ("dvg", "stages"): [((0.5, 0.5), (0.5, 1.0), (1.0, 1.0), (1.0, 1.0))],
    ("fresco", "stages"): [(2, 4, 3)],
    ("fresco", "window"): [2],
    ("fresco", "threshold"): [1e6],
    ("fresco", "coarse_weight"): [4.0],
    ("fresco", "smooth"): [0.5],
    ("ralu", "stages"): [fit_stages((4, 2, 3), (0.7, 0.55, 0.0))],
    ("spectral", "stages"): [(3, 6)],
    ("spectral", "power"): [(100.0, 1.9155)],
    ("specedit", "bounds"): [(0.3, 0.9)],
    ("specedit", "global_change"): [1e-6],
    ("specedit", "coverage"): [2],
    ("focused-forcing", "refresh_every"): [1],
    ("focused-forcing", "diversity_tokens"): [2],
    ("focused-forcing", "window"): [3],
    ("focused-forcing", "forget_after"): [1],
    ("topk-attention", "refresh_every"): [1],
    ("dummy-forcing", "samples"): [3],
    ("forcing-kv", "samples"): [3],
    ("forcing-kv", "patches"): [2],
    ("fresco", "shares"): [0.5],
    ("ralu", "share"): [0.5],
    ("leapcache", "computed_steps"): [7, 9],
}
COMMON: dict[str, Sequence[Any]] = {"interval": [3], "computed_steps": [6, 9], "steps": [(0, 2, 5, 9)]}
# No effect can be seen in a small run of one call.
EXCEPTIONS = {
    ("fbcache", "front"): "the small pipeline has two blocks; test_gates counts those of a deeper one",
    ("hicache", "guided_sigma"): "these runs have one pass; test_engine asks for it with two",
    ("l2p", "published"): "the published lists are for 50 steps; test_calibration asks for each of them",
    **dict.fromkeys(
        [(name, "domain") for name in ("hyca", "svdcache", "l2p", "leapcache")],
        "the calibration decides; test_calibration sees that another one is refused",
    ),
    ("leap", "guidance"): "of a fit for a range alone; test_leap sees the scale decide",
    ("leap", "calibration"): "a fit takes a search; tests of LEAP compare schedulers of different fits",
}


def alternatives(name: str, parameter: Parameter, now: Any) -> Sequence[Any]:
    """Other legal values than the one `now`."""
    key = (name, parameter.name)
    if key in VALUES:
        return VALUES[key]() if callable(VALUES[key]) else VALUES[key]
    if parameter.name in COMMON:
        values = COMMON[parameter.name]
    elif parameter.name == "calibration":
        values = [other_ratios() if name == "magcache" else calibration(name, seed=5)]
    elif parameter.name == "searched":
        values = [searched(lists(4, 5))]
    elif allowed(parameter.hint).kinds == {bool}:
        values = [not now]
    elif choices(parameter.hint):
        # "searched" needs a file, "deep" a UNet
        values = [choice for choice in choices(parameter.hint) if choice not in (now, "searched", "deep")]
    elif isinstance(now, int):
        values = [now + 1, now - 1]
    elif isinstance(now, float):
        values = [0.5 * now, 1.5 * now, 0.01 * now]
    else:
        values = []
    return [value for value in values if legal(parameter, value)]


def contrary(name: str, condition: With) -> dict[str, Any]:
    """Parameters with which a condition of an effect does not hold."""
    declared = METHODS[name].parameters[condition.parameter]
    others = [declared.default, *alternatives(name, declared, declared.default)]
    value = next(other for other in others if other not in condition.values)
    return CONTEXT.get((name, condition.parameter), {}) | {condition.parameter: value}


def legal(parameter: Parameter, value: Any) -> bool:
    try:
        parameter.accept(value, "")
    except ConfigError:
        return False
    return True


def observed(name: str, params: dict[str, Any], known: dict[str, list[Any]] = {}) -> list[Any]:  # noqa: B006 - a memory
    """What a run of the method is seen to do, or why it is refused."""
    info = METHODS[name]
    if info.needs_calibration:
        site = {"site": params["site"]} if "site" in params else {}
        params = {"calibration": calibration(name, **site)} | {k: v() if callable(v) else v for k, v in params.items()}
    key = f"{name} {sorted((k, id(v) if isinstance(v, Calibration) else v) for k, v in params.items())}"
    if key not in known:
        try:
            known[key] = RUNS[name](registry.build(name, **params))
        except HastenError as error:
            known[key] = [type(error).__name__, str(error)]
    return known[key]


EFFECTS = [
    pytest.param(name, parameter, condition, id=f"{name}-{parameter}-{condition.parameter}")
    for name, info in METHODS.items()
    if info.kind == "caching"
    for parameter, conditions in info.config.effects.items()
    for condition in conditions
]


@pytest.mark.parametrize(("name", "parameter", "condition"), EFFECTS)
def test_a_parameter_that_does_nothing_beside_others_is_refused(
    name: str, parameter: str, condition: With, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is declared to do nothing is refused by both names with the remedy, goes when the method is changed so, and
    does nothing indeed."""
    config, declared = METHODS[name].config, METHODS[name].parameters
    assert all(legal(declared[condition.parameter], value) for value in condition.values)
    lacking = contrary(name, condition)
    fitted = {"calibration": calibration(name)} if METHODS[name].needs_calibration else {}
    usual, context = (
        fitted | {key: value() if callable(value) else value for key, value in given.items()}
        for given in (lacking, CONTEXT.get((name, parameter), {}))
    )
    default = declared[parameter].default
    value = context.get(parameter, next(iter(alternatives(name, declared[parameter], default)), None))
    assert value != default
    with pytest.raises(ConfigError) as error:
        config(**usual | {parameter: value})
    message = str(error.value)
    assert f"{parameter}={brief(value)} does nothing with {condition.parameter}=" in message
    assert "; leave it out, or use " in message
    assert all(f"{condition.parameter}={able!r}" in message for able in condition.values)
    if condition.parameter in ("published", "mode") and name != "svdcache":
        return  # the published lists are for 50 steps; FreqCa's published rule is its defaults, and nothing else
    able = config(**context | {parameter: value})
    assert getattr(able.changed(**{key: usual[key] for key in lacking}), parameter) == default
    without = cached_run(config(**usual))
    monkeypatch.setattr(config, "effects", {})
    assert cached_run(config(**usual | {parameter: value})) == without


def refused(run: list[Any]) -> bool:
    return isinstance(run[0], str) and run[0].endswith("Error")


@pytest.mark.parametrize(("name", "parameter"), EVERY)
def test_a_parameter_has_an_effect(name: str, parameter: str) -> None:
    if (name, parameter) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[name, parameter])
    params = BASE.get(name, {}) | CONTEXT.get((name, parameter), {})
    declared = METHODS[name].parameters[parameter]
    values = alternatives(name, declared, params.get(parameter, declared.default))
    if not values:
        assert allowed(declared.hint).kinds <= {NoneType, str}, "say another value"
        assert len(choices(declared.hint)) <= 1, "say another value"
        pytest.skip("there is no other legal value")
    usual = observed(name, params)
    runs = {repr(value): observed(name, params | {parameter: value}) for value in values}
    assert parameter == "strict" or not refused(usual), usual
    changed = {value: run != usual and not refused(run) for value, run in runs.items()}
    assert all(changed.values()) if choices(declared.hint) else any(changed.values()), changed
