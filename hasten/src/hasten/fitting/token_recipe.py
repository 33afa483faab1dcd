"""What a training of a token model is made of: its recipe, its conditions, and the model that is built by default.

Shapes: `B` batch, `N` tokens, `P` ids of a condition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from hasten.errors import ConfigError
from hasten.parameters import Declared, Range, accepted
from hasten.tokens.causal import Condition
from hasten.tokens.cost import free_memory
from hasten.tokens.hugging_face import HuggingFaceModel
from hasten.tokens.mapping import TokenMap
from hasten.tokens.sample import MOST_SEED
from hasten.tokens.vocabulary import Vocabulary, mark_converted

__all__ = ["UNSOUND", "Conditions", "Recipe", "build_model", "class_conditions", "finite"]

UNSOUND = "take a smaller lr, look for weights that are not finite, or train in float32"


def finite(module: nn.Module) -> bool:
    """Whether all of a module's parameters, as far as they lie in this process, are finite; waits for the device."""
    own = [getattr(p, "_local_tensor", p).detach() for p in module.parameters() if p.is_floating_point()]
    return bool(torch.stack([p.isfinite().all().cpu() for p in own]).all()) if own else True


@dataclass(frozen=True, kw_only=True)
class Recipe(Declared):
    """One training run.

    Raises:
        ConfigError: if a value cannot work.
    """

    steps: Annotated[int, Range(1), "optimizer steps"] = 2000
    batch: Annotated[int, Range(1), "images of a step, over all processes"] = 64
    accumulate: Annotated[int, Range(1), "parts in which a process takes its images of a step, one after the other"] = 1
    lr: Annotated[float, Range(above=0), "peak learning rate"] = 1e-3
    warmup: Annotated[int, Range(0), "steps until it is reached"] = 100
    condition_dropout: Annotated[
        float, Range(0, below=1), "share of images that are trained without their condition"
    ] = 0.1
    width: Annotated[int, Range(1), "of the model that is built where none is given"] = 256
    layers: Annotated[int, Range(1), "of that model"] = 6
    heads: Annotated[int, Range(1), "of that model; twice as many divide the width"] = 4
    seed: Annotated[int, Range(0, MOST_SEED), "of the weights and the order of the images"] = 0

    def check(self) -> None:
        super().check()
        if self.width % (2 * self.heads):
            raise ConfigError(f"twice the heads must divide the width, got {self.heads} and {self.width}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, share)))


def build_model(
    mapping: TokenMap, classes: int, length: int, recipe: Recipe, codebooks: tuple[int, ...] = ()
) -> HuggingFaceModel:
    """A `HuggingFaceModel` of a `LlamaForCausalLM` with rows for clusters, classes and "no class", seeded.

    Ids before the replacement are the `N` tokens, then the classes, then "no class".
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = mapping.clusters + classes + 1
    _refuse_unless_it_fits(recipe.layers * 12 * recipe.width**2 + 2 * rows * recipe.width)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
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
    vocabulary = Vocabulary.of_clusters(mapping, classes + 1, "model.embed_tokens", "lm_head")
    mark_converted(model, vocabulary)
    return HuggingFaceModel(model, vocabulary, codebooks=codebooks, keep_text=False)


def _refuse_unless_it_fits(parameters: int) -> None:
    """Raise a ConfigError if there is no memory for a model of about so many parameters, its gradient and moments."""
    needed, free = 16 * parameters, free_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"the model has about {parameters:,} parameters, for whose training {needed / 2**30:.1f} GiB are needed, "
            f"but {free / 2**30:.1f} are free; use a smaller --width, or fewer --layers"
        )


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the labels of shards are to a model.

    Attributes:
        first_class: id of class 0, where labels are classes; texts are ids already.
        without: the ids `[P]` that stand for no condition, for dropout and guidance; None without either.
        classes: that the model knows; None where that is not told.

    Raises:
        ConfigError: for other ids.
    """

    first_class: int = 0
    without: Tensor | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        accepted("Conditions", "first_class", Annotated[int, Range(0)], self.first_class)
        accepted("Conditions", "classes", Annotated[int | None, Range(1)], self.classes)
        accepted("Conditions", "without", Tensor | None, self.without)
        if self.without is not None and self.without.ndim != 1:
            raise ConfigError(f"the ids that stand for no condition are [P], got the shape {tuple(self.without.shape)}")

    def of(self, labels: Tensor, dropped: Tensor | None = None) -> Condition:
        """Conditions of labels: classes `[B]` or texts `[B, P]`, without those that are dropped `[B]`."""
        accepted("Conditions.of", "labels", Tensor, labels)
        if labels.ndim == 1 and labels.numel() and labels.device.type == "cpu":
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or (self.classes is not None and high >= self.classes):
                known = "from 0 on" if self.classes is None else f"0 .. {self.classes - 1}"
                raise ConfigError(f"the model knows the classes {known}, got {low} .. {high}")
        ids = labels[:, None] + self.first_class if labels.ndim == 1 else labels
        if self.without is None or dropped is None:
            return Condition.padded(ids)
        missing = max(0, len(self.without) - ids.shape[1])
        ids = nn.functional.pad(ids, (missing, 0), value=-1)
        none = nn.functional.pad(self.without, (ids.shape[1] - len(self.without), 0), value=-1)
        return Condition.padded(torch.where(dropped[:, None], none, ids))

    def none(self) -> Condition:
        """The one that stands for no condition.

        Raises:
            ConfigError: if there is none.
        """
        if self.without is None:
            raise ConfigError("the model was trained with its conditions alone; guidance needs ids that stand for none")
        return Condition(self.without[None])


def class_conditions(tokens: int, classes: int) -> Conditions:
    """Of a model that `build_model` made: class 0 is behind the `N` tokens, and "no class" behind the classes."""
    return Conditions(tokens, torch.tensor([tokens + classes]), classes)
