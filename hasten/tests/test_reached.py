"""The hook is reached whatever others do to the transformer between calls, or it says what stands in the way."""

from __future__ import annotations

import threading
import types
import warnings

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxPipeline, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, ModelHook, apply_first_block_cache, apply_group_offloading
from pipelines import draw, make_pipe
from tiny import TINY, build, first
from torch import nn

import hasten
from hasten.errors import AdapterError, AlreadyAcceleratedError, ConfigError, HastenWarning
from hasten.pipeline.hooks import hooks_on

CPU = torch.device("cpu")
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def messages(caught):
    return [str(w.message) for w in caught if issubclass(w.category, HastenWarning)]


def near(latents, expected):
    return torch.allclose(latents, expected, rtol=0, atol=5e-6)


# --- blocks replaced or wrapped


class Louder(nn.Module):
    """A block that somebody wrapped."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        encoder, hidden = self.block(*args, **kwargs)
        return encoder, hidden * 1.3


def wrap(model, stack, index):
    blocks = getattr(model, stack)
    blocks[index] = Louder(blocks[index])


def swap(model, stack, index):
    torch.manual_seed(7)
    blocks = getattr(model, stack)
    other = type(blocks[index])(dim=32, num_attention_heads=2, attention_head_dim=16)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(std=0.1)
    blocks[index] = other


def drop(model, stack, index):
    blocks = getattr(model, stack)
    setattr(model, stack, nn.ModuleList([block for i, block in enumerate(blocks) if i != index % len(blocks)]))


METHODS = [
    ("taylorseer", {}),
    ("reuse", {"site": "module"}),
    ("fbcache", {"threshold": 0.4}),
    ("teacache", {"threshold": 0.4}),
    ("speca", {}),
]


@pytest.mark.parametrize(("method", "params"), METHODS)
@pytest.mark.parametrize(
    ("change", "stack", "index"),
    [(wrap, BLOCKS[1], -1), (wrap, BLOCKS[0], 0), (wrap, BLOCKS[1], 1), (drop, BLOCKS[1], -1)],
)
@pytest.mark.parametrize("interval", [1, 4])
def test_blocks_replaced_between_calls_are_the_ones_that_run(method, params, change, stack, index, interval):
    pipe = make_pipe()
    with hasten.accelerate(pipe, method, interval=interval, **params):
        before = draw(pipe)
        change(pipe.transformer, stack, index)
        changed = draw(pipe)
    plain = draw(pipe)
    with hasten.accelerate(pipe, method, interval=interval, **params):
        assert torch.equal(draw(pipe), changed)
    assert not torch.equal(changed, before)
    assert interval > 1 or torch.equal(changed, plain)


def test_a_block_whose_input_cannot_be_looked_at_is_named(pipe):
    class Opaque(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states, **_):
            return encoder_hidden_states, hidden_states

    with hasten.accelerate(pipe, "teacache"):
        pipe.transformer.transformer_blocks[0] = Opaque()
        with pytest.raises(AdapterError, match="Opaque has no 'attn'"):
            draw(pipe)


# --- offloading by the pipeline itself, which strips hooks and puts them back at the end of each call


@pytest.mark.parametrize("first", ["offload", "accelerate"])
@pytest.mark.parametrize("site", ["hidden", "output", "module"])
def test_offloading_by_the_pipeline_over_many_calls(first, site):
    pipe = make_pipe()
    plain = draw(pipe)
    with hasten.accelerate(pipe, "taylorseer", interval=4, site=site):
        fast = draw(pipe)
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    run = hasten.accelerate(pipe, "taylorseer", interval=4, site=site)
    if first == "accelerate":
        pipe.enable_model_cpu_offload(device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(4):
            if call == 2:  # switched off, and on again
                pipe.remove_all_hooks()
                draw(pipe)
                pipe.enable_model_cpu_offload(device="cpu")
            assert near(draw(pipe), fast)
            assert len(run.records) == 12 * (call + 1 + (call >= 2))
    assert not messages(caught)
    run.remove()
    assert near(draw(pipe), plain)
    pipe.remove_all_hooks()
    assert near(draw(pipe), plain)
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


@pytest.mark.parametrize("first", ["offload", "accelerate"])
def test_group_offloading_in_either_order_over_many_calls(first, tmp_path):
    try:
        alone = make_pipe()
        apply_group_offloading(alone.transformer, CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path / "alone"))
        draw(alone, 1)
    except AttributeError:
        pytest.skip("this diffusers offloads groups from an accelerator only")
    pipe = make_pipe()
    plain = draw(pipe)
    with hasten.accelerate(pipe, "taylorseer", interval=4):
        fast = draw(pipe)
    run = hasten.accelerate(pipe, "taylorseer", interval=4) if first == "accelerate" else None
    apply_group_offloading(pipe.transformer, CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path))
    run = run or hasten.accelerate(pipe, "taylorseer", interval=4)
    for call in range(3):
        assert near(draw(pipe), fast)
        assert len(run.records) == 12 * (call + 1)
    run.remove()
    assert near(draw(pipe), plain)


# --- forwards of others


def louder_forward(model):
    """A forward that somebody puts on the instance."""
    inner = model.forward

    def forward(self, *args, **kwargs):
        output = inner(*args, **kwargs)
        return (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else type(output)(output.sample * 1.1)

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("site", ["hidden", "output"])
def test_a_forward_put_on_the_instance_stays_what_the_user_made(pipe, order, site):
    plain = draw(pipe)
    if order == "before":
        louder_forward(pipe.transformer)
    run = hasten.accelerate(pipe, "taylorseer", interval=1, site=site)
    if order == "after":
        louder_forward(pipe.transformer)
    theirs = pipe.transformer.forward
    loud = draw(pipe)
    assert len(run.records) == 12
    run.remove()
    assert pipe.transformer.forward == theirs
    assert torch.equal(draw(pipe), loud)
    del pipe.transformer.forward
    assert torch.equal(draw(pipe), plain)


def test_hooks_of_others_that_come_and_go_meanwhile(pipe):
    class Doubled(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.01}

    plain = draw(pipe)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(Doubled(), "first")
    hooked = draw(pipe)
    run = hasten.accelerate(pipe, "taylorseer", interval=1)
    assert torch.equal(draw(pipe), hooked)
    registry.remove_hook("first")
    assert torch.equal(draw(pipe), plain)
    registry.register_hook(Doubled(), "second")
    assert torch.equal(draw(pipe), hooked)
    run.remove()
    assert torch.equal(draw(pipe), hooked)
    registry.remove_hook("second")
    assert torch.equal(draw(pipe), plain)
    assert len(run.records) == 36


# --- whole-model compilation


@pytest.mark.parametrize("how", ["in place", "wrapped"])
@pytest.mark.parametrize("when", ["before", "between"])
def test_whole_model_compilation_is_reached_and_stays(pipe, how, when):
    model, plain = pipe.transformer, draw(pipe, 6)
    with hasten.accelerate(pipe, "taylorseer", interval=3):
        fast = draw(pipe, 6)

    def compiled():
        if how == "in place":
            model.compile(backend="eager")
        else:
            pipe.transformer = torch.compile(model, backend="eager")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if when == "before":
            compiled()
        run = hasten.accelerate(pipe, "taylorseer", interval=3)
        if when == "between":
            draw(pipe, 6)
            compiled()
        assert near(draw(pipe, 6), fast)
        assert [r.step for r in run.records[-6:] if r.computed] == [0, 1, 2, 5]
        run.remove()
    assert not messages(caught)
    if how == "in place":
        assert model._compiled_call_impl is not None
    assert near(draw(pipe, 6), plain)
    assert not hooks_on(model)


# --- caches of others


CACHES = [
    FirstBlockCacheConfig(threshold=0.5),
    PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
]
if hasattr(diffusers, "TaylorSeerCacheConfig"):  # not in diffusers 0.35
    CACHES.append(diffusers.TaylorSeerCacheConfig(cache_interval=4, disable_cache_before_step=3))


@pytest.mark.parametrize("config", CACHES)
def test_a_diffusers_cache_is_refused_in_either_order(pipe, config):
    plain = draw(pipe)
    with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
        fast = draw(pipe)
        with pytest.raises(AlreadyAcceleratedError, match="hasten"):
            pipe.transformer.enable_cache(config)
        assert torch.equal(draw(pipe), fast)
        assert len(run.records) == 24
    pipe.transformer.enable_cache(config)
    with pytest.raises(AlreadyAcceleratedError, match="disable_cache"):
        hasten.accelerate(pipe, "taylorseer", interval=4)
    pipe.transformer.disable_cache()
    assert torch.equal(draw(pipe), plain)


def test_a_cache_put_on_the_blocks_behind_the_transformers_back_is_refused_at_the_next_run(pipe):
    with hasten.accelerate(pipe, "taylorseer", interval=4):
        draw(pipe)
        apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.5))
        with pytest.raises(AlreadyAcceleratedError, match="diffusers cache"):
            draw(pipe)


def test_cache_dit_is_refused_in_either_order(pipe):
    pipe.transformer._is_cached = True  # what cache-dit leaves on a transformer that it is at work on
    with pytest.raises(AlreadyAcceleratedError, match="cache-dit"):
        hasten.accelerate(pipe, "taylorseer", interval=4)
    del pipe.transformer._is_cached
    with hasten.accelerate(pipe, "taylorseer", interval=4):
        draw(pipe)
        pipe.transformer._is_cached = True
        with pytest.raises(AlreadyAcceleratedError, match="cache-dit"):
            draw(pipe)
        del pipe.transformer._is_cached
        draw(pipe)


# --- LoRA


def add_lora(model):
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "net.0.proj"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), "style")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)


@pytest.mark.parametrize(
    ("method", "site"),
    [
        ("taylorseer", "hidden"),
        ("taylorseer", "output"),
        ("taylorseer", "module"),
        ("fbcache", "hidden"),
        ("teacache", "hidden"),
        ("speca", "hidden"),
        ("easycache", "output"),
    ],
)
def test_the_strength_of_lora_per_call_reaches_every_layer(pipe, method, site):
    add_lora(pipe.transformer)
    weak = {"joint_attention_kwargs": {"scale": 0.3}}
    plain, strong = draw(pipe, **weak), draw(pipe)
    assert not torch.allclose(plain, strong, atol=1e-2)
    with hasten.accelerate(pipe, method, interval=1, site=site):
        assert torch.equal(draw(pipe, **weak), plain)
    if site != "module":
        with hasten.accelerate(pipe, method, interval=4, site=site):
            draw(pipe, **weak)
    assert torch.equal(draw(pipe, **weak), plain)
    assert torch.equal(draw(pipe), strong)  # no layer is left scaled, after skipped steps neither


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel"])
@pytest.mark.parametrize("method", ["taylorseer", "fbcache"])
def test_the_strength_of_lora_reaches_every_layer_of_other_families(name, method):
    model = build(name)
    add_lora(model)
    key = "joint_attention_kwargs" if name.startswith("SD3") else "attention_kwargs"
    arguments = TINY[name].arguments(randn(*TINY[name].latent, seed=1), 0.8)
    with torch.no_grad():
        plain = first(model(**arguments, **{key: {"scale": 0.3}}))
        with hasten.accelerate(model, method, interval=1):
            assert torch.equal(first(model(**arguments, **{key: {"scale": 0.3}})), plain)


def test_lora_fused_and_unfused_between_calls(pipe):
    twin = make_pipe()
    with hasten.accelerate(pipe, "taylorseer", interval=4):
        draw(pipe)
        for change in (add_lora, lambda m: m.fuse_lora(), lambda m: m.unfuse_lora(), lambda m: m.unload_lora()):
            for model in (pipe.transformer, twin.transformer):
                change(model)
            latents = draw(pipe)
            with hasten.accelerate(twin, "taylorseer", interval=4):
                assert torch.equal(draw(twin), latents)


def lora_file(folder, seed, rank):
    """A LoRA as it is shared."""
    peft = pytest.importorskip("peft")
    model = make_pipe().transformer
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k"]), "style")
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    layers = peft.get_peft_model_state_dict(model, adapter_name="style")
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


@pytest.mark.parametrize("first", ["lora", "hasten"])
@pytest.mark.parametrize("site", ["hidden", "module"])
def test_lora_hot_swapped_between_calls(pipe, tmp_path, first, site):
    """Weights of another rank put in the place of those that are there: as with acceleration of each afresh."""
    files = [lora_file(tmp_path / str(rank), seed=rank, rank=rank) for rank in (2, 4)]
    twin = make_pipe()
    for one in (pipe, twin):
        one.enable_lora_hotswap(target_rank=4)
    run = None if first == "lora" else hasten.accelerate(pipe, "taylorseer", interval=3, site=site)
    images = []
    for file in (*files, files[0]):
        for one in (pipe, twin):
            one.load_lora_weights(
                file, weight_name="pytorch_lora_weights.safetensors", adapter_name="style", hotswap=bool(images)
            )
        run = run or hasten.accelerate(pipe, "taylorseer", interval=3, site=site)
        images.append(draw(pipe, 6))
        with hasten.accelerate(twin, "taylorseer", interval=3, site=site):
            assert torch.equal(draw(twin, 6), images[-1])
    assert not near(images[0], images[1])
    assert torch.equal(images[0], images[2])
    run.remove()
    assert torch.equal(draw(pipe, 6), draw(twin, 6))


def test_proxies_leave_state_and_parameters_alone(pipe):
    model, seen = pipe.transformer, []
    names = list(model.state_dict())

    def look(*_):
        seen.append((len({id(p) for p in model.parameters()}), sum(1 for _ in model.parameters())))

    model.x_embedder.register_forward_hook(look)
    with hasten.accelerate(pipe, "taylorseer", interval=4):
        draw(pipe)
        assert list(model.state_dict()) == names
    assert len(set(seen)) == 1


# --- the forward called directly


def recorded_arguments(pipe):
    """Arguments of a pipeline's latest forward."""
    arguments = {}
    handle = pipe.transformer.register_forward_pre_hook(lambda _m, _a, kw: arguments.update(kw), with_kwargs=True)
    draw(pipe, 2)
    handle.remove()
    return arguments


