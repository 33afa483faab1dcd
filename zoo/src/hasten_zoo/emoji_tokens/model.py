"""The trained model under the MASC vocabulary that comes with the package, and how it is packed.

    python -m hasten_zoo.emoji_tokens.model --model runs/masc/model --refiner runs/masc/refiner.safetensors

packs what `hasten tokens train` and `hasten tokens refine` wrote: half precision, which costs nothing that can be seen.
Shapes: `B` images, `L` tokens of an image.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from hasten.errors import ConfigError, ModelError
from hasten.fitting.token_recipe import Conditions, class_conditions
from hasten.tokens import TokenMap
from hasten.tokens.export import export_model, open_model
from hasten.tokens.hugging_face import HuggingFaceModel
from hasten.tokens.refiner import Refiner
from hasten.tokens.sample import Sampling, sample_clusters
from torch import Tensor

from hasten_zoo.command import told
from hasten_zoo.emoji_tokens import WEIGHTS, VQTokenizer, load_tokenizer
from hasten_zoo.emoji_tokens.data import OBJECTS

__all__ = ["MODEL", "EmojiTokens", "pack"]

MODEL = WEIGHTS / "masc"


@dataclass(frozen=True, eq=False)
class EmojiTokens:
    """A class-conditional autoregressive model of clusters, and what makes images of them.

    Attributes:
        tokenizer: decodes tokens.
        model: `HuggingFaceModel` of a `LlamaForCausalLM` of clusters.
        conditions: what classes are to it.
        mapping: token -> cluster.
        refiner: chooses the members.
    """

    tokenizer: VQTokenizer
    model: HuggingFaceModel
    conditions: Conditions
    mapping: TokenMap
    refiner: Refiner

    @classmethod
    def load(cls, folder: Path = MODEL) -> Self:
        """What `pack` wrote, by default the model that comes with the package; computed in float32.

        Raises:
            ModelError: if a file is missing or damaged, or they do not belong together.
        """
        opened, tokenizer = open_model(folder), load_tokenizer()
        opened.mapping.check(tokenizer.codebook)
        refiner = Refiner.load(folder / "refiner.safetensors")
        refiner.check(opened.mapping)
        model = HuggingFaceModel(opened.model, opened.vocabulary)
        conditions = class_conditions(opened.mapping.tokens, len(OBJECTS))
        return cls(tokenizer, model, conditions, opened.mapping, refiner)

    @torch.no_grad()
    def draw(self, classes: Tensor, sampling: Sampling | None = None, seed: int = 0) -> Tensor:
        """Images `[B, 3, 32, 32]` in [0, 1] of objects `[B]` int64, indices in `data.OBJECTS`.

        Raises:
            ConfigError: if there is no such object.
        """
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < len(OBJECTS):
            raise ConfigError(f"objects are 0 .. {len(OBJECTS) - 1}, got {classes.unique().tolist()}")
        length = self.model.model.config.max_position_embeddings - 1  # the class comes first
        condition, without = self.conditions.of(classes), self.conditions.none()
        clusters, states = sample_clusters(self.model, condition, length, sampling, seed, without)
        assert states is not None
        tokens = self.refiner.sample(states, clusters, torch.Generator().manual_seed(seed))
        return self.tokenizer.decode(tokens)


def pack(model: Path, refiner: Path, to: Path) -> Path:
    """Write a trained model with its map and its refiner in half precision; returns the folder.

    Raises:
        ModelError: if the refiner is for another map, or the model knows other objects.
    """
    opened, chooser = open_model(model), Refiner.load(refiner)
    mapping, rows = opened.mapping, opened.vocabulary.after
    chooser.check(mapping)
    if rows != mapping.clusters + len(OBJECTS) + 1:
        raise ModelError(
            f"{model} has {rows} rows; expected {mapping.clusters} clusters, {len(OBJECTS)} objects "
            "and one for no object"
        )
    export_model(opened.model.half(), mapping, to, opened.vocabulary)
    chooser.half().save(to / "refiner.safetensors")
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--refiner", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=MODEL)
    args = parser.parse_args()
    print(pack(args.model, args.refiner, args.to))


if __name__ == "__main__":
    told(main)
