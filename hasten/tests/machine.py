"""A state machine that does to accelerated pipelines what people do to them, in any order.

Two pipelines share a transformer. Rules accelerate them, call them, cancel, nest and thread the calls, change
schedulers, weights, dtypes and blocks, offload, train, save and copy. The oracle of every call is a fresh pipeline with
the same weights, scheduler and methods: it gives the same latents, bit for bit, or the same error.

`test_fuzz.py` runs it for seconds, `benchmarks/fuzz.py` for as long as one likes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import tempfile
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from types import MethodType
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
)
from hasten_zoo.emoji_flux.model import PixelVAE
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from pipelines import own_tokenizers
from torch import Tensor, nn

import hasten
from hasten import registry
from hasten.errors import AlreadyAcceleratedError, CopyError, HastenError
from hasten.models import Proxy
from hasten.pipeline.hooks import hooks_on

__all__ = ["Machine"]

BLOCKS = "single_transformer_blocks"
KINDS = {"text": FluxPipeline, "image": FluxImg2ImgPipeline}
CACHING = (
    "taylorseer:interval=2:warmup=1",
    "taylorseer:interval=1",
    "hicache:interval=2:warmup=2",
    "foca:computed_steps=2:schedule=even",
    "taylorseer:site=output:interval=2:warmup=1",
    "reuse:site=module:interval=2:warmup=1",
    "freqca:interval=2:warmup=2",
    "fbcache:threshold=0.3:warmup=1",
    "teacache:threshold=0.3:warmup=1",
    "easycache:threshold=0.5:warmup=1",
    "speca:interval=2:warmup=2",
)
STAGED = "fresco:stages=2/1/1:shares=0.4"


class Heun(FlowMatchHeunDiscreteScheduler):
    """The pipeline tells its scheduler the shift and the levels, which this one makes on its own."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None):
        super().set_timesteps(num_inference_steps or len(sigmas), device)


SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
    "unipc": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    ),
    "heun": Heun,
}


class Cancelled(Exception):  # noqa: N818 - what services call it
    """Thrown by a callback."""


