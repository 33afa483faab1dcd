"""What the documentation tells people to write is run as it stands."""

import re

import pages
import pytest
import tiny
import torch
from pages import DOCS
from pipelines import draw, make_pipe

import hasten
from hasten import registry
from hasten.caching import ScheduledMethod, computed_steps
from hasten.errors import CertificateError
from hasten.models import registry as host_registry
from hasten.parameters import parameters


def blocks(page):
    """The Python blocks of a page that run, in order."""
    return [block.code for block in pages.blocks(DOCS / page) if block.kind == "python" and block.run]


def lines(code):
    """Lines of code, without blank ones."""
    return [line for line in code.splitlines() if line.strip()]


@pytest.fixture
def untouched():
    """Methods and families that a page registers are forgotten again."""
    methods, hosts = {known.name: known for known in registry.methods()}, dict(host_registry._HOSTS)
    yield
    registry._METHODS.clear()
    registry._METHODS.update(methods)
    host_registry._HOSTS.clear()
    host_registry._HOSTS.update(hosts)


def test_adding_a_method_takes_under_forty_lines(untouched):
    pipe = make_pipe()
    plain = draw(pipe)
    first, *more = blocks("add-a-method.md")
    # The page attaches its method twice to the same pipeline to show both ways; a reader uses one of them.
    again = "run = hasten.accelerate(pipe, DampedLineCache"
    assert again in first
    first = first.replace(again, f"run.remove()\n{again}")
    assert len(lines(first)) < 40
    scope = {"pipe": pipe}
    exec(first, scope)
    assert not torch.equal(draw(pipe), plain)
    assert scope["run"].summary().skipped_steps > 0
    scope["run"].remove()
    assert "damped-line" in {info.name for info in hasten.methods()}
    for block in more:
        assert len(lines(block)) < 40
        exec(block, scope)
    with hasten.accelerate(pipe, scope["HalfAndHalf"](interval=3)) as run:
        assert not torch.equal(draw(pipe), plain)
        assert run.summary().skipped_steps == 6
    with hasten.accelerate(pipe, scope["InputCache"](threshold=0.3)) as run:
        first_run = draw(pipe)
        assert torch.equal(draw(pipe), first_run)
        assert 0 < run.summary().skipped_steps < 12

    class Early(scope["ScheduledMethod"]):
        def plan(self):
            return scope["DenseEarly"](dense=4, interval=3)

        def predictors(self):
            return {"whole": scope["DampedLine"](0.5)}

    with hasten.accelerate(pipe, Early()) as run:
        draw(pipe)
        assert [r.step for r in run.records if r.computed] == [0, 1, 2, 3, 6, 9]
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "WanTransformer3DModel"])
def test_adding_a_model_takes_under_forty_lines(untouched, name):
    model = tiny.build(name)
    plain = tiny.sample(name, model)
    (described,) = [block for block in blocks("add-a-model.md") if f'"{name}"' in block]
    assert len(lines(described)) < 40
    host_registry._HOSTS.pop(name)
    exec(described, {})
    sites = ("hidden", "module") if "BlockModules" in described else ("hidden",)
    for site in sites:
        with hasten.accelerate(model, "taylorseer", interval=4, site=site) as run:
            fast = tiny.sample(name, model)
            assert run.summary().skipped_steps == 7
        assert 0 < (fast - plain).norm() < 0.2 * plain.norm()
    assert torch.equal(tiny.sample(name, model), plain)


def test_the_page_on_quality_runs_and_says_what_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HASTEN_CERTIFICATES", str(tmp_path / "none"))
    scope = {}
    for block in blocks("quality.md"):
        exec(block, scope)
    assert scope["run"].summary  # of the configuration that was saved and loaded
    pipe, call = scope["pipe"], scope["call"]
    with pytest.raises(CertificateError) as refused:
        pipe("red apple", **call | {"num_inference_steps": 30})
    scope["run"].remove()
    text = " ".join((DOCS / "quality.md").read_text(encoding="utf-8").split())
    assert f"CertificateError: {refused.value}" in text


def test_every_method_has_a_page_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for info in hasten.methods():
        if info.kind == "caching" and info.config.__module__.startswith("hasten."):
            page = DOCS / "methods" / f"{info.name}.md"
            assert page.is_file()
            assert f"methods/{info.name}.md" in navigation
            text = page.read_text(encoding="utf-8")
            assert f"<!-- curve {info.name} -->" in text
            for parameter in set(info.parameters) - {*parameters(ScheduledMethod), "strict"}:
                assert f"`{parameter}`" in text, f"{info.name}: {parameter}"


def test_every_resolution_method_has_a_page_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for info in hasten.methods():
        if info.kind == "resolution":
            text = (DOCS / "methods" / f"{info.name}.md").read_text(encoding="utf-8")
            assert f"methods/{info.name}.md" in navigation
            for parameter in info.parameters:
                assert f"`{parameter}`" in text, f"{info.name}: {parameter}"


def published_settings():
    """Expressions of the page's table and how many of 50 steps they compute, None where a gate decides."""
    rows = re.findall(
        r"^\| [^|]+ \| `([^`]+)` \| (-|\d+) \|", (DOCS / "how-to/published-settings.md").read_text(), re.M
    )
    return [(expression, None if count == "-" else int(count)) for expression, count in rows]


@pytest.mark.parametrize(("expression", "count"), published_settings())
def test_published_settings_can_be_had_and_compute_what_the_page_says(expression, count):
    ((name, given),) = registry.split(expression)
    if registry.info(name).needs_calibration:
        assert {*given} <= {*registry.info(name).parameters}
        if count is None or "computed_steps" in given:
            return
        plan = hasten.FoCa(interval=int(given["interval"]), warmup=int(given.get("warmup", 3))).plan()
        assert len(computed_steps(plan, 50)) == count
        return
    (method,) = registry.parse(expression)
    assert isinstance(method, ScheduledMethod) == (count is not None)
    if count is not None:
        assert len(computed_steps(method.plan(), 50)) == count
