"""The ComfyUI node pack against a small stand-in for the interfaces that it touches, and small denoisers that are wired
and called as ComfyUI's own classes are."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from test_bench import command
from torch import nn

import hasten
from hasten import models
from hasten.bench.subject import load
from hasten.caching.schedule import computed_steps
from hasten.errors import CalibrationError, ConfigError, HastenError
from hasten.integrations import comfyui
from hasten.integrations.comfyui import nodes
from hasten.integrations.comfyui.adapters import ADAPTERS
from hasten.integrations.listed import listed
from hasten.pipeline.hooks import hooks_on

WIDTH, STEPS = 16, 10


def manual_seed(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=manual_seed(seed))


# --- small denoisers


class Block(nn.Module):
    """Mixes tokens; counts its calls."""

    def __init__(self):
        super().__init__()
        self.mix, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def change(self, x, *others):
        self.calls += 1
        pooled = sum(other.mean(1, keepdim=True) for other in (x, *others))
        return 0.3 * torch.tanh(self.mix(x + pooled))


class Double(Block):
    def forward(self, img, txt, vec, pe=None, attn_mask=None):
        return img + self.change(img, txt) + 0.1 * vec[:, None], txt + self.change(txt, img)


class Sequence(Block):
    """One sequence of tokens, as argument `x`; some change it in place."""

    def __init__(self, in_place=False):
        super().__init__()
        self.in_place = in_place

    def forward(self, x, vec=None, *rest, **named):
        change = self.change(x) + (0.1 * vec[:, None] if isinstance(vec, torch.Tensor) and vec.ndim == 2 else 0)
        if self.in_place:
            x += change
            return x
        return x + change


class Pair(Block):
    def forward(self, hidden_states, encoder_hidden_states, temb):
        text = encoder_hidden_states + self.change(encoder_hidden_states, hidden_states)
        return text, hidden_states + self.change(hidden_states, encoder_hidden_states) + 0.1 * temb[:, None]


class Denoiser(nn.Module):
    """Latents `[B, 4, H, W]` to a velocity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden_size = self.inner_dim = self.dim = WIDTH
        self.enter, self.leave, self.time = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(1, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.make()

    def start(self, x, t):
        return self.enter(x.flatten(2).transpose(1, 2)), torch.tanh(self.time(t.reshape(-1, 1).float()))

    def end(self, tokens, x):
        return self.leave(self.norm(tokens)).transpose(1, 2).reshape(x.shape)


class TwoStacks(Denoiser):
    text_first = True

    def make(self):
        self.double_blocks = nn.ModuleList(Double() for _ in range(2))
        self.single_blocks = nn.ModuleList(Sequence() for _ in range(3))

    def forward(self, x, timestep, context, y=None, guidance=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        (img, vec), txt = self.start(x, timestep), context
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=None, attn_mask=None)
        order = (txt, img) if self.text_first else (img, txt)
        both = torch.cat(order, 1)
        for block in self.single_blocks:
            both = block(both, vec=vec, pe=None, attn_mask=None)
        length = txt.shape[1]
        return self.end(both[:, length:] if self.text_first else both[:, : img.shape[1]], x)


class ImageFirst(TwoStacks):
    text_first = False


class Qwen(Denoiser):
    def make(self):
        self.transformer_blocks = nn.ModuleList(Pair() for _ in range(4))

    def forward(self, x, timestep, context, attention_mask=None, transformer_options={}, **kwargs):  # noqa: B006
        (img, vec), txt = self.start(x, timestep), context
        for block in self.transformer_blocks:
            txt, img = block(hidden_states=img, encoder_hidden_states=txt, temb=vec)
        return self.end(img, x)


class Wan(Denoiser):
    def make(self):
        self.blocks = nn.ModuleList(Sequence() for _ in range(4))

    def forward(self, x, timestep, context, clip_fea=None, transformer_options={}, **kwargs):  # noqa: B006
        tokens, vec = self.start(x, timestep)
        for block in self.blocks:
            tokens = block(tokens, vec, freqs=None, context=context)
        return self.end(tokens, x)


class Lumina(Denoiser):
    def make(self):
        self.layers = nn.ModuleList(Sequence() for _ in range(4))

    def forward(self, x, timesteps, context, num_tokens=None, attention_mask=None, **kwargs):
        tokens, vec = self.start(x, 1 - timesteps)
        both = torch.cat((context, tokens), 1)
        for block in self.layers:
            both = block(both, None, None, vec)
        return self.end(both[:, context.shape[1] :] + 0.1 * vec[:, None], x)


class Ltx(Denoiser):
    def make(self):
        self.transformer_blocks = nn.ModuleList(Sequence(in_place=True) for _ in range(4))

    def forward(self, x, timestep, context, attention_mask=None, frame_rate=25, transformer_options={}, **kwargs):  # noqa: B006
        tokens, vec = self.start(x, timestep)
        for block in self.transformer_blocks:
            tokens = block(tokens, vec, context=context)
        return self.end(tokens, x)


KINDS = {
    "comfy.ldm.flux.model.Flux": TwoStacks,
    "comfy.ldm.chroma.model.Chroma": TwoStacks,
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": ImageFirst,
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": Qwen,
    "comfy.ldm.wan.model.WanModel": Wan,
    "comfy.ldm.lumina.model.NextDiT": Lumina,
    "comfy.ldm.lightricks.model.LTXVModel": Ltx,
}


def denoiser(name="comfy.ldm.flux.model.Flux"):
    """A small denoiser under a full name of ComfyUI's."""
    module, _, kind = name.rpartition(".")
    made = type(kind, (KINDS[name],), {"__module__": module, "__qualname__": kind})().eval()
    return made


# --- ComfyUI in small


class Executor:
    """Calls wrappers from the outside in, then the function."""

    def __init__(self, function, class_obj, wrappers):
        self.function, self.class_obj, self.wrappers = function, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        inner = Executor(self.function, self.class_obj, self.wrappers[1:])
        return inner.execute(*args, **kwargs)

    def execute(self, *args, **kwargs):
        return self.wrappers[0](self, *args, **kwargs) if self.wrappers else self.function(*args, **kwargs)


class Patcher:
    """A MODEL."""

    def __init__(self, module, wrappers=()):
        self.model, self.wrappers = types.SimpleNamespace(diffusion_model=module), list(wrappers)

    def clone(self):
        return Patcher(self.model.diffusion_model, self.wrappers)

    def add_wrapper_with_key(self, kind, key, wrapper):
        assert kind == "outer_sample"
        self.wrappers.append(wrapper)


class KSampler:
    """A SAMPLER."""

    def __init__(self, function, extra_options=None, inpaint_options=None):
        self.function, self.options = function, extra_options or {}


def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **(extra_args or {}))
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        middle = (sigmas[i] + sigmas[i + 1]) / 2
        slope = (x - model(x, sigmas[i] * x.new_ones(len(x)))) / sigmas[i]
        guess = x + slope * (middle - sigmas[i])
        x = x + (guess - model(guess, middle * x.new_ones(len(x)))) / middle * (sigmas[i + 1] - sigmas[i])
    return x


