"""A service on Ray: the OpenAI images route, with a quality or a number of computed steps per request.

    POST /v1/images/generations    {"prompt": "a red apple", "size": "64x64", "quality": "high"}
    GET  /v1/models, /health, /metrics

One model per worker, each with one image at a time. What does not fit into the queue is answered with 429, and clients
try again; a worker that dies starts again, and its image with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from hasten.bench.sheet import png_of
from hasten.errors import ConfigError, HastenError
from hasten.integrations.batch import Failure, Job, Worker
from hasten.integrations.images_route import MOST_BYTES, RefusalError, answer, jobs_of
from hasten.integrations.ray_batch import RETRIES, connected
from hasten.io import describe
from hasten.quality.configuration import Configuration

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve.config import HTTPOptions
    from ray.serve.exceptions import BackPressureError
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
except ImportError as error:
    raise ConfigError(f"hasten serve needs {error.name}, which is not installed: pip install 'ray[serve]'") from None

__all__ = ["running"]

log = logging.getLogger("hasten")

NAME = "hasten"
IMAGES = "/v1/images/generations"
GONE = "499"  # status, among what is counted, of requests that nobody waits for any more
MOST_REQUESTS = 10_000  # that are answered at a time, most of them with 429
Drawn = tuple[bytes, dict[str, Any]]


class Model:
    """A worker: a model that is loaded and accelerated once, and draws one image at a time."""

    def __init__(self, configuration: Configuration, device: str | None) -> None:
        self._thread = ThreadPoolExecutor(1)  # the same for all images: tokenizers are kept per thread
        self.problem = ""  # why there is no worker; an exception would have Ray try again and again
        try:
            self._worker = Worker(configuration, device)
            if self._worker.model.kind != "images":
                self.problem = f"{configuration.model} makes {self._worker.model.kind}, and this service draws images"
            self._worker.check(Job(id="0", prompt=""))  # a request that asks for nothing but an image
        except HastenError as error:
            self.problem = self.problem or str(error)
        except Exception as error:
            log.exception("a worker did not start")
            self.problem = f"the model could not be loaded: {type(error).__name__}, {describe(error)}"

    async def state(self) -> str:
        """Why nothing can be drawn; empty if it can."""
        return self.problem

    async def draw(self, job: Job) -> Drawn | Failure:
        """A PNG file and what was done, or why there is none."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._draw, job)

    def _draw(self, job: Job) -> Drawn | Failure:
        try:
            image, provenance = self._worker.draw(job)
        except HastenError as error:
            return Failure(job.id, str(error))
        summary = {name: provenance["summary"][name] for name in ("method", "steps", "computed_steps")}
        return png_of(image), {"seed": job.seed, "setting": provenance["setting"], **summary}


class Front:
    """Takes requests, has the workers draw, and counts."""

    def __init__(self, models: Any, name: str) -> None:
        self._models, self._name = models, name
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "hasten_requests", "Requests for images by status.", ["status"], registry=self._registry
        )
        self._images = Counter("hasten_images", "Images drawn.", registry=self._registry)
        self._steps = Counter(
            "hasten_steps", "Steps of these images, computed or skipped.", ["kind"], registry=self._registry
        )
        self._seconds = Histogram("hasten_request_seconds", "Time to the answer.", registry=self._registry)
        self._under_way = Gauge(
            "hasten_requests_under_way", "Requests that wait or are drawn.", registry=self._registry
        )

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        routes = {
            IMAGES: ("POST", self._draw),
            "/v1/models": ("GET", self._list),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
        }
        method, route = routes.get(request.url.path, ("", None))
        if route is None:
            return _refused(RefusalError(f"there is {', '.join(routes)} here, not {request.url.path}", 404))
        if request.method != method:
            return _refused(RefusalError(f"{request.url.path} takes {method}, not {request.method}", 405))
        return await route(request)

    async def _draw(self, request: Request) -> Response:
        with self._under_way.track_inprogress(), self._seconds.time():
            try:
                jobs = jobs_of(await _body(request), self._name, secrets.randbelow(1 << 31))
                response: Response = JSONResponse(answer(await self._drawn(jobs)))
            except RefusalError as refusal:
                response = _refused(refusal)
            except asyncio.CancelledError:
                self._requests.labels(GONE).inc()
                raise
        self._requests.labels(str(response.status_code)).inc()
        return response

    async def _drawn(self, jobs: list[Job]) -> list[Drawn]:
        """The images of a request; all of them or a refusal, with which the others are not drawn to the end."""
        tasks = [asyncio.ensure_future(self._one(job)) for job in jobs]
        try:
            drawn = await asyncio.gather(*tasks)
        except BackPressureError:
            raise RefusalError("the queue is full; try again in a moment", 429, code="queue_full") from None
        except RefusalError:
            raise
        except Exception as error:
            log.exception("a request failed")
            raise RefusalError("the image could not be drawn; the server's log says why", 500) from error
        finally:
            for task in tasks:
                task.cancel()
        for _, told in drawn:
            self._images.inc()
            self._steps.labels("computed").inc(told["computed_steps"])
            self._steps.labels("skipped").inc(told["steps"] - told["computed_steps"])
        return drawn

    async def _one(self, job: Job) -> Drawn:
        for _ in range(RETRIES):
            try:
                return _drawn(await self._models.draw.remote(job))
            except RayActorError:
                log.warning("a worker died; its image is drawn again")
        return _drawn(await self._models.draw.remote(job))

    async def _list(self, _: Request) -> Response:
        data = [{"id": self._name, "object": "model", "created": 0, "owned_by": NAME}]
        return JSONResponse({"object": "list", "data": data})

    async def _health(self, _: Request) -> Response:
        status = await asyncio.to_thread(serve.status)
        states = status.applications[NAME].deployments[Model.__name__].replica_states
        workers = {str(getattr(state, "value", state)).lower(): count for state, count in states.items()}
        return JSONResponse({"model": self._name, "workers": workers}, 200 if workers.get("running") else 503)

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(generate_latest(self._registry), media_type="text/plain; version=0.0.4")


