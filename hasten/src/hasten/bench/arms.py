"""What is compared: one `Arm` for each way of sampling, each switched on for one call and off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import UniPCMultistepScheduler

from hasten import registry
from hasten.acceleration import Acceleration, accelerate
from hasten.caching import CachingMethod, full_steps
from hasten.errors import ConfigError, unknown

__all__ = ["Arm", "method_arms", "parse_method", "plain_arms"]

Attach = Callable[[Any], AbstractContextManager[Acceleration | None]]


@dataclass(frozen=True)
class Arm:
    """One way of sampling.

    Attributes:
        id: unique in a result, such as `"hicache-9"`.
        method: name, such as `"hicache"` or `"euler"`.
        library: `"hasten"`, `"plain"` or a peer's name.
        params: parameters, as they are reported.
        steps: sampler steps.
        full_steps: steps whose blocks run.
        attach: switches the arm on for a pipeline, for the length of a `with`.
    """

    id: str
    method: str
    library: str
    params: dict[str, Any]
    steps: int
    full_steps: int
    attach: Attach


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_method(text: str) -> tuple[str, CachingMethod]:
    """Read `name` or `name:param=value:param=value`, such as `hicache:order=1:site=module`.

    Returns:
        the text as a label, and the method.
    """
    name, *assignments = text.strip().split(":")
    params = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(
                f"{assignment!r} in {text!r} is not param=value; write for instance hicache:order=1:sigma=0.7"
            )
        params[key.strip()] = _value(value.strip())
    return text.strip(), registry.build(name, **params)


def method_arms(texts: list[str], counts: list[int], total: int) -> list[Arm]:
    """Every method at every number of full steps: the smallest interval that has no more."""

    def arm(label: str, method: CachingMethod) -> Arm:
        count = len(full_steps(method.plan(), total))
        params = {k: v for k, v in asdict(method).items() if v is not None}
        return Arm(f"{label}-{count}", label, "hasten", params, total, count, lambda pipe: accelerate(pipe, method))

    return [arm(label, m.with_full_steps(n, total)) for n in counts for label, m in map(parse_method, texts)]


@contextmanager
def _as_it_is(pipe: Any) -> Iterator[None]:
    yield


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


_PLAIN: dict[str, Attach] = {"euler": _as_it_is, "unipc": _unipc}


def plain_arms(counts: list[int], samplers: tuple[str, ...] = ("euler", "unipc")) -> list[Arm]:
    """The plain sampler with as many steps as the methods compute: the comparison that every method has to win.

    `"euler"` is the pipeline's own scheduler (Euler for flow-matching models), `"unipc"` a second-order multistep
    solver.
    """
    for name in samplers:
        if name not in _PLAIN:
            raise unknown("sampler", name, _PLAIN)
    return [Arm(f"{name}-{n}", name, "plain", {}, n, n, _PLAIN[name]) for n in counts for name in samplers]