@torch.inference_mode()
def sample(patcher, sampler, sigmas, guidance=None, together=False, noise=None):
    """What a guider does: conditional and unconditional in one forward or in two, as memory allows."""
    net, context = patcher.model.diffusion_model, randn(1, 3, WIDTH, seed=2)

    def predict(x, sigma, **_):
        def velocity(cond, latents, level):
            return net(latents, level, context=cond)

        if guidance is None:
            out = velocity(context, x, sigma)
        elif together:
            pair = velocity(torch.cat([context, -context]), torch.cat([x, x]), torch.cat([sigma, sigma]))
            out = pair[1:] + guidance * (pair[:1] - pair[1:])
        else:
            plain, out = velocity(-context, x, sigma), velocity(context, x, sigma)
            out = plain + guidance * (out - plain)
        return x - sigma.reshape(-1, 1, 1, 1) * out

    def outer_sample(
        noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        return sampler.function(predict, noise, sigmas, **sampler.options)

    guider = types.SimpleNamespace(model_patcher=patcher)
    executor = Executor(outer_sample, guider, patcher.wrappers)
    return executor.execute(randn(1, 4, 4, 4) if noise is None else noise, None, sampler, sigmas, seed=0)


@pytest.fixture(autouse=True)
def core(monkeypatch, tmp_path):
    """The modules that nodes import."""
    paths = types.ModuleType("folder_paths")
    paths.models_dir, paths.folder_names_and_paths = str(tmp_path / "models"), {}
    paths.get_filename_list = lambda key: sorted(
        path.name for folder in paths.folder_names_and_paths[key][0] for path in Path(folder).glob("*.safetensors")
    )
    paths.get_full_path = lambda key, name: next(
        (str(Path(f) / name) for f in paths.folder_names_and_paths[key][0] if (Path(f) / name).exists()), None
    )
    extension, samplers = types.ModuleType("comfy.patcher_extension"), types.ModuleType("comfy.samplers")
    extension.WrappersMP = types.SimpleNamespace(OUTER_SAMPLE="outer_sample")
    samplers.KSAMPLER = KSampler
    for name, module in {
        "comfy": types.ModuleType("comfy"),
        "comfy.patcher_extension": extension,
        "comfy.samplers": samplers,
        "folder_paths": paths,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return Path(paths.models_dir)


def sigmas(steps=STEPS):
    return torch.linspace(1, 0, steps + 1)


def accelerated(patcher, method="foca", count=4, schedule="even", **more):
    return nodes.Accelerate().apply(patcher, method, count, schedule, **more)


# --- tests


def test_every_family_has_an_adapter_and_a_stand_in():
    assert set(KINDS) == set(ADAPTERS)


@pytest.mark.parametrize("name", KINDS)
def test_the_blocks_of_each_family_run_at_the_computed_steps_alone(name):
    net = denoiser(name)
    assert models.find(net) is ADAPTERS[name]  # and not a class of diffusers that is called the same
    patcher = Patcher(net)
    plain = sample(patcher, KSampler(euler), sigmas())
    patched, session = accelerated(patcher)
    blocks = [block for block in net.modules() if isinstance(block, Block)]
    last = blocks[-1]
    before = last.calls
    per_step = before // STEPS
    fast = sample(patched, KSampler(euler), sigmas())
    assert last.calls - before == 4 * per_step
    assert session.summary.computed_steps == 4
    assert session.summary.steps == STEPS
    assert 0 < (fast - plain).abs().max() < 0.2
    assert torch.equal(sample(patcher, KSampler(euler), sigmas()), plain)  # the other MODEL is as it was
    assert not hooks_on(net)
    whole, _ = accelerated(patcher, "reuse", STEPS)
    assert torch.equal(sample(whole, KSampler(euler), sigmas()), plain)


@pytest.mark.parametrize("together", [True, False])
def test_guidance_in_one_forward_or_two_is_the_same(together):
    patched, session = accelerated(Patcher(denoiser()), "taylorseer")
    fast = sample(patched, KSampler(euler), sigmas(), guidance=3.0, together=together)
    assert session.summary.computed_steps == 4
    assert len(session.summary.passes) == (1 if together else 2)
    other, _ = accelerated(Patcher(denoiser()), "taylorseer")
    assert torch.allclose(
        fast, sample(other, KSampler(euler), sigmas(), guidance=3.0, together=not together), atol=1e-5
    )


def test_steps_of_every_run_are_those_of_its_sigmas():
    patched, session = accelerated(Patcher(denoiser()), "foca", 4)
    for steps in (10, 7, 20):
        sample(patched, KSampler(euler), sigmas(steps))
        assert (session.summary.steps, session.summary.computed_steps) == (steps, 4)
    with pytest.raises(HastenError, match="computed_steps=4 is more than the 3 steps"):
        sample(patched, KSampler(euler), sigmas(3))
    assert not hooks_on(patched.model.diffusion_model)
    assert torch.equal(sample(patched, KSampler(euler), sigmas(0), noise=torch.ones(1)), torch.ones(1))
    for schedule in nodes.Accelerate.INPUT_TYPES()["required"]["schedule"][0]:
        method = hasten.FoCa(computed_steps=4, schedule=schedule)
        assert list(listed(method, 10).steps) == computed_steps(method.plan(), 10)
        patched, session = accelerated(Patcher(denoiser()), "foca", 4, schedule)
        sample(patched, KSampler(euler), sigmas(10))
        assert session.summary.computed_steps == 4


def test_a_sampler_of_two_evaluations_is_warned_of(caplog):
    patched, _ = accelerated(Patcher(denoiser()), "reuse", 4)
    with caplog.at_level(logging.WARNING, "hasten"):
        sample(patched, KSampler(midpoint), sigmas())
    assert "evaluates more than once per step" in caplog.text


def test_the_summary_says_what_the_run_saved():
    patched, session = accelerated(Patcher(denoiser()))
    show = nodes.Summarise()
    assert show.show(session, "latent")["result"] == ("no run yet", "latent")
    sample(patched, KSampler(euler), sigmas())
    shown = show.show(session, "latent")
    assert "FoCa: 4 of 10 steps computed" in shown["result"][0]
    assert shown["ui"]["text"] == [shown["result"][0]]
    assert nodes.Summarise.IS_CHANGED() != nodes.Summarise.IS_CHANGED()


class Trained(nn.Module):
    """The transformer of `emoji-flux` with one prompt: packed latents `[1, 1, T, C]` to their velocity."""

    def __init__(self, pipe):
        super().__init__()
        self.transformer = pipe.transformer
        states, pooled, text_ids = pipe.encode_prompt(prompt="red apple", prompt_2=None)
        self.noise, image_ids = pipe.prepare_latents(
            1, pipe.transformer.config.in_channels // 4, 64, 64, torch.float32, states.device, manual_seed(5)
        )
        self.given = {
            "encoder_hidden_states": states,
            "pooled_projections": pooled,
            "txt_ids": text_ids,
            "img_ids": image_ids,
        }

    def forward(self, x, timestep, context):
        return self.transformer(x[:, 0], timestep=timestep, **self.given, return_dict=False)[0][:, None]


def test_leap_is_what_its_scheduler_does_with_the_levels_of_the_node(core):
    subject = load("emoji-flux")
    fit = subject.fitted["leap"]
    (core / "hasten").mkdir(parents=True)
    (core / "hasten" / "leap.safetensors").write_bytes(fit.read_bytes())
    assert nodes.LeapSample.INPUT_TYPES()["required"]["file"] == (["leap.safetensors"],)
    sampler, levels = nodes.LeapSample().make("leap.safetensors", 5)
    net = Trained(subject.pipe)
    noise = net.noise[:, None]
    seen = []
    sampler.options["callback"] = seen.append
    fast = sample(Patcher(net), sampler, levels, noise=noise)
    scheduler = hasten.LeapScheduler.load(fit)
    scheduler.set_timesteps(5)
    x = noise
    with torch.inference_mode():
        for level, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
            x = scheduler.step(net(x, level[None], context=None), timestep, x).prev_sample
    assert torch.allclose(fast, x, atol=1e-5)
    assert [one["i"] for one in seen] == list(range(5))
    fine = sample(Patcher(net), KSampler(euler), sigmas(400), noise=noise)
    coarse = sample(Patcher(net), KSampler(euler), sigmas(5), noise=noise)
    assert (fast - fine).norm() < (coarse - fine).norm() / 2
    with pytest.raises(ConfigError, match="not those of the LEAP node"):
        sample(Patcher(net), sampler, sigmas(5))
    with pytest.raises(HastenError, match="evaluations"):
        nodes.LeapSample().make("leap.safetensors", 11)


def test_calibrations_come_from_the_models_folder(core):
    assert nodes.LoadCalibration.INPUT_TYPES()["required"]["file"] == ([],)
    with pytest.raises(CalibrationError, match="is not in models/hasten"):
        nodes.LoadCalibration().load("nothing.safetensors")
    (core / "hasten" / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(CalibrationError, match=r"broken\.safetensors"):
        nodes.LoadCalibration().load("broken.safetensors")
    with pytest.raises(CalibrationError, match=r"is a calibration of|has to be fitted"):
        accelerated(Patcher(denoiser()), "l2p")


def test_workflows_use_nodes_and_inputs_that_there_are():
    folder = Path(comfyui.__file__).parent / "workflows"
    found = set()
    for file in sorted(folder.glob("*.json")):
        graph = json.loads(file.read_text())
        for node in graph.values():
            for value in node["inputs"].values():
                assert not isinstance(value, list) or value[0] in graph
            if node["class_type"] in comfyui.NODE_CLASS_MAPPINGS:
                found.add(node["class_type"])
                declared = comfyui.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
                assert (
                    set(declared["required"]) <= set(node["inputs"]) <= {n for part in declared.values() for n in part}
                )
    assert found == set(comfyui.NODE_CLASS_MAPPINGS) - {"HastenLoadCalibration"}
    assert set(comfyui.NODE_DISPLAY_NAME_MAPPINGS) == set(comfyui.NODE_CLASS_MAPPINGS)


def test_install_links_the_folder_once(monkeypatch, capsys, tmp_path):
    root = tmp_path / "ComfyUI"
    (root / "custom_nodes").mkdir(parents=True)
    code, _, error = command(monkeypatch, capsys, "comfyui", "install", root)
    assert code == 2
    assert "is no ComfyUI" in error
    (root / "main.py").touch()
    assert command(monkeypatch, capsys, "comfyui", "install", root)[0] == 0
    assert (root / "custom_nodes" / "hasten" / "__init__.py").is_file()
    assert "is there already" in command(monkeypatch, capsys, "comfyui", "install", root)[1]
    (root / "custom_nodes" / "hasten").unlink()
    (root / "custom_nodes" / "hasten").mkdir()
    code, _, error = command(monkeypatch, capsys, "comfyui", "install", root)
    assert code == 2
    assert "remove it first" in error
