"""Models of other makers: attached, attended, and given back."""

import math
import types

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import hasten
from hasten.errors import AdapterError, AlreadyAcceleratedError, CalibrationError, ConfigError
from hasten.pipeline.hooks import hooks_on
from hasten.streaming import FocusedForcing, FullHistory, HeadBudgets, SlidingWindow
from hasten.streaming.adapters import attach_anyflow, attach_causal_wan
from hasten.streaming.adapters.causal_wan import wan_unrotate

diffusers = pytest.importorskip("diffusers", minversion="0.42")

# ---------------------------------------------------------------- AnyFlow


def anyflow(seed=0, head_width=16):
    """A pipeline with random weights and no text encoder: 1 + 2 + 2 + 2 latent frames of 2x2 or 1x1 tokens."""
    torch.manual_seed(seed)
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=head_width,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        chunk_partition=(1, 2, 2, 2),
    )
    pipe = diffusers.AnyFlowFARPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer.eval(),
        vae=None,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    """Latents of one call."""
    return pipe(
        **{
            "prompt_embeds": torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(5)),
            "height": 32,
            "width": 32,
            "num_frames": 25,
            "num_inference_steps": 2,
            "guidance_scale": 1.0,
            "output_type": "latent",
            "latents": torch.randn(1, 4, 7, 4, 4, generator=torch.Generator().manual_seed(6)),
            **arguments,
        }
    ).frames


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "head_width"), [(FullHistory(), 12), (FocusedForcing(budget=9), 16), (SlidingWindow(window=9), 16)]
)
def test_anyflow_with_the_whole_history_is_the_plain_pipeline(method, head_width):
    pipe = anyflow(head_width=head_width)
    plain = draw(pipe)
    with attach_anyflow(pipe, method) as run:
        assert torch.allclose(draw(pipe), plain, atol=1e-5)
        assert torch.allclose(draw(pipe), plain, atol=1e-5)  # a second video begins afresh
        stats = run.stats()
    assert stats.pairs == stats.full_pairs > 0
    assert torch.equal(draw(pipe), plain)


def test_anyflow_chooses_frames_and_does_less():
    pipe = anyflow()
    plain = draw(pipe)
    drawn = {}
    for backend in ("grouped", "masked"):
        with attach_anyflow(pipe, FocusedForcing(budget=1), backend=backend) as run:
            drawn[backend] = draw(pipe)
            assert run.stats().work_ratio > 1.04  # most keys at this size are the stock padding
    assert torch.allclose(drawn["grouped"], drawn["masked"], atol=1e-5)
    assert not torch.allclose(drawn["grouped"], plain, atol=1e-5)


@pytest.mark.slow
def test_anyflow_with_guidance_has_a_batch_of_two():
    pipe = anyflow()
    negative = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(7))
    arguments = {"guidance_scale": 3.0, "negative_prompt_embeds": negative}
    plain = draw(pipe, **arguments)
    with attach_anyflow(pipe, FullHistory()):
        assert torch.allclose(draw(pipe, **arguments), plain, atol=1e-5)


def test_anyflow_is_attached_once_and_is_anyflow():
    pipe = anyflow()
    with attach_anyflow(pipe, FullHistory()), pytest.raises(AlreadyAcceleratedError, match="remove"):
        attach_anyflow(pipe.transformer, FullHistory())
    with pytest.raises(AdapterError, match="AnyFlowFARPipeline"):
        attach_anyflow(nn.Linear(1, 1), FullHistory())


def test_the_one_verb_serves_streaming_pipelines():
    pipe = anyflow()
    plain = draw(pipe)
    run = hasten.accelerate(pipe, FocusedForcing(budget=1))
    with pytest.raises(ConfigError, match="call the pipeline first"):
        hasten.summary(pipe)
    less = draw(pipe)
    assert run.stats().work_ratio > 1
    assert not torch.equal(less, plain)
    assert "fewer pairs of query and key" in str(hasten.summary(pipe))
    assert "FocusedForcing" in str(hasten.summary(pipe.transformer))
    with pytest.raises(AlreadyAcceleratedError):
        hasten.accelerate(pipe, "focused-forcing", budget=2)
    again = hasten.accelerate(pipe, "focused-forcing", budget=1, replace=True)
    assert torch.equal(draw(pipe), less)
    assert again.method == FocusedForcing(budget=1)
    hasten.remove(pipe)
    assert torch.equal(draw(pipe), plain)
    assert not hooks_on(pipe.transformer)


