"""`calibrate`: run a model uncached, watch it, and fit a method to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from hasten import models, registry
from hasten.acceleration import accelerate
from hasten.caching.engine import CachingEngine
from hasten.caching.method import Feature
from hasten.caching.methods import Reuse
from hasten.calibration import Calibration, Fingerprint, Trace, model_digest
from hasten.errors import AdapterError, CalibrationError, ConfigError, unknown
from hasten.parameters import Range, accepted, parameters
from hasten.pipeline.handle import Acceleration
from hasten.pipeline.view import denoisers
from hasten.weights import weights_digest

__all__ = ["Tape", "calibrate", "check_length", "engine_of", "fingerprint_of", "fit", "merge", "record"]

Call = Mapping[str, Any] | Callable[[], Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class _Watch(Reuse):
    """Computes every step, in the way in which a gate would look at it."""

    interval: int = 1
    warmup: int = 1
    look: Literal["nothing", "input", "modulated"] = "modulated"

    def feature(self) -> Feature:
        return Feature(gate_input=self.look)


class Tape:
    """Collects what the engine's listener is shown, a run at a time.

    Args:
        tokens: how many tokens of a feature are kept, spread evenly; features are averages over tokens in every fit.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._run: dict[tuple[str, str], list[Tensor]] = {}
        self._forward: tuple[str, int] | None = None  # whose samples are still on the device
        self._samples: list[tuple[tuple[str, str], Tensor]] = []
        self.runs: list[dict[tuple[str, str], Tensor]] = []

    def __call__(self, pass_name: str, step: int, slot: str, tensor: Tensor) -> None:
        if (pass_name, step) != self._forward:
            self._gather()
            self._forward = (pass_name, step)
        self._samples.append(((pass_name, slot), self._sample(slot, tensor)))

    def _sample(self, slot: str, tensor: Tensor) -> Tensor:
        """The tokens that are kept, in memory of their own, since the feature's is written over."""
        if slot.startswith("output"):
            flat = tensor.detach().flatten()
            return flat[:: max(1, flat.numel() // (64 * self._tokens))].clone()
        tokens = tensor.detach().flatten(0, -2)
        return tokens[:: -(-len(tokens) // self._tokens)].clone()

    def _gather(self) -> None:
        """Bring the samples of one forward to the host: one copy, however many there are, of each dtype."""
        for dtype in dict.fromkeys(sample.dtype for _, sample in self._samples):
            alike = [(key, sample) for key, sample in self._samples if sample.dtype == dtype]
            gathered = torch.cat([sample.flatten() for _, sample in alike]).cpu()
            parts = gathered.split([sample.numel() for _, sample in alike])
            for (key, sample), part in zip(alike, parts, strict=True):
                self._run.setdefault(key, []).append(part.view(sample.shape))
        self._samples.clear()

    def end_run(self) -> None:
        """A call of the pipeline is over.

        Raises:
            CalibrationError: if the model produced a number that is not finite.
        """
        self._gather()
        self._forward = None
        run = {key: torch.stack(steps) for key, steps in self._run.items()}
        _refuse_non_finite(run, len(self.runs))
        self.runs.append(run)
        self._run = {}

    def features(self) -> dict[str, dict[str, Tensor]]:
        """All runs as `[S, T, ...]` by pass and slot."""
        features: dict[str, dict[str, Tensor]] = {}
        for (pass_name, slot), first in self.runs[0].items():
            shapes = {run[pass_name, slot].shape if (pass_name, slot) in run else None for run in self.runs}
            if len(shapes) > 1:
                raise CalibrationError(
                    f"the calls differ in steps, passes or image size (features of {slot!r}: "
                    f"{', '.join(str(None if s is None else tuple(s)) for s in shapes)}); make them alike"
                )
            features.setdefault(pass_name, {})[slot] = torch.stack([run[pass_name, slot] for run in self.runs])
            assert first.ndim >= 2
        return features


def record(
    target: Any, calls: Sequence[Call], *, site: str = "hidden", tokens: int = 512, progress: Progress | None = None
) -> Trace:
    """Run a pipeline uncached and keep what its transformer does.

    Args:
        target: a pipeline with one transformer, or a transformer.
        calls: arguments of the pipeline's calls; or functions without arguments, each of which samples once (for a bare
            transformer).
        site: `"hidden"` keeps the image tokens before and after the blocks and the transformer's result; `"module"`
            keeps every attention and feed-forward output (much more).
        tokens: how many tokens of a feature are kept.
        progress: called with (done, total).

    Returns:
        a trace for `fit`s; it holds `steps x tokens x width` numbers a call and slot, on the CPU.

    Raises:
        CalibrationError: if there are no calls, they differ in steps or size, or a number is not finite.
    """
    if not calls:
        raise CalibrationError("there is nothing to record: give at least one call, such as {'prompt': 'a red apple'}")
    accepted("record", "tokens", Annotated[int, Range(1)], tokens)
    if isinstance(calls, Mapping) or not all(callable(call) or isinstance(call, Mapping) for call in calls):
        raise ConfigError("calls are a list with the arguments of each call, such as [{'prompt': 'a red apple'}]")
    tape = Tape(tokens)
    with _watch(target, site) as run:
        engine_of(run).listener = tape
        for i, call in enumerate(calls):
            run.reset()
            call() if callable(call) else target(**call)
            tape.end_run()
            if progress is not None:
                progress(i + 1, len(calls))
        if not run.records:
            raise CalibrationError("the calls never ran the transformer")
        fingerprint = fingerprint_of(target, run, site)
        features = tape.features()
        norm = _norm(engine_of(run).model)
        if site == "hidden" and norm is not None:
            for slots in features.values():
                slots["normed"] = norm(slots["hidden"])
    return Trace(features, fingerprint)


def _norm(model: nn.Module) -> models.FinalNorm | None:
    try:
        return models.final_norm(model, models.find(model))
    except AdapterError:
        return None


def engine_of(run: Acceleration) -> CachingEngine:
    """The engine of a pipeline with one transformer.

    Raises:
        CalibrationError: if there are several.
    """
    if len(run.engines) != 1:
        raise CalibrationError(
            f"the pipeline has {len(run.engines)} transformers ({', '.join(run.engines)}); "
            "calibrate a pipeline with one, or one transformer with functions as calls"
        )
    return next(iter(run.engines.values()))


def fingerprint_of(target: Any, run: Acceleration, site: str) -> Fingerprint:
    """What the latest run of a pipeline with one transformer was."""
    engine = engine_of(run)
    model, scheduler = engine.model, getattr(target, "scheduler", None)
    latest = [record for record in run.records if record.run == run.records[-1].run]
    passes = tuple(dict.fromkeys(record.pass_name for record in latest))
    own = tuple(record.timestep for record in latest if record.pass_name == passes[0])
    return Fingerprint(
        model=type(model).__name__,
        config=model_digest(model),
        weights=weights_digest(model),
        scheduler="" if isinstance(target, nn.Module) or scheduler is None else type(scheduler).__name__,
        timesteps=engine.facts.timesteps or own,
        passes=passes,
        guidance=engine.facts.guidance,
        site=site,
    )


def _refuse_non_finite(run: Mapping[tuple[str, str], Tensor], call: int) -> None:
    """Raise a CalibrationError for features `[T, ...]` by pass and key with NaN or infinity, naming the first step.

    A fit to them would spoil every image.
    """
    bad = [
        (step, pass_name, key)
        for (pass_name, key), steps in run.items()
        for step, feature in enumerate(steps)
        if not bool(feature.isfinite().all())
    ]
    if bad:
        step, pass_name, key = min(bad)
        raise CalibrationError(
            f"call {call}: {key!r} of pass {pass_name!r} has a number that is not finite at step {step}; leave out "
            "that call, or run the model in a wider precision"
        )


def merge(traces: Sequence[Trace]) -> Trace:
    """Traces of the same sampling, such as those of several processes, as one.

    Raises:
        CalibrationError: if they are of different models or samplings.
    """
    first = traces[0]
    for trace in traces[1:]:
        if trace.fingerprint != first.fingerprint:
            raise CalibrationError("the traces are of different models or samplings; record them alike")
    features = {
        name: {slot: torch.cat([trace.features[name][slot] for trace in traces]) for slot in slots}
        for name, slots in first.features.items()
    }
    return Trace(features, first.fingerprint)


def _watch(target: Any, site: str) -> Acceleration:
    if site == "module":
        return accelerate(target, Reuse(interval=1, warmup=1, site="module"))
    model = next(iter(denoisers(target).values()))
    adapter = models.find(model)
    if adapter is not None and all(stack.modules is not None for stack in adapter.stacks):
        return accelerate(target, _Watch())
    # The first attention is not known; a UNet has no blocks to look in front of.
    return accelerate(target, _Watch(look="nothing" if adapter is None and models.is_unet(model) else "input"))


def _options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method's fit, checked.

    Raises:
        UnknownNameError: for a method or an option that does not exist.
        ConfigError: for a method that needs no calibration, or a value that cannot work.
    """
    fitter = getattr(registry.info(method).config, "fit", None)
    if fitter is None:
        able = [other.name for other in registry.methods() if hasattr(other.config, "fit")]
        raise ConfigError(f"{method} has nothing to calibrate; the methods that have are {', '.join(able)}")
    known = parameters(fitter)
    for name in options:
        if name not in known:
            raise unknown(f"fit option of {method}", name, known)
    return {name: known[name].accept(value, method) for name, value in options.items()}


def check_length(method: str, steps: int) -> None:
    """Refuse runs that are too short for a method's fit.

    Raises:
        CalibrationError: naming how many steps it takes.
    """
    fewest = registry.info(method).config.fewest_steps
    if steps < fewest:
        raise CalibrationError(
            f"{method} is fitted to how features change, which takes runs of {fewest} steps or more, got {steps}; "
            "record longer ones"
        )


def _check_blocks(target: Any, method: str, site: str) -> None:
    """Raise a CalibrationError for a model that has nothing at the site; what has blocks shows when it runs."""
    models_here = [*denoisers(target).values()]
    if len(models_here) == 1 and site != "output" and models.is_unet(models_here[0]):
        raise CalibrationError(
            f"{method} is fitted at site {site!r}, to the blocks of a transformer, and {type(models_here[0]).__name__} "
            "is a UNet, which has none; take l2p, or a method without a calibration, such as hicache with site='deep'"
        )


def fit(trace: Trace, method: str, **options: Any) -> Calibration:
    """Fit a method to a trace.

    Args:
        trace: from `record`.
        method: its name.
        options: of the method's fit, such as `energy=0.9` for `svdcache` or `clusters=4` for `hyca`; `site`, where the
            method has a choice.

    Raises:
        UnknownNameError: for a method or an option that does not exist.
        ConfigError: for a method that needs no calibration.
        CalibrationError: for a trace with a number that is not finite, or of fewer steps than the fit takes.
    """
    options = _options(method, options)
    check_length(method, trace.fingerprint.steps)
    features = {(name, key): runs for name, keys in trace.features.items() for key, runs in keys.items()}
    for i in range(min((len(runs) for runs in features.values()), default=0)):
        _refuse_non_finite({place: runs[i] for place, runs in features.items()}, i)
    info = registry.info(method)
    fitted = info.config.fit(trace, **options)
    site = options.get("site", info.parameters["site"].default)
    fingerprint = Fingerprint(**{**vars(trace.fingerprint), "site": site, "domain": fitted.domain})
    return Calibration(method, fitted.tensors, fingerprint, fitted.report, dict(options))


def calibrate(
    target: Any,
    method: str,
    calls: Sequence[Call],
    *,
    tokens: int = 512,
    progress: Progress | None = None,
    **options: Any,
) -> Calibration:
    """Run a pipeline uncached on a few calls and fit a method to it.

    Args:
        target: a pipeline with one transformer, or a transformer.
        method: `"l2p"`, `"hyca"`, `"svdcache"`, `"magcache"` or `"teacache"`.
        calls: arguments of the pipeline's calls, such as `[{"prompt": "a red apple", "num_inference_steps": 50}]`, with
            the steps, size and guidance that will be used; for a bare transformer functions that sample once each.
        tokens: how many tokens of a feature are kept while recording.
        progress: called with (done, total) calls.
        options: of the fit, such as `site="module"`, `clusters=4` or `energy=0.9`.

    Returns:
        a calibration to give to the method, or to save.

    Example:
        >>> calls = [{"prompt": p, "num_inference_steps": 50} for p in prompts]
        >>> calibration = hasten.calibrate(pipe, "l2p", calls)
        >>> calibration.save("l2p.safetensors")
        >>> run = hasten.accelerate(pipe, "l2p", calibration="l2p.safetensors", schedule="even", interval=7)
    """
    options = _options(method, options)
    fitted = options.get("site", registry.info(method).parameters["site"].default)
    _check_blocks(target, method, fitted)
    for call in calls or ():
        steps = call.get("num_inference_steps") if isinstance(call, Mapping) else None
        if isinstance(steps, int):
            check_length(method, steps)
    site = "module" if fitted == "module" else "hidden"
    trace = record(target, calls, site=site, tokens=tokens, progress=progress)
    return fit(trace, method, **options)
