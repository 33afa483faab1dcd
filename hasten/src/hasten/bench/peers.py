"""Other caching libraries as arms of a bench: cache-dit, the hooks of diffusers, and hicache-pp.

A peer never touches the pipeline's own transformer. For the length of a call a copy of its modules stands in its place
(the weights are shared, so the copy costs no memory), the peer is switched on for the copy, and both are dropped
afterwards. Nothing that a library leaves behind can therefore reach another arm.

Each peer gets the settings that its documentation recommends for the budget; where two are plausible, both are tried
on the prompts of the trials and the one with the better PSNR is kept. A peer that cannot run, or that cannot reach the
budget, becomes an arm with an error.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import io
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from hasten.bench.arms import Arm, one_line
from hasten.bench.thresholds import Match, Trial, Trials, match_computed_steps
from hasten.caching import Uniform, computed_steps
from hasten.errors import AdapterError, ConfigError, ModelError, unknown
from hasten.pipeline.view import denoisers

__all__ = ["PEERS", "OnACopy", "Peer", "chosen_peers", "peer_arms", "shared_copy"]

WARMUP = 3  # computed steps at the start, as in hasten's own schedule
Params = dict[str, Any]
Switch = Callable[[nn.Module, Params], None]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that shares its parameters and buffers.

    Raises:
        AdapterError: if the model's forward has been replaced (offloading, another cache), since a copy of such a hook
            would still lead to the original.
    """
    if any("forward" in vars(module) for module in model.modules()):
        raise AdapterError(
            f"the forward of {type(model).__name__} is hooked already (offloading?); "
            "bench peers with the model wholly on one device"
        )
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


@dataclass(frozen=True)
class OnACopy:
    """Switches a peer on for copies of a pipeline's transformers, which stand in for them for the length of a call."""

    switch: Switch
    params: Params

    @contextlib.contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        originals = {name: getattr(pipe, name) for name in denoisers(pipe)}
        try:
            for name, original in originals.items():
                model = shared_copy(original)
                self.switch(model, self.params)
                setattr(pipe, name, model)
            yield
        finally:
            for name, original in originals.items():
                setattr(pipe, name, original)


@dataclass(frozen=True)
class Search:
    """What the settings of a peer depend on."""

    trials: Trials

    @property
    def total(self) -> int:
        """Steps of the sampler."""
        return self.trials.steps

    @cached_property
    def magnitudes(self) -> list[float]:
        """MagCache's curve: mean over the prompts and passes of what the calibration of diffusers prints."""
        return list(self.trials.recall("diffusers magcache's curve", self._calibrated))

    def _calibrated(self) -> tuple[float, ...]:
        params = {"num_inference_steps": self.total, "calibrate": True}
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            for i in range(len(self.trials.prompts)):
                self.trials.draw(OnACopy(_magcache, params), i, self.total)
        curves = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1.0,")]
        if not curves:
            raise ModelError("the calibration of diffusers' MagCache printed no curve; another version of diffusers?")
        return tuple(torch.tensor(curves, dtype=torch.float64).mean(0).tolist())


# --- cache-dit


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Only errors: cache-dit, whose modules each have a logger, reports and warns on every call."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _dbcache(model: nn.Module, params: Params, calibrator: str | None = None) -> None:
    import cache_dit

    forecasts = {
        "taylorseer": partial(cache_dit.TaylorSeerCalibratorConfig, taylorseer_order=1),
        "foca": cache_dit.FoCaCalibratorConfig,
        "dmd": cache_dit.DMDCalibratorConfig,
    }
    with _muted():
        cache_dit.enable_cache(
            model,
            cache_config=cache_dit.DBCacheConfig(**params),
            calibrator_config=forecasts[calibrator]() if calibrator is not None else None,
        )


def _dbcache_settings(search: Search, wanted: int) -> list[Params]:
    """The preset of cache-dit's own benchmark (50 steps) that is nearest to the budget, and its short warm-up alone.

    Presets M, F and U compute 12.7, 8.7 and 6.8 of 50 steps.
    """
    share = wanted * 50 / search.total
    preset = (4, 1, 6) if share > 10 else (8, 2, 8) if share > 8 else (8, 4, 10)
    common = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "num_inference_steps": search.total,
        "enable_separate_cfg": search.trials.passes == 2,
    }
    return [
        {**common, "max_warmup_steps": warmup, "warmup_interval": interval, "max_continuous_cached_steps": longest}
        for warmup, interval, longest in (preset, (4, 1, -1))
    ]


# --- diffusers