def test_the_one_verb_serves_causal_wan_models():
    model = wan()
    plain = roll_out(model)
    with hasten.accelerate(model, SlidingWindow(window=2)) as run:
        assert not torch.equal(roll_out(model), plain)
        assert run.stats().work_ratio > 1
    assert torch.equal(roll_out(model), plain)
    assert vars(model).keys() == vars(wan()).keys()


def test_the_one_verb_says_which_models_have_a_history(pipe):
    with pytest.raises(AdapterError, match=r"FluxTransformer2DModel is not known to be.*hasten\.KVStream"):
        hasten.accelerate(pipe, FocusedForcing())
    with pytest.raises(ConfigError, match="give it alone"):
        hasten.accelerate(anyflow(), FocusedForcing(), hasten.FoCa())
    with pytest.raises(ConfigError, match="leave FocusedForcing out"):
        hasten.accelerate(anyflow(), FocusedForcing(), quality="high")
    with pytest.raises(ConfigError, match="leave audit out"):
        hasten.accelerate(anyflow(), FocusedForcing(), audit=0.1)


def test_a_history_that_does_not_fit_leaves_what_is_there(pipe):
    with hasten.accelerate(pipe, "foca", interval=2) as run:
        with pytest.raises(AdapterError, match="is not known to be"):
            hasten.accelerate(pipe, FocusedForcing(), replace=True)
        assert list(hooks_on(pipe.transformer)) == list(run.engines.values())


def test_budgets_of_another_model_are_refused():
    pipe = anyflow()
    with pytest.raises(CalibrationError, match="3 layers"):
        attach_anyflow(pipe, FocusedForcing(budget=HeadBudgets.uniform(3, 2, 1)))
    with pytest.raises(CalibrationError, match="chunk 3 instead of 2"):
        attach_anyflow(pipe, FocusedForcing(budget=HeadBudgets.uniform(2, 2, 1, {"chunk": 3})))


# ---------------------------------------------------------------- causal Wan

ROWS, COLUMNS, CHUNK, WIDTH, HEADS = 2, 3, 2, 36, 3
TOKENS = ROWS * COLUMNS


