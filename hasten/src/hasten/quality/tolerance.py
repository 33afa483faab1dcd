"""How far an image may be from the full run's: bounds on metrics, for a share of requests or for their mean."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from torch import Tensor

from hasten.errors import ConfigError, unknown
from hasten.io import shown
from hasten.parameters import Declared, Range
from hasten.quality import metrics, testing

__all__ = ["EXACT", "METRICS", "TIERS", "Tolerance", "check_measurable", "check_name", "measured", "tier"]

METRICS = ("lpips", "flip", "psnr", "ssim")
EXACT = "exact"  # every step is computed: nothing to certify
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it is part of a file's name, and of requests to a service


@dataclass(frozen=True)
class Tolerance(Declared):
    """Bounds that an image keeps in comparison with the full run's of the same prompt, noise and settings.

    With `share`, that share of requests keeps all bounds. Without, the mean over requests of each loss does: of LPIPS
    (counted as 1 above 1), of FLIP, of 1 - SSIM, and of the squared error that the PSNR stands for.
    """

    max_lpips: Annotated[float | None, Range(above=0, below=1), "largest LPIPS (shift-tolerant, AlexNet)"] = None
    max_flip: Annotated[float | None, Range(above=0, below=1), "largest mean FLIP"] = None
    min_psnr: Annotated[float | None, Range(above=0, below=100), "smallest PSNR in dB"] = None
    min_ssim: Annotated[float | None, Range(above=-1, below=1), "smallest SSIM"] = None
    share: Annotated[float | None, Range(above=0, below=1), "share of requests that keep all bounds"] = 0.95
    confidence: Annotated[float, Range(above=0.5, below=1), "of the certificate"] = 0.9

    def check(self) -> None:
        if not self.bounds:
            names = ", ".join(f.name for f in fields(self) if f.name.startswith(("max_", "min_")))
            raise ConfigError(f"a tolerance needs a bound; give one of {names}, such as max_lpips=0.02")

    @property
    def bounds(self) -> dict[str, float]:
        """Bounds by metric."""
        found = {name: getattr(self, f"{_side(name)}_{name}") for name in METRICS}
        return {name: bound for name, bound in found.items() if bound is not None}

    @property
    def level(self) -> float:
        """The chance of a wrong certificate that is allowed."""
        return 1 - self.confidence

    def kept(self, values: Mapping[str, float]) -> bool:
        """Whether the metrics of an image keep all bounds."""
        return self.strain(values) <= 1

    def strain(self, values: Mapping[str, float]) -> float:
        """The largest loss relative to its bound; at most 1 if all bounds are kept."""
        return max(_loss(name, values[name]) / _loss(name, bound) for name, bound in self.bounds.items())

    def risk(self, requests: Sequence[Mapping[str, float]]) -> float:
        """How near a few requests come to the tolerance, 1 where they reach it; to compare settings by."""
        if self.share is not None:
            return max(map(self.strain, requests))
        losses = {name: [_loss(name, one[name]) for one in requests] for name in self.bounds}
        return max(sum(found) / len(found) / _loss(name, self.bounds[name]) for name, found in losses.items())

    def p_value(self, requests: Sequence[Mapping[str, float]]) -> float:
        """Of the hypothesis that the tolerance is not kept, from the metrics of requests."""
        if self.share is not None:
            return testing.share_p_value(sum(map(self.kept, requests)), len(requests), self.share)
        # It is kept if every mean is: the largest p-value is one of the whole (intersection-union).
        return max(
            testing.mean_p_value([_loss(name, one[name]) for one in requests], _loss(name, bound), self.level)
            for name, bound in self.bounds.items()
        )

    def broken_p_value(self, requests: Sequence[Mapping[str, float]], level: float) -> float:
        """Of the hypothesis that the tolerance is kept; valid whenever it is looked at, while requests come in."""
        if self.share is not None:
            # "Kept" is the loss: its mean is below the share if too many are not.
            return testing.mean_p_value([float(self.kept(one)) for one in requests], self.share, level, always=True)
        tests = [
            testing.mean_p_value(
                [1 - _loss(name, one[name]) for one in requests], 1 - _loss(name, bound), level, always=True
            )
            for name, bound in self.bounds.items()
        ]
        return min(1.0, len(tests) * min(tests))

    def bound(self, requests: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """What is certain with this confidence: the least share, or the worst mean of each metric."""
        if self.share is not None:
            kept = sum(map(self.kept, requests))
            return {"share": testing.share_lower_bound(kept, len(requests), self.confidence)}
        return {
            name: _value(name, testing.mean_upper_bound([_loss(name, one[name]) for one in requests], self.confidence))
            for name in self.bounds
        }

    @property
    def fewest(self) -> int:
        """Fewer requests cannot show that it is kept."""
        if self.share is not None:
            return testing.fewest_for_share(self.share, self.level)
        return max(testing.fewest_for_mean(_loss(name, bound), self.level) for name, bound in self.bounds.items())

    def hopeless(self, requests: Sequence[Mapping[str, float]], total: int) -> bool:
        """Whether no further requests, up to `total`, can show that it is kept."""
        if self.share is None:
            return False
        failures = sum(not self.kept(one) for one in requests)
        return failures > testing.most_failures(total, self.share, self.level)

    def __str__(self) -> str:
        signs = {"max": "<=", "min": ">="}
        bounds = ", ".join(f"{name.upper()} {signs[_side(name)]} {bound:g}" for name, bound in self.bounds.items())
        whom = "in the mean" if self.share is None else f"for {self.share:.0%} of requests"
        return f"{bounds} {whom}, confidence {self.confidence:.0%}"


def tier(name: str) -> Tolerance:
    """The tolerance of a tier.

    Raises:
        UnknownNameError: for another name.
    """
    if name not in TIERS:
        raise unknown("quality", name, [*TIERS, EXACT])
    return TIERS[name]


def check_name(quality: str) -> None:
    """Find out whether a certificate can be called so.

    Raises:
        ConfigError: if it cannot.
    """
    if not NAME.fullmatch(quality):
        raise ConfigError(
            f"--quality {shown(quality)}: a certificate's name has 1 to 64 letters, digits, dashes and underscores"
        )
    if quality in (EXACT, "auto"):
        raise ConfigError(f"--quality {quality} is another thing by that name; give your bounds another one")


def check_measurable(tolerance: Tolerance) -> None:
    """Find out, before anything is drawn, whether what a tolerance bounds can be measured.

    Raises:
        ModelError: if it bounds LPIPS, whose weights are not installed.
    """
    if "lpips" in tolerance.bounds:
        metrics.lpips()


def measured(tolerance: Tolerance, image: Tensor, reference: Tensor) -> dict[str, float]:
    """The metrics that a tolerance bounds, of images `[3, H, W]` or clips `[F, 3, H, W]` in [0, 1].

    Raises:
        ModelError: if it bounds LPIPS, whose weights are not installed.
    """
    known: dict[str, Any] = {"flip": metrics.flip, "psnr": metrics.psnr, "ssim": metrics.ssim}
    if "lpips" in tolerance.bounds:
        known["lpips"] = metrics.lpips()
    values = {name: metrics.over_frames(known[name], image, reference) for name in tolerance.bounds}
    return {name: min(value, metrics.PSNR_CEILING) for name, value in values.items()}


def _side(name: str) -> str:
    return "min" if name in ("psnr", "ssim") else "max"


def _loss(name: str, value: float) -> float:
    """A metric as a loss in [0, 1]."""
    if name == "psnr":
        return float(10 ** (-value / 10))
    return (1 - value) / 2 if name == "ssim" else min(value, 1.0)


def _value(name: str, loss: float) -> float:
    """The metric that a loss stands for."""
    if name == "psnr":
        return -10 * math.log10(max(loss, 1e-10))
    return 1 - 2 * loss if name == "ssim" else loss


# Lossless is what nobody tells apart side by side, high what nobody misses alone, draft what keeps the composition.
TIERS = {
    "lossless": Tolerance(max_lpips=0.005, min_psnr=40.0),
    "high": Tolerance(max_lpips=0.02, min_psnr=30.0),
    "draft": Tolerance(max_lpips=0.1, min_psnr=20.0),
}
