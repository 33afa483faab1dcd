"""The training loop of the larger models: constant rate, running average, resumable anywhere, CPU or GPU.

Training goes on in many parts, on machines that may be gone between two of them. So there are two ways back in:

- `checkpoint.pt`, written atomically every few minutes: everything, and training goes on as if nothing had happened;
- a *half-precision weights folder*, small enough to be committed and sealed by its list of digests: the averaged
  weights and the position. The optimizer starts afresh with a short warm-up. Used when there is no checkpoint.

The rate stays constant, which lets a run be extended at will; the running average is usable at any time. A *cooldown*
lets the rate fall to zero over the last samples; it works on a copy in a folder of its own, and the trunk can go on.
"""

from __future__ import annotations

import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hasten.errors import HastenWarning, ModelError
from hasten.io import add_line, check_sealed, read_json, write_atomically, write_sealed
from torch import Tensor, nn

from hasten_zoo.optimizers import MuonAdamW, adamw
from hasten_zoo.record import LOG, Start, export_record, hours_of, start_of
from hasten_zoo.swift import fuse_norms

__all__ = [
    "Loss",
    "Settings",
    "Training",
    "load_half",
    "read_checkpoint",
    "run",
    "save_half",
]

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Loss:
    """What one batch gives: a scalar to descend, how many samples it saw, their kind, and parts to log."""

    value: Tensor
    samples: int
    kind: str
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How to descend.

    Attributes:
        lr: constant rate.
        warmup_steps: steps over which the rate rises, at the start and after a start from bare weights.
        cooldown: (first sample, number of samples) over which the rate falls to zero, or None.
        ema: decay of the running average per step, approached from below in the first steps.
        bfloat16: whether matrix products and convolutions run in bfloat16 (weights stay float32).
        muon: whether Muon moves the matrices of blocks, see `MuonAdamW`; otherwise AdamW moves everything.
    """

    lr: float = 1e-3
    warmup_steps: int = 200
    cooldown: tuple[int, int] | None = None
    ema: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    bfloat16: bool = False
    muon: bool = False
    seed: int = 0


class Training:
    """Optimizer, running average and position of a module that learns; one call of `step` is one batch.

    Args:
        net: the module; moved to `device`.
        loss: from a generator on `device` to the loss of a fresh batch. All randomness must come from the generator.
        settings: see `Settings`.
        device: `"cpu"` or `"cuda"`.
        terms: what must stay the same while the run lasts, by name: a checkpoint of a run on other terms is refused.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[torch.Generator], Loss],
        settings: Settings | None = None,
        device: str = "cpu",
        terms: Mapping[str, str | float] | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.device = torch.device(device)
        self.net = net.to(self.device).train()
        if self.settings.bfloat16:
            fuse_norms(self.net)
        self.loss = loss
        how = (self.settings.lr, self.settings.betas, self.settings.weight_decay)
        self.optimizer: MuonAdamW | torch.optim.AdamW
        if self.settings.muon:
            self.optimizer = MuonAdamW(self.net, *how)
        else:
            self.optimizer = adamw([p for p in self.net.parameters() if p.requires_grad], *how)
        named = self.net.state_dict(keep_vars=True)
        self.average = {k: v.detach().clone() for k, v in named.items()}
        self.frozen = {k for k, v in named.items() if isinstance(v, nn.Parameter) and not v.requires_grad}
        self.generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        self.terms = dict(terms or {})
        self.steps = self.samples = 0
        self.warm_from = 0  # the step at which the optimizer was fresh
        self.sound = torch.ones((), dtype=torch.bool)  # whether the gradients of the latest step were finite
        self.seconds, self.timed_from = 0.0, 0  # of training in all parts, and the samples before they were counted
        self.ends_from: float | None = None  # the seconds at which a part began that the rate falls to zero in
        self.fallen = 1.0  # share of the rate that is left in that part; see `run`

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        s = self.settings
        rate = s.lr * min(1.0, (self.steps - self.warm_from + 1) / s.warmup_steps)
        if s.cooldown is not None:
            start, length = s.cooldown
            rate *= min(1.0, max(0.0, 1 - (self.samples - start) / length))
        return rate * self.fallen

    def step(self) -> Loss:
        """One optimizer step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            loss = self.loss(self.generator)
        loss.value.backward()
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.clip)
        self.sound = norm.isfinite()  # one batch that is not must not end a run; not read here, which would wait
        for parameter in self.net.parameters():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~self.sound, 0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.settings.ema, (1 + self.steps) / (10 + self.steps))
        current = self.net.state_dict()
        names = [k for k, v in self.average.items() if v.is_floating_point() and k not in self.frozen]
        torch._foreach_lerp_([self.average[k] for k in names], [current[k] for k in names], 1 - decay)
        self.steps += 1
        self.samples += loss.samples
        return loss

    def state(self) -> dict[str, Any]:
        """Everything of its own that `restore` needs to go on; what the loss keeps between its calls is not in it."""
        return {
            "net": self.net.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "position": [self.steps, self.samples, self.warm_from],
            "time": [self.seconds, self.timed_from],
            "ends_from": self.ends_from,
            "terms": dict(self.terms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a saved state; `settings` may have changed since. Another optimizer starts afresh, with a warm-up.

        Raises:
            ModelError: if the terms have changed.
        """
        for name, value in state.get("terms", {}).items():
            if self.terms.get(name) != value:
                now = f"now it is {self.terms[name]}" if name in self.terms else "now it is not given"
                raise ModelError(
                    f"the checkpoint is of a run with {name} {value}, {now}; go on with {value}, or train in another "
                    "folder (--out)"
                )
        self.net.load_state_dict(state["net"])
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        same_kind = state["optimizer"].keys() == self.optimizer.state_dict().keys()
        if same_kind:
            self.optimizer.load_state_dict(state["optimizer"])
        randomness = state["generator"].cpu()
        if randomness.shape == self.generator.get_state().shape:
            self.generator.set_state(randomness)
        else:  # the checkpoint comes from another kind of device
            self.generator.manual_seed(self.settings.seed + state["position"][0])
        self.steps, self.samples, self.warm_from = state["position"]
        self.seconds, self.timed_from = state.get("time", (0.0, 0))
        self.ends_from = state.get("ends_from")
        if not same_kind:
            self.warm_from = self.steps

    def start_from(self, start: Start) -> None:
        """Go on from bare weights: a fresh optimizer, which is warmed up again, and fresh randomness."""
        full = {k: v.float() if v.is_floating_point() else v for k, v in start.weights.items()}
        self.net.load_state_dict(full)
        self.average = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.steps, self.samples, self.warm_from = start.steps, start.samples, start.steps
        self.seconds, self.timed_from = start.seconds, start.timed_from
        self.generator.manual_seed(self.settings.seed + start.steps)


