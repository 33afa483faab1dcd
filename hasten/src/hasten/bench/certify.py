"""`hasten certify`: the cheapest setting that keeps a tolerance, shown on held-out prompts.

A few prompts *screen*: they match thresholds, and choose the settings to test and their order, from the most expensive
to the cheapest, each kept only if no cheaper one is better. Other prompts *test* them; see `hasten.quality.testing`. A
setting that no further prompt could save is not drawn to the end, and in a sequence nothing after the first that fails.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten import registry
from hasten.bench.arms import Accelerated, Arm, Solved, method_arms, one_line
from hasten.bench.certify_settings import PROCEDURES, CertifySettings
from hasten.bench.environment import environment
from hasten.bench.partial import Partial
from hasten.bench.sampling import count_flops, draw_sample, plain
from hasten.bench.subject import Subject
from hasten.bench.thresholds import Trials
from hasten.caching.engine import CachingEngine
from hasten.calibration import Calibration
from hasten.errors import CertificateError, ConfigError, FileError, HastenError
from hasten.io import Kind, alone, check_target, digest_of, read_tensors, write_tensors
from hasten.pipeline.runs import Run
from hasten.pipeline.view import PipelineView, denoisers
from hasten.quality.certificate import Certificate, Evidence, Tried, store
from hasten.quality.conditions import Call, Conditions, pipeline_name, scheduler_facts
from hasten.quality.model_facts import ModelFacts
from hasten.quality.setting import FULL
from hasten.quality.tolerance import check_measurable, measured

__all__ = ["run_certify"]

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
Values = dict[str, float]

MARK = 12  # digits that tell what two commands drew for one certificate apart
REFERENCE = Kind("image of a full run", dict[str, Any], CertificateError, "Delete it to draw it again.", 1 << 30)


@dataclass(frozen=True)
class _Request:
    number: int
    prompt: str
    seed: int
    call: dict[str, Any]


@dataclass(frozen=True)
class _Candidate:
    """A setting with what it costs and how it did while screening."""

    arm: Arm
    setting: str
    files: dict[str, Path]
    flops: int
    strain: float


def run_certify(
    model: Subject,
    settings: CertifySettings,
    out: Path | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> tuple[Certificate, Path]:
    """Find the cheapest setting that keeps the tolerance; returns its certificate and where it was written.

    What is drawn is compared and kept beside the certificate until the end: called again with the same prompts, seeds
    and steps, a run that was cut short goes on where it stopped.

    Args:
        model: from `open_model`.
        settings: what to show.
        out: path of the certificate; in the store of this machine by default.
        progress: called with (what is being done, done, of how many).
        command: the command line that asked for it.

    Raises:
        CertificateError: if no setting passes; it names the nearest.
        ConfigError: if the model cannot be drawn so, or there are too few prompts.
        KeyboardInterrupt: with a line on how to go on.
    """
    return _Certification(model, settings, out, progress or (lambda label, done, total: None), command).run()


class _Certification:
    """One run of `hasten certify`."""

    def __init__(
        self, model: Subject, settings: CertifySettings, out: Path | None, progress: Progress, command: str
    ) -> None:
        self._model, self._settings, self._progress, self._command = model, settings, progress, command
        check_measurable(settings.tolerance)
        settings.check_prompts(settings.prompt_list or model.prompts)
        model.check_call(settings.call)
        self._methods = settings.candidates(model)
        known = list(dict.fromkeys(settings.prompt_list or model.prompts))
        requests = [self._request(i, prompt) for i, prompt in enumerate(known[: settings.screen + settings.prompts])]
        self._screening, self._testing = requests[: settings.screen], requests[settings.screen :]
        self._conditions = self._observe()
        self._out = out or self._place()
        check_target(self._out)
        identity = {
            "model": model.name,
            "conditions": digest_of(vars(self._conditions) | {"models": str(self._conditions.models)}),
            "requests": [(request.prompt, request.seed) for request in requests],
            "metrics": sorted(settings.tolerance.bounds),
            "environment": environment(),
        }
        digest = digest_of(identity)[:MARK]
        self._folder = self._out.parent / f".certify-{self._out.stem}-{digest}"
        self._kept = Partial(self._folder / "values.json", identity)

    def run(self) -> tuple[Certificate, Path]:
        with alone(self._out):
            for other in self._out.parent.glob(f".certify-{glob.escape(self._out.stem)}-{'?' * MARK}"):
                if other != self._folder:  # of another command for this certificate, which would be replaced
                    shutil.rmtree(other)
            return self._run()

    def _run(self) -> tuple[Certificate, Path]:
        try:
            candidates = self._screen()
            tried, values = self._test(candidates)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"what was drawn is kept in {self._folder}; the same command goes on from there"
            ) from None
        passed = [index for index, result in enumerate(tried) if result.passed]
        if not passed:
            raise CertificateError(self._nothing(tried))
        best = min(passed, key=lambda index: candidates[index].flops)
        path = self._write(candidates[best], tried, best, values[best])
        shutil.rmtree(self._folder)
        return Certificate.load(path), path

    # --- requests and conditions

    def _request(self, number: int, prompt: str) -> _Request:
        seed, call = self._settings.seed + number, dict(self._settings.call)
        if self._settings.guidance is not None:
            scale = random.Random(seed).uniform(*self._settings.guidance)
            call |= {"true_cfg_scale": scale, "negative_prompt": ""}
        return _Request(number, prompt, seed, call)

    def _observe(self) -> Conditions:
        """What a full run is like, seen as `accelerate` will see calls."""
        pipe, found = self._model.pipe, []

        def see(run: Run) -> None:
            found.append(Call.of(run))

        modules, home = denoisers(pipe), PipelineView(pipe)
        ends = self._settings.guidance or (None,)
        for scale in dict.fromkeys(ends):
            call = dict(self._settings.call)
            if scale is not None:
                call |= {"true_cfg_scale": scale, "negative_prompt": ""}
            engines = [CachingEngine(module, FULL, home, see) for module in modules.values()]
            try:
                for engine in engines:
                    engine.attach()
                prompt = self._screening[0].prompt
                draw_sample(self._model, plain, self._settings.steps, prompt, self._settings.seed, call)
            finally:
                for engine in engines:
                    engine.detach()
        first, name, config = found[0], *scheduler_facts(pipe.scheduler)
        if first.timesteps is None:
            raise ConfigError(f"{self._model.name} does not tell the steps of its scheduler, and cannot be certified")
        return Conditions(
            pipeline=pipeline_name(pipe),
            models={key: ModelFacts.of(module) for key, module in modules.items()},
            scheduler=name,
            scheduler_config=config,
            steps=self._settings.steps,
            timesteps=first.timesteps,
            height=first.height,
            width=first.width,
            frames=first.frames,
            guidance={
                key: (min(one.guidance[key] for one in found), max(one.guidance[key] for one in found))
                for key in first.guidance
            },
        )

    def _place(self) -> Path:
        conditions = {key: value for key, value in vars(self._conditions).items() if key != "models"}
        models = {key: vars(facts) for key, facts in self._conditions.models.items()}
        folder = store() / digest_of(models)[:12]
        return folder / f"{self._settings.quality}-{digest_of(conditions)[:8]}.json"

    # --- drawing

    def _values(self, arm: Arm, setting: str, request: _Request) -> Values:
        """The metrics of a request; drawn unless they were before."""

        def compute() -> tuple[float, ...]:
            sample = draw_sample(self._model, arm.attach, arm.steps, request.prompt, request.seed, request.call)
            values = measured(self._settings.tolerance, sample.image, self._reference(request))
            return tuple(values[name] for name in self._settings.tolerance.bounds)

        found = self._kept.trial(f"{setting} at {arm.computed_steps}, request {request.number}", compute)
        return dict(zip(self._settings.tolerance.bounds, found, strict=True))

    def _reference(self, request: _Request) -> Tensor:
        file = self._folder / f"{request.number:05d}.safetensors"
        if file.exists():
            return torch.from_numpy(read_tensors(file, REFERENCE)[0]["image"])
        sample = draw_sample(self._model, plain, self._settings.steps, request.prompt, request.seed, request.call)
        write_tensors(file, REFERENCE, {"image": sample.image.numpy()}, {})
        return sample.image

    # --- screening

    def _screen(self) -> list[_Candidate]:
        """The settings to test, from the most expensive to the cheapest: none has a cheaper one that did better."""
        settings = self._settings
        trials = Trials(
            self._model,
            [request.prompt for request in self._screening],
            settings.seed,
            settings.steps,
            settings.call,
            lambda label: self._progress(label, 0, None),
            self._kept.trial,
        )
        arms = method_arms(self._methods, settings.counts, settings.steps, trials)
        usable = {arm.id: arm for arm in arms if not arm.error}
        reasons = [f"{arm.method}: {arm.error}" for arm in arms if arm.error]
        total = len(usable) * len(self._screening)
        found = []
        for number, arm in enumerate(usable.values()):
            try:
                found.append(self._screened(arm, number * len(self._screening), total))
            except FileError:
                raise
            except HastenError as error:  # such as a fit without guidance, where there is guidance: the others can
                log.warning("%s cannot be tested: %s", arm.id, error)
                reasons.append(f"{arm.id}: {one_line(error)}")
        if not found:
            raise ConfigError(f"none of the methods can be tested; {reasons[0]}")
        self._progress("screening", total, total)
        kept: list[_Candidate] = []
        for candidate in sorted(found, key=lambda one: (one.flops, one.strain)):
            if all(candidate.strain < cheaper.strain for cheaper in kept):
                kept.append(candidate)
        return kept[::-1]

    def _screened(self, arm: Arm, done: int, total: int) -> _Candidate:
        """How a setting does on the prompts that screen."""
        setting, files = _setting(arm, digest_of(self._out.name)[:6])
        values: list[Values] = []
        for request in self._screening:
            self._progress(f"screening: {arm.id}", done + len(values), total)
            values.append(self._values(arm, setting, request))
        first = self._screening[0]
        (flops,) = self._kept.trial(f"cost of {setting} at {arm.computed_steps}", partial(self._flops, arm, first))
        return _Candidate(arm, setting, files, int(flops), self._settings.tolerance.risk(values))

    def _flops(self, arm: Arm, request: _Request) -> tuple[float]:
        flops, _ = count_flops(self._model, arm.attach, arm.steps, request.prompt, request.seed, request.call)
        return (flops,)

    # --- testing

    def _test(self, candidates: Sequence[_Candidate]) -> tuple[list[Tried], list[list[Values]]]:
        """What came of each setting; in a sequence, up to the first that fails."""
        settings, tolerance = self._settings, self._settings.tolerance
        if settings.procedure == "holm":
            settings.check_corrected(len(candidates))
        everything: list[list[Values]] = []
        p_values: list[float] = []
        for candidate in candidates:
            values: list[Values] = []
            for request in self._testing:
                self._progress(f"testing: {candidate.arm.id}", len(values), len(self._testing))
                values.append(self._values(candidate.arm, candidate.setting, request))
                if tolerance.hopeless(values, len(self._testing)):
                    break
            self._progress(f"testing: {candidate.arm.id}", len(values), len(values))
            everything.append(values)
            p_values.append(1.0 if len(values) < len(self._testing) else tolerance.p_value(values))
            if settings.procedure == "sequence" and p_values[-1] > tolerance.level:
                break
        passed = PROCEDURES[settings.procedure](p_values, tolerance.level)
        (full,) = self._kept.trial("cost of the full run", partial(self._flops, self._full_arm, self._screening[0]))
        tried = [
            Tried(
                setting=candidate.setting,
                computed_steps=candidate.arm.computed_steps,
                flops_ratio=round(full / candidate.flops, 4),
                requests=len(values),
                kept=sum(map(tolerance.kept, values)),
                p_value=p_value,
                passed=yes,
            )
            for candidate, values, p_value, yes in zip(candidates, everything, p_values, passed, strict=False)
        ]
        return tried, everything

    @property
    def _full_arm(self) -> Arm:
        steps = self._settings.steps
        return Arm("full", "full", "plain", {}, steps, steps)

    def _nothing(self, tried: Sequence[Tried]) -> str:
        nearest = max(tried, key=lambda one: one.kept / one.requests)
        return (
            f"no setting keeps {self._settings.tolerance}: the nearest, {nearest.setting} with "
            f"{nearest.computed_steps:g} computed steps, kept it for {nearest.kept} of {nearest.requests} prompts; "
            "allow more, or give larger --computed-steps or other --methods"
        )

    # --- the certificate

    def _write(self, best: _Candidate, tried: Sequence[Tried], index: int, values: Sequence[Values]) -> Path:
        settings, tolerance = self._settings, self._settings.tolerance
        certificate = Certificate(
            quality=settings.quality,
            tolerance=tolerance,
            setting=best.setting,
            computed_steps=best.arm.computed_steps,
            flops_ratio=tried[index].flops_ratio,
            conditions=self._conditions,
            evidence=Evidence(
                requests=len(values),
                kept=sum(map(tolerance.kept, values)),
                bound=tolerance.bound(values),
                metrics={name: _spread(name, [one[name] for one in values]) for name in tolerance.bounds},
                prompts=digest_of([(request.prompt, request.seed) for request in self._testing]),
                screened=len(self._screening),
                procedure=settings.procedure,
                tried=tuple(tried),
            ),
            environment=environment(),
            command=self._command,
            model=self._model.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        files = {}
        for name, file in best.files.items():  # what was learned carries what was shown of it
            calibration = Calibration.load(file)
            options = {**calibration.options, "certificate": certificate.content}
            written = replace(calibration, options=options).save(self._out.with_name(name))
            files[name] = hashlib.sha256(written.read_bytes()).hexdigest()
        return replace(certificate, files=files).save(self._out)


def _setting(arm: Arm, mark: str) -> tuple[str, dict[str, Path]]:
    """The method expression of an arm with its files by the names that they will have beside the certificate.

    The mark is the certificate's: each has files of its own, as they carry what was shown of them.
    """
    attach = arm.attach
    if isinstance(attach, Solved):
        method, given = f"leap:calibration={attach.calibration.file}", [attach.calibration]
    else:
        assert isinstance(attach, Accelerated)
        method = registry.format(attach.method)
        values = [getattr(attach.method, item.name) for item in fields(attach.method)]  # type: ignore[arg-type]
        given = [value for value in values if isinstance(value, Calibration)]
    files = {}
    for calibration in given:
        if calibration.file is None:
            raise ConfigError(f"{arm.id}: its calibration is in no file; save it and give the path")
        path = Path(calibration.file)
        name = f"{calibration.method}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}-{mark}{path.suffix}"
        files[name] = path
        method = method.replace(f"={calibration.file}", f"={name}")
    return method, files


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    worst = min(values) if name in ("psnr", "ssim") else max(values)
    return {"median": statistics.median(values), "mean": statistics.fmean(values), "worst": worst}
