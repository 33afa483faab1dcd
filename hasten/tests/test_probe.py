"""Transformers in the styles of original repositories, by the probe; and what it refuses, with what it saw."""

import pytest
import torch
from torch import nn

import hasten
from hasten.errors import AdapterError, TargetError
from hasten.models import root_arguments

WIDTH = 16


def linear():
    return nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    """Hidden states, and one condition."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = linear(), linear()

    def forward(self, x, c):
        return x + torch.tanh(self.mlp(self.attn(x) + c[:, None]))


class Cross(Block):
    """Another class with the same stream."""

    def forward(self, x, c):
        return 0.9 * super().forward(x, c)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.build()
        self.t_embedder, self.final_layer = linear(), linear()

    def time(self, t):
        return self.t_embedder(torch.cos(t[:, None] * torch.arange(WIDTH)))


class DiT(Base):
    """Blocks `(x, c)`, called with `(x, t, y)`."""

    def build(self):
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x, t, y):
        c = self.time(t) + y
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x) * (1 + c[:, None])

    def call(self, x, t):
        return self(x, t, torch.ones(1, WIDTH))


class Mixed(DiT):
    """Blocks of several classes in turn."""

    def build(self):
        self.blocks = nn.ModuleList([Block(), Cross(), Block(), Cross()])


class InSequence(DiT):
    """Blocks in a `Sequential`, which calls them itself."""

    class One(Block):
        def forward(self, x):
            return super().forward(x, torch.zeros(1, WIDTH))

    def build(self):
        self.blocks = nn.Sequential(*[self.One() for _ in range(4)])

    def forward(self, x, t, y):
        return self.final_layer(self.blocks(x)) * (1 + self.time(t)[:, None])


class ByName(DiT):
    """Blocks in a `ModuleDict`."""

    def build(self):
        self.blocks = nn.ModuleDict({f"block_{i}": Block() for i in range(4)})

    def forward(self, x, t, y):
        c = self.time(t) + y
        for name in self.blocks:
            x = self.blocks[name](x, c)
        return self.final_layer(x) * (1 + c[:, None])


class Nested(DiT):
    """A list of lists of blocks."""

    def build(self):
        self.stages = nn.ModuleList([nn.ModuleList([Block(), Block()]) for _ in range(2)])

    def forward(self, x, t, y):
        c = self.time(t) + y
        for stage in self.stages:
            for block in stage:
                x = block(x, c)
        return self.final_layer(x) * (1 + c[:, None])


class Wrapped(nn.Module):
    """The blocks are in `model.model.blocks`, and the wrapper names neither latents nor time as usual."""

    def __init__(self):
        super().__init__()
        self.model = DiT()

    def forward(self, noisy, noise_level):
        return self.model.call(noisy, noise_level)

    def call(self, x, t):
        return self(x, t)


class MMDiTBlock(nn.Module):
    """Text before image, as arguments and as results; the last one has no use for text."""

    def __init__(self, last=False):
        super().__init__()
        self.x_block, self.context_block = Block(), (None if last else Block())

    def forward(self, context, x, c):
        both = torch.cat([context, x], 1).mean(1)
        context = None if self.context_block is None else self.context_block(context, c + both)
        return context, self.x_block(x, c + both)


class MMDiT(Base):
    """Joint blocks, called with `(x, t, y, context)`; here in a module of their own."""

    def build(self):
        self.diffusion_model = nn.Module()
        self.diffusion_model.joint_blocks = nn.ModuleList([MMDiTBlock(last=i == 3) for i in range(4)])

    def forward(self, x, t, y=None, context=None):
        c = self.time(t)
        for block in self.diffusion_model.joint_blocks:
            context, x = block(context, x, c=c)
        return self.final_layer(x)

    def call(self, x, t):
        return self(x, t, context=torch.ones(1, 3, WIDTH))


class DoubleBlock(MMDiTBlock):
    def forward(self, img, txt, vec, pe):
        txt, img = super().forward(txt, img, vec)
        return img, txt


class SingleBlock(Block):
    def forward(self, x, vec, pe):
        return super().forward(x, vec)


class Flux(Base):
    """Double blocks by name, then single blocks on text and image in one sequence."""

    def build(self):
        self.double_blocks = nn.ModuleList([DoubleBlock() for _ in range(2)])
        self.single_blocks = nn.ModuleList([SingleBlock() for _ in range(3)])

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        vec = self.time(timesteps) + y
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=img_ids)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=img_ids)
        return self.final_layer(img[:, txt.shape[1] :])

    def call(self, x, t):
        return self(x, x[..., :3], torch.ones(1, 3, WIDTH), torch.zeros(1, 3, 3), t, torch.ones(1, WIDTH))


class WanBlock(Block):
    def forward(self, x, e, seq_lens, context):
        return super().forward(x, e + context.mean(1))


class Wan(Base):
    """A list of clips in, a list of clips out; blocks by position and by name."""

    def build(self):
        self.blocks = nn.ModuleList([WanBlock() for _ in range(4)])

    def forward(self, x, t, context, seq_len):
        x = torch.cat([u[None] for u in x])
        arguments = {"e": self.time(t), "seq_lens": seq_len, "context": torch.stack(context)}
        for block in self.blocks:
            x = block(x, **arguments)
        return list(self.final_layer(x))

    def call(self, x, t):
        return self(list(x), t, [torch.ones(3, WIDTH)], x.shape[1])[0]


class ClipAndSound(Base):
    """Two streams that look like image and text, and both are predicted."""

    def build(self):
        self.blocks = nn.ModuleList([MMDiTBlock() for _ in range(4)])
        self.sound_out = linear()

    def forward(self, x, context, t):
        c = self.time(t)
        for block in self.blocks:
            context, x = block(context, x, c)
        return {"clip": self.final_layer(x), "sound": self.sound_out(context)}

    def call(self, x, t):
        out = self(x, torch.linspace(-1, 1, 3 * WIDTH).reshape(1, 3, WIDTH), t)
        return torch.cat([out["clip"], out["sound"]], 1)


class Tied(DiT):
    """Two blocks that each stand in two places."""

    def build(self):
        first, second = Block(), Block()
        self.blocks = nn.ModuleList([first, second, first, second])


class Shared(DiT):
    """One block in every place."""

    def build(self):
        self.blocks = nn.ModuleList([Block()] * 4)


class Faint(ClipAndSound):
    """A second output whose numbers are tiny."""

    def forward(self, x, context, t):
        out = super().forward(x, context, t)
        return out | {"sound": 1e-5 * out["sound"]}

    def call(self, x, t):
        out = self(x, torch.linspace(-1, 1, 3 * WIDTH).reshape(1, 3, WIDTH), t)
        return torch.cat([out["clip"], 1e5 * out["sound"]], 1)


STYLES = [DiT, Mixed, InSequence, ByName, Nested, Wrapped, MMDiT, Flux, Wan, ClipAndSound, Tied, Shared, Faint]


def run_of(model, steps=9, constant=False):
    """The results of a few steps, whose input moves unless it is held constant."""
    start = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [
            model.call(start * (1 if constant else 1 + 0.03 * i), torch.tensor([1 - (1e-6 if constant else 0.1) * i]))
            for i in range(steps)
        ]


@pytest.mark.parametrize("style", STYLES)
def test_the_probe_finds_the_blocks_of_every_style(style):
    model = style()
    plain, constant = run_of(model), run_of(model, constant=True)
    ran = []
    blocks = [m for m in model.modules() if isinstance(m, (Block, MMDiTBlock))]
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in blocks]
    with hasten.accelerate(model, "reuse", interval=1):
        assert all(map(torch.equal, run_of(model), plain))
    with hasten.accelerate(model, "reuse", interval=3, warmup=1) as run:
        for found, right in zip(run_of(model, constant=True), constant, strict=True):
            assert torch.allclose(found, right, atol=1e-3)
        ran.clear()
        fast = run_of(model)
        per_step = len(ran)
        assert run.summary(-1).skipped_steps == 6
    with hasten.accelerate(model, "taylorseer", interval=3, warmup=2):
        better = run_of(model)
    ran.clear()
    assert all(map(torch.equal, run_of(model), plain))
    assert per_step == len(ran) / 3  # 3 of 9 steps are computed, and no block runs on the others
    for handle in handles:
        handle.remove()
    assert 0 < (better[-1] - plain[-1]).norm() < (fast[-1] - plain[-1]).norm() < 0.6 * plain[-1].norm()


def test_blocks_whose_forward_is_called_are_skipped_too():
    class Direct(DiT):
        def forward(self, x, t, y):
            c = self.time(t) + y
            for block in self.blocks:
                x = block.forward(x, c)
            return self.final_layer(x) * (1 + c[:, None])

    model, ran = Direct(), []
    plain = run_of(model)
    with hasten.accelerate(model, "reuse", interval=1):
        assert all(map(torch.equal, run_of(model), plain))
    handles = [block.mlp.register_forward_hook(lambda *_: ran.append(1)) for block in model.blocks]
    with hasten.accelerate(model, "reuse", interval=3, warmup=1):
        run_of(model)
    for handle in handles:
        handle.remove()
    assert len(ran) == 3 * len(model.blocks)
    assert all(map(torch.equal, run_of(model), plain))


def test_a_timestep_that_is_no_number_or_is_not_there_is_refused_by_name():
    class Listed(DiT):
        def forward(self, x, y, t=None):
            return super().forward(x, torch.ones(1) if t is None else t[0], y)

    model, x, y = Listed(), torch.ones(1, 6, WIDTH), torch.ones(1, WIDTH)
    with hasten.accelerate(model, "reuse"), torch.no_grad():
        with pytest.raises(AdapterError, match=r"Listed was given a list for 't', expected a number.*timestep=None"):
            model(x, y, [torch.ones(1)])
        with pytest.raises(AdapterError, match=r"Listed was called without 't'.*register\('Listed'"):
            model(x, y)


@pytest.mark.parametrize(
    ("parameters", "hidden", "timestep"),
    [
        ("self, x, t, y", "x", "t"),
        ("self, img, img_ids, txt, txt_ids, timesteps, y", "img", "timesteps"),
        ("self, tokens, vision_timesteps, sound_timesteps", "tokens", "vision_timesteps"),
        ("self, noise_level, noisy", "noisy", "noise_level"),
        ("self, sample, timestep_ratio", "sample", "timestep_ratio"),
        ("self, masks, tokens, decoder_noise_time", "masks", "decoder_noise_time"),
    ],
)
def test_the_timestep_is_found_among_any_arguments(parameters, hidden, timestep):
    scope = {}
    exec(f"def forward({parameters}): ...", scope)
    model = type("Model", (nn.Module,), {"forward": scope["forward"]})()
    assert root_arguments(model) == (hidden, timestep)


def test_lists_that_are_little_of_the_model_are_refused():
    class Heavy(DiT):
        def build(self):
            super().build()
            self.decoder = nn.Linear(WIDTH, 40 * WIDTH)  # at every step, whatever the blocks do

        def forward(self, x, t, y):
            return self.decoder(super().forward(x, t, y)).mean(-1, keepdim=True) + x

    run = hasten.accelerate(Heavy(), "reuse")
    with pytest.raises(AdapterError, match=r"blocks together hold only \d\d% of the parameters"):
        run_of(run._engines["Heavy"].model)
    run.remove()


def test_blocks_that_run_in_another_order_than_they_stand_in_are_refused_by_name():
    class Backwards(DiT):
        """Runs its last block first, so that what leaves the last of the list is not what the result is made of."""

        def forward(self, x, t, y):
            stack, self.blocks = self.blocks, nn.ModuleList(reversed(self.blocks))
            try:
                return super().forward(x, t, y)
            finally:
                self.blocks = stack

    run = hasten.accelerate(Backwards(), "reuse")
    with pytest.raises(AdapterError, match="its blocks are called in another order than they stand in"):
        run_of(run._engines["Backwards"].model)
    run.remove()


def test_a_stream_that_is_lost_is_refused_by_name():
    class Recurrent(DiT):
        """Runs its blocks twice, so that what leaves the last one is not what the result is made of."""

        def forward(self, x, t, y):
            return super().forward(super().forward(x, t, y), t, y)

    run = hasten.accelerate(Recurrent(), "reuse")
    with pytest.raises(AdapterError, match="a block is called twice in a forward"):
        run_of(run._engines["Recurrent"].model)
    run.remove()
    with hasten.accelerate(Recurrent(), "reuse", site="output", interval=3) as run:
        run_of(run._engines["Recurrent"].model)
        assert run.summary().skipped_steps > 0


def test_blocks_that_cannot_be_watched_are_refused_and_wrong_calls_fail_as_they_are():
    class Asking(DiT):
        """Asks for the class of its blocks."""

        def forward(self, x, t, y):
            assert all(type(block) is Block for block in self.blocks), "other blocks"
            return super().forward(x, t, y)

    model = Asking()
    run = hasten.accelerate(model, "reuse")
    with pytest.raises(AdapterError, match=r"cannot be watched \(AssertionError.*register\('Asking'"):
        run_of(model)
    run.remove()
    with hasten.accelerate(DiT(), "reuse") as run, torch.no_grad(), pytest.raises(RuntimeError, match=r"mat1|size"):
        run._engines["DiT"].model(torch.ones(1, 6, WIDTH + 1), torch.ones(1), torch.ones(1, WIDTH))


def test_what_a_pipeline_calls_a_decoder_is_left_alone_unless_it_denoises():
    class Pipe:
        decoder = nn.Linear(1, 1)

    with pytest.raises(TargetError, match="nothing that denoises"):
        hasten.accelerate(Pipe(), "reuse")
    Pipe.decoder = DiT()
    with hasten.accelerate(Pipe(), "reuse") as run:
        assert list(run.engines) == ["decoder"]