class Louder(nn.Module):
    """A block that somebody wrapped."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        encoder, hidden = self.block(*args, **kwargs)
        return encoder, hidden * 1.2


# --- fresh pipelines


@cache
def _model() -> Any:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(std=0.2)
    return model


def pipeline(kind: str, scheduler: Any, model: Any, vae: Any) -> Any:
    """A pipeline over a model."""
    pipe = KINDS[kind](scheduler, vae, None, None, None, None, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _lora(model: Any) -> None:
    import peft

    targets = ["to_q", "to_v", "proj_out"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), "style")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)


def _wrap(model: Any) -> None:
    blocks = getattr(model, BLOCKS)
    blocks[-1] = Louder(blocks[-1])


def _swap(model: Any) -> None:
    blocks = getattr(model, BLOCKS)
    other = copy.deepcopy(getattr(_model(), BLOCKS)[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    blocks[0] = other.to(model.x_embedder.weight.dtype)


WEIGHTS = {
    "lora": _lora,
    "fuse": lambda model: model.fuse_lora(),
    "unfuse": lambda model: model.unfuse_lora(),
    "unload": lambda model: model.unload_lora(),
    "off": lambda model: model.disable_adapters(),
    "on": lambda model: model.enable_adapters(),
    "wrap": _wrap,
    "swap": _swap,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float32": lambda model: model.to(torch.float32),
}


class _Pickler(pickle.Pickler):
    """Leaves tensors aside: they are copied when a model is made."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        """Where a tensor is."""
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        """A copy of a tensor."""
        return copy.deepcopy(self.tensors[pid])


@cache
def _template(weights: tuple[str, ...]) -> tuple[bytes, list[Tensor]]:
    """A model whose weights were changed in turn, as a pickle: copies of it are several times faster than deep ones."""
    model = copy.deepcopy(_model())
    for name in weights:
        WEIGHTS[name](model)
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(model)
    return file.getvalue(), pickler.tensors


def fresh_model(weights: tuple[str, ...] = ()) -> Any:
    """A model that nobody has touched."""
    return _Unpickler(*_template(weights)).load()


@dataclass(frozen=True)
class Call:
    """What a pipeline is called with."""

    prompt: int = 0
    steps: int = 4
    size: int = 32
    batch: int = 1
    guided: bool = False
    weak: bool = False  # LoRA's strength per call
    mode: str = "plain"

    def __call__(self, pipe: Any, kind: str, **kwargs: Any) -> Tensor:
        """Final latents."""
        dtype = pipe.transformer.x_embedder.weight.dtype
        generator = torch.Generator().manual_seed(self.prompt)
        text = {
            "prompt_embeds": torch.randn(self.batch, 4, 16, generator=generator).to(dtype),
            "pooled_prompt_embeds": torch.randn(self.batch, 16, generator=generator).to(dtype),
        }
        if self.guided:
            text |= {f"negative_{name}": -value for name, value in text.items()} | {"true_cfg_scale": 3.0}
        if kind == "image":
            text |= {"image": torch.randn(self.batch, 12, self.size // 2, self.size // 2), "strength": 0.7}
            text["image"] = torch.randn(text["image"].shape, generator=generator).to(dtype)
        if self.weak:
            text["joint_attention_kwargs"] = {"scale": 0.3}
        noise = [torch.Generator().manual_seed(7 * self.prompt + i) for i in range(self.batch)]
        context = {
            "plain": contextlib.nullcontext,
            "inference": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        }[self.mode]()
        with context:
            return pipe(
                **text,
                height=self.size,
                width=self.size,
                num_inference_steps=self.steps,
                generator=noise if self.batch > 1 else noise[0],
                output_type="latent",
                **kwargs,
            ).images.clone()


@dataclass(frozen=True)
class Spec:
    """What a fresh pipeline has to be like.

    Attributes:
        weights: what was done to the weights, in turn.
        kind: of the pipeline.
        scheduler: its name.
        caching: expression of the caching method on the transformer.
        staged: whether a resolution method is on this pipeline.
    """

    weights: tuple[str, ...] = ()
    kind: str = "text"
    scheduler: str = "euler"
    caching: str | None = None
    staged: bool = False

    def build(self, home: bool = True) -> Any:
        """The pipeline, with its methods on itself or on its bare transformer."""
        model = fresh_model(self.weights)
        vae = PixelVAE()
        vae.anchor = vae.anchor.to(model.x_embedder.weight.dtype)
        pipe = pipeline(self.kind, SCHEDULERS[self.scheduler](), model, vae)
        for method in (self.caching, STAGED if self.staged else None):
            if method is not None:
                hasten.accelerate(pipe if home else model, *registry.parse(method))
        return pipe


def attempt(act: Any) -> Any:
    """The result of an action, or the error that it raised, as text."""
    try:
        return act()
    except Cancelled:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@cache
def expected(spec: Spec, call: Call) -> tuple[Any, tuple[int, int] | None]:
    """What a call gives on a fresh pipeline, and how many steps of how many were computed."""
    pipe = spec.build()
    result = attempt(lambda: call(pipe, spec.kind))
    return result, _counts(pipe, result)


def _counts(pipe: Any, result: Any) -> tuple[int, int] | None:
    if isinstance(result, str) or not hooks_on(pipe.transformer):
        return None
    summary = attempt(lambda: hasten.summary(pipe))
    return None if isinstance(summary, str) else (summary.computed_steps, summary.steps)


def same(result: Any, right: Any) -> bool:
    """Whether two results are equal bit for bit, or the same error."""
    if isinstance(result, Tensor) and isinstance(right, Tensor):
        return result.dtype == right.dtype and torch.equal(result, right)
    return bool(type(result) is type(right) and result == right)


def shown(result: Any) -> str:
    """A result in a line."""
    return f"{result.dtype} {list(result.shape)}, norm {float(result.norm())}" if isinstance(result, Tensor) else result


def at(step: int, act: Any) -> Any:
    """A callback that acts after a step."""

    def callback(_pipe: Any, index: int, _timestep: Any, kwargs: Any) -> Any:
        if index == step:
            act()
        return kwargs

    return callback


# Few, so that most of what is expected is known already.
CALLS = st.sampled_from(
    [
        Call(),
        Call(prompt=1),
        Call(size=16),
        Call(steps=3, size=16),
        Call(steps=1, size=16),
        Call(size=16, batch=2),
        Call(guided=True),
        Call(size=16, guided=True, weak=True),
        Call(size=16, weak=True, steps=3),
        Call(size=16, mode="inference"),
        Call(size=16, mode="autocast"),
        Call(size=16, batch=2, guided=True, mode="autocast"),
    ]
)
SIDES = st.integers(0, 1)


class Machine(RuleBasedStateMachine):
    """See the head of the file."""

    executed: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        warnings.simplefilter("ignore")
        self.model, self.vae = fresh_model(), PixelVAE()
        self.weights: tuple[str, ...] = ()
        self.kinds = ["text", "text"]
        self.schedulers = ["euler", "euler"]
        self.pipes = [pipeline("text", SCHEDULERS["euler"](), self.model, self.vae) for _ in range(2)]
        self.caching: str | None = None
        self.home: Any = None  # the side that the caching method was put on
        self.staged: tuple[Any, Any] | None = None  # pipeline and scheduler that a resolution method was put on
        self.handles: list[Any] = []
        self.offloaded = False

    # --- the oracle

    def spec(self, side: int) -> Spec:
        staged = self.staged is not None and self.staged[0] is self.pipes[side]
        return Spec(self.weights, self.kinds[side], self.schedulers[side], self.caching, staged)

    def misplaced(self, side: int) -> bool:
        """Whether the pipeline was given another scheduler than the one that the resolution method stands at."""
        return (
            self.staged is not None
            and self.staged[0] is self.pipes[side]
            and self.staged[1] is not self.pipes[side].scheduler
        )

    def call(self, side: int, call: Call, **kwargs: Any) -> Any:
        return attempt(lambda: call(self.pipes[side], self.kinds[side], **kwargs))

    def check(self, side: int, call: Call, result: Any) -> None:
        if self.misplaced(side):
            assert isinstance(result, str), (self.spec(side), call, "another scheduler was accepted")
            assert "another scheduler" in result, result
            return
        right, _ = expected(self.spec(side), call)
        assert same(result, right), (self.spec(side), call, shown(result), shown(right))

    def check_counts(self, side: int, call: Call, result: Any) -> None:
        if isinstance(result, str) or self.caching is None or self.staged is not None:
            return
        _, right = expected(self.spec(side), call)
        assert _counts(self.pipes[side], result) == right, (self.spec(side), call)

    def done(self, name: str) -> None:
        Machine.executed[name] += 1

    # --- calls

    @rule(side=SIDES, call=CALLS)
    def calls(self, side: int, call: Call) -> None:
        result = self.call(side, call)
        self.check(side, call, result)
        self.check_counts(side, call, result)
        self.done("call")

    @rule(side=SIDES, call=CALLS, step=st.integers(0, 3), how=st.sampled_from(["callback", "block", "interrupt"]))
    def cancels(self, side: int, call: Call, step: int, how: str) -> None:
        removal = None
        count = 0

        def fail(*_: Any) -> None:
            nonlocal count
            count += 1
            if count > step:
                raise KeyboardInterrupt if how == "interrupt" else Cancelled

        def cancel() -> None:
            raise Cancelled

        kwargs: dict[str, Any] = {}
        if how == "callback":
            kwargs = {"callback_on_step_end": at(step, cancel)}
        else:
            removal = getattr(self.model, BLOCKS)[0].register_forward_pre_hook(fail)
        try:
            with contextlib.suppress(Cancelled, KeyboardInterrupt):
                self.call(side, call, **kwargs)
        finally:
            if removal is not None:
                removal.remove()
        self.done(f"cancelled by {how}")

    @rule(outer=CALLS, inner=CALLS, side=SIDES, step=st.integers(0, 3), cut=st.booleans())
    def nests(self, outer: Call, inner: Call, side: int, step: int, cut: bool) -> None:
        other = 1 - side
        if self.pipes[side].scheduler is self.pipes[other].scheduler or self.misplaced(side):
            return
        inner = inner if outer.mode == "plain" else replace(inner, mode=outer.mode)
        seen: list[Any] = []

        def preview() -> None:
            if cut:
                with contextlib.suppress(Cancelled):
                    self.call(other, inner, callback_on_step_end=at(1, lambda: (_ for _ in ()).throw(Cancelled())))
            seen.append(self.call(other, inner))

        result = self.call(side, outer, callback_on_step_end=at(step, preview))
        self.check(side, outer, result)
        for latents in seen:
            self.check(other, inner, latents)
        self.done("nested call")

    @rule(one=CALLS, two=CALLS)
    def threads(self, one: Call, two: Call) -> None:
        if self.pipes[0].scheduler is self.pipes[1].scheduler or self.offloaded:
            return
        results: dict[int, Any] = {}
        start = threading.Barrier(2)

        def work(side: int, call: Call) -> None:
            try:
                start.wait()
                results[side] = self.call(side, call)
            except BaseException as error:
                results[side] = error

        # LoRA's strength is state of the layers: plain pipelines cannot differ in it on two threads.
        two = replace(two, weak=one.weak)
        if one.weak or two.mode == "inference" or one.mode == "inference":
            one, two = replace(one, weak=False, mode="plain"), replace(two, weak=False, mode="plain")
        workers = [threading.Thread(target=work, args=pair) for pair in ((0, one), (1, two))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.check(0, one, results[0])
        self.check(1, two, results[1])
        self.done("threads")

    @rule(side=SIDES, call=CALLS, steps=st.integers(1, 4))
    def loops(self, side: int, call: Call, steps: int) -> None:
        """A loop of the user's own by the scheduler of the accelerated pipeline, perhaps left before its end."""
        home = self.home in (0, 1)
        if self.staged is not None or (home and self.pipes[self.home].scheduler is not self.pipes[side].scheduler):
            return
        call = replace(call, mode="plain", guided=False, weak=False)
        spec = self.spec(side)
        fresh = spec.build(home)
        right, result = _loop(fresh, call, steps), _loop(self.pipes[side], call, steps)
        assert same(result, right), (spec, call, steps, "a loop of the user's own", shown(result), shown(right))
        if steps == 1 or call.steps == 1:
            for handle in self.handles:  # or the next loop's first forward is a second pass of this one's only step
                handle.reset()
        self.done("loop of the user's own")

    @rule(side=SIDES)
    def trains(self, side: int) -> None:
        """An optimisation step without an update."""
        # Offloading within inference mode leaves parameters that cannot be trained, with or without an acceleration.
        if "bfloat16" in self.weights or any(parameter.is_inference() for parameter in self.model.parameters()):
            return
        self.model.requires_grad_(True)
        arguments = _arguments(self.model, Call(size=16))
        with torch.enable_grad():
            self.model(**arguments)[0].mean().backward()
        assert any(parameter.grad is not None for parameter in self.model.parameters())
        self.model.zero_grad(set_to_none=True)
        self.done("optimisation step")

    # --- accelerations

    @rule(
        where=st.sampled_from([0, 1, "bare"]),
        method=st.sampled_from(CACHING),
        replacing=st.booleans(),
        staged=st.sampled_from([False, False, True]),
    )
    def accelerates(self, where: Any, method: str, replacing: bool, staged: bool) -> None:
        thing = self.model if where == "bare" else self.pipes[where]
        fits = where != "bare" and self.kinds[where] == "text" and self.schedulers[where] in ("euler", "shifted")
        chosen = registry.parse(STAGED + "+" + method if staged else method)
        if staged and not fits:
            before = hooks_on(self.model)
            try:
                hasten.accelerate(thing, *chosen, replace=replacing)
            except HastenError:
                assert hooks_on(self.model) == before, "a refused acceleration changed what was there"
            else:
                raise AssertionError("a resolution method was put on what it cannot serve")
            return
        taken = self.caching is not None or (staged and self.staged is not None)
        if taken and not replacing:
            before = hooks_on(self.model)
            try:
                hasten.accelerate(thing, *chosen)
            except AlreadyAcceleratedError:
                assert hooks_on(self.model) == before
            else:
                raise AssertionError("accelerated twice")
            return
        handle = hasten.accelerate(thing, *chosen, replace=replacing)
        self.handles.append(handle)
        self.caching, self.home = method, where
        if staged:
            self.staged = (thing, thing.scheduler)
        elif replacing:
            self.staged = None
        self.done("replace" if taken else "accelerate")

    @precondition(lambda self: self.handles)
    @rule(how=st.sampled_from(["verb", "bare", "handles", "reset"]), side=SIDES)
    def removes(self, how: str, side: int) -> None:
        if how == "reset":
            self.handles[-1].reset()
            self.done("reset")
            return
        if how == "handles":
            for handle in self.handles:
                handle.remove()
        else:
            hasten.remove(self.model if how == "bare" else self.pipes[side])
        self.caching = self.staged = None
        self.handles.clear()
        assert not hooks_on(self.model)
        self.done("remove")

    # --- what else happens to pipelines

    @rule(side=SIDES, name=st.sampled_from(list(SCHEDULERS)), how=st.sampled_from(["new", "copy", "from_config"]))
    def swaps_the_scheduler(self, side: int, name: str, how: str) -> None:
        pipe = self.pipes[side]
        if how == "copy":
            pipe.scheduler, name = copy.deepcopy(pipe.scheduler), self.schedulers[side]
        elif how == "from_config":
            pipe.scheduler, name = type(pipe.scheduler).from_config(pipe.scheduler.config), self.schedulers[side]
        else:
            pipe.scheduler = SCHEDULERS[name]()
        self.schedulers[side] = name
        self.done("scheduler")

    @rule(side=SIDES, kind=st.sampled_from(list(KINDS)), how=st.sampled_from(["components", "from_pipe", "sharing"]))
    def makes_another_pipeline(self, side: int, kind: str, how: str) -> None:
        """In the place of the other one, with the scheduler of the first, or a copy."""
        pipe, other = self.pipes[side], 1 - side
        if how == "from_pipe":
            dtype = self.model.x_embedder.weight.dtype
            new = KINDS[kind].from_pipe(pipe, vae=self.vae, torch_dtype=dtype)
        else:
            components = dict(pipe.components)
            if how == "components":
                components["scheduler"] = copy.deepcopy(pipe.scheduler)
            new = KINDS[kind](**components)
        new.register_modules(**own_tokenizers(pipe))
        new.set_progress_bar_config(disable=True)
        if self.staged is not None and self.staged[0] is self.pipes[other]:
            hasten.remove(self.pipes[other])
            self.caching = self.staged = None
            self.handles.clear()
        self.pipes[other], self.kinds[other] = new, kind
        self.home = None if self.home == other else self.home
        self.schedulers[other] = self.schedulers[side]
        self.done(f"pipeline by {how}")

    @rule(name=st.sampled_from([*WEIGHTS]))
    def changes_weights(self, name: str) -> None:
        lora = [op for op in self.weights if op in ("lora", "fuse", "unfuse", "unload", "off", "on")]
        has = bool(lora) and "unload" not in lora
        fused = has and lora and [op for op in lora if op in ("fuse", "unfuse")][-1:] == ["fuse"]
        off = has and [op for op in lora if op in ("off", "on")][-1:] == ["off"]
        allowed = {
            "lora": not lora and "wrap" not in self.weights,
            "fuse": has and not fused and not off,
            "unfuse": fused,
            "unload": has and not fused,
            "off": has and not fused and not off,
            "on": off,
            "wrap": self.weights.count("wrap") == 0 and not has,
            "swap": self.weights.count("swap") == 0 and not has and "wrap" not in self.weights,
            "bfloat16": "bfloat16" not in self.weights and not self.offloaded,
            "float32": "bfloat16" in self.weights and self.weights[-1:] != ("float32",) and not self.offloaded,
        }
        if not allowed[name] or len(self.weights) > 8:
            return
        WEIGHTS[name](self.model)
        self.weights = self.weights[:-1] if (*self.weights[-1:], name) == ("off", "on") else (*self.weights, name)
        self.vae.to(self.model.x_embedder.weight.dtype)
        self.done(f"weights: {name}")

    @rule(side=SIDES)
    def offloads(self, side: int) -> None:
        if self.offloaded:
            for pipe in self.pipes:
                pipe.remove_all_hooks()
        else:
            self.pipes[side].enable_model_cpu_offload(device="cpu")
        self.offloaded = not self.offloaded
        self.done("offload")

    @rule(side=SIDES, call=CALLS)
    def copies(self, side: int, call: Call) -> None:
        """A copy of an accelerated pipeline is refused; one of a plain pipeline is plain."""
        if self.offloaded:
            return
        pipe = self.pipes[side]
        if hooks_on(self.model):
            try:
                copy.deepcopy(pipe if call.prompt else self.model)
            except CopyError:
                pass
            else:
                raise AssertionError("an accelerated transformer was copied")
        else:
            call = replace(call, steps=2)
            result = attempt(lambda: call(copy.deepcopy(pipe), self.kinds[side]))
            assert same(result, expected(self.spec(side), call)[0])
        self.done("deepcopy")

    @rule(side=SIDES, call=CALLS)
    def saves(self, side: int, call: Call) -> None:
        """What is saved while it is accelerated is the plain model."""
        if set(self.weights) - {"bfloat16", "float32"} or self.offloaded:
            return
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            loaded = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=self.model.dtype)
        state, right = loaded.state_dict(), self.model.state_dict()
        assert list(state) == list(right)
        assert all(torch.equal(state[name], right[name]) for name in state)
        self.done("save")

    # --- what always holds

    @invariant()
    def nothing_is_left_between_calls(self) -> None:
        for parent in (self.model, *self.model.children()):
            assert not any(isinstance(module, Proxy) for module in parent._modules.values())

    def teardown(self) -> None:
        hasten.remove(self.model)
        for pipe in self.pipes:
            pipe.remove_all_hooks()
        assert "_hasten" not in self.model.__dict__
        assert "_call_impl" not in self.model.__dict__
        assert self.model.forward.__func__ is FluxTransformer2DModel.forward
        self.caching = self.staged = None
        for side in range(2):
            step = self.pipes[side].scheduler.step  # a copy's own is bound in its dictionary
            assert isinstance(step, MethodType)
            assert step.__self__ is self.pipes[side].scheduler
            call = Call(steps=2)
            self.check(side, call, self.call(side, call))


# --- loops of the user's own


def _arguments(model: Any, call: Call, time: float = 0.5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(call.prompt)
    side, dtype = call.size // 4, model.x_embedder.weight.dtype
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None]
    return {
        "hidden_states": torch.randn(call.batch, side * side, 48, generator=generator).to(dtype),
        "timestep": torch.full((call.batch,), time),
        "encoder_hidden_states": torch.randn(call.batch, 4, 16, generator=generator).to(dtype),
        "pooled_projections": torch.randn(call.batch, 16, generator=generator).to(dtype),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(4, 3),
        "return_dict": False,
    }


@torch.no_grad()
def _loop(pipe: Any, call: Call, steps: int) -> Any:
    """Latents after some steps by the pipeline's scheduler, outside of the pipeline's call."""

    def run() -> Tensor:
        model, scheduler = pipe.transformer, pipe.scheduler
        mu = {"mu": 0.6} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(call.steps, **mu)
        arguments = _arguments(model, call)
        latents = arguments.pop("hidden_states")
        for t in scheduler.timesteps[:steps]:
            arguments["timestep"] = t.expand(call.batch) / 1000
            velocity = model(hidden_states=latents, **arguments)[0]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents

    return attempt(run)