def save_half(
    parts: Mapping[str, Any],
    state: dict[str, Any],
    folder: Path,
    of: str,
    others: Mapping[str, Any] | None = None,
    log: Path | None = None,
) -> None:
    """Write a run's averaged weights in half precision, and its record beside them, as a sealed folder.

    Args:
        parts: models of diffusers or transformers by name, as they were in the `ModuleDict` that learned; overwritten.
        state: of `Training.state`.
        folder: gets one folder per part, in pieces of at most 15 MB, and what `export_record` writes.
        of: name of the model.
        others: further parts by name, written as they are.
        log: of the run.

    Raises:
        FileError: if it cannot be written.
    """
    nn.ModuleDict(parts).load_state_dict(state["average"])

    def fill(scratch: Path) -> None:
        for name, part in parts.items():
            part.half().save_pretrained(scratch / name, max_shard_size="15MB")
        for name, part in (others or {}).items():
            part.save_pretrained(scratch / name)
        for config in scratch.glob("*/config.json"):  # diffusers notes where a part was read from
            content = read_json(config, error=ModelError)
            content.pop("_name_or_path", None)
            write_atomically(config, json.dumps(content, indent=2) + "\n")
        export_record(scratch, state, log)

    write_sealed(folder, fill, of)


def load_half(parts: Mapping[str, Any], folder: Path) -> Start:
    """What `save_half` wrote for `parts`, whose classes say how to read it.

    Raises:
        ModelError: if a file is missing, or not as it was written.
    """
    check_sealed(folder, ModelError, "Export the weights again, or train from the start in another folder.")
    read = nn.ModuleDict({name: type(part).from_pretrained(folder / name) for name, part in parts.items()})
    return start_of(folder, read.state_dict())


