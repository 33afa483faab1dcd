"""What `hasten certify` is asked to show, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hasten.bench.requests import Request, check_counts, parse_request
from hasten.bench.subject import Subject
from hasten.errors import ConfigError
from hasten.quality.testing import fixed_sequence, holm
from hasten.quality.tolerance import Tolerance, check_name
from hasten.solvers.content import LEAP

__all__ = ["METHODS", "PROCEDURES", "USUAL", "CertifySettings"]

PROCEDURES = {"sequence": fixed_sequence, "holm": holm}
METHODS = ("foca:schedule=even", "hicache")
USUAL = (25, 20, 16, 12, 9, 7, 5)  # numbers of computed steps


@dataclass(frozen=True)
class CertifySettings:
    """What to show, and on what.

    Args:
        quality: name of the certificate: a tier, or one of the user's own.
        tolerance: what is to be kept.
        methods: candidates, as `parse_request` reads them, each at all numbers of computed steps; by default `METHODS`,
            and LEAP where a fit comes with the model.
        computed_steps: numbers of computed steps; `USUAL` ones below the steps by default.
        prompts: how many prompts test; the model's or `prompt_list`'s, after those that screen.
        screen: how many prompts screen: the first ones.
        prompt_list: own prompts instead of the model's, of the kind that will be asked for.
        seed: prompt `i` is drawn with seed `seed + i`.
        steps: that the pipeline is called with.
        call: further arguments of the pipeline's call.
        guidance: least and largest scale; each request has one between, drawn uniformly.
        procedure: `"sequence"` tests from the most expensive setting on, at the full level each, and stops at the
            first that fails; `"holm"` tests all of them, at corrected levels.

    Raises:
        UnknownNameError, ConfigError: for what cannot be shown, such as too few prompts for the confidence.
    """

    quality: str
    tolerance: Tolerance
    methods: tuple[str, ...] | None = None
    computed_steps: tuple[int, ...] | None = None
    prompts: int = 100
    screen: int = 8
    prompt_list: tuple[str, ...] = ()
    seed: int = 3000
    steps: int = 50
    call: dict[str, Any] = field(default_factory=dict)
    guidance: tuple[float, float] | None = None
    procedure: Literal["sequence", "holm"] = "sequence"

    def __post_init__(self) -> None:
        check_name(self.quality)
        if self.screen < 1 or () in (self.methods, self.counts):
            raise ConfigError("give at least one method, one number of computed steps and one prompt that screens")
        if self.procedure not in PROCEDURES:
            raise ConfigError(f"--procedure must be {' or '.join(PROCEDURES)}, got {self.procedure!r}")
        if self.guidance is not None and not 0 <= self.guidance[0] <= self.guidance[1]:
            raise ConfigError(f"--guidance must be a number or a range such as 2:5, got {self.guidance}")
        check_counts(self.counts, self.steps)
        if self.prompts < self.tolerance.fewest:
            raise ConfigError(
                f"{self.prompts} prompts cannot show {self.tolerance}, even if all keep it; "
                f"give --prompts {self.tolerance.fewest} or more"
            )
        requests = [parse_request(text) for text in self.methods or METHODS]
        if staged := [request.label for request in requests if request.resolution is not None]:
            raise ConfigError(f"{staged[0]}: certificates are for caching methods and leap; leave it out of --methods")
        self.check_prompts(self.prompt_list)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of computed steps; of a short run, those that leave something out."""
        if self.computed_steps is not None:
            return self.computed_steps
        return tuple(count for count in USUAL if count < self.steps) or (max(1, self.steps - 1),)

    def candidates(self, model: Subject) -> list[Request]:
        """The methods to try on a model.

        Raises:
            ConfigError: if LEAP was asked for, and no fit comes with the model.
        """
        usual = (*METHODS, *([LEAP] if LEAP in model.fitted else []))
        requests = [parse_request(text) for text in (usual if self.methods is None else self.methods)]
        for request in requests:
            if request.leap:
                request.fit(model)
        return requests

    def check_corrected(self, count: int) -> None:
        """Raise a `ConfigError` if the first of so many settings to pass Holm's test would need more prompts."""
        fewest = replace(self.tolerance, confidence=1 - self.tolerance.level / count).fewest
        if self.prompts < fewest:
            raise ConfigError(
                f"{self.prompts} prompts cannot show {self.tolerance} of any of {count} settings by --procedure holm, "
                f"even if all keep it; give --prompts {fewest} or more, fewer settings, or leave --procedure out"
            )

    def check_prompts(self, known: Sequence[str]) -> None:
        """Raise a `ConfigError` if there are prompts, but fewer different ones than asked for."""
        different = len(set(known))
        if known and self.prompts + self.screen > different:
            raise ConfigError(
                f"--prompts {self.prompts} and --screen {self.screen} ask for more than the {len(set(known))} "
                "different prompts there are; give your own with --prompts-file, of the kind that you will draw"
            )