@pytest.mark.parametrize("kind", ["caching", "resolution"])
def test_a_forward_called_past_the_hooks_is_told_once(pipe, kind):
    arguments = recorded_arguments(pipe)
    model = pipe.transformer
    method = hasten.TaylorSeer(interval=4) if kind == "caching" else hasten.Fresco(stages=(4, 4, 4), shares=0.3)
    with warnings.catch_warnings(record=True) as caught, hasten.accelerate(pipe, method):
        warnings.simplefilter("always")
        draw(pipe, 12)
        with torch.no_grad():
            model.x_embedder(arguments["hidden_states"])  # a submodule on its own is no forward
            assert not messages(caught)
            passed = [model.forward(**arguments)[0] for _ in range(2)]
    (message,) = messages(caught)
    assert "FluxTransformer2DModel.forward(...) was called directly" in message
    with torch.no_grad():
        assert torch.equal(passed[0], model(**arguments)[0])
        assert torch.equal(passed[0], passed[1])


def start_and_join(worker):
    worker.start()
    worker.join()


def test_a_forward_called_on_another_thread_is_told_too(pipe):
    arguments, seen = recorded_arguments(pipe), []

    def elsewhere():
        with torch.no_grad():
            seen.append(pipe.transformer.forward(**arguments)[0])

    worker = threading.Thread(target=elsewhere)
    with hasten.accelerate(pipe, "taylorseer", warmup=1):
        draw(pipe, 2)
        with pytest.warns(HastenWarning, match="called directly"):
            start_and_join(worker)
    assert len(seen) == 1


