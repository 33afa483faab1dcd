"""`hasten serve`: the images route by itself, and a service on Ray under load, with bad requests and a dying worker."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_bench import command
from test_ray import TINY, wait_until, workers_of

from hasten.bench.sheet import to_pil
from hasten.errors import ConfigError
from hasten.integrations.batch import Job, Worker
from hasten.integrations.images_route import MOST_BYTES, RefusalError, answer, jobs_of

# --- the route, without a service


def asked(**entries):
    return jobs_of(json.dumps(entries).encode(), "emoji-flux", 7)


def test_a_request_becomes_jobs_with_noise_of_their_own():
    found = asked(prompt="a red apple", n=2, size="48x32", quality="high", model="emoji-flux", user="me", steps=None)
    assert found == [Job(str(i), "a red apple", 7 + i, width=48, height=32, quality="high") for i in range(2)]
    (one,) = asked(prompt="a", size="auto", quality="auto", response_format="b64_json", stream=False)
    assert one == Job("0", "a", 7)
    (one,) = asked(prompt="a", seed=3, computed_steps=4, steps=9, guidance=2, negative_prompt="b")
    assert one == Job("0", "a", 3, "b", steps=9, guidance=2.0, computed_steps=4)


@pytest.mark.parametrize(("entries", "message", "status"), [
    ({}, "a prompt is needed", 400),
    ({"prompt": 3}, "a prompt is needed", 400),
    ({"prompt": "a", "qualty": "high"}, "Did you mean 'quality'", 400),
    ({"prompt": "a", "quality": "../certificate.json"}, "name of a certified tier", 400),
    ({"prompt": "a", "size": "large"}, "WIDTHxHEIGHT", 400),
    ({"prompt": "a", "size": "0x64"}, "WIDTHxHEIGHT", 400),
    ({"prompt": "a", "n": 11}, "n is a whole number of 1 to 10", 400),
    ({"prompt": "a", "n": True}, "n is a whole number", 400),
    ({"prompt": "a", "seed": -1}, "seed is a whole number", 400),
    ({"prompt": "a", "computed_steps": 0}, "computed_steps must be", 400),
    ({"prompt": "a", "computed_steps": "nine"}, "computed_steps must be", 400),
    ({"prompt": "a", "response_format": "url"}, "response_format is b64_json here", 400),
    ({"prompt": "a", "stream": True}, "stream is False here", 400),
    ({"prompt": "a", "model": "dall-e-3"}, "this server has 'emoji-flux'", 404),
])  # fmt: skip
def test_what_cannot_be_asked_for_is_refused_by_name(entries, message, status):
    with pytest.raises(RefusalError, match=message) as caught:
        asked(**entries)
    assert caught.value.status == status
    assert caught.value.content["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("body", "message", "status"), [
    (b"{", "no JSON", 400),
    (b"\xff", "no JSON", 400),
    (b"[" * 100_000, "no JSON", 400),
    (b"[1]", "expected an object", 400),
    (b" " * (MOST_BYTES + 1), "expected at most", 413),
])  # fmt: skip
def test_bodies_that_are_no_request_are_refused(body, message, status):
    with pytest.raises(RefusalError, match=message) as caught:
        jobs_of(body, "emoji-flux", 0)
    assert caught.value.status == status


def test_the_answer_holds_the_files():
    found = answer([(b"png", {"seed": 3})])
    assert base64.b64decode(found["data"][0]["b64_json"]) == b"png"
    assert found["data"][0]["hasten"] == {"seed": 3}


def test_without_ray_it_is_said_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hasten.integrations.ray_serve", raising=False)
    code, _, error = command(monkeypatch, capsys, "serve", "--model", "emoji-flux")
    assert code == 2
    assert "pip install 'ray[serve]'" in error
    code, _, error = command(monkeypatch, capsys, "serve")
    assert code == 2
    assert "give --model" in error


# --- what takes requests and what draws, where Ray is installed, without starting it


@pytest.fixture
def ray_serve():
    pytest.importorskip("ray.serve")
    return importlib.import_module("hasten.integrations.ray_serve")


class Drawing:
    """Workers with room for some images, none of which comes to its end."""

    def __init__(self, room, full):
        self.room, self.full, self.under_way, self.draw = room, full, 0, self

    async def remote(self, job):
        if self.under_way == self.room:
            raise self.full
        self.under_way += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.under_way -= 1


class Sent:
    """A request whose body comes in parts of a KiB."""

    def __init__(self, body, headers=None):
        self.parts, self.headers = [body[i : i + 1024] for i in range(0, len(body), 1024)], headers or {}

    async def stream(self):
        while self.parts:
            yield self.parts.pop(0)


def counted(front, status):
    return front._registry.get_sample_value("hasten_requests_total", {"status": str(status)})


async def drawn(front, workers, body, headers=None, cancelled=False):
    """What a request is answered, and how many images are under way after it."""
    task = asyncio.ensure_future(front._draw(Sent(body, headers)))
    if cancelled:
        while not workers.under_way:
            await asyncio.sleep(0)
        task.cancel()
    found = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)
    await asyncio.sleep(0)
    return found[0], workers.under_way


def test_a_request_that_does_not_fit_is_refused_at_once_and_none_of_its_images_is_drawn(ray_serve):
    full = ray_serve.BackPressureError(num_queued_requests=3, max_queued_requests=3)
    workers = Drawing(3, full)
    front = ray_serve.Front(workers, "emoji-flux")
    answered, left = asyncio.run(drawn(front, workers, b'{"prompt": "cat", "n": 10}'))
    assert (answered.status_code, left) == (429, 0)


def test_a_request_that_nobody_waits_for_any_more_is_counted_and_not_drawn(ray_serve):
    workers = Drawing(10, None)
    front = ray_serve.Front(workers, "emoji-flux")
    answered, left = asyncio.run(drawn(front, workers, b'{"prompt": "cat", "n": 4}', cancelled=True))
    assert isinstance(answered, asyncio.CancelledError)
    assert (counted(front, 499), left) == (1, 0)
    assert front._registry.get_sample_value("hasten_requests_under_way") == 0


@pytest.mark.parametrize("headers", [{}, {"content-length": str(10**12)}])
def test_no_more_is_read_than_a_request_may_have(ray_serve, headers):
    front, request = ray_serve.Front(None, "emoji-flux"), Sent(bytes(4 * MOST_BYTES), headers)
    answered = asyncio.run(front._draw(request))
    assert (answered.status_code, counted(front, 413)) == (413, 1)
    assert len(request.parts) * 1024 > 2 * MOST_BYTES


@pytest.mark.parametrize(("changes", "message"), [
    ({"computed_steps": 60, "method": None, "steps": None}, "60 of 50 steps cannot be computed"),
    ({"height": 100}, "draws 64x64 or 32x32 pixels"),
    ({"model": "sprites-wan", "height": None, "width": None}, "makes clips"),
    ({"model": "nosuch"}, "unknown model 'nosuch'"),
])  # fmt: skip
def test_a_service_that_could_draw_nothing_says_why(ray_serve, changes, message):
    assert message in asyncio.run(ray_serve.Model(replace(TINY, **changes), None).state())


def test_a_model_whose_files_are_damaged_is_not_loaded_again_and_again(ray_serve, monkeypatch):
    monkeypatch.setattr(ray_serve, "Worker", lambda *_: SimpleNamespace().model)
    assert "could not be loaded: AttributeError" in asyncio.run(ray_serve.Model(TINY, None).state())


@pytest.mark.parametrize("host", [None, "nosuch.invalid"])
def test_where_nothing_can_listen_is_said_before_anything_starts(ray_serve, monkeypatch, host):
    monkeypatch.setattr(ray_serve, "connected", lambda *_: pytest.fail("Ray was started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"--port {port}: cannot listen there \(.*\); give others"),
            ray_serve.running(TINY, host=host or "127.0.0.1", port=port),
        ):
            pass


# --- the service

SERVICE = """
import signal, sys, threading
sys.path[:0] = {paths!r}
from hasten.integrations.ray_serve import running
from test_ray import TINY
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
with running(TINY, workers=2, port={port}, queue={queue}):
    print("up", flush=True)
    threading.Event().wait()
