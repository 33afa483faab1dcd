"""`accelerate`: one line that makes a pipeline faster; `summary` and `remove`, for those who lost its handle."""

from __future__ import annotations

from dataclasses import replace as with_params
from functools import partial
from typing import Any, overload

from torch import nn

from hasten import registry
from hasten.caching.default import default_method
from hasten.caching.engine import CachingEngine
from hasten.caching.method import CachingMethod
from hasten.errors import AlreadyAcceleratedError, ConfigError, unknown
from hasten.pipeline.handle import Acceleration
from hasten.pipeline.hooks import hooks_on, still
from hasten.pipeline.summary import Summary
from hasten.pipeline.view import PipelineView, denoisers
from hasten.quality.configuration import Configuration
from hasten.quality.requests import Requests
from hasten.quality.setting import Setting, check_quality, find
from hasten.quality.tolerance import check_measurable
from hasten.registry import methods
from hasten.resolution.engine import ResolutionMethod
from hasten.solvers.method import Leap
from hasten.streaming.adapters import StreamingRun, adapter_of, attach_stream
from hasten.streaming.method import StreamingMethod

__all__ = ["accelerate", "check_configuration", "methods", "remove", "summary"]

Chosen = tuple[CachingMethod | None, ResolutionMethod | None, Leap | None]


def _methods(methods: tuple[Any, ...], params: dict[str, Any]) -> Chosen:
    """The caching method and the resolution method, of which there may be one each; or LEAP."""
    methods = methods or (default_method(params),)
    if len(methods) > 1 and params:
        raise ConfigError(f"with several methods, give each its own parameters: {', '.join(params)} could be of any")
    chosen = [_method(method, params) for method in methods]
    caching = [method for method in chosen if isinstance(method, CachingMethod)]
    staged = [method for method in chosen if isinstance(method, ResolutionMethod)]
    solvers = [method for method in chosen if isinstance(method, Leap)]
    if solvers and len(chosen) > 1:
        raise ConfigError("leap replaces the scheduler, which other methods need; give it alone")
    if len(caching) > 1 or len(staged) > 1:
        given = ", ".join(map(str, methods))
        raise ConfigError(f"give one caching method, one resolution method (dvg, fresco), or one of each; got {given}")
    return next(iter(caching), None), next(iter(staged), None), next(iter(solvers), None)


def check_configuration(configuration: Configuration) -> None:
    """Find out, before a model is there, whether a setting can be had on any.

    Raises:
        UnknownNameError, ConfigError, CalibrationError, CertificateError: if it cannot.
    """
    if configuration.quality is not None:
        check_quality(configuration.quality)
        return
    methods, params = _chosen_in(configuration)
    _methods(methods, params)


