"""Calls that are checked against the full run while a certified setting is at work."""

from __future__ import annotations

import copy
import functools
import logging
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.errors import ConfigError
from hasten.io import describe
from hasten.quality.certificate import Certificate
from hasten.quality.tolerance import measured

__all__ = ["Audit"]

log = logging.getLogger("hasten")

LEVEL = 0.01  # chance of a false alarm, over all calls there will ever be


class Audit:
    """Makes the full run beside some calls of a pipeline, compares, and warns through the logger `hasten`.

    A call outside of the tolerance is a warning, since a certificate allows some. When so many are that the certified
    share cannot hold any more, which a test that may be looked at all the time decides, it is an error. So is a full
    run that fails; the call that it was made for gives what it gives.

    Args:
        pipe: the pipeline.
        certificate: whose tolerance is checked.
        share: of the calls.
        full: gives a pipeline that computes everything.

    Attributes:
        checked: the metrics of each checked image.
        plain_class: class of the pipeline without audits.

    Raises:
        ConfigError: if the share is no share.
    """

    def __init__(
        self, pipe: Any, certificate: Certificate, share: float, full: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"audit is the share of calls to check, above 0 to 1; got {share}")
        self._pipe, self._certificate, self._share, self._full = pipe, certificate, share, full
        self._random, self._lock = random.Random(), threading.Lock()
        self.checked: list[dict[str, float]] = []
        self._alarmed = self._said = False
        self.plain_class: Any = type(pipe)
        plain_call = self.plain_class.__call__

        @functools.wraps(plain_call)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                chosen = self._random.random() < self._share
            return self._checked(plain_call, pipe, args, kwargs) if chosen else plain_call(pipe, *args, **kwargs)

        names = {"__call__": call, "__module__": self.plain_class.__module__, "__doc__": self.plain_class.__doc__}
        self._class = type(self.plain_class.__name__, (self.plain_class,), names)
        pipe.__class__ = self._class

    def close(self) -> None:
        """Give the pipeline its class back."""
        if type(self._pipe) is self._class:
            self._pipe.__class__ = self.plain_class

    def _checked(self, call: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        again, named_again = [_again(value) for value in args], {name: _again(x) for name, x in kwargs.items()}
        state = torch.get_rng_state()
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        output = call(pipe, *args, **kwargs)
        try:
            # Without a generator the noise is of the global one, which is left as the call alone would leave it.
            with torch.random.fork_rng(), self._full() as full:
                torch.set_rng_state(state)
                if devices:
                    torch.cuda.set_rng_state_all(devices)
                reference = call(full, *again, **named_again)
            self._compare(output, reference)
        except Exception as error:
            kind = type(error).__name__
            log.error("audit: a call is not checked, since its full run failed (%s: %s)", kind, describe(error))
        return output

    def _compare(self, output: Any, reference: Any) -> None:
        images, references = _images(output), _images(reference)
        if images is None or references is None:
            if not self._said:
                log.warning("audit: calls with output_type='latent' have no images to compare, and are not checked")
            self._said = True
            return
        for image, other in zip(images, references, strict=True):
            self._record(image, other)

    def _record(self, image: Tensor, reference: Tensor) -> None:
        tolerance, quality = self._certificate.tolerance, self._certificate.quality
        values = measured(tolerance, image, reference)
        with self._lock:
            self.checked.append(values)
            p_value = tolerance.broken_p_value(self.checked, LEVEL)
            alarm = p_value <= LEVEL and not self._alarmed
            self._alarmed |= alarm
            count, outside = len(self.checked), sum(not tolerance.kept(one) for one in self.checked)
        if not tolerance.kept(values) and tolerance.share is not None:
            found = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            log.warning(
                "audit: a call is outside of quality %r (%s; %s); %d of %d checked calls are",
                quality, found, tolerance, outside, count,
            )  # fmt: skip
        if alarm:
            log.error(
                "audit: quality %r does not hold any more: %d of %d checked calls are outside of %s (p = %.2g); "
                "prompts or settings are not those that were certified. Certify again: hasten certify",
                quality, outside, count, tolerance, p_value,
            )  # fmt: skip


def _again(value: Any) -> Any:
    """An argument for a second call: generators where they stand now, tensors that the first call cannot change."""
    if isinstance(value, torch.Generator):
        made = torch.Generator(value.device)
        made.set_state(value.get_state())
        return made
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_again(item) for item in value]
    return copy.copy(value) if isinstance(value, dict) else value


def _images(output: Any) -> list[Tensor] | None:
    """Images `[3, H, W]` or clips `[F, 3, H, W]` in [0, 1] of a pipeline's result; None for latents."""
    result = output[0] if isinstance(output, tuple) else getattr(output, "frames", None)
    found = [_image(one) for one in (output.images if result is None else result)]
    return None if any(one is None for one in found) else [one for one in found if one is not None]


def _image(one: Any) -> Tensor | None:
    if isinstance(one, list):
        frames = [_image(frame) for frame in one]
        return None if any(frame is None for frame in frames) else torch.stack([f for f in frames if f is not None])
    if isinstance(one, Tensor):
        pixels = one.detach().float().cpu()
    else:
        array = np.asarray(one)
        pixels = torch.from_numpy(array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1))
        pixels = pixels.movedim(-1, -3) if pixels.ndim >= 3 else pixels
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3 or pixels.min() < -1e-3 or pixels.max() > 1.001:
        return None
    return pixels.clamp(0, 1)
