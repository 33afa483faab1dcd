"""Every block of Python on every page runs as it stands, in order, and whatever it says about its results holds.

The large models that pages name are stood in for by tiny ones of the same classes, and the GPU by the CPU: what is
shown is that the lines work, not what they gain. A block that cannot run without what no test has (a second GPU, a
service) is marked on its page, `<!-- not run: why -->`.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import hasten_zoo
import leap_pipelines
import peft
import pytest
import test_modular
import test_streaming_hosts
import test_unets
import torch
from accelerate import cpu_offload_with_hook
from pages import ROOT, blocks, pages
from pipelines import make_pipe
from test_variants import VARIANTS, wan

import hasten
from hasten.bench import subject
from hasten.caching import Uniform, computed_steps
from hasten.errors import HastenWarning

SIZE = {"height": 32, "width": 32, "max_sequence_length": 8}
PROMPTS = ["red apple", "green pear", "fish", "rose"]
CALLS = [{"prompt": prompt, "num_inference_steps": 20, **SIZE} for prompt in PROMPTS[:2]]
# Run by tests of their own, with what they need: `test_docs.py`, `test_tokens_*.py`.
ELSEWHERE = {"docs/add-a-method.md", "docs/add-a-model.md"}
SLOW = {
    "docs/leap.md",
    "docs/which-method.md",
    "docs/quality.md",
    "docs/how-to/compile.md",
    "docs/methods/leapcache.md",
    "docs/tutorial/index.md",
}


def small(pipe: Any, **defaults: Any) -> Any:
    """The pipeline, called with these arguments unless told otherwise."""
    kind = type(pipe)

    class Small(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **{**defaults, **kwargs})

    Small.__name__ = kind.__name__
    pipe.__class__ = Small
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> Any:
    """FLUX.1."""
    return small(make_pipe(), **SIZE)


def known(name: str) -> Any:
    """A pipeline of the tests of families, which takes any prompt: it has no text encoder, but what one gave."""
    make, call = OWN[name] if name in OWN else (VARIANTS[name].make, VARIANTS[name].call)
    pipe = make()
    call = {key: value for key, value in call.items() if key not in ("prompt", "num_inference_steps")}

    class Told(type(pipe)):  # type: ignore[misc]
        def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
            return super().__call__(
                **{**call, "output_type": "latent", **kwargs, **{k: call[k] for k in ("image",) if k in call}}
            )

    Told.__name__ = type(pipe).__name__
    pipe.__class__ = Told
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet(name: str) -> Callable[[Path], Any]:
    """Stable Diffusion, tiny: `test_unets.py` has the parts."""

    def make(folder: Path) -> Any:
        xl = test_unets.tiny_sdxl(folder)
        return small(xl if name == "xl" else test_unets.tiny_sd15(xl), height=16, width=16)

    return make


def modular() -> Any:
    """FLUX.1 as a modular pipeline."""
    pipe = test_modular.assembled(diffusers.FluxAutoBlocks(), make_pipe().components)
    pipe.load_components = lambda **_: None
    return small(pipe, **SIZE)


def bundled() -> dict[str, Any]:
    """The small model that comes with fits and certificates."""
    return {"pipe": small(subject.load("emoji-flux").pipe, height=64, width=64)}


def fitted() -> dict[str, Any]:
    """The same, with its fits where `hasten tune` writes them."""
    model = subject.load("emoji-flux")
    Path("calibrations").mkdir()
    shutil.copy(Path(hasten_zoo.__file__).parent / "emoji_flux" / "leap.safetensors", "calibrations")
    calls = [{"prompt": prompt, "num_inference_steps": 50, "height": 64, "width": 64} for prompt in PROMPTS[:2]]
    pipe = small(model.pipe, height=64, width=64)
    return {"pipe": pipe, "calls": calls}


def leapcache() -> dict[str, Any]:
    """A fit of leapcache for FLUX.1 in small."""
    pipe = flux()
    calls = [{"prompt": prompt, "num_inference_steps": 50} for prompt in PROMPTS[:2]]
    hasten.fit_leapcache(pipe, calls, [computed_steps(Uniform(7, 3), 50)]).save("calibrations/leapcache.safetensors")
    return {"pipe": pipe}


MODELS: dict[str, Callable[[], Any]] = {
    "black-forest-labs/FLUX.1-dev": flux,
    "black-forest-labs/FLUX.1-schnell": flux,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": lambda: known("wan"),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": lambda: known("wan 2.2"),
}
UNETS = {
    "stabilityai/stable-diffusion-xl-base-1.0": unet("xl"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": unet("1.5"),
}
OWN = {
    **leap_pipelines.OWN,
    "wan 2.2": (wan("WanPipeline", "WanTransformer3DModel", 2, boundary_ratio=0.7), leap_pipelines.OWN["wan"][1]),
}
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "docs/leap.md": fitted,
    "docs/quality.md": bundled,
    "docs/methods/leapcache.md": leapcache,
    "docs/methods/dvg.md": lambda: {"pipe": known("wan")},
    "docs/methods/specedit.md": lambda: {"pipe": known("flux kontext"), "photo": None},
    "docs/how-to/controlnet.md": lambda: {"edges": torch.rand(1, 3, 16, 16)},
    "docs/streaming.md": lambda: {"pipe": streaming()},
}


def streaming() -> Any:
    """AnyFlow, which takes any prompt."""
    pipe, draw = test_streaming_hosts.anyflow(), test_streaming_hosts.draw

    class Told(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(frames=draw(super().__call__)) if args else super().__call__(**kwargs)

    pipe.__class__ = Told
    return pipe


def _adapter(pipe: Any, path: str, adapter_name: str) -> None:
    """A low-rank adapter with weights that show."""
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), adapter_name
    )


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hub ids are tiny models, `cuda` is the CPU, and a second acceleration takes the place of the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HASTEN_CERTIFICATES", str(tmp_path / "certificates"))

    def load_model(name: str, **_: Any) -> Any:
        return UNETS[name](tmp_path) if name in UNETS else MODELS[name]()

    for kind in (diffusers.DiffusionPipeline, diffusers.ControlNetModel):
        monkeypatch.setattr(kind, "from_pretrained", staticmethod(load_model))
        monkeypatch.setattr(kind, "to", lambda self, *_, **__: self)
    monkeypatch.setitem(MODELS, "lllyasviel/sd-controlnet-canny", lambda: None)  # the pipeline of the tests has one
    monkeypatch.setattr(diffusers.ModularPipeline, "from_pretrained", staticmethod(lambda name: modular()))
    monkeypatch.setattr(diffusers.ModularPipeline, "to", lambda self, *_: self)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", _offload)
    monkeypatch.setattr(diffusers.FluxPipeline, "load_lora_weights", _adapter)
    casting = diffusers.FluxTransformer2DModel.enable_layerwise_casting
    monkeypatch.setattr(  # the tiny models compute in float32
        diffusers.FluxTransformer2DModel,
        "enable_layerwise_casting",
        lambda self, storage_dtype, compute_dtype: casting(self, storage_dtype, torch.float32),
    )
    accelerate, calibrate, fit_leap = hasten.accelerate, hasten.calibrate, hasten.fit_leap

    def instead(target: Any, *methods: Any, **params: Any) -> Any:
        hasten.remove(target)  # a page shows one way after the other
        return accelerate(target, *methods, **params)

    def plainly(learn: Any) -> Any:
        return lambda target, *args, **params: (hasten.remove(target), learn(target, *args, **params))[1]

    monkeypatch.setattr(hasten, "accelerate", instead)
    monkeypatch.setattr(hasten, "calibrate", plainly(calibrate))
    monkeypatch.setattr(hasten, "fit_leap", plainly(fit_leap))


def _offload(pipe: Any) -> None:
    """Offloading with the CPU as the device, which diffusers refuses."""
    cpu_offload_with_hook(pipe.transformer, execution_device=torch.device("cpu"))


def _cases() -> list[Any]:
    cases = []
    for page in pages():
        name = str(page.relative_to(ROOT))
        if name not in ELSEWHERE and any(block.kind == "python" for block in blocks(page)):
            cases.append(pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else []))
    return cases


@pytest.mark.parametrize("page", _cases())
def test_the_code_of_a_page_runs(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    scope: dict[str, Any] = {
        "hasten": hasten,
        "torch": torch,
        "prompts": PROMPTS,
        "calls": CALLS,
        "prompt": "red apple",
    }
    given = GIVEN.get(name, lambda: {"pipe": flux()})
    scope |= given()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HastenWarning)
        for block in blocks(page):
            if block.kind == "python" and block.run:
                exec(compile(block.code, name, "exec"), scope)


def test_a_block_that_does_not_run_says_why_and_there_are_few() -> None:
    left = [str(page) for page in pages() for block in blocks(page) if block.kind == "python" and not block.run]
    assert len(left) < 12
