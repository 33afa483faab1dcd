"""The jobs of a batch on the workers of a Ray cluster: one model per worker, whatever of it may die.

A worker that dies starts again, and its job with it: the same job gives the same image. Images are written by the
driver, so that the folder need not be shared; a driver that dies leaves whole images, and goes on as on one machine.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hasten.errors import ConfigError, HastenError
from hasten.integrations.batch import Failure, Job, Progress, Worker, check, interrupted, pending, write
from hasten.quality.configuration import Configuration

__all__ = ["RETRIES", "connected", "generate"]

log = logging.getLogger("hasten")

RETRIES = 5  # of a job whose worker died
AHEAD = 2  # jobs that a worker has at a time, so that it does not wait for the driver


class _Actor:
    """A worker in a process of its own."""

    def __init__(self, configuration: Configuration, device: str | None) -> None:
        self._problem = ""  # why there is no worker; an exception would have Ray try again and again
        try:
            self._worker = Worker(configuration, device)
        except HastenError as error:
            self._problem = str(error)

    def problem(self) -> str:
        """Why nothing can be drawn; empty if it can."""
        return self._problem

    def identities(self, jobs: Sequence[Job]) -> list[str | Failure]:
        """Digests of jobs, or why there are none."""
        return [
            self._worker.identity(job) if why is None else Failure(job.id, why)
            for job, why in zip(jobs, self._worker.reasons(jobs), strict=True)
        ]

    def draw(self, job: Job) -> tuple[Any, dict[str, Any]] | Failure:
        """Pixels as an array and their provenance, or why there are none."""
        try:
            image, provenance = self._worker.draw(job)
        except HastenError as error:
            return Failure(job.id, str(error))
        return image.numpy(), provenance


def generate(
    configuration: Configuration,
    jobs: Sequence[Job],
    folder: Path,
    address: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Failure]:
    """Draw the jobs that have no image in a folder yet on a Ray cluster; see `hasten.integrations.batch.generate`.

    Args:
        configuration: model and setting; every worker loads them.
        jobs: what to draw, with different ids.
        folder: of the driver.
        address: of the cluster; None starts one on this machine.
        workers: how many; one per GPU of the cluster by default, or one per CPU but one where it has none.
        progress: called with (done, of how many, id).

    Returns:
        the jobs that could not be done.

    Raises:
        ConfigError: if Ray is not installed, the workers have no such model or setting, or images of that name were
            made of other jobs.
        KeyboardInterrupt: with a line on how to go on.
    """
    with connected(address, workers) as (count, share):
        return _Cluster(configuration, count, share).run(jobs, folder, progress or (lambda done, total, label: None))


@contextmanager
def connected(address: str | None, workers: int | None) -> Iterator[tuple[int, dict[str, float]]]:
    """A cluster within a `with`: how many workers, and the resources of each.

    Args:
        address: of the cluster; None starts one on this machine.
        workers: how many; one per GPU by default, or one per CPU but one where there is none.

    Raises:
        ConfigError: if Ray is not installed, or does not start.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("this needs Ray, which is not installed: pip install ray") from None
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    except Exception as error:  # Ray raises no narrower one
        raise ConfigError(f"--ray: no cluster at {address or 'this machine'} ({error}); is it busy?") from error
    try:
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        count = workers or gpus or max(1, cpus - 1)
        yield count, {"num_gpus": min(1.0, gpus / count)} if gpus else {"num_cpus": min(1.0, cpus / count)}
    finally:
        ray.shutdown()


class _Cluster:
    """Workers and what they have to do."""

    def __init__(self, configuration: Configuration, count: int, share: dict[str, float]) -> None:
        import ray

        self._ray = ray
        remote = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **share)(_Actor)
        device = "cuda" if "num_gpus" in share else None
        self._actors = [remote.remote(configuration, device) for _ in range(count)]

    def run(self, jobs: Sequence[Job], folder: Path, tick: Progress) -> list[Failure]:
        problem = self._ray.get(self._actors[0].problem.remote())
        if problem:
            raise ConfigError(problem)
        identities = self._ray.get(self._actors[0].identities.remote(list(jobs)))
        known = {job.id: identity for job, identity in zip(jobs, identities, strict=True)}
        check(jobs, [one.error if isinstance(one, Failure) else None for one in identities])
        rest = deque(pending(jobs, folder, lambda job: str(known[job.id])))
        done, failures = len(jobs) - len(rest), []
        under_way: dict[Any, tuple[Any, Job]] = {}

        def start(actor: Any) -> None:
            if rest:
                job = rest.popleft()
                under_way[actor.draw.remote(job)] = actor, job

        try:
            for actor in self._actors * AHEAD:
                start(actor)
            while under_way:
                (ready,), _ = self._ray.wait(list(under_way), num_returns=1)
                actor, job = under_way.pop(ready)
                start(actor)
                result = self._ray.get(ready)
                if isinstance(result, Failure):
                    failures.append(result)
                else:
                    pixels, provenance = result
                    write(folder, job, torch.from_numpy(pixels.copy()), provenance)
                done += 1
                tick(done, len(jobs), job.id)
        except KeyboardInterrupt:
            raise interrupted(done, len(jobs), folder) from None
        return failures