def test_a_forward_compiled_in_one_graph_is_no_bypass_and_nothing_is_left_on_submodules(pipe):
    model = pipe.transformer
    plain = draw(pipe, 2)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    with (
        warnings.catch_warnings(record=True) as caught,
        hasten.accelerate(pipe, "reuse", warmup=1, interval=1, site="output"),
    ):
        warnings.simplefilter("always")
        assert near(draw(pipe, 2), plain)
    assert not messages(caught)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("order", "site"),
    [
        ("after", "hidden"),
        pytest.param("before", "hidden", marks=pytest.mark.slow),
        pytest.param("after", "module", marks=pytest.mark.slow),
    ],
)
def test_a_forward_compiled_in_one_graph_is_named_where_proxies_stand_in_it(pipe, order, site):
    model, plain = pipe.transformer, draw(pipe, 3)

    def compile_it():
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)

    if order == "before":
        compile_it()
    with hasten.accelerate(pipe, "taylorseer", warmup=1, interval=2, site=site):
        if order == "after":
            compile_it()
        with pytest.raises(
            ConfigError, match=r"compiled in one graph \(fullgraph=True\).*transformer.compile"
        ) as error:
            draw(pipe, 3)
        assert len(str(error.value).splitlines()) == 1
    del model.forward
    assert torch.equal(draw(pipe, 3), plain)


def test_a_compilers_own_error_stays_what_it_is(pipe):
    torch._dynamo.reset()  # nothing that other tests compiled
    model = pipe.transformer
    model.x_embedder.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    with (
        hasten.accelerate(pipe, "taylorseer", warmup=1, interval=2, site="output"),
        pytest.raises(torch._dynamo.exc.TorchDynamoException),
    ):
        draw(pipe, 4)


# --- the pipeline calls another transformer


def test_a_transformer_that_is_not_the_pipelines_any_more_is_told(pipe):
    other = make_pipe(1).transformer
    run = hasten.accelerate(pipe, "taylorseer", interval=4)
    mine, pipe.transformer = pipe.transformer, other
    draw(pipe)
    with pytest.raises(ConfigError, match="is not the transformer that was accelerated"):
        run.summary()
    pipe.transformer = mine
    draw(pipe)
    assert run.summary().computed_steps == 5
    pipe.transformer = other
    with pytest.warns(HastenWarning, match="is not the transformer that was accelerated"):
        run.summary()
    run.remove()


def test_summary_before_any_call_says_so(pipe):
    with hasten.accelerate(pipe, "taylorseer") as run, pytest.raises(ConfigError, match="call the pipeline first"):
        run.summary()
