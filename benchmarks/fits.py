"""What arms need before they can run: calibrations, thresholds and settings of other libraries, kept in a folder.

An arm's text is `METHOD@N`: a method expression (`foca:schedule=even`), `default`, `leap`, `peer:NAME` of another
library, or a plain sampler, with `N` computed steps (a sampler: steps); a resolution method says its steps itself.
Everything is fitted to calls that no arm draws. What was found is kept, so that a benchmark goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import hasten
import torch
from arms import arm_of
from hasten import registry
from hasten.bench.arms import Arm, method_arms, one_line
from hasten.bench.peers import chosen_peers, peer_arms
from hasten.bench.plain import plain_samplers
from hasten.bench.requests import Request, parse_request
from hasten.bench.thresholds import Trials
from hasten.caching.default import default_method
from hasten.calibration import Calibration, Trace
from hasten.errors import ConfigError, HastenError
from hasten.fitting.leap_fitter import YARDSTICK
from hasten.io import write_atomically
from hasten.pipeline.replay import Replay
from hasten.solvers.content import LEAP

__all__ = ["DEFAULT", "PEER", "Fits"]

DEFAULT, PEER = "default", "peer:"
TOKENS = 4096  # of a feature that are recorded per call
NOT_FITTED_TO = ("model", "progress", "recall")  # of the trials


class Fits:
    """Arms of one model at one guidance.

    Args:
        pipe: what draws.
        calls: arguments of the calls to learn from, each with generators of its own.
        counts: numbers of evaluations that LEAP is fitted for.
        trials: draws what thresholds are matched on.
        folder: one per weights, guidance and number of steps. What was fitted is in one of its folders for each set of
            calls and trials and each version of hasten, so that none serves what was asked for in another way.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[dict[str, Any]],
        counts: Sequence[int],
        trials: Callable[..., Trials],
        folder: Path,
    ) -> None:
        self.pipe, self.calls, self.counts = pipe, calls, counts
        self.trials = trials(recall=self.recall)
        self.folder = folder / digest(calls, self.trials)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tried = self.folder / "trials.json"

    def arm(self, text: str) -> Arm:
        """What an arm's text says, ready to run; one that cannot run has an `error`."""
        name, _, count = text.partition("@")
        try:
            if name.startswith(PEER):
                (arm,) = peer_arms([int(count)], self.trials, chosen_peers([name.removeprefix(PEER)]))
                return arm
            request = None if name in plain_samplers() else self.request(name)
            if request is None or request.resolution is not None:
                attach, steps = arm_of(text, self.trials.steps)
                return Arm(text, name, "hasten" if request else "plain", {}, steps, steps, attach)
            (arm,) = method_arms([request], [int(count)], self.trials.steps, self.trials)
        except HastenError as error:
            steps = self.trials.steps
            return Arm(text, name, "hasten", {}, steps, steps, error=one_line(error))
        return arm

    def request(self, name: str) -> Request:
        """A method expression with what was fitted."""
        if name == LEAP:
            return Request(name, leap=True, calibration=self.leap)
        if name == DEFAULT:
            return Request(name, caching=default_method())
        return parse_request(self.calibrated(name))

    def calibrated(self, expression: str) -> str:
        """A method expression with its calibration, which is made where it is missing."""
        parts = registry.split(expression)
        if len(parts) > 1:
            return expression
        ((name, given),) = parts
        fits = registry.info(name).needs_calibration or name == "teacache"  # whose published polynomials are of others
        if not fits or "calibration" in given:
            return expression
        site = {"site": given["site"]} if "site" in given else {}
        file = self.folder / ("-".join((name, *site.values())) + ".safetensors")
        if not file.exists():
            self.timed(file.stem, lambda: hasten.fit(self.trace(**site), name, **site).save(file))
        return f"{expression}:calibration={file}"

    def trace(self, site: str = "hidden") -> Trace:
        """What the transformer does in the calls to learn from; in one of them at the module site, which is large."""
        if site not in self.traces:
            with Replay(self.calls) as replay:
                again = replay.runs(self.pipe)
                some = again[:1] if site == "module" else again
                self.traces[site] = hasten.record(self.pipe, some, site=site, tokens=TOKENS)
        return self.traces[site]

    @cached_property
    def traces(self) -> dict[str, Trace]:
        """Traces by site, as far as they are recorded."""
        return {}

    @cached_property
    def leap(self) -> Calibration:
        """LEAP for all numbers of evaluations."""
        file = self.folder / "leap.safetensors"
        known = Calibration.load(file) if file.exists() else None
        if known is not None and known.options.get("yardstick") != YARDSTICK:
            known = None  # of another objective
        missing = [count for count in self.counts if known is None or str(count) not in known.report]
        if not missing:
            assert known is not None
            return known
        return self.timed(
            "leap",
            lambda: hasten.fit_leap(
                self.pipe, self.calls, self.counts, known=known, keep=lambda found: found.save(file)
            ),
        )

    def timed(self, name: str, fit: Callable[[], Any]) -> Any:
        """Fit, and note the processor seconds that it took."""
        started = time.process_time()
        found = fit()
        self.note(f"seconds of {name}", (round(time.process_time() - started, 1),))
        return found

    def recall(self, key: str, compute: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
        """What a trial came to, from the folder or computed."""
        known = self.known()
        if key not in known:
            self.note(key, compute())
            known = self.known()
        return tuple(known[key])

    def known(self) -> dict[str, list[float]]:
        """All trials and times in the folder."""
        return json.loads(self.tried.read_text()) if self.tried.exists() else {}

    def note(self, key: str, values: Sequence[float]) -> None:
        """Keep numbers in the folder."""
        write_atomically(self.tried, json.dumps(self.known() | {key: list(values)}, indent=1) + "\n")


def digest(calls: Sequence[dict[str, Any]], trials: Trials) -> str:
    """A short name for all that fits depend on apart from the model and the method: the prompts, seeds, batches, steps
    and arguments of the calls and of the trials, and hasten's version.

    Raises:
        TypeError: for arguments of calls that are neither plain values nor generators.
    """

    def seed(value: Any) -> int:
        if not isinstance(value, torch.Generator):
            raise TypeError(f"calls to learn from take plain values and generators, got {type(value).__name__}")
        return value.initial_seed()

    tried = {one.name: getattr(trials, one.name) for one in fields(trials) if one.name not in NOT_FITTED_TO}
    told = json.dumps([hasten.__version__, TOKENS, list(calls), tried], default=seed, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def check_texts(texts: Sequence[str]) -> None:
    """End the program for arms that cannot be read, before any work."""
    for text in texts:
        name, _, count = text.partition("@")
        try:
            if count and not count.isdigit():
                raise ConfigError(f"the number behind @ has to be a whole one, got {count!r}")
            if name.startswith(PEER):
                chosen_peers([name.removeprefix(PEER)])
            elif name not in (DEFAULT, LEAP, *plain_samplers()):
                for method, _ in registry.split(name):
                    registry.info(method)
        except HastenError as error:
            raise SystemExit(f"arm {text!r}: {error}") from None
