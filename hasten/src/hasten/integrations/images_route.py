"""The OpenAI images route: what a request asks for, and answers and errors in the form that its clients read."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.errors import HastenError, unknown
from hasten.integrations.batch import MOST_SEED, Job
from hasten.io import describe, parse_json

__all__ = ["MOST_BYTES", "RefusalError", "answer", "jobs_of"]

MOST_BYTES = 1 << 18  # of a request
MOST_IMAGES = 10
SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
QUALITY = re.compile(r"[A-Za-z0-9_-]{1,64}")  # no path: a request opens no files

# What may be asked for because it is what is done anyway.
ONLY: dict[str, tuple[Any, ...]] = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "background": ("auto", "opaque"),
    "stream": (False,),
}
CALL = ("negative_prompt", "steps", "guidance", "computed_steps")  # ours, under the names of a job's entries
KNOWN = ("prompt", "model", "n", "size", "quality", "seed", "user", *CALL, *ONLY)


class RefusalError(Exception):
    """Why there is no image, with the status of the answer."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def jobs_of(body: bytes, model: str, seed: int) -> list[Job]:
    """The images that a request asks for.

    Args:
        body: JSON with `prompt`, and perhaps `n`, `size`, `quality`, `model` as in OpenAI's interface, and `seed`,
            `computed_steps`, `steps`, `guidance`, `negative_prompt`. Image `i` has the noise of `seed + i`.
        model: the one that is served.
        seed: of a request that gives none.

    Raises:
        RefusalError: for what cannot be done, with the reason.
    """
    if len(body) > MOST_BYTES:
        raise RefusalError(f"the request has {len(body)} bytes, expected at most {MOST_BYTES}", 413)
    try:
        given = parse_json(body.decode())
    except (ValueError, HastenError) as error:
        raise RefusalError(f"the request is no JSON ({describe(error)})") from error
    if not isinstance(given, dict):
        raise RefusalError('expected an object such as {"prompt": "a red apple"}')
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in KNOWN:
            raise RefusalError(str(unknown("parameter", name, KNOWN)), param=name, code="unknown_parameter")
    for name, allowed in ONLY.items():
        if name in given and given[name] not in allowed:
            raise RefusalError(f"{name} is {' or '.join(map(str, allowed))} here, got {given[name]!r}", param=name)
    if given.get("model", model) != model:
        raise RefusalError(f"this server has {model!r}, not {given['model']!r}", 404, "model", "model_not_found")
    entries = {name: given[name] for name in CALL if name in given}
    entries |= _size(given.get("size", "auto")) | _quality(given.get("quality", "auto"))
    count = _whole(given, "n", 1, 1, MOST_IMAGES)
    first = _whole(given, "seed", seed, 0, MOST_SEED - MOST_IMAGES)
    if not isinstance(given.get("prompt"), str):
        raise RefusalError("a prompt is needed, as text", param="prompt")
    try:
        return [Job(id=str(i), prompt=given["prompt"], seed=first + i, **entries) for i in range(count)]
    except HastenError as error:
        raise RefusalError(str(error)) from error


def answer(images: Sequence[tuple[bytes, Mapping[str, Any]]]) -> dict[str, Any]:
    """The body of an answer, from PNG files and what is told of each beside it."""
    data = [{"b64_json": base64.b64encode(png).decode(), "hasten": dict(told)} for png, told in images]
    return {"created": int(time.time()), "output_format": "png", "data": data}


def _size(text: Any) -> dict[str, int]:
    if text == "auto":
        return {}
    found = SIZE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise RefusalError(f"size is WIDTHxHEIGHT in pixels, such as 1024x1024, or auto; got {text!r}", param="size")
    return {"width": int(found[1]), "height": int(found[2])}


def _quality(name: Any) -> dict[str, str]:
    if name == "auto":
        return {}
    if not isinstance(name, str) or not QUALITY.fullmatch(name):
        raise RefusalError(f"quality is the name of a certified tier, exact, or auto; got {name!r}", param="quality")
    return {"quality": name}


def _whole(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = given.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RefusalError(f"{name} is a whole number of {least} to {most}, got {value!r}", param=name)
    return value