def attention(q, k, v):
    """The function that the proxy's module calls."""
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def turned(x, freqs, start):
    """Wan's rotation by (frame, row, column): `[B, tokens, heads, width]`."""
    half = x.shape[-1] // 2
    parts = freqs.split([half - 2 * (half // 3), half // 3, half // 3], 1)
    f = x.shape[1] // TOKENS
    grid = (
        parts[0][start : start + f].view(f, 1, 1, -1).expand(f, ROWS, COLUMNS, -1),
        parts[1][:ROWS].view(1, ROWS, 1, -1).expand(f, ROWS, COLUMNS, -1),
        parts[2][:COLUMNS].view(1, 1, COLUMNS, -1).expand(f, ROWS, COLUMNS, -1),
    )
    turn = torch.cat(grid, -1).reshape(1, x.shape[1], 1, half)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x)


class StandInAttention(nn.Module):
    """The attributes and the call of a causal Wan self-attention, with a rolling cache."""

    def __init__(self, sink_size=0):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.sink_size = sink_size

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).unbind(2)
        start = current_start // math.prod(grid_sizes[0][1:].tolist())
        q, k = turned(q, freqs, start), turned(k, freqs, start)
        if kv_cache is None:
            return self.o(attention(q, k, v).flatten(2))
        new, size, sink = k.shape[1], kv_cache["k"].shape[1], self.sink_size * TOKENS
        if current_start + new > kv_cache["end"]:
            kv_cache["end"] = current_start + new
            over = kv_cache["held"] + new - size
            if over > 0:
                for name in "kv":
                    kv_cache[name][:, sink:-over] = kv_cache[name][:, sink + over :].clone()
                kv_cache["held"] -= over
            kv_cache["held"] += new
        held = kv_cache["held"]
        kv_cache["k"][:, held - new : held], kv_cache["v"][:, held - new : held] = k, v
        return self.o(attention(q, kv_cache["k"][:, :held], kv_cache["v"][:, :held]).flatten(2))


class Proxy(nn.Module):
    """Blocks of such attention; `freqs` as in Wan."""

    def __init__(self, sink_size=0):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.self_attn = StandInAttention(sink_size)
        half = WIDTH // HEADS // 2
        angles = torch.outer(torch.arange(64.0), 100.0 ** -(torch.arange(half) / half)).double()
        self.freqs = torch.polar(torch.ones_like(angles), angles)

    def forward(self, x, caches, current_start):
        grid = torch.tensor([[x.shape[1] // TOKENS, ROWS, COLUMNS]])
        for block, cache in zip(self.blocks, caches, strict=True):
            x = x + block.self_attn(x, None, grid, self.freqs, None, kv_cache=cache, current_start=current_start)
        return x


@torch.no_grad()
def roll_out(model, chunks=6, window=None, steps=2):
    """Chunks of two frames, two denoising steps each and a clean pass, as Self-Forcing's pipeline does."""
    size = (window or chunks * CHUNK) * TOKENS
    caches = [
        {"k": torch.zeros(1, size, HEADS, WIDTH // HEADS), "v": torch.zeros(1, size, HEADS, WIDTH // HEADS)}
        | {"held": 0, "end": 0}
        for _ in model.blocks
    ]
    generator, clean = torch.Generator().manual_seed(2), []
    for chunk in range(chunks):
        x = torch.randn(1, CHUNK * TOKENS, WIDTH, generator=generator)
        for _ in range(steps):
            x = model(x, caches, chunk * CHUNK * TOKENS)
        model(x, caches, chunk * CHUNK * TOKENS)
        clean.append(x)
    return torch.cat(clean, 1)


def wan(sink_size=0):
    torch.manual_seed(0)
    return Proxy(sink_size)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("sink", [0, 1])
def test_wan_with_the_whole_history_is_the_plain_model(window, sink):
    model = wan(sink)
    plain = roll_out(model, window=window)
    for method in (FullHistory(), FocusedForcing(budget=99)):
        with attach_causal_wan(model, method) as run:
            assert torch.allclose(roll_out(model, window=window), plain, atol=1e-5)
            assert torch.allclose(roll_out(model, window=window), plain, atol=1e-5)
            assert run.stats().work_ratio == 1
    assert torch.equal(roll_out(model, window=window), plain)
    assert all("forward" not in vars(block.self_attn) for block in model.blocks)


def test_wan_chooses_frames_and_does_less():
    model = wan()
    plain = roll_out(model)
    drawn = {}
    for backend in ("grouped", "masked"):
        with attach_causal_wan(model, FocusedForcing(budget=2), backend=backend) as run:
            drawn[backend] = roll_out(model)
            assert run.stats().work_ratio > 1.5
    assert torch.allclose(drawn["grouped"], drawn["masked"], atol=1e-5)
    assert not torch.allclose(drawn["grouped"], plain, atol=1e-3)


def test_a_rolling_cache_keeps_absolute_frame_numbers():
    model = wan(sink_size=1)
    with attach_causal_wan(model, FullHistory()) as run:
        roll_out(model, window=6)
        # The last chunk is frames 10 and 11; the cache of six holds the first and those before it.
        assert run.stream[0].cache.frames == [0, 7, 8, 9]


def test_a_window_on_wan_is_attention_to_the_window():
    """The window of the method equals the window of the model's own cache, sink and all."""
    model = wan(sink_size=1)
    wanted = roll_out(model, window=6)  # one sink, three before the chunk, two of the chunk
    with attach_causal_wan(model, SlidingWindow(window=3, sink=1)):
        assert torch.allclose(roll_out(model), wanted, atol=1e-5)


def test_after_a_reset_in_the_middle_the_history_is_seen_again():
    model = wan()
    with attach_causal_wan(model, FullHistory()) as run:
        plain = roll_out(model)
        step = model.blocks[0].self_attn.forward
        calls = []

        def with_resets(*args, **kwargs):
            calls.append(1)
            if len(calls) % 2:
                run.stream.reset()
            return step(*args, **kwargs)

        model.blocks[0].self_attn.forward = with_resets
        assert torch.allclose(roll_out(model), plain, atol=1e-5)


def test_wan_rotation_is_undone():
    model = wan()
    keys = torch.randn(1, 4 * TOKENS, HEADS, WIDTH // HEADS)
    still = turned(keys[:, :TOKENS].repeat(1, 4, 1, 1), model.freqs, 5)
    by_head = still.unflatten(1, (4, TOKENS)).permute(0, 3, 1, 2, 4)
    assert not torch.allclose(by_head[:, :, 0], by_head[:, :, 3], atol=1e-2)
    plain = wan_unrotate(model.freqs, by_head, torch.arange(5, 9))
    assert torch.allclose(plain, plain[:, :, :1].expand_as(plain), atol=1e-5)


def test_training_passes_go_through_untouched():
    model = wan()
    x = torch.randn(1, 2 * TOKENS, WIDTH)
    plain = model(x, [None, None], 0)
    with attach_causal_wan(model, FocusedForcing(budget=0)) as run:
        assert torch.equal(model(x, [None, None], 0), plain)
        assert run.stats().forwards == 0


def test_the_module_and_the_class_are_not_patched():
    model, other = wan(), wan()
    before = globals()["attention"]
    with attach_causal_wan(model, FocusedForcing(budget=0)):
        assert globals()["attention"] is before
        assert "forward" not in vars(other.blocks[0].self_attn)


def test_wan_is_attached_once_and_is_wan():
    model = wan()
    with attach_causal_wan(model, FullHistory()), pytest.raises(AlreadyAcceleratedError):
        attach_causal_wan(model, FullHistory())
    with pytest.raises(AdapterError, match="Self-Forcing"):
        attach_causal_wan(nn.Linear(1, 1), FullHistory())
    strange = types.SimpleNamespace(blocks=[types.SimpleNamespace(self_attn=nn.Linear(1, 1))], freqs=None)
    with pytest.raises(AdapterError, match="no function named attention"):
        attach_causal_wan(strange, FullHistory())


@pytest.mark.parametrize("attach", [attach_anyflow, attach_causal_wan])
def test_autocast_may_be_on(attach):
    """Projections are of half precision then, and what the model keeps is not."""
    model, run = (anyflow(), draw) if attach is attach_anyflow else (wan(), roll_out)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model)
        with attach(model, FullHistory()):
            assert torch.allclose(run(model).float(), plain.float(), atol=0.1)
        with attach(model, FocusedForcing(budget=1)) as less:
            run(model)
            assert less.stats().work_ratio > 1


def test_two_caches_in_turns_are_told_apart():
    """Guidance with a cache for each pass: at the same place of the video stands another history."""
    model = wan()

    def guided():
        size, generator, clean = 12 * TOKENS, torch.Generator().manual_seed(2), []
        caches = [
            [
                {"k": torch.zeros(1, size, HEADS, WIDTH // HEADS), "v": torch.zeros(1, size, HEADS, WIDTH // HEADS)}
                | {"held": 0, "end": 0}
                for _ in model.blocks
            ]
            for _ in range(2)
        ]
        with torch.no_grad():
            for chunk in range(4):
                x = torch.randn(1, CHUNK * TOKENS, WIDTH, generator=generator)
                for _ in range(2):
                    one, other = (
                        model(t, c, chunk * CHUNK * TOKENS) for t, c in zip((x, 1 + x / 2), caches, strict=True)
                    )
                    x = (one + other) / 2
                clean.append(x)
        return torch.cat(clean, 1)

    plain = guided()
    with attach_causal_wan(model, FullHistory()):
        assert torch.allclose(guided(), plain, atol=1e-4)


@pytest.mark.parametrize("attach", [attach_anyflow, attach_causal_wan])
def test_nothing_piles_up_from_video_to_video(attach):
    model, run = (anyflow(), draw) if attach is attach_anyflow else (wan(), roll_out)
    with attach(model, FocusedForcing(budget=1)) as less:
        for _ in range(2):
            run(model)
            assert all(len(layer.view.notes["chosen"][1]) == 1 for layer in less.stream)
    if attach is attach_causal_wan:
        with attach(model, FocusedForcing(budget=1)):
            run(model)
            assert not any(block.self_attn.forward.__self__._arguments for block in model.blocks)