def _hook(model: nn.Module, apply: str, config: str, **params: Any) -> None:
    """Apply a cache of diffusers, by name since older ones have fewer; they serve models without `enable_cache` too."""
    from diffusers import __version__, hooks

    if not hasattr(hooks, apply):
        raise ModelError(f"diffusers {__version__} has no {config}; it takes a newer one")
    getattr(hooks, apply)(model, getattr(hooks, config)(**params))
    if not any(getattr(getattr(module, "_diffusers_hook", None), "hooks", None) for module in model.modules()):
        raise ModelError(f"{config} hooks no module of {type(model).__name__} and would do nothing")
    registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
    if hasattr(registry, "invalidate_child_registries_cache"):  # from diffusers 0.41 on
        registry.invalidate_child_registries_cache()


def _first_block(model: nn.Module, params: Params) -> None:
    _hook(model, "apply_first_block_cache", "FirstBlockCacheConfig", **params)


def _first_block_settings(search: Search, wanted: int) -> list[Params]:
    return [{}]


def _magcache(model: nn.Module, params: Params) -> None:
    _hook(model, "apply_mag_cache", "MagCacheConfig", **params)


def _magcache_settings(search: Search, wanted: int) -> list[Params]:
    """The retention of diffusers (0.2), of the authors (0.1) and half of it, with longer runs of skipped steps.

    The defaults (3 to 5 in a row) cannot reach one step in five. The shortest run that can makes the schedule uniform;
    twice that leaves the choice to the curve.
    """
    settings = []
    for retention in (0.2, 0.1, 0.05):
        kept = int(retention * search.total + 0.5)
        rest = search.total - kept
        longest = next((k for k in range(1, rest + 1) if kept + rest // (k + 1) <= wanted), None)
        if longest is not None:
            settings += [{"retention_ratio": retention, "max_skip_steps": k} for k in (longest, 2 * longest)]
    common = {"num_inference_steps": search.total, "mag_ratios": search.magnitudes}
    return [{**common, **setting} for setting in settings]


def _taylorseer(model: nn.Module, params: Params) -> None:
    dtype = next(model.parameters()).dtype  # the default, bfloat16, would handicap a float32 model
    _hook(model, "apply_taylorseer_cache", "TaylorSeerCacheConfig", taylor_factors_dtype=dtype, **params)


def _taylorseer_settings(search: Search, wanted: int, lite: bool) -> list[Params]:
    def count(interval: int) -> int:
        return sum(step < WARMUP or (step - WARMUP - 1) % interval == 0 for step in range(search.total))

    interval = _smallest_interval(count, wanted, search.total)
    common = {"cache_interval": interval, "disable_cache_before_step": WARMUP, "use_lite_mode": lite}
    return [{**common, "max_order": order} for order in (1, 2)]


# --- hicache-pp


def _hermite(model: nn.Module, params: Params) -> None:
    """hicache-pp leaves the loop to its user: forecast what the transformer returns, each pass on its own."""
    from hicache_pp import hicache_decide, hicache_forecast, hicache_init, hicache_update_derivatives

    passes, config = params["passes"], {name: value for name, value in params.items() if name != "passes"}
    states = [hicache_init(**config) for _ in range(passes)]
    forward = model.forward
    calls = itertools.count()

    def forecasting(*args: Any, **kwargs: Any) -> Any:
        step, number = divmod(next(calls), passes)
        state = states[number]
        state["step"] = step
        if hicache_decide(state) == "full":
            output = forward(*args, **kwargs)
            hicache_update_derivatives(state, output[0])
            state["output"] = type(output)
            return output
        forecast = hicache_forecast(state)
        return (forecast,) if state["output"] is tuple else state["output"](sample=forecast)

    model.forward = forecasting


def _hermite_settings(search: Search, wanted: int) -> list[Params]:
    def count(interval: int) -> int:
        return len(computed_steps(Uniform(interval, WARMUP), search.total))

    common = {
        "num_steps": search.total,
        "interval": _smallest_interval(count, wanted, search.total),
        "first_enhance": WARMUP,
        "passes": search.trials.passes,
    }
    return [{**common, "max_order": order, "sigma": sigma} for order in (1, 2) for sigma in (0.5, 0.7)]


# --- matching


def _smallest_interval(count: Callable[[int], int], wanted: int, total: int) -> int:
    for interval in range(1, total + 1):
        if count(interval) <= wanted:
            return interval
    raise ConfigError(f"no interval computes only {wanted} of {total} steps; ask for more computed steps")


@dataclass(frozen=True)
class Peer:
    """A method of another library.

    Attributes:
        name: of the method.
        library: as it is called on the package index.
        module: what has to be importable.
        switch: switches it on for a transformer that is thrown away afterwards.
        settings: plausible parameters for a number of computed steps.
        threshold: name of the parameter that decides how much is computed; empty if the settings do.
        loosest: largest sensible threshold.
        note: what a reader has to know about the figures.
    """

    name: str
    library: str
    module: str
    switch: Switch
    settings: Callable[[Search, int], list[Params]]
    threshold: str = ""
    loosest: float = 10.0
    note: str = ""

    def available(self) -> None:
        """Raise a `ModelError` if the package is missing."""
        if importlib.util.find_spec(self.module) is None:
            raise ModelError(f"{self.library} is not installed; install it with: pip install {self.library}")

    def best(self, search: Search, wanted: int) -> Params:
        """The setting with the best PSNR among those that compute no more than `wanted` steps."""
        found: list[tuple[float, Params]] = []
        failures: list[str] = []
        for params in self.settings(search, wanted):
            try:
                match = self._match(search.trials, params, wanted)
            except ConfigError as error:
                failures.append(str(error))
                continue
            fitted = {**params, self.threshold: match.threshold} if self.threshold else params
            found.append((match.trial.psnr, fitted))
        if not found:
            raise ConfigError(failures[-1] if failures else f"no setting computes only {wanted} steps")
        return max(found, key=lambda pair: pair[0])[1]

    def _match(self, trials: Trials, params: Params, wanted: int) -> Match:
        def run(threshold: float) -> Trial:
            own = {self.threshold: threshold} if self.threshold else {}
            setting = {name: value for name, value in {**params, **own}.items() if name != "mag_ratios"}
            return trials.run(OnACopy(self.switch, {**params, **own}), f"{self.library} {self.name} {setting}")

        if self.threshold:
            return match_computed_steps(run, wanted, 1e-3, self.loosest)
        trial = run(0.0)
        if abs(trial.computed - wanted) >= 1:
            raise ConfigError(f"{trial.computed:g} steps are computed, not the {wanted} asked for")
        return Match(0.0, trial)


_CACHE_DIT = partial(
    Peer,
    library="cache-dit",
    module="cache_dit",
    settings=_dbcache_settings,
    threshold="residual_diff_threshold",
    loosest=1.0,  # which cache-dit takes for "always"
)
_DIFFUSERS = partial(Peer, library="diffusers", module="diffusers")

PEERS: tuple[Peer, ...] = (
    _CACHE_DIT("dbcache", switch=_dbcache),
    _CACHE_DIT("dbcache-taylorseer", switch=partial(_dbcache, calibrator="taylorseer")),
    _CACHE_DIT("dbcache-foca", switch=partial(_dbcache, calibrator="foca")),
    _CACHE_DIT("dbcache-dmd", switch=partial(_dbcache, calibrator="dmd")),
    _DIFFUSERS("first-block", switch=_first_block, settings=_first_block_settings, threshold="threshold"),
    _DIFFUSERS(
        "magcache",
        switch=_magcache,
        settings=_magcache_settings,
        threshold="threshold",
        note="curve of magnitudes measured on the prompts of the trials",
    ),
    _DIFFUSERS(
        "taylorseer",
        switch=_taylorseer,
        settings=partial(_taylorseer_settings, lite=False),
        note="caches attention only: the feed-forward layers run at every step",
    ),
    _DIFFUSERS("taylorseer-lite", switch=_taylorseer, settings=partial(_taylorseer_settings, lite=True)),
    Peer("hermite", "hicache-pp", "hicache_pp", _hermite, _hermite_settings, note="forecasts the transformer's output"),
)


def peer_arms(counts: list[int], trials: Trials, peers: tuple[Peer, ...] = PEERS) -> list[Arm]:
    """Every peer at every number of computed steps; one that cannot run is an arm with an `error`."""
    search = Search(trials)
    return [_arm(peer, search, wanted) for wanted in counts for peer in peers]


def chosen_peers(names: Sequence[str]) -> tuple[Peer, ...]:
    """The peers with these names; all of them if there are none.

    Raises:
        UnknownNameError: for another name.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise unknown("peer", name, known)
    return tuple(known[name] for name in names) or PEERS


def _arm(peer: Peer, search: Search, wanted: int) -> Arm:
    search.trials.progress(f"matching {peer.library} {peer.name} to {wanted} computed steps")
    arm = Arm(f"{peer.library}-{peer.name}-{wanted}", peer.name, peer.library, {}, search.total, wanted, note=peer.note)
    try:
        peer.available()
        params = peer.best(search, wanted)
    except Exception as error:  # whatever another library raises must not end the bench
        return replace(arm, error=one_line(error))
    reported = {name: value for name, value in params.items() if name != "mag_ratios"}
    return replace(arm, params=reported, attach=OnACopy(peer.switch, params))
