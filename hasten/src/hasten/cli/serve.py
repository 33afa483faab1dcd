"""`hasten serve`: a service for images on Ray."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from hasten.cli import options
from hasten.cli.common import console
from hasten.parameters import Range

__all__ = ["serve"]


def serve(
    model: options.OwnModel = None,
    config: options.ConfigFile = None,
    quality: options.Quality = None,
    method: options.Method = None,
    computed_steps: options.SomeSteps = None,
    audit: options.Audit = None,
    steps: options.CallSteps = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance: options.Guidance = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    queue: Annotated[
        int,
        options.number(Range(1, options.MOST_COUNT), "Images that wait for a worker; others are answered with 429."),
    ] = 64,
    ray: Annotated[str | None, typer.Option("--ray", help="Address of a Ray cluster; this machine by default.")] = None,
    workers: options.Workers = None,
) -> None:
    """Serve a model at the OpenAI images route, with quality and computed_steps per request.

    A setting given here is that of requests that ask for none. There is no authentication: keep it behind what has one.

    Example: hasten serve --model emoji-flux --quality high
    """
    configuration = options.configured(
        config,
        model=model,
        quality=quality,
        method=method,
        computed_steps=computed_steps,
        audit=audit,
        steps=steps,
        height=height,
        width=width,
        guidance=guidance,
    )
    from hasten.integrations.ray_serve import running

    with running(configuration, ray, workers, host, port, queue) as url:
        console.print(f"[bold]{url}/v1/images/generations[/bold], /v1/models, /health, /metrics", soft_wrap=True)
        threading.Event().wait()