async def _body(request: Request) -> bytes:
    """What was sent; no more of it is read than a request may have, whatever length it says."""
    too_long = RefusalError(f"the request is too long, expected at most {MOST_BYTES} bytes", 413)
    if int(request.headers.get("content-length") or 0) > MOST_BYTES:
        raise too_long
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise too_long
    return body


def _drawn(result: Drawn | Failure) -> Drawn:
    if isinstance(result, Failure):
        raise RefusalError(result.error)
    return result


def _check_free(host: str, port: int) -> None:
    """Find out, before anything is loaded, whether this machine can listen there.

    Raises:
        ConfigError: if it cannot.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a service that has just ended is no obstacle
            probe.bind((host, port))
    except OSError as error:
        raise _deaf(host, port, error) from error


def _deaf(host: str, port: int, error: Exception) -> ConfigError:
    return ConfigError(f"--host {host} --port {port}: cannot listen there ({describe(error)}); give others")


def _refused(refusal: RefusalError) -> Response:
    headers = {"Retry-After": "1"} if refusal.status == 429 else {}
    return JSONResponse(refusal.content, refusal.status, headers)


@contextmanager
def running(
    configuration: Configuration,
    address: str | None = None,
    workers: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    queue: int = 64,
) -> Iterator[str]:
    """A service that runs within a `with`; gives its address.

    Args:
        configuration: model and setting; every worker loads them.
        address: of the cluster; None starts one on this machine.
        workers: how many; one per GPU of the cluster by default, or one per CPU but one where it has none.
        host: to listen at.
        port: to listen at.
        queue: requests that wait for a worker; more are answered with 429.

    Raises:
        ConfigError: if the model or the setting cannot be had, or Ray cannot listen there.
    """
    if address is None:
        _check_free(host, port)
    with connected(address, workers) as (count, share):
        try:
            serve.start(http_options=HTTPOptions(host=host, port=port))
        except Exception as error:  # Ray raises no narrower one
            raise _deaf(host, port, getattr(error, "cause", None) or error) from error
        model = serve.deployment(Model).options(
            num_replicas=count, max_ongoing_requests=1, max_queued_requests=queue, ray_actor_options=share
        )
        front = serve.deployment(Front).options(max_ongoing_requests=MOST_REQUESTS, ray_actor_options={"num_cpus": 0})
        device = "cuda" if "num_gpus" in share else None
        try:
            bound = model.bind(configuration, device)
            serve.run(front.bind(bound, str(configuration.model)), name=NAME, route_prefix="/")
            problem = serve.get_deployment_handle(Model.__name__, NAME).state.remote().result()
            if problem:
                raise ConfigError(problem)
            yield f"http://{host}:{port}"
        finally:
            serve.delete(NAME) if address else serve.shutdown()  # a cluster may serve other things, too
