"""Many images into a folder, each with where it came from; a run that ended in any way goes on where it stopped.

An image is written when it is whole, after the file with its provenance; so an image that is there is finished, and
after `kill -9` the same call leaves out what is.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from torch import Tensor

from hasten.acceleration import accelerate
from hasten.bench.edits import edit_of
from hasten.bench.environment import environment
from hasten.bench.sampling import call_arguments
from hasten.bench.sheet import png_of
from hasten.bench.subject import Subject, open_model
from hasten.bench.video import write_video
from hasten.errors import ConfigError, FileError, HastenError, unknown
from hasten.io import describe, digest_of, parse_json, read_bytes, read_json, read_lines, shown, write_atomically
from hasten.parameters import MOST_GUIDANCE, MOST_PIXELS, MOST_STEPS, Declared, Range, Text, parameters
from hasten.pipeline.view import denoisers
from hasten.quality.configuration import Configuration
from hasten.quality.model_facts import ModelFacts
from hasten.quality.setting import check_quality
from hasten.quality.tolerance import EXACT

__all__ = ["Failure", "Job", "Worker", "generate", "read_jobs"]

ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
LONGEST_ID = 120  # characters
MOST_SEED = 2**63 - 1
SHOWN = 5  # of the jobs that cannot be done
LONGEST_LINE = 1 << 20  # bytes
LARGEST_IMAGE = 4 << 30
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job(Declared):
    """One image to generate; what is left at None is as the model or the configuration has it."""

    id: Annotated[str, Text(1, LONGEST_ID), "name of its files"]
    prompt: Annotated[str, Text(), "what to draw"]
    seed: Annotated[int, Range(0, MOST_SEED), "of its noise"] = 0
    negative_prompt: Annotated[str | None, Text(), "what not to draw, with guidance"] = None
    steps: Annotated[int | None, Range(1, MOST_STEPS), "steps that the pipeline is called with"] = None
    height: Annotated[int | None, Range(1, MOST_PIXELS), "in pixels"] = None
    width: Annotated[int | None, Range(1, MOST_PIXELS), "in pixels"] = None
    guidance: Annotated[float | None, Range(0, MOST_GUIDANCE), "true classifier-free guidance"] = None
    quality: Annotated[str | None, Text(1), "a certified tier, or exact"] = None
    computed_steps: Annotated[int | None, Range(1, MOST_STEPS), "steps to compute"] = None

    def check(self) -> None:
        if not ID.fullmatch(self.id):
            raise ConfigError(f"id must be letters, digits, dots, dashes and underscores, got {self.id!r}")


@dataclass(frozen=True)
class Failure:
    """A job that could not be done, and why."""

    id: str
    error: str


def read_jobs(file: Path, seed: int = 0) -> list[Job]:
    """The jobs of a file: JSON lines such as `{"id": "a1", "prompt": "a red apple", "seed": 7}`, or plain prompts.

    Args:
        file: with one job per line. A line that is no JSON object is a prompt; jobs without an id have the number of
            their line.
        seed: of the job on line `i` is `seed + i`, unless it has its own.

    Raises:
        ConfigError: for a file that cannot be read or holds no job, and for a bad line, with its number.
    """
    try:
        lines = read_lines(file)
    except (OSError, ValueError) as error:
        reason = describe(error)
        raise ConfigError(f"--prompts-file {file}: not readable as text ({reason}); give one job per line") from error
    jobs: dict[str, Job] = {}
    qualities: set[str] = set()  # that are known: all certificates are read to find that out
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            job = _job(line.strip(), number, seed)
            if job.quality is not None and job.quality not in qualities:
                check_quality(job.quality)
                qualities.add(job.quality)
        except (HastenError, ValueError) as error:
            why = str(error) if isinstance(error, HastenError) else describe(error)
            raise ConfigError(f"--prompts-file {file}, line {number + 1}: {why}") from error
        if job.id in jobs:
            raise ConfigError(f"--prompts-file {file}, line {number + 1}: the id {job.id!r} is there twice")
        jobs[job.id] = job
    if not jobs:
        raise ConfigError(f"--prompts-file {file}: no jobs in it; write one prompt or JSON object per line")
    return list(jobs.values())


def _job(line: str, number: int, seed: int) -> Job:
    given: dict[str, Any] = {"id": f"{number:05d}", "seed": seed + number}
    if len(line) > LONGEST_LINE:
        raise ValueError(f"it has {len(line)} bytes, expected at most {LONGEST_LINE}")
    if not line.startswith("{"):
        if _is_json(line):
            raise ConfigError(f'{shown(line)} is JSON, but no object: write {{"prompt": ...}}, or the prompt as it is')
        return Job(**given, prompt=line)
    content = parse_json(line)
    for name in content:
        if name not in parameters(Job):
            raise unknown("entry", name, parameters(Job))
    if "prompt" not in content:
        raise ValueError("it has no prompt")
    if type(content.get("id")) is int:
        content["id"] = str(content["id"])
    return Job(**{**given, **content})


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


class Worker:
    """A model that is loaded and accelerated once, and draws job after job.

    Args:
        configuration: model and setting.
        device: where to; the model's own place by default.
        model: a subject that is loaded already.

    Raises:
        UnknownNameError, ModelError, ConfigError: for a model or a setting that cannot be had.
    """

    def __init__(self, configuration: Configuration, device: str | None = None, model: Subject | None = None) -> None:
        if configuration.model is None and model is None:
            raise ConfigError("a model is needed: give --model, or `model:` in the configuration")
        self.configuration = configuration
        self.model = model or open_model(str(configuration.model), device=device)
        plain = all(getattr(configuration, name) is None for name in ("quality", "method", "computed_steps"))
        chosen = replace(configuration, quality=EXACT) if plain else configuration
        self._run = accelerate(self.model.pipe, chosen)
        self._run.describe()  # what has no description cannot be told in a provenance
        self._environment = environment()
        models = {name: vars(ModelFacts.of(part)) for name, part in denoisers(self.model.pipe).items()}
        self._facts = {"model": self.model.name, "transformers": models}

    def check(self, job: Job) -> None:
        """Find out, before anything is drawn, whether a job can be had, as far as that shows.

        Raises:
            ConfigError, UnknownNameError: if not.
        """
        call = self._call(job)
        self.model.check_call(call)
        edit_of(self.model, job.prompt)
        steps = call.get("num_inference_steps", self.model.call.get("num_inference_steps"))
        wanted = job.computed_steps or (None if job.quality else self.configuration.computed_steps)
        if steps is not None and wanted is not None and wanted > steps:
            raise ConfigError(
                f"{wanted} of {steps} steps cannot be computed; give smaller computed_steps, or more steps"
            )
        self._run.describe(quality=job.quality, computed_steps=job.computed_steps, call=self.model.call | call)

    def reasons(self, jobs: Sequence[Job]) -> list[str | None]:
        """Why jobs cannot be done, as far as that shows before they are drawn; looked up once for all alike."""
        # What `check` does not look at; of a model that edits, it finds the prompt's image.
        alike = [replace(job, id="0", prompt=job.prompt if self.model.edits else "", seed=0) for job in jobs]
        found = {one: self._reason(one) for one in dict.fromkeys(alike)}
        return [found[one] for one in alike]

    def _reason(self, job: Job) -> str | None:
        try:
            self.check(job)
        except HastenError as error:
            return str(error)
        return None

    def identity(self, job: Job) -> str:
        """Digest of all that decides the image but versions and device.

        Raises:
            ConfigError: for a job whose setting cannot be had.
        """
        return digest_of({"job": asdict(job), "call": self._call(job), "setting": self._setting(job), **self._facts})

    def _setting(self, job: Job) -> dict[str, Any]:
        return self._run.describe(quality=job.quality, computed_steps=job.computed_steps)

    def draw(self, job: Job) -> tuple[Tensor, dict[str, Any]]:
        """The image `[3, H, W]`, or the frames `[F, 3, H, W]`, in [0, 1], and where it came from.

        Raises:
            ConfigError: for what the model or the setting cannot do.
        """
        call = self._call(job)
        self.model.check_call(call)
        arguments = call_arguments(self.model, [job.prompt], call) | {"output_type": "pt"}
        generator = torch.Generator("cpu").manual_seed(job.seed)
        with self._run.using(quality=job.quality, computed_steps=job.computed_steps) as pipe:
            output = pipe(prompt=job.prompt, generator=generator, **arguments)
        drawn = output.frames if hasattr(output, "frames") else output.images
        summary = {name: value for name, value in self._run.summary().to_dict().items() if not name.endswith("_ms")}
        return drawn[0].float().cpu(), {
            "identity": self.identity(job),
            "job": asdict(job),
            "call": call,
            "setting": self._setting(job),
            "summary": summary,
            **self._facts,
            "environment": self._environment,
        }

    def _call(self, job: Job) -> dict[str, Any]:
        call: dict[str, Any] = {}
        for name, argument in (("steps", "num_inference_steps"), ("height", "height"), ("width", "width")):
            value = getattr(job, name) or getattr(self.configuration, name)
            if value is not None:
                call[argument] = value
        guidance = self.configuration.guidance if job.guidance is None else job.guidance
        if guidance is not None:
            call |= {"true_cfg_scale": guidance, "negative_prompt": job.negative_prompt or ""}
        elif job.negative_prompt is not None:
            if "negative_prompt" not in inspect.signature(type(self.model.pipe).__call__).parameters:
                raise ConfigError(f"{self.model.name} takes no negative prompt; leave it out")
            call["negative_prompt"] = job.negative_prompt
        return call


def image_path(folder: Path, job: Job) -> Path | None:
    """The finished image of a job; None if there is none."""
    return next(
        (path for path in (folder / f"{job.id}{suffix}" for suffix in (".png", ".webp")) if path.exists()), None
    )


def pending(jobs: Sequence[Job], folder: Path, identity: Callable[[Job], str]) -> Iterator[Job]:
    """The jobs that have no image yet.

    Raises:
        ConfigError: if an image of that name was made of another job, or with another setting.
    """
    for job in jobs:
        path = image_path(folder, job)
        if path is None:
            yield job
            continue
        try:
            known = read_json(path.with_suffix(".json"))
            digest = sha256(read_bytes(path, LARGEST_IMAGE)).hexdigest()
            same = isinstance(known, dict) and known.get("image") == digest and known.get("identity") == identity(job)
        except (HastenError, OSError, ValueError):
            same = False  # among others, it would not be drawn now
        if not same:
            raise ConfigError(
                f"{path} was made of another job, setting or model than {job.id!r} asks for, or changed since; give "
                "another --out, or remove it"
            )


def write(folder: Path, job: Job, image: Tensor, provenance: dict[str, Any]) -> Path:
    """Write an image and, before it, where it came from with the image's SHA-256; returns the image's path."""
    if image.ndim == 4:
        with TemporaryDirectory() as scratch:
            content, suffix = write_video(image, Path(scratch) / "video.webp").read_bytes(), ".webp"
    else:
        content, suffix = png_of(image), ".png"
    provenance = {**provenance, "image": sha256(content).hexdigest()}
    write_atomically(folder / f"{job.id}.json", json.dumps(provenance, indent=1) + "\n")
    return write_atomically(folder / f"{job.id}{suffix}", content)


def check(jobs: Sequence[Job], reasons: Sequence[str | None]) -> None:
    """Find out, before any of them is drawn, whether all jobs can be had.

    Args:
        jobs: all of them.
        reasons: why each of them cannot; None if it can.

    Raises:
        ConfigError: if one cannot, with the reasons of the first few.
    """
    bad = [f"{job.id}: {reason}" for job, reason in zip(jobs, reasons, strict=True) if reason is not None]
    if bad:
        listed = "; ".join(bad[:SHOWN])
        raise ConfigError(f"{len(bad)} of {len(jobs)} jobs cannot be done, and nothing was drawn ({listed})")


def interrupted(done: int, of: int, folder: Path) -> KeyboardInterrupt:
    """What ends a job that was stopped, with a line on how to go on."""
    return KeyboardInterrupt(f"{done} of {of} images are in {folder}; the same command goes on from there")


def generate(worker: Worker, jobs: Sequence[Job], folder: Path, progress: Progress | None = None) -> list[Failure]:
    """Draw the jobs that have no image in a folder yet; one that fails while it is drawn does not keep the others.

    Args:
        worker: draws.
        jobs: what to draw, with different ids.
        folder: for one image and one JSON file per job.
        progress: called with (done, of how many, id).

    Returns:
        the jobs that could not be done.

    Raises:
        ConfigError: if a job asks for what cannot be had, or images of that name were made of other jobs.
        FileError: if something cannot be written.
        KeyboardInterrupt: with a line on how to go on.
    """
    check(jobs, worker.reasons(jobs))
    rest = list(pending(jobs, folder, worker.identity))
    tick, failures = progress or (lambda done, total, label: None), []
    done = len(jobs) - len(rest)
    try:
        for job in rest:
            tick(done, len(jobs), job.id)
            try:
                image, provenance = worker.draw(job)
                write(folder, job, image, provenance)
            except FileError:
                raise
            except HastenError as error:
                failures.append(Failure(job.id, str(error)))
            done += 1
            tick(done, len(jobs), job.id)
    except KeyboardInterrupt:
        raise interrupted(done, len(jobs), folder) from None
    return failures


def overridden(configuration: Configuration, **given: Any) -> Configuration:
    """A configuration with what was given besides, which takes precedence.

    Raises:
        ConfigError: if they do not go together.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    known = {item.name for item in fields(configuration)}
    assert changes.keys() <= known
    if "quality" in changes:
        audit = 0.0 if changes["quality"] == EXACT else configuration.audit
        configuration = replace(configuration, method=None, computed_steps=None, audit=audit)
    elif changes.keys() & {"method", "computed_steps"}:
        configuration = replace(configuration, quality=None, audit=0.0)
    return replace(configuration, **changes)
