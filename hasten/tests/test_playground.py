"""`hasten playground`: what it draws and says, and the page in a browser."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
import torch
from pipelines import make_pipe
from test_bench import command

import hasten
from hasten.bench.sheet import to_pil
from hasten.bench.subject import Subject
from hasten.errors import ConfigError, HastenError
from hasten.integrations.playground import BUDGET, GAIN, TOLERANCE, Playground
from hasten.pipeline.hooks import hooks_on

CALL = {"height": 32, "width": 32, "max_sequence_length": 8, "num_inference_steps": 8}


@pytest.fixture
def playground():
    return Playground(Subject("tiny", make_pipe(), ["red apple"], dict(CALL)))


def test_both_images_are_what_the_calls_give_and_the_line_makes_the_fast_one(playground):
    found = playground.compare("red apple", 3, BUDGET, "high", "foca", 3)
    namespace = {"hasten": hasten, "torch": torch, "pipe": playground.model.pipe}
    generator = torch.Generator().manual_seed(3)
    full = playground.model.pipe("red apple", **CALL, generator=generator, output_type="pt").images[0]
    exec(found.code, namespace)  # as it is copied
    with namespace["run"] as run:
        assert run.summary().computed_steps == 3
    assert np.array_equal(np.asarray(found.fast), np.asarray(namespace["image"]))
    assert np.array_equal(np.asarray(found.full), np.asarray(to_pil(full)))
    fast = torch.from_numpy(np.asarray(found.fast) / 255).movedim(-1, 0)
    largest = float((full - fast).abs().mean(0).max())
    assert np.asarray(found.difference).max() == pytest.approx(255 * min(1, GAIN * largest), abs=GAIN)
    assert "| computed steps | 8 | 3 (FoCa) |" in found.figures
    assert "dB" in found.figures
    assert not hooks_on(playground.model.pipe.transformer)


def test_the_full_run_is_made_once_per_prompt_and_noise(playground, monkeypatch):
    drawn, own = [], playground._draw
    monkeypatch.setattr(playground, "_draw", lambda *args, **changes: drawn.append(args) or own(*args, **changes))
    for count in (3, 4):
        playground.compare("red apple", 0, BUDGET, "high", "reuse", count)
    assert len(drawn) == 3
    assert "identical" in playground.compare("red apple", 0, BUDGET, "high", "reuse", 8).figures
    for seed in range(40):
        playground.compare("red apple", seed, BUDGET, "high", "reuse", 2)
    assert len(playground._known) < 20


@pytest.mark.parametrize(("asked", "message"), [
    ((" ", 0, BUDGET, "high", "foca", 3), "write what to draw"),
    (("a", 0, BUDGET, "high", "foca", 9), "compute 1 to 8"),
    (("a", 0, BUDGET, "high", "foca", None), "compute 1 to 8"),
    (("a", None, BUDGET, "high", "foca", 3), "seed must be a whole number"),  # the field was emptied
    (("a", -1, TOLERANCE, "high", "foca", 3), "seed must be a whole number"),
    (("a", 0, TOLERANCE, "draft", "foca", 3), "not certified"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said_and_leaves_nothing(asked, message, playground, tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CERTIFICATES", str(tmp_path))
    with pytest.raises(HastenError, match=message):
        playground.compare(*asked)
    assert not hooks_on(playground.model.pipe.transformer)


def test_it_draws_images_with_methods_that_need_no_file(playground):
    assert "foca" in playground.methods
    assert not {"hyca", "leap", "fbcache"} & set(playground.methods)
    with pytest.raises(ConfigError, match="makes clips"):
        Playground(replace(playground.model, call={**CALL, "num_frames": 9}))


def test_without_gradio_it_is_said_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, error = command(monkeypatch, capsys, "playground")
    assert code == 2
    assert "pip install gradio" in error


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(width, tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    port = free_port()
    paths = [path for path in sys.path if path]
    code = f"import sys; sys.path[:0] = {paths!r}; from hasten.cli.entry import main; main()"
    environment = os.environ | {"HASTEN_CERTIFICATES": str(tmp_path)}
    server = subprocess.Popen(
        [sys.executable, "-c", code, "playground", "--port", str(port)], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < end
                assert server.poll() is None
                time.sleep(0.2)
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": width, "height": 844})
            errors, outside = [], []
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("request", lambda asked: outside.append(asked.url) if asked.url.startswith("http") else None)
            page.goto(f"http://127.0.0.1:{port}")
            draw = page.get_by_role("button", name="Draw")
            draw.click(timeout=120_000)
            page.get_by_text("faster").wait_for(timeout=300_000)
            for title in ("Full run", "Fast", "Difference, 8 times"):
                shown = page.get_by_role("img", name=title, exact=True)
                assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
                assert shown.bounding_box()["width"] > 200
            assert "hasten.Leap(" in page.locator(".cm-content").inner_text()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.get_by_label("Prompt").fill(" ")
            draw.click()
            page.get_by_text("write what to draw").wait_for(timeout=60_000)
            assert page.get_by_role("img", name="Full run", exact=True).count() == 0
            browser.close()
        assert not errors
        assert all(url.startswith(f"http://127.0.0.1:{port}") for url in outside)
    finally:
        server.terminate()
        server.wait(60)