"""


class Service:
    """A service in a process of its own."""

    def __init__(self, queue=400):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        paths = [path for path in sys.path if path]
        self.url, self.mark = f"http://127.0.0.1:{port}", f"HASTEN_TEST={uuid.uuid4().hex}"
        environment = os.environ | dict([self.mark.split("=")]) | {"PYTHONPATH": os.pathsep.join(paths)}
        code = SERVICE.format(paths=paths, port=port, queue=queue)
        self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        assert b"up" in next(line for line in self.process.stdout if b"up" in line)

    def close(self):
        self.process.terminate()
        self.process.wait(120)

    def ask(self, body=None, path="/v1/images/generations", tries=1):
        """Status, headers and body; a body that is no bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=900) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def models(self):
        return workers_of(self.mark, b"Model")


def right(worker, **entries):
    """The PNG files that a request has to get."""
    files = []
    for job in jobs_of(json.dumps(entries).encode(), "emoji-flux", 0):
        file = io.BytesIO()
        to_pil(worker.draw(job)[0]).save(file, format="png")
        files.append(file.getvalue())
    return files


GOOD = [
    {"prompt": "red apple", "seed": 1},
    {"prompt": "red apple", "seed": 1, "computed_steps": 2},
    {"prompt": "cat", "seed": 2, "quality": "exact", "n": 2},
    {"prompt": "house", "seed": 3, "size": "64x64", "steps": 5},
]
BAD = [
    ({"prompt": "cat", "quality": "best"}, 400),
    ({"prompt": "cat", "computed_steps": 10**12}, 400),
    ({"prompt": "cat", "size": "48x48"}, 400),
    (b"{", 400),
    ({"prompt": "cat", "model": "other"}, 404),
]


