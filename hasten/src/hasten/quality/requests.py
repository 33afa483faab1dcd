"""The setting of an accelerated pipeline, and settings of single calls."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from hasten import registry
from hasten.caching.engine import CachingEngine
from hasten.errors import ConfigError
from hasten.parameters import MOST_STEPS, Range, Text, accepted
from hasten.pipeline.hooks import Forward, Hook, Remove, still
from hasten.pipeline.instead import Entry, generator_around, instead
from hasten.pipeline.records import KEPT
from hasten.pipeline.runs import Run
from hasten.pipeline.view import PipelineView
from hasten.quality.audit import Audit
from hasten.quality.configuration import Configuration
from hasten.quality.setting import FULL, GONE, LANE, FixedLeap, Setting, find
from hasten.quality.tolerance import EXACT
from hasten.solvers.handover import hand_over
from hasten.solvers.passes import watch_passes

__all__ = ["Requests"]

MOST_SETTINGS = 64  # kept of single calls: a service is asked for any number


def _accepted(owner: str, quality: Any, computed_steps: Any) -> tuple[str | None, int | None]:
    """What a call asks for, in the declared types."""
    return (
        accepted(owner, "quality", Annotated[str | None, Text(1)], quality),
        accepted(owner, "computed_steps", Annotated[int | None, Range(1, MOST_STEPS)], computed_steps),
    )


class _Through(Hook):
    """Lets calls through as if nothing was attached."""

    kind = "full run"

    def call(self, module: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs)


HOOKS = "_hasten_hooks"  # where a pipeline that `using` gave keeps the entry of its setting


@cache
def _with_setting(plain: type[Any]) -> Any:
    """The class of a pipeline whose calls have its setting, on whichever thread they are made."""
    plain_call = next((vars(base)["__call__"] for base in plain.__mro__ if "__call__" in vars(base)), None)
    if plain_call is None:  # a stand-in, called in loops of the user's own
        return plain

    @functools.wraps(plain_call)
    def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        hooks = dict(vars(pipe)[HOOKS].hooks)  # a call under way keeps them
        with instead(hooks):
            result = plain_call(pipe, *args, **kwargs)
        return _going_on(result, hooks) if inspect.isgenerator(result) else result

    return type(plain.__name__, (plain,), {"__call__": call, "__module__": plain.__module__, "__doc__": plain.__doc__})


def _going_on(calls: Generator[Any, Any, Any], hooks: Mapping[Hook, Hook]) -> Generator[Any, Any, Any]:
    """The results of a pipeline whose call is a generator, each made with these hooks."""
    while True:
        with instead(hooks):
            try:
                result = next(calls)
            except StopIteration as end:
                return end.value
        yield result


class Requests:
    """Gives calls of an accelerated pipeline their settings.

    Args:
        modules: the transformers by name.
        engines: what is attached to each of them.
        home: the pipeline; None for a bare transformer.
        setting: what all calls have unless they are given another; None if no caching method is at work.
        staged: the resolution method or LEAP, if one is at work.
        configuration: what the user asked for.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        engines: Mapping[str, CachingEngine],
        home: PipelineView | None,
        setting: Setting | None,
        staged: Any,
        configuration: Configuration,
    ) -> None:
        self._modules, self._engines, self._home = dict(modules), dict(engines), home
        self._setting, self._staged, self._configuration = setting, staged, configuration
        self._instead: dict[tuple[str | None, int | None], tuple[Setting, dict[Hook, Hook]]] = {}
        self._open_entries: list[Entry] = []  # of `using` under way
        self._names: dict[int, tuple[str, int | None]] = {}  # of the runs that had a setting of their own
        certificate = None if setting is None or setting.leap is None else setting.certificate
        replaced = None if certificate is None else certificate.conditions.steps
        self._usual = ("" if setting is None else setting.label, replaced)
        self._text = None if configuration.quality is None else str(setting)
        self._lock = threading.Lock()
        self._local = threading.local()
        self._unhook: Remove | None = None
        self._scheduler = None if home is None else home.scheduler
        self._replaced = None if setting is None else setting.scheduler()
        if self._replaced is not None and home is not None:
            _, self._unhook = watch_passes(home.pipe, self._replaced.observe)
            self._replaced.expects_passes = True
            home.pipe.scheduler = self._replaced
            hand_over(self._scheduler, self._replaced)
        self._audit: Audit | None = None
        if configuration.audit and home is not None and setting is not None and setting.certificate is not None:
            self._audit = Audit(home.pipe, setting.certificate, configuration.audit, self._full)

    def close(self) -> None:
        """Give the pipeline its scheduler back, unless somebody gave it another one, and end audits."""
        if self._audit is not None:
            self._audit.close()
        if self._unhook is not None:
            self._unhook()
            self._unhook = None
        pipe = None if self._home is None else self._home.pipe
        if pipe is not None and self._replaced is not None and pipe.scheduler is self._replaced:
            pipe.scheduler = self._scheduler
            self._replaced.unwatch()
            hand_over(self._replaced, self._scheduler)
        for entry in self._open_entries:
            entry.close()
        self._open_entries.clear()
        self._modules, self._engines, self._home, self._instead = {}, {}, None, {}
        self._setting = self._audit = self._scheduler = None

    @property
    def audit(self) -> Audit | None:
        """What checks calls against the full run."""
        return self._audit

    def save(self, path: str | Path) -> Path:
        """Write the setting of all calls as a configuration; see `Acceleration.save`."""
        if self._configuration.quality is not None:
            return self._configuration.save(path)
        return replace(self._configuration, method=self._expression(), computed_steps=None).save(path)

    def _expression(self) -> str:
        methods = [one for one in (self._staged, self._setting and self._setting.method) if one is not None]
        if not methods:
            raise ConfigError("the acceleration was removed, and there is no setting")
        return registry.format(*methods)

    def describe(
        self, quality: str | None, computed_steps: int | None, call: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """See `Acceleration.describe`."""
        quality, computed_steps = _accepted("describe", quality, computed_steps)
        if self._staged is not None and (quality, computed_steps) == (None, None):
            return {"method": self._expression()}
        setting = self._made(quality, computed_steps)[0]
        if call is not None:
            setting.check_arguments(call, self._modules, None if self._home is None else self._home.pipe)
        return setting.describe()

    @contextmanager
    def using(self, quality: str | None, computed_steps: int | None) -> Iterator[Any]:
        """See `Acceleration.using`."""
        quality, computed_steps = _accepted("using", quality, computed_steps)
        if self._staged is not None and (quality, computed_steps) == (None, None):
            yield next(iter(self._modules.values())) if self._home is None else self._home.pipe
            return
        with still(self._modules.values()):  # it is not removed meanwhile
            setting, hooks = self._made(quality, computed_steps)
            lane = self._lane(setting)
            entry = Entry(hooks, generator_around())
            self._open_entries.append(entry)
            if LANE in vars(lane):
                lane.__dict__[HOOKS] = entry
                lane.__class__ = _with_setting(type(lane))  # type: ignore[arg-type]  # a class is hashable
        try:
            yield lane
        finally:
            entry.close()
            if entry in self._open_entries:
                self._open_entries.remove(entry)

    def _open(self) -> Setting:
        """The setting of all calls, of an acceleration that is at work and can have others."""
        if self._staged is not None:
            raise ConfigError(
                "a resolution method or LEAP is at work, and is for all calls alike; ask for nothing else"
            )
        if self._setting is None:
            raise ConfigError("the acceleration was removed; accelerate the pipeline again")
        return self._setting

    @contextmanager
    def _full(self) -> Iterator[Any]:
        """A pipeline whose calls compute everything and leave no record."""
        with instead({engine: _Through() for engine in self._engines.values()}):
            yield self._lane(Setting(FULL))

    def _made(self, quality: str | None, computed_steps: int | None) -> tuple[Setting, dict[Hook, Hook]]:
        """A setting and its hooks, which are made once; features and records are of runs, so that calls may share."""
        key = (quality, computed_steps)
        if key == (None, None):
            return self._open(), {}
        with still(self._modules.values()), self._lock:
            if key in self._instead:
                return self._instead[key]
            setting = self._chosen(self._open(), quality, computed_steps)
            hooks: dict[Hook, Hook] = {
                engine: engine.beside(setting.method, partial(self._begin, setting, name, self._modules[name]))
                for name, engine in self._engines.items()
            }
            while len(self._instead) >= MOST_SETTINGS:  # calls under way hold theirs
                self._instead.pop(next(iter(self._instead)))
            self._instead[key] = setting, hooks
            return setting, hooks

    def _begin(self, setting: Setting, name: str, module: nn.Module, run: Run) -> None:
        """A run with a setting of its own is about to begin."""
        setting.check(name, module, run)
        self._names[run.number] = setting.label, setting.replaced_steps(run)
        while len(self._names) > 2 * KEPT:  # runs are numbered per transformer, and kept so long
            self._names.pop(next(iter(self._names)))

    def setting_of(self, run: int) -> tuple[str, int | None]:
        """What the setting of a run is called, and how many steps a scheduler of ours took its own in place of."""
        return self._names.get(run, self._usual)

    @property
    def plain_scheduler(self) -> Any:
        """The pipeline's own scheduler, while the setting's is in its place."""
        return None if self._replaced is None else self._scheduler

    @property
    def text(self) -> str | None:
        """The setting of all calls, where it is not just the methods at work."""
        return self._text

    def _chosen(self, own: Setting, quality: str | None, computed_steps: int | None) -> Setting:
        if quality is not None and computed_steps is not None:
            raise ConfigError(
                f"quality={quality!r} decides how many steps are computed; leave out one of it and computed_steps"
            )
        if quality is None:
            assert computed_steps is not None
            return own.with_computed_steps(computed_steps)
        if self._home is None and quality != EXACT:
            raise ConfigError("a certificate is for a pipeline's calls; accelerate the pipeline itself")
        return find(quality, None if self._home is None else self._home.pipe, self._modules, self._scheduler)

    def _lane(self, setting: Setting) -> Any:
        """A pipeline for calls of this thread: what calls change is its own, what computes is shared."""
        pipe = None if self._home is None else self._home.pipe
        if pipe is None:
            return next(iter(self._modules.values()))
        lane = copy.copy(pipe)
        audited = self._setting is not None and setting.certificate == self._setting.certificate
        if self._audit is not None and not audited:
            lane.__class__ = self._audit.plain_class
        own = setting.scheduler() or copy.deepcopy(self._own_scheduler(pipe))
        if isinstance(own, FixedLeap):
            own.expects_passes = self._unhook is not None
        if setting is not self._setting:
            lane.__dict__[LANE], lane.__dict__[GONE] = setting, lambda: self._setting is None
        lane.__dict__["scheduler"] = own  # past the pipeline's setter, which describes its components anew
        for name, part in vars(pipe).items():
            if name.startswith("tokenizer") and part is not None:
                lane.__dict__[name] = self._tokenizer(part)
        return lane

    def _own_scheduler(self, pipe: Any) -> Any:
        return self._scheduler if isinstance(pipe.scheduler, FixedLeap) else pipe.scheduler

    def _tokenizer(self, part: Any) -> Any:
        """This thread's copy of a tokenizer: fast ones keep padding and truncation as state."""
        copies = self._local.__dict__.setdefault("copies", {})
        if id(part) not in copies:
            copies[id(part)] = part, copy.deepcopy(part)  # holding it keeps its identity from being given to another
        return copies[id(part)][1]
