"""Training of autoregressive models on shards of fine tokens, under any map; resumable.

The model is any `CausalModel`: a converted model of transformers, a module with a function that runs it, or by default
a `LlamaForCausalLM` with `k` cluster rows, one row per class and one for "no class". A sequence is the condition (a
class or a text) followed by the clusters of an image; the loss is the cross-entropy over them, in nats per cluster.
AdamW with the paper's settings (betas 0.9 and 0.95, weight decay 0.05, gradients clipped to 1, cosine to a tenth); one
image in ten loses its condition, so that classifier-free guidance works.

Under `accelerate launch` or `torchrun` each process takes its own images of a batch, and gradients are averaged; with
`shard=True` parameters, gradients and moments are shared out as well (FSDP).

Shapes: `B` batch, `L` clusters of an image, `k` clusters that there are, `P` ids of a condition.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hasten.errors import ConfigError, ModelError, NonFiniteError
from hasten.fitting.token_checkpoint import check_tensors, load_tensors, tensors_of
from hasten.fitting.token_recipe import UNSOUND, Conditions, Recipe, build_model, class_conditions, finite
from hasten.io import Kind, as_path, read_tensors, write_atomically, write_tensors
from hasten.parameters import Range, accepted
from hasten.tokens.causal import CausalModel, Condition
from hasten.tokens.mapping import TokenMap
from hasten.tokens.shards import TokenShards

__all__ = ["Trainer"]


@dataclass(frozen=True)
class _Position:
    """What the header of a checkpoint holds."""

    recipe: Recipe
    steps: int
    cpu_seconds: float
    seconds: float

    def __post_init__(self) -> None:
        if min(self.steps, self.cpu_seconds, self.seconds) < 0:
            raise ValueError("steps and seconds count from 0")


CHECKPOINT = "checkpoint.safetensors"
KIND = Kind("checkpoint of a token model", _Position, ModelError, "Train again in another folder.", 64 << 30)


class Trainer:
    """Model, optimizer and position in the data; `step` is one optimizer step.

    Args:
        shards: fine tokens with what they show.
        mapping: token -> cluster.
        recipe: of the training.
        model: of the clusters; by default a class-conditional one is built. What its predictions do not depend on (a
            tokenizer, a vision tower) is frozen.
        conditions: what the labels of the shards are to a model that is given.
        codebooks: of a model that is built, for several codebooks in turn.
        shard: whether processes share out parameters, gradients and moments (FSDP).
        cpu: not to use an accelerator that is there.

    Raises:
        ConfigError: if the map is of another vocabulary than the shards, the model of another number of clusters,
            processes or parts do not divide the batch, or conditions are to be dropped and none stands for that.
        ModelError: if the map is of another codebook than the shards.
    """

    def __init__(
        self,
        shards: TokenShards,
        mapping: TokenMap,
        recipe: Recipe,
        model: CausalModel | None = None,
        conditions: Conditions | None = None,
        *,
        codebooks: tuple[int, ...] = (),
        shard: bool = False,
        cpu: bool = False,
    ) -> None:
        for name, hint, value in (
            ("shards", TokenShards, shards),
            ("mapping", TokenMap, mapping),
            ("recipe", Recipe, recipe),
            ("model", CausalModel | None, model),
            ("conditions", Conditions | None, conditions),
        ):
            accepted("Trainer", name, hint, value)
        shards.check(mapping)
        if not len(shards):
            raise ConfigError(f"{shards.folder} holds no image; give shards with some to train on")
        self.accelerator = Accelerator(cpu=cpu)
        parts = self.accelerator.num_processes * recipe.accumulate
        if recipe.batch % parts:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes with {recipe.accumulate} parts each do not divide the "
                f"batch of {recipe.batch}"
            )
        self.shards, self.mapping, self.recipe = shards, mapping, recipe
        self.k = mapping.clusters
        if model is None:
            if shards.text:
                raise ConfigError("the model that is built knows classes; give a model for shards with texts")
            self.classes = 1 + max((int(c.max()) for c in shards.classes), default=0)
            self.conditions = class_conditions(mapping.tokens, self.classes)
            model = build_model(mapping, self.classes, shards.length, recipe, codebooks)
        else:
            self.conditions = conditions or Conditions()
        assert model is not None
        if model.clusters != self.k:
            raise ConfigError(f"the model predicts {model.clusters} clusters, the map has {self.k}")
        if recipe.condition_dropout and self.conditions.without is None:
            raise ConfigError("condition_dropout needs conditions with ids that stand for none; without them it is 0")
        self.causal: CausalModel = model.to(self.accelerator.device)
        self.sharded = shard and self.accelerator.num_processes > 1
        used = {id(p) for p in self.causal.trained()}
        for parameter in self.causal.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in used)
        if self.sharded:
            _shard(self.causal)
        parameters = [p for p in self.causal.trained() if p.requires_grad]
        kept = {id(p) for p in self.causal.undecayed()}
        decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in kept]
        groups = [
            {"params": decayed, "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim < 2 or id(p) in kept], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), eps=1e-8)
        self.model: Any = self.causal
        self._stepper: Any = self.optimizer
        if not self.sharded:
            self.model, self._stepper = self.accelerator.prepare(self.causal, self.optimizer)
        self.steps = 0
        self.cpu_seconds = self.seconds = 0.0  # of this process, for the steps alone

    def batch(self, step: int) -> tuple[Condition, Tensor]:
        """This process's images of a step: conditions and clusters `[B, L]`; a function of seed and step alone."""
        rng = np.random.default_rng([self.recipe.seed, step])
        pick = rng.integers(len(self.shards), size=self.recipe.batch)
        dropped = rng.random(self.recipe.batch) < self.recipe.condition_dropout
        own = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return self._images(self.shards, pick[own], torch.from_numpy(dropped[own]))

    def _images(self, shards: TokenShards, pick: Any, dropped: Tensor | None = None) -> tuple[Condition, Tensor]:
        device = self.accelerator.device
        clusters = torch.from_numpy(self.mapping(shards.take(pick))).long()
        condition = self.conditions.of(torch.from_numpy(shards.labels(pick)), dropped)
        return condition.to(device), clusters.to(device)

    def loss(self, condition: Condition, clusters: Tensor) -> Tensor:
        """Mean cross-entropy over the clusters, in nats per cluster."""
        logits = self.model(condition, clusters[:, :-1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), clusters.flatten())

    def step(self) -> float:
        """One optimizer step; the loss of this process's images."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.steps)
        condition, clusters = self.batch(self.steps)
        parts = self.recipe.accumulate
        size = len(clusters) // parts
        total = torch.zeros((), device=self.accelerator.device)
        for part in range(parts):
            own = slice(part * size, (part + 1) * size)
            with self._synchronised(part == parts - 1):
                loss = self.loss(condition.part(own), clusters[own]) / parts
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.sharded:
            nn.utils.clip_grad_norm_(self.causal.parameters(), 1.0)
        else:  # with half precision it divides by the loss's scale first
            self.accelerator.clip_grad_norm_(self.causal.parameters(), 1.0)
        self._stepper.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.cpu_seconds += time.process_time() - cpu
        self.seconds += time.perf_counter() - wall
        return float(total)

    def _synchronised(self, last: bool) -> Any:
        """Gradients are averaged over the processes with the last part alone."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    @torch.no_grad()
    def evaluate(self, held_out: TokenShards, images: int = 256) -> dict[str, float]:
        """How well held-out images are predicted.

        Returns:
            `loss`, nats a cluster; `loss_over_log_k` and `entropy_over_log_k` (mean entropy of the predictions), 1 for
            a model that knows nothing; `token_loss`, nats a fine token when members are drawn uniformly,
            `-log p(cluster) + log |cluster|`, which can be compared between vocabularies.

        Raises:
            ConfigError: if there are no images, or they are of another vocabulary or show other things.
            ModelError: if they are of another codebook.
        """
        images = accepted("Trainer.evaluate", "images", Annotated[int, Range(1)], images)
        self._check_held_out(held_out)
        self.model.eval()
        losses, entropies, inside = [], [], []
        log_sizes = torch.from_numpy(np.log(self.mapping.sizes)).float()
        for first in range(0, min(images, len(held_out)), self.recipe.batch):
            pick = np.arange(first, min(first + self.recipe.batch, images, len(held_out)))
            condition, clusters = self._images(held_out, pick)
            logits = self.causal(condition, clusters[:, :-1]).logits.float().cpu()
            clusters = clusters.cpu()
            chances = logits.log_softmax(-1)
            losses.append(-chances.gather(-1, clusters[..., None]).flatten())
            inside.append(log_sizes[clusters].flatten())
            entropies.append(torch.special.entr(chances.exp()).sum(-1).flatten())
        scale = math.log(self.k) if self.k > 1 else 1.0
        loss, entropy = float(torch.cat(losses).mean()), float(torch.cat(entropies).mean())
        token_loss = loss + float(torch.cat(inside).mean())
        measures = {"loss": loss, "loss_over_log_k": loss / scale, "entropy_over_log_k": entropy / scale}
        return {**measures, "token_loss": token_loss}

    def _check_held_out(self, held_out: TokenShards) -> None:
        """Refuse what is not of the kind of the shards that are trained on."""
        accepted("Trainer.evaluate", "held_out", TokenShards, held_out).check(self.mapping)
        if not len(held_out):
            raise ConfigError(f"{held_out.folder} holds no image; at least one held-out image is needed")
        kinds = ["texts" if s.text else "classes" if s.classes else "no labels" for s in (held_out, self.shards)]
        if kinds[0] != kinds[1]:
            raise ConfigError(f"{held_out.folder} has {kinds[0]}, the shards that are trained on have {kinds[1]}")

    def weights(self) -> dict[str, Tensor]:
        """Whole weights of the model by name, on the CPU; to be called by all processes alike."""
        arrays = tensors_of(self.causal, self.optimizer)
        return {name[6:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("model/")}

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically; all processes call this, and the main one writes.

        Raises:
            FileError: if it cannot be written.
        """
        arrays = tensors_of(self.causal, self.optimizer)
        if not self.accelerator.is_main_process:
            return
        content = {"recipe": asdict(self.recipe), "steps": self.steps}
        content |= {"cpu_seconds": self.cpu_seconds, "seconds": self.seconds}
        write_tensors(path, KIND, arrays | {"labels": self.mapping.labels}, content)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of the same run; more steps than it was started with are fine.

        Raises:
            ModelError: if it is missing or damaged, or of another recipe or map.
        """
        arrays, position = read_tensors(path, KIND)
        saved = replace(position.recipe, steps=self.recipe.steps)
        if saved != self.recipe or not np.array_equal(arrays.pop("labels", np.empty(0)), self.mapping.labels):
            raise ModelError(f"{path} is of another recipe or map; give another folder or the same options")
        try:
            check_tensors(arrays, self.causal, self.optimizer, position.steps)
        except ModelError as error:
            raise ModelError(f"{path}: {error}. {KIND.remedy}") from error
        load_tensors(arrays, self.causal, self.optimizer)
        self.steps, self.cpu_seconds, self.seconds = position.steps, position.cpu_seconds, position.seconds

    def run(
        self,
        out: Path,
        held_out: TokenShards | None = None,
        minutes: float | None = None,
        every: int = 100,
        progress: Callable[[int, int, float], None] | None = None,
        measure: Callable[[Trainer], dict[str, float]] | None = None,
    ) -> bool:
        """Train until the last step or for some minutes.

        Args:
            out: folder of `checkpoint.safetensors`, from which a run goes on, and of `log.jsonl`.
            held_out: what `evaluate` measures on, for the log.
            minutes: after how long to stop, looked at after each step; the whole run by default.
            every: steps between two lines of the log and checkpoints.
            progress: called with the steps done, the steps in all and the loss.
            measure: further figures for the log.

        Returns:
            Whether the last step is done.

        Raises:
            NonFiniteError: if the loss or a weight is no number; the checkpoint is the one before.
        """
        out = as_path(out)
        accepted("Trainer.run", "minutes", Annotated[float | None, Range(0)], minutes)
        accepted("Trainer.run", "every", Annotated[int, Range(1)], every)
        if held_out is not None:
            self._check_held_out(held_out)  # not after some hundred steps
        started = time.monotonic()
        checkpoint = out / CHECKPOINT
        if checkpoint.exists():
            self.restore(checkpoint)
        log = self._known_log(out / "log.jsonl")
        while self.steps < self.recipe.steps:
            loss = self.step()
            if progress is not None:
                progress(self.steps, self.recipe.steps, loss)
            late = minutes is not None and self._time_is_up(started, minutes)
            if late or self.steps % every == 0 or self.steps == self.recipe.steps:
                self._refuse_lost(loss)
                log += self._row(loss, held_out, measure)
                if self.accelerator.is_main_process:
                    write_atomically(out / "log.jsonl", log)
                self.save(checkpoint)
                if late:
                    break
        return self.steps >= self.recipe.steps

    def _time_is_up(self, started: float, minutes: float) -> bool:
        """Whether any process has used up its time, so that all stop at the same step."""
        return self._any(time.monotonic() - started >= 60 * minutes)

    def _any(self, own: bool) -> bool:
        """Whether something is so in any process; a single one does not ask its device."""
        if self.accelerator.num_processes == 1:
            return own
        return bool(self.accelerator.reduce(torch.tensor([float(own)], device=self.accelerator.device), "sum") > 0)

    def _refuse_lost(self, loss: float) -> None:
        """Refuse to keep, or go on with, what is no number."""
        if self._any(not math.isfinite(loss) or not finite(self.causal)):
            raise NonFiniteError(f"step {self.steps}: the loss is {loss}, or weights are not finite; {UNSOUND}")

    def _known_log(self, path: Path) -> str:
        """The lines of the log up to this step: those of steps that are made again are dropped."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            return "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= self.steps)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"{path}: no log of a training run; move it away or give another folder") from error

    def _row(
        self,
        loss: float,
        held_out: TokenShards | None,
        measure: Callable[[Trainer], dict[str, float]] | None,
    ) -> str:
        """A line of the log."""
        row: dict[str, Any] = {"step": self.steps, "train": round(loss, 5)}
        row |= {"cpu_seconds": round(self.cpu_seconds, 2), "seconds": round(self.seconds, 2)}
        if self.accelerator.is_main_process or self.sharded:  # what is shared out can only be run by all
            figures = {} if held_out is None else self.evaluate(held_out)
            if measure is not None:
                figures |= measure(self)
            row |= {name: round(value, 5) for name, value in figures.items()}
        return json.dumps(row) + "\n"


def _shard(model: CausalModel) -> None:
    """Share out the parameters of each block, and of all else, over the processes."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    deepest = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=())
    for block in deepest:
        fully_shard(block)
    fully_shard(model)