def read_checkpoint(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that `run` left in `folder`.

    Raises:
        ModelError: if there is none, or it cannot be read.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ModelError(f"no checkpoint in {folder}; run the training script with --out {folder} first")
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:
        raise ModelError(
            f"{path} is damaged ({type(error).__name__}); remove it, and training starts again from what is committed"
        ) from error
    return state


@contextmanager
def _stopping() -> Iterator[list[bool]]:
    """A list that is no longer empty once the process was asked to end (SIGTERM, or control-C)."""
    asked: list[bool] = []
    old = {s: signal.signal(s, lambda *_: asked.append(True)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(
    training: Training,
    folder: Path,
    samples: int,
    minutes: float = math.inf,
    fallback: Callable[[], Start] | None = None,
    checkpoint_minutes: float = 5.0,
    log_every: int = 50,
    fall: float = 0.0,
) -> None:
    """Train until `samples` were seen or the time is over; goes on from what it finds.

    Args:
        training: fresh.
        folder: for `checkpoint.pt` and `log.jsonl`.
        samples: in total, earlier parts counted.
        minutes: budget of this part, wall clock.
        fallback: gives what to start from if there is no checkpoint; see `load_half`.
        checkpoint_minutes: between two checkpoints.
        log_every: steps per line of the log.
        fall: share of `minutes`, at the end, over which the rate falls to zero; for a part that nothing follows. If it
            was interrupted, it goes on where it was: its `minutes` are those of all its pieces. Where `samples` end it
            before them, a warning says so.

    Raises:
        ModelError: if the checkpoint cannot be read or is of a run on other terms (`fall` and its `minutes` among
            them), or most batches give gradients that are not finite.
    """
    if fall:
        training.terms |= {"--fall": fall, "--minutes": minutes}
    if (folder / CHECKPOINT).exists():
        state = read_checkpoint(folder, training.device)
        training.restore(state)
        if "time" not in state:  # it was written before 0.2
            training.seconds = 3600 * hours_of(folder / LOG)
    elif fallback is not None:
        start = fallback()
        training.start_from(start)
        if not (folder / LOG).exists():
            write_atomically(folder / LOG, "".join(json.dumps(row) + "\n" for row in start.curve))
    before = training.seconds
    if fall and training.ends_from is None:
        training.ends_from = before
    begun = before if training.ends_from is None else training.ends_from

    def fallen() -> float:
        return min(1.0, max(0.0, 1 - (training.seconds - begun) / (60 * minutes)) / fall)

    if training.samples >= samples and not fall:
        warnings.warn(
            f"{training.samples} samples have been seen already, and --samples is {samples} in total: nothing is "
            "trained",
            HastenWarning,
            stacklevel=2,
        )
    started = saved = lined = time.monotonic()
    seen, sums, counts = training.samples, {}, {}  # type: ignore[var-annotated]
    idle = torch.zeros((), dtype=torch.long, device=training.device)  # batches that moved nothing
    with _stopping() as asked:
        while training.samples < samples and training.seconds - begun < 60 * minutes and not asked:
            if fall:
                training.fallen = fallen()
            loss = training.step()
            training.seconds = before + time.monotonic() - started
            idle = idle + ~training.sound
            for name, value in {"loss": loss.value, **loss.parts}.items():
                key = f"{name}/{loss.kind}"
                sums[key] = sums.get(key, 0.0) + torch.where(training.sound, value.detach(), 0.0)
                counts[key] = counts.get(key, 0) + training.sound
            if training.steps % log_every == 0:
                now = time.monotonic()
                row: dict[str, object] = {"step": training.steps, "samples": training.samples}
                row |= {key: round(float(value / counts[key]), 5) for key, value in sorted(sums.items()) if counts[key]}
                if idle:
                    row["not_finite"] = int(idle)
                if idle > log_every / 2:
                    raise ModelError(
                        f"{int(idle)} of the last {log_every} batches gave gradients that are not finite; the last "
                        f"checkpoint in {folder} is from before: go on from it with a smaller --lr, or with --float32"
                    )
                idle = torch.zeros((), dtype=torch.long, device=training.device)
                row["lr"] = training.optimizer.param_groups[0]["lr"]
                row["samples_per_second"] = round((training.samples - seen) / (now - lined), 1)
                row["hours"] = round(training.seconds / 3600, 4)
                add_line(folder / LOG, json.dumps(row))
                lined, seen, sums, counts = now, training.samples, {}, {}
            if time.monotonic() - saved > 60 * checkpoint_minutes and not idle:
                _save(training, folder)
                saved = time.monotonic()
    _save(training, folder)
    if fall and training.samples >= samples and (left := fallen()):
        warnings.warn(
            f"all --samples {samples} were seen in {(training.seconds - begun) / 60:.3g} of the {minutes:g} --minutes, "
            f"and the rate fell to {left:.2g} of itself, not to zero; go on with more --samples, the rest as it is",
            HastenWarning,
            stacklevel=2,
        )


def _save(training: Training, folder: Path) -> None:
    write_atomically(folder / CHECKPOINT, partial(torch.save, training.state()))
