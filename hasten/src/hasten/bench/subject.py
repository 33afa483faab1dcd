"""What is measured: a *subject* is a pipeline with its prompts and, where there is a ground truth, a grader.

Subjects come from other distributions, through entry points: `hasten.subjects` (pipelines) and
`hasten.streaming_subjects` (causal video models). `hasten-zoo` brings the small trained reference models; anybody can
add one:

    [project.entry-points."hasten.subjects"]
    my-model = "my_package:load_my_model"       # a function without arguments that returns a Subject
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hasten.errors import ConfigError, ModelError, unknown

if TYPE_CHECKING:  # the names of the subjects are known without torch
    from torch import Tensor

    from hasten.bench.rollout import RollOut

__all__ = [
    "Edit",
    "StreamingSubject",
    "Subject",
    "check_device",
    "load",
    "load_streaming",
    "names",
    "open_model",
    "streaming_names",
]

PIPELINES, STREAMING = "hasten.subjects", "hasten.streaming_subjects"
PROMPTS = ("a red apple on a wooden table", "a lighthouse at dusk", "a cat reading a newspaper", "a bowl of ramen")
ZOO = "the small trained reference models come with the distribution hasten-zoo: pip install ./zoo (or make setup)"


@dataclass(frozen=True, eq=False)
class Edit:
    """An instruction with the image that it is for and the image that it asks for.

    Attributes:
        prompt: the instruction.
        source: `[3, H, W]` float32 in [0, 1].
        target: what a perfect model returns, of the same shape.
        mask: `[H, W]` bool, True where the edit may change something; True everywhere for a global edit.
        kind: whether the edit concerns one object or the whole image.
    """

    prompt: str
    source: Tensor
    target: Tensor
    mask: Tensor
    kind: Literal["local", "global"]


@dataclass(frozen=True)
class Subject:
    """A pipeline and what is needed to measure on it.

    Attributes:
        name: as in `load`; a pipeline that was loaded from nowhere is told, so that what it says can name it.
        pipe: an unmodified diffusers pipeline.
        prompts: prompts that the model knows, in an order fit for taking the first few.
        call: arguments for calls, such as height, width and the number of steps.
        grade: for images `[B, 3, H, W]` (videos `[B, F, 3, H, W]`) in [0, 1] and their prompts, whether each is what
            its prompt asks for; None if the model has no ground truth.
        edits: for an editing model, one per prompt and in the same order: the sources, targets and masks; else empty.
        fitted: files that were fitted to the model and come with it, by name of the method (`"leap"`).
        sizes: (height, width) in pixels that the model can draw; empty for whatever the pipeline takes.
        about: what it is, in one line.
    """

    name: str
    pipe: Any
    prompts: list[str]
    call: dict[str, Any] = field(default_factory=dict)
    grade: Callable[[Tensor, list[str]], list[bool]] | None = None
    edits: list[Edit] = field(default_factory=list)
    fitted: dict[str, Path] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    about: str = ""

    def __post_init__(self) -> None:
        if hasattr(self.pipe, "register_to_config") and not self.pipe.config.get("_name_or_path"):
            self.pipe.register_to_config(_name_or_path=self.name)

    @property
    def kind(self) -> str:
        """What it makes."""
        return "edits" if self.edits else "clips" if "num_frames" in self.call else "images"

    def check_call(self, call: Mapping[str, Any]) -> None:
        """Find out whether the model can be called with these arguments, before any work.

        Args:
            call: further arguments of the pipeline's call; `height` and `width` in pixels.

        Raises:
            ConfigError: for a size that it cannot draw.
        """
        size = tuple(call.get(name, self.call.get(name)) for name in ("height", "width"))
        if self.sizes and size not in self.sizes:
            known = " or ".join(f"{height}x{width}" for height, width in self.sizes)
            raise ConfigError(
                f"{self.name} draws {known} pixels, not {size[0]}x{size[1]}; "
                "leave --height and --width out, or give one of its sizes"
            )
        unit = getattr(self.pipe, "vae_scale_factor", 1)
        for name, length in zip(("height", "width"), size, strict=True):
            if length is not None and (length < 1 or length % unit):
                raise ConfigError(f"--{name} must be a positive multiple of {unit} for {self.name}, got {length}")


@dataclass(frozen=True)
class StreamingSubject:
    """A causal video model, which has no diffusers pipeline.

    Attributes:
        name: as in `load_streaming`.
        rollout: from frames and steps of the sampler to a way to roll out; see `hasten.bench.rollout`.
        about: what it is, in one line.
    """

    name: str
    rollout: Callable[[int, int], RollOut]
    about: str = ""


def _known(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


def _load(group: str, kind: str, name: str) -> Any:
    known = _known(group)
    if not known:
        raise ModelError(f"no {kind} is installed; {ZOO}")
    if name not in known:
        raise unknown(kind, name, known)
    return known[name].load()()


def names() -> list[str]:
    """Names that `load` knows."""
    return sorted(_known(PIPELINES))


def load(name: str) -> Subject:
    """Load an installed subject (nothing is downloaded).

    Raises:
        UnknownNameError: for another name.
        ModelError: if no subject is installed, or its files are missing or damaged.
    """
    subject: Subject = _load(PIPELINES, "reference model", name)
    return subject


def open_model(name: str, *, dtype: Any = None, device: str | None = None) -> Subject:
    """An installed subject by name, or any diffusers pipeline by folder or hub id.

    Args:
        name: of the subject, folder or hub id.
        dtype: of the weights, or its name; of an installed subject its own by default, else bfloat16.
        device: where to put the pipeline; see `check_device`.

    Raises:
        UnknownNameError: if the name is neither a subject, nor a folder, nor of the form `owner/model`.
        ModelError: if the pipeline cannot be loaded.
        ConfigError: for a device that is not there, and for a streaming model, which is no pipeline.
    """
    check_device(device)
    kind = _dtype(dtype)
    if name in names():
        model = load(name)
        if kind is not None:
            model.pipe.to(kind)
    elif Path(name).is_dir() or "/" in name:
        import torch
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=kind or torch.bfloat16)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the pipeline {name!r}: {' '.join(str(error).split())}") from error
        except Exception as error:  # whatever a file that is none leads to
            raise ModelError(f"cannot load the pipeline {name!r}: {type(error).__name__}, {error}") from error
        model = Subject(name=name, pipe=pipe, prompts=list(PROMPTS))
    elif name in streaming_names():
        raise ConfigError(f"{name} streams video, which `hasten bench` and `hasten demo` measure; give a pipeline here")
    else:
        raise unknown("model", name, [*names(), *streaming_names()])
    model.pipe.set_progress_bar_config(disable=True)
    if device is not None:
        model.pipe.to(device)
    return model


def _dtype(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    import torch

    return getattr(torch, given)


def check_device(name: str | None) -> None:
    """Find out whether there is a device, such as `"cuda:1"`; None is where the model is.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name is None:
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: no such device; give cpu, cuda, cuda:1, mps or xpu") from None
    if device.type == "cpu":
        return
    module = getattr(torch, device.type, None)
    count = module.device_count() if module is not None and module.is_available() else 0
    if (device.index or 0) >= count:
        raise ConfigError(
            f"--device {name}: there are {count} {device.type} devices here; leave --device out for the CPU"
        )


def streaming_names() -> list[str]:
    """Names that `load_streaming` knows."""
    return sorted(_known(STREAMING))


def load_streaming(name: str) -> StreamingSubject:
    """Load an installed streaming subject (nothing is downloaded).

    Raises:
        UnknownNameError: for another name.
        ModelError: if no subject is installed, or its files are missing or damaged.
    """
    subject: StreamingSubject = _load(STREAMING, "streaming model", name)
    return subject
