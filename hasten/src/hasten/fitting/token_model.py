"""Training of class-conditional autoregressive models on shards of fine tokens, under any map; resumable.

The model is a `LlamaForCausalLM` with `k` cluster rows, one row a class and one for "no class". A sequence is the
class followed by the clusters of an image; the loss is the cross-entropy over the `k` clusters, in nats a token.
AdamW with the paper's settings (betas 0.9 and 0.95, weight decay 0.05, gradients clipped to 1, cosine to a tenth);
one image in ten loses its class, so that classifier-free guidance works.

Under `accelerate launch` or `torchrun` each process takes its own images of a batch, and gradients are averaged.

Shapes: `B` batch, `L` tokens of an image, `k` clusters.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hasten.errors import ConfigError, ModelError
from hasten.io import Kind, read_tensors, write_atomically, write_tensors
from hasten.tokens.mapping import TokenMap
from hasten.tokens.shards import TokenShards

__all__ = ["Recipe", "Trainer", "build_model", "sequences"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run.

    Attributes:
        steps: optimizer steps.
        batch: images of a step, over all processes.
        lr: peak learning rate.
        warmup: steps until it is reached.
        class_dropout: share of images that are trained without their class.
        width, layers, heads: of the model.
        seed: of the weights and the order of the images.

    Raises:
        ConfigError: if a value cannot work.
    """

    steps: int = 2000
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 100
    class_dropout: float = 0.1
    width: int = 256
    layers: int = 6
    heads: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.width, self.layers, self.heads) < 1 or self.warmup < 0 or self.lr <= 0:
            raise ConfigError(f"sizes, steps and the learning rate must be positive, got {self}")
        if self.width % (2 * self.heads):
            raise ConfigError(f"twice the heads must divide the width, got {self.heads} and {self.width}")
        if not 0 <= self.class_dropout < 1:
            raise ConfigError(f"class_dropout must be in [0, 1), got {self.class_dropout}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, share)))


def build_model(clusters: int, classes: int, length: int, recipe: Recipe) -> Any:
    """A `LlamaForCausalLM` with `clusters + classes + 1` rows for `length` tokens, with seeded weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=clusters + classes + 1,
            hidden_size=recipe.width,
            intermediate_size=8 * recipe.width // 3,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=length + 1,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            use_cache=True,
        )
    )


def sequences(clusters: Tensor, classes: Tensor, k: int) -> Tensor:
    """Model inputs `[B, 1 + L]`: class row `k + class`, then the clusters `[B, L]`."""
    return torch.cat([k + classes[:, None], clusters], dim=1)


@dataclass(frozen=True)
class _Position:
    """What the header of a checkpoint holds."""

    recipe: Recipe
    steps: int
    cpu_seconds: float

    def __post_init__(self) -> None:
        if self.steps < 0 or self.cpu_seconds < 0:
            raise ValueError("steps and seconds count from 0")


CHECKPOINT = "checkpoint.safetensors"
KIND = Kind("checkpoint of a token model", _Position, ModelError, "Train again in another folder.", 64 << 30)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Trainer:
    """Model, optimizer and position in the data; `step` is one optimizer step.

    Raises:
        ConfigError: if the map is of another vocabulary than the shards, or processes do not divide the batch.
    """

    def __init__(self, shards: TokenShards, mapping: TokenMap, recipe: Recipe, cpu: bool = False) -> None:
        if mapping.tokens != shards.vocabulary:
            raise ConfigError(f"the map has {mapping.tokens} tokens, the shards a vocabulary of {shards.vocabulary}")
        self.accelerator = Accelerator(cpu=cpu)
        if recipe.batch % self.accelerator.num_processes:
            raise ConfigError(f"{self.accelerator.num_processes} processes do not divide the batch of {recipe.batch}")
        self.shards, self.mapping, self.recipe = shards, mapping, recipe
        self.classes = 1 + max((int(c.max()) for c in shards.classes), default=0)
        self.k = mapping.clusters
        self.plain = build_model(self.k, self.classes, shards.length, recipe)
        parameters = list(self.plain.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), eps=1e-8)
        self.model, self.optimizer = self.accelerator.prepare(self.plain, optimizer)
        self.steps = 0
        self.cpu_seconds = 0.0  # of this process, for the steps alone

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's images of a step: clusters `[B, L]` and classes `[B]`; a function of seed and step alone."""
        rng = np.random.default_rng([self.recipe.seed, step])
        pick = rng.integers(len(self.shards), size=self.recipe.batch)
        dropped = rng.random(self.recipe.batch) < self.recipe.class_dropout
        own = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        classes = np.where(dropped, self.classes, self.shards.labels(pick))[own]
        clusters = self.mapping(self.shards.take(pick[own]))
        device = self.accelerator.device
        return torch.from_numpy(clusters).long().to(device), torch.from_numpy(classes).to(device)

    def loss(self, clusters: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy over the clusters, in nats a token."""
        logits = self.model(input_ids=sequences(clusters, classes, self.k)[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits[..., : self.k].flatten(0, 1).float(), clusters.flatten())

    def step(self) -> float:
        """One optimizer step; the loss of this process's images."""
        started = time.process_time()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.steps)
        loss = self.loss(*self.batch(self.steps))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.cpu_seconds += time.process_time() - started
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, held_out: TokenShards, images: int = 256) -> dict[str, float]:
        """How well held-out images are predicted.

        Returns:
            `loss`, nats a cluster; `loss_over_log_k` and `entropy_over_log_k` (mean entropy of the predictions), 1 for
            a model that knows nothing; `token_loss`, nats a fine token when members are drawn uniformly,
            `-log p(cluster) + log |cluster|`, which can be compared between vocabularies.

        Raises:
            ConfigError: if there are no images.
        """
        if not len(held_out) or images < 1:
            raise ConfigError("at least one held-out image is needed")
        self.model.eval()
        losses, entropies, inside = [], [], []
        log_sizes = torch.from_numpy(np.log(self.mapping.sizes)).float()
        for first in range(0, min(images, len(held_out)), self.recipe.batch):
            pick = np.arange(first, min(first + self.recipe.batch, images, len(held_out)))
            clusters = torch.from_numpy(self.mapping(held_out.take(pick))).long()
            classes = torch.from_numpy(held_out.labels(pick))
            inputs = sequences(clusters, classes, self.k)[:, :-1].to(self.accelerator.device)
            logits = self.plain(input_ids=inputs, use_cache=False).logits[..., : self.k].float().cpu()
            chances = logits.log_softmax(-1)
            losses.append(-chances.gather(-1, clusters[..., None]).flatten())
            inside.append(log_sizes[clusters].flatten())
            entropies.append(-(chances.exp() * chances).sum(-1).flatten())
        scale = math.log(self.k) if self.k > 1 else 1.0
        loss, entropy = float(torch.cat(losses).mean()), float(torch.cat(entropies).mean())
        token_loss = loss + float(torch.cat(inside).mean())
        measures = {"loss": loss, "loss_over_log_k": loss / scale, "entropy_over_log_k": entropy / scale}
        return {**measures, "token_loss": token_loss}

    def _tensors(self) -> dict[str, Tensor]:
        """Weights, and the optimizer's moments once it has made a step."""
        tensors = {f"model/{name}": value for name, value in self.plain.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": moments[name] for name in MOMENTS}
        return tensors

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically; of several processes the main one writes.

        Raises:
            FileError: if it cannot be written.
        """
        if not self.accelerator.is_main_process:
            return
        arrays = {name: value.detach().cpu().numpy() for name, value in self._tensors().items()}
        content = {"recipe": asdict(self.recipe), "steps": self.steps, "cpu_seconds": self.cpu_seconds}
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
        sizes = [p.shape for group in self.optimizer.param_groups for p in group["params"]]
        expected = {f"model/{name}": value.shape for name, value in self.plain.state_dict().items()}
        for i, size in enumerate(sizes if position.steps else []):
            expected |= {f"optimizer/{i}/{name}": size if name != "step" else torch.Size([]) for name in MOMENTS}
        if {name: array.shape for name, array in arrays.items()} != expected:
            raise ModelError(f"{path}: its tensors are not those of this model. {KIND.remedy}")
        for name, array in arrays.items():
            wrong = not np.isfinite(array).all() or (name.endswith("/exp_avg_sq") and array.min() < 0)
            if wrong or (name.endswith("/step") and array != position.steps):
                raise ModelError(f"{path}: {name!r} has a value that no training leaves. {KIND.remedy}")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.plain.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model/")})
        if position.steps:
            moments = {i: {name: tensors[f"optimizer/{i}/{name}"] for name in MOMENTS} for i in range(len(sizes))}
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.steps, self.cpu_seconds = position.steps, position.cpu_seconds

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
            minutes: after how long to stop; the whole run by default.
            every: steps between two lines of the log and checkpoints.
            progress: called with the steps done, the steps in all and the loss.
            measure: further figures for the log.

        Returns:
            Whether the last step is done.
        """
        started = time.monotonic()
        checkpoint = out / CHECKPOINT
        if checkpoint.exists():
            self.restore(checkpoint)
        log = self._known_log(out / "log.jsonl")
        while self.steps < self.recipe.steps:
            loss = self.step()
            if progress is not None:
                progress(self.steps, self.recipe.steps, loss)
            if self.steps % every == 0 or self.steps == self.recipe.steps:
                log += self._row(loss, held_out, measure)
                if self.accelerator.is_main_process:
                    write_atomically(out / "log.jsonl", log)
                self.save(checkpoint)
                if minutes is not None and self._time_is_up(started, minutes):
                    break
        return self.steps >= self.recipe.steps

    def _time_is_up(self, started: float, minutes: float) -> bool:
        """Whether any process has used up its time, so that all stop at the same step."""
        late = torch.tensor([float(time.monotonic() - started >= 60 * minutes)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(late, "sum").item() > 0)

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
        row: dict[str, Any] = {"step": self.steps, "cpu_seconds": round(self.cpu_seconds, 2), "train": round(loss, 5)}
        if self.accelerator.is_main_process:
            figures = {} if held_out is None else self.evaluate(held_out)
            if measure is not None:
                figures |= measure(self)
            row |= {name: round(value, 5) for name, value in figures.items()}
        return json.dumps(row) + "\n"
