"""What is seen of a denoiser at a site: whether it is right there, and what a skipped step still runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import tiny
import torch
from tiny import Tiny
from torch import Tensor, nn

import hasten
from denoisers.clips import CLIPS
from denoisers.images import IMAGES
from denoisers.sounds import SOUNDS
from denoisers.unets import UNETS
from hasten.errors import AdapterError, HastenError
from hasten.models import root_arguments
from hasten.pipeline.runs import Run, Runs, StepInfo

SITES = ("hidden", "output", "module", "deep")
STEPS, INTERVAL = 4, 2  # computed: 0 and 2
TRANSFORMERS: dict[str, Tiny] = {**tiny.TINY, **IMAGES, **CLIPS, **SOUNDS}
DENOISERS: dict[str, Tiny] = {**TRANSFORMERS, **UNETS}
# Classes of the packages of denoisers that denoise nothing on their own.
PARTS = {
    "MiniMaxMusic3RVQDepthDecoder": "turns one frame of sound into codes",
    "DreamLiteTransformer2DModel": "a part of DreamLiteUNetModel",
    "TransformerTemporalModel": "a part of UNet3DConditionModel",
    "MotionAdapter": "weights for UNetMotionModel",
}


def shipped() -> set[str]:
    """Names of the denoiser classes of the installed diffusers."""
    found = set()
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name[0].isupper() else None
        if not inspect.isclass(cls) or not issubclass(cls, diffusers.ModelMixin) or cls is diffusers.ModelMixin:
            continue
        module = cls.__module__.removeprefix("diffusers.")
        ours = module.startswith(("models.transformers.", "models.unets.")) or name.startswith("UNet")
        if ours or (_timed(cls) and not module.startswith(("models.controlnets.", "models.autoencoders."))):
            found.add(name)
    return found - set(PARTS)


def _timed(cls: Any) -> bool:
    """Whether a class is called with a time, in the words of the probe."""
    try:
        return bool(root_arguments(cls))
    except AdapterError:
        return False


@dataclass(frozen=True)
class Verdict:
    """What was seen of one denoiser at one site.

    Attributes:
        status: `"right"`, `"refused"` (an error of hasten before anything was lost), or what is wrong.
        share: calls of layers in a skipped step, as a share of a computed one's; None where none was skipped.
        detail: the message of a refusal.
    """

    status: str
    share: float | None = None
    detail: str = ""


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of a denoiser's output."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


class _Counted(Runs):
    """Every forward is a step, whatever the timestep: so that input and time can be held constant."""

    left = 1000

    def label(self, timestep: Any, hidden: Any, name: str | None = None) -> tuple[Run, StepInfo]:
        self.left -= 1
        return super().label(float(self.left), hidden, name)


class Subject:
    """A tiny denoiser, and what it gives when it is plain."""

    def __init__(self, name: str) -> None:
        self.tiny = DENOISERS[name]
        self.model: Any = tiny.build(name, self.tiny)
        self.calls = 0
        self.plain = self.outputs(steps=2)
        self.constant = self.outputs(constant=True, steps=1)[0]

    @torch.no_grad()
    def outputs(
        self, constant: bool = False, shares: list[int] | None = None, steps: int = STEPS
    ) -> list[list[Tensor]]:
        """All outputs of each of a few steps."""
        start = tiny.randn(*self.tiny.latent, seed=1)
        drift = tiny.randn(*self.tiny.latent, seed=2)
        found = []
        for i in range(steps):
            x, t = (start, 0.7) if constant else (start + 0.1 * i * drift, 1 - i / STEPS)
            self.calls = 0
            found.append(tensors(self.model(**self.tiny.arguments(x, t))))
            if shares is not None:
                shares.append(self.calls)
        return found

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count calls of the layers that have weights."""

        def count(*_: Any) -> None:
            self.calls += 1

        layers = [m for m in self.model.modules() if not list(m.children()) and list(m.parameters(recurse=False))]
        handles = [layer.register_forward_hook(count) for layer in layers]
        yield
        for handle in handles:
            handle.remove()

    def state(self) -> Any:
        """What an acceleration could leave behind."""
        tree = {name: id(module) for name, module in self.model.named_modules()}
        return tree, set(self.model.__dict__) - {"_diffusers_hook"}

    def check(self, site: str) -> Verdict:
        """Whether a cache at the site is right."""
        before = self.state()
        try:
            verdict = self._check(site)
        except HastenError as error:
            verdict = Verdict("refused", detail=str(error))
        except Exception as error:
            verdict = Verdict("crashed", detail=f"{type(error).__name__}: {error}")
        hasten.remove(self.model)
        if self.state() != before or not _same(self.outputs(steps=1), self.plain[:1]):
            return Verdict("left traces")
        return verdict

    def _check(self, site: str) -> Verdict:
        params = {"site": site, "warmup": 1}
        with _counted(self.model, interval=1, **params):
            if not _same(self.outputs(steps=2), self.plain):
                return Verdict("interval 1 is not the plain model")
        with _counted(self.model, interval=INTERVAL, **params):
            for step in self.outputs(constant=True, steps=2):
                if not near(step, self.constant):
                    return Verdict("an output is lost")
        calls: list[int] = []
        with self.counting(), _counted(self.model, interval=INTERVAL, **params) as run:
            first = self.outputs(shares=calls)
            computed = [record.computed for record in run.records]
            run.reset()
            second = self.outputs()
        if computed != [i % INTERVAL == 0 for i in range(STEPS)]:
            return Verdict("steps are not skipped")
        share = calls[INTERVAL + 1] / calls[INTERVAL]
        if not _same(first, second):
            return Verdict("a second run differs", share)
        if share > LARGEST_SHARE:
            return Verdict("skipped steps run too much", share)
        return Verdict("right", share)

    def gate(self, method: str) -> str:
        """What a gate does that lets no change pass: `"computes"` every step, `"refused"`, or what is wrong."""
        try:
            with hasten.accelerate(self.model, method, threshold=1e-9, warmup=1) as run:
                for engine in run._engines.values():
                    engine.runs = _Counted(self.model)
                self.outputs()
                return "computes" if all(record.computed for record in run.records) else "skips whatever comes"
        except HastenError:
            return "refused"


LARGEST_SHARE = 0.75  # of layers that a skipped step may run; tiny models have few blocks beside their embeddings


def _counted(model: nn.Module, **params: Any) -> Any:
    run = hasten.accelerate(model, "reuse", **params)
    for engine in run._engines.values():
        engine.runs = _Counted(model)
    return run


def _same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(first, second, strict=True))


def near(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all outputs are there and right; a cache sums in another order than the model."""
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True)
    )


@cache
def subject(name: str) -> Subject:
    """The denoiser of that class, built once."""
    return Subject(name)