def resident(process):
    """Bytes of memory of a process."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


needs_service = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve]"),
]


@pytest.fixture(scope="module")
def service():
    made = Service()
    yield made
    made.close()


class TestService:
    pytestmark = needs_service

    def test_two_hundred_requests_at_a_time_with_bad_ones_among_them(self, service):
        worker = Worker(TINY)
        files = [right(worker, **one) for one in GOOD]
        requests = [GOOD[i % len(GOOD)] if i % 5 else BAD[i // 5 % len(BAD)][0] for i in range(200)]
        memory = []
        for _ in range(3):
            with ThreadPoolExecutor(len(requests)) as pool:
                answers = list(pool.map(service.ask, requests))
            memory.append(sum(map(resident, service.models())))
            for i, (status, _, body) in enumerate(answers):
                found = json.loads(body)
                if i % 5:
                    assert status == 200, body
                    assert [base64.b64decode(one["b64_json"]) for one in found["data"]] == files[i % len(GOOD)]
                else:
                    assert status == BAD[i // 5 % len(BAD)][1], body
                    assert found["error"]["message"]
        print("memory of the workers, MiB:", [round(one / 2**20, 1) for one in memory])
        assert memory[2] < memory[0] + 24 * 2**20
        _, _, metrics = service.ask(path="/metrics")
        lines = dict(line.rsplit(" ", 1) for line in metrics.decode().splitlines() if not line.startswith("#"))
        assert float(lines['hasten_requests_total{status="200"}']) == 3 * 160
        assert float(lines['hasten_requests_total{status="404"}']) == 3 * 8
        assert float(lines["hasten_images_total"]) == 3 * (160 + 40)
        assert float(lines["hasten_requests_under_way"]) == 0

    def test_what_was_done_is_told_and_other_routes_are(self, service):
        _, _, body = service.ask(GOOD[1])
        told = json.loads(body)["data"][0]["hasten"]
        assert (told["seed"], told["computed_steps"], told["steps"]) == (1, 2, 6)
        status, _, body = service.ask(path="/health")
        assert (status, json.loads(body)["workers"]["running"]) == (200, 2)
        assert json.loads(service.ask(path="/v1/models")[2])["data"][0]["id"] == "emoji-flux"
        assert service.ask(path="/v2")[0] == 404
        status, _, body = service.ask(path="/v1/images/generations")
        assert (status, "takes POST, not GET" in body.decode()) == (405, True)
        status, _, body = service.ask({"prompt": "cat", "quality": "draft"})
        assert status in (200, 400)  # whether one is certified for these sizes depends on the machine

    def test_a_worker_that_dies_loses_no_request(self, service):
        worker, wanted = Worker(TINY), [{"prompt": "red apple", "seed": i % 4} for i in range(60)]
        files = [right(worker, **one) for one in wanted[:4]]
        with ThreadPoolExecutor(len(wanted)) as pool:
            answers = [pool.submit(service.ask, one) for one in wanted]
            wait_until(lambda: sum(one.done() for one in answers) > 10)
            os.kill(service.models()[0], signal.SIGKILL)
        for i, one in enumerate(answers):
            status, _, body = one.result()
            assert status == 200, body
            assert base64.b64decode(json.loads(body)["data"][0]["b64_json"]) == files[i % 4][0]
        wait_until(lambda: json.loads(service.ask(path="/health")[2])["workers"].get("running") == 2)


class TestFullQueue:
    pytestmark = needs_service

    def test_what_does_not_fit_is_answered_at_once_and_may_be_tried_again(self):
        service = Service(queue=2)
        try:
            with ThreadPoolExecutor(40) as pool:
                answers = list(pool.map(service.ask, [GOOD[2]] * 40))
            statuses = [status for status, _, _ in answers]
            assert set(statuses) == {200, 429}
            refused = next(one for one in answers if one[0] == 429)
            assert refused[1]["Retry-After"] == "1"
            assert json.loads(refused[2])["error"]["code"] == "queue_full"
            end = time.monotonic() + 300
            while service.ask(GOOD[0])[0] != 200:
                assert time.monotonic() < end
        finally:
            service.close()


@pytest.mark.slow
def test_a_model_that_cannot_be_had_is_said_in_one_line():
    pytest.importorskip("ray.serve")
    from hasten.integrations.ray_serve import running

    with pytest.raises(ConfigError, match="emoji-flx"), running(replace(TINY, model="emoji-flx")):
        pass