def _chosen_in(configuration: Configuration) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The methods of a configuration, and parameters besides."""
    methods = () if configuration.method is None else registry.parse(configuration.method)
    steps = configuration.computed_steps
    return methods, {} if steps is None else {"computed_steps": steps}


def _method(chosen: Any, params: dict[str, Any]) -> CachingMethod | ResolutionMethod | Leap:
    if isinstance(chosen, str):
        _check_name(chosen)
        chosen = registry.build(chosen, **params)
    elif isinstance(chosen, (CachingMethod, ResolutionMethod, Leap)) and params:
        for name in params:
            if name not in chosen.__dataclass_fields__:
                raise unknown(f"parameter of {type(chosen).__name__}", name, chosen.__dataclass_fields__)
        chosen = with_params(chosen, **params)
    if isinstance(chosen, StreamingMethod):
        raise ConfigError(f"{type(chosen).__name__} chooses the history of a streaming model; give it alone")
    if not isinstance(chosen, (CachingMethod, ResolutionMethod, Leap)):
        raise ConfigError(f"a method is a name or a method object such as hasten.HiCache(), got {chosen!r}")
    return chosen


def _check_name(text: str) -> None:
    """Refuse an expression and the path of a file, and say what reads them."""
    first = registry.PLUS.split(text)[0].partition(":")[0].strip()
    if first != text and first in {info.name for info in registry.methods()}:
        registry.split(text)  # a slip in it is told first
        raise ConfigError(
            f"{text!r} is an expression, not a name; give accelerate(pipe, *hasten.registry.parse({text!r})), or the "
            "name and its parameters as arguments"
        )
    if text.lower().endswith((".yaml", ".yml", ".json")):
        raise ConfigError(
            f"{text!r} is a path, not a method; give accelerate(pipe, hasten.load({text!r})), or quality={text!r} for "
            "a certificate"
        )
    if first != text:
        registry.info(first)  # names the nearest


def _streaming(methods: tuple[Any, ...], params: dict[str, Any]) -> StreamingMethod | None:
    """The method that chooses history, if that is what was given."""
    if len(methods) != 1:
        return None
    (chosen,) = methods
    kinds = {info.name: info.kind for info in registry.methods()}
    if isinstance(chosen, str) and kinds.get(chosen) == "streaming":
        chosen = registry.build(chosen, **params)
    elif isinstance(chosen, StreamingMethod) and params:
        chosen = with_params(chosen, **params)
    return chosen if isinstance(chosen, StreamingMethod) else None


@overload
def accelerate(target: Any, method: StreamingMethod, /, *, replace: bool = False) -> StreamingRun: ...


@overload
def accelerate(
    target: Any,
    *methods: Any,
    quality: str | None = None,
    audit: float = 0.0,
    replace: bool = False,
    **params: Any,
) -> Acceleration: ...


def accelerate(
    target: Any,
    *methods: Any,
    quality: str | None = None,
    audit: float = 0.0,
    replace: bool = False,
    **params: Any,
) -> Acceleration | StreamingRun:
    """Make a diffusers pipeline (or a bare denoiser) faster. The pipeline is called as before.

    Args:
        target: a pipeline with a `transformer` (and perhaps a `transformer_2` or an `unconditional_transformer`), a
            `unet`, a `prior` or a `decoder` that denoises; or a transformer or UNet itself. On a UNet a cache works at
            the output, unless told `site="deep"`: the inner levels forecast, the outermost one computed.
        methods: a method's name or object, such as `"hicache"` or `hasten.HiCache(interval=7)`; or a caching method and
            one with stages, `hasten.DVG(), hasten.FoCa(interval=3)`: the cache then starts again in each stage; or
            `hasten.Leap(file)`, on a pipeline with any denoiser, whose scheduler it replaces meanwhile. Without
            a method it is HiCache with a damped straight line, which guidance does not break, on computed steps that
            are denser early. Or a configuration that `hasten.load` read. Or a method that chooses history, for a
            pipeline of streaming video that has an adapter, or its transformer: `hasten.FocusedForcing(budget=6)`.
        quality: instead of a method, a tier that is certified for the model (`"lossless"`, `"high"`, `"draft"`), the
            path of a certificate, or `"exact"` for the full run.
        audit: with `quality`, the share of calls for which the full run is made too and the tolerance checked; the
            logger `hasten` warns.
        replace: take away an acceleration that is there already; a method that does not fit leaves it.
        params: parameters of a single method; common ones of caches are `interval`, `warmup`, `site` and `steps`.

    Returns:
        a handle with `.records`, `.summary()`, `.using()`, `.save()`, `.stages`, `.estimate_bytes()`, `.reset()` and
        `.remove()`; also a context manager. For a method that chooses history, one with `.stream`, `.stats()`,
        `.summary()` and `.remove()`.

    Raises:
        UnknownNameError, ConfigError: for a method or parameter that cannot work.
        TargetError: if there is nothing that denoises.
        AdapterError: if the denoiser's layout is not known and cannot be found out, or the method does not fit it.
        AlreadyAcceleratedError: if it is accelerated already, by hasten or by another cache.
        CertificateError: if the quality is not certified for the model; in a call outside of its range, too.

    Example:
        >>> run = hasten.accelerate(pipe, "hicache", interval=7)
        >>> image = pipe("a red apple").images[0]
        >>> print(run.summary())
        >>> run.remove()
    """
    history = _streaming(methods, params)
    if history is not None:
        return _streamed(target, history, Configuration(quality=quality, audit=audit), replace)
    if len(methods) == 1 and isinstance(methods[0], Configuration):
        configuration = with_params(methods[0], quality=quality or methods[0].quality, audit=audit or methods[0].audit)
        methods, more = _chosen_in(configuration)
        params |= more
    else:
        configuration = Configuration(quality=quality, audit=audit)
    method, staged, solver = (None, None, None) if configuration.quality is not None else _methods(methods, params)
    modules = denoisers(target)
    home = None if isinstance(target, nn.Module) else PipelineView(target)
    # What is fitted is compared with a tree that has no proxies in it; what is replaced may be on other modules, too.
    with still({*modules.values(), *(_modules_of(modules) if replace else ())}):
        if configuration.quality is None:
            setting = None if method is None else Setting(method)
        else:
            setting = _certified(configuration, methods, params, modules, home)
        engines = {}
        if setting is not None:
            engines = {
                name: CachingEngine(m, setting.method, home, partial(setting.check, name, m))
                for name, m in modules.items()
            }
        stages = None if staged is None else staged.engine(target)
        solving = None if solver is None else solver.engine(target)
        if replace:
            for handle in _handles(modules):
                handle.remove()
        _check_apart(modules, solver)
        try:
            for engine in engines.values():
                engine.attach(target if isinstance(target, nn.Module) and target is not engine.model else None)
            if stages is not None:
                stages.attach()
            if solving is not None:
                solving.attach()
            requests = Requests(modules, engines, home, setting, solver if staged is None else staged, configuration)
        except BaseException:
            for engine in engines.values():
                engine.detach()
            if stages is not None:
                stages.remove()
            if solving is not None:
                solving.remove()
            raise
        return Acceleration(engines, stages, modules, home, requests, solving)


def _streamed(target: Any, method: StreamingMethod, configuration: Configuration, replace: bool) -> StreamingRun:
    """A streaming model that attends to what the method chooses."""
    if configuration.quality is not None:
        name = type(method).__name__
        raise ConfigError(f"quality={configuration.quality!r} decides on the method; leave {name} out")
    modules = denoisers(target)
    model = next(iter(modules.values()))
    adapter_of(model, method)  # one that does not fit leaves what is there
    if replace:
        for handle in _handles(modules):
            handle.remove()
    return attach_stream(model, method)


def _certified(
    configuration: Configuration,
    methods: tuple[Any, ...],
    params: dict[str, Any],
    modules: dict[str, nn.Module],
    home: PipelineView | None,
) -> Setting:
    """The certified setting, which decides on everything."""
    quality = str(configuration.quality)
    if methods or params:
        given = ", ".join([*map(str, methods), *params])
        raise ConfigError(f"quality={quality!r} decides on the method and its parameters; leave {given} out")
    if home is None:
        raise ConfigError("a certificate is for a pipeline's calls; accelerate the pipeline itself")
    # The pipeline's own scheduler may be away, in an acceleration that will be replaced or refuses later.
    plain = (getattr(handle, "plain_scheduler", None) for handle in _handles(modules))
    scheduler = next((one for one in plain if one is not None), home.scheduler)
    setting = find(quality, home.pipe, modules, scheduler)
    if configuration.audit and setting.certificate is not None:
        check_measurable(setting.certificate.tolerance)
    return setting


def summary(target: Any, run: int = -1) -> Summary:
    """What a run on an accelerated pipeline or denoiser saved; the latest one unless told otherwise.

    Raises:
        ConfigError: if the target is not accelerated, or there was no such run.
    """
    handles = _handles(denoisers(target))
    if not handles:
        raise ConfigError(f"this {type(target).__name__} is not accelerated; call hasten.accelerate on it first")
    return handles[0].summary(run)


def remove(target: Any) -> None:
    """Take every acceleration of hasten away from a pipeline or denoiser; nothing happens if there is none.

    Raises:
        TargetError: if there is nothing that denoises.
    """
    for handle in _handles(denoisers(target)):
        handle.remove()


def _check_apart(modules: dict[str, nn.Module], solver: Leap | None) -> None:
    """Refuse LEAP beside a method that is at work already, and any method beside LEAP."""
    for handle in _handles(modules):
        known = handle.methods if isinstance(handle, Acceleration) else [handle]
        if (solver is not None) != any(isinstance(method, Leap) for method in known):  # two refuse each other
            names = " and ".join(type(method).__name__ for method in known)
            raise AlreadyAcceleratedError(
                f"already at work here: {names}. LEAP replaces the scheduler, which other methods need; call "
                ".remove() on the handle that accelerate() returned, or hasten.remove(...), or give "
                "accelerate(..., replace=True)"
            )


def _modules_of(modules: dict[str, nn.Module]) -> list[nn.Module]:
    """All modules on which the handles of what is at work on some denoisers are at work."""
    handles = [handle for handle in _handles(modules) if isinstance(handle, Acceleration)]
    return [module for handle in handles for module in handle.modules.values()]


def _handles(modules: dict[str, nn.Module]) -> list[Any]:
    """The handles of what is at work on some denoisers, the latest first."""
    found = [hook.handle for module in modules.values() for hook in reversed(hooks_on(module))]
    return list(dict.fromkeys(handle for handle in found if handle is not None))
