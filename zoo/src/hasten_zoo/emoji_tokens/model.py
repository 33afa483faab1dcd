"""The trained model under the MASC vocabulary that comes with the package, and how it is packed.

    python -m hasten_zoo.emoji_tokens.model --model runs/masc/model --refiner runs/masc/refiner.safetensors

packs what `hasten tokens train` and `hasten tokens refine` wrote: half precision, which costs nothing that can be seen.
Shapes: `B` images, `L` tokens of an image.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from hasten.errors import ModelError
from hasten.tokens import TokenMap
from hasten.tokens.refiner import Refiner
from hasten.tokens.replace import export_model, open_model
from hasten.tokens.sample import Sampling, sample_clusters
from torch import Tensor

from hasten_zoo.emoji_tokens import WEIGHTS, VQTokenizer, load_tokenizer
from hasten_zoo.emoji_tokens.data import OBJECTS

__all__ = ["MODEL", "EmojiTokens", "pack"]

MODEL = WEIGHTS / "masc"


@dataclass(frozen=True, eq=False)
class EmojiTokens:
    """A class-conditional autoregressive model of clusters, and what makes images of them.

    Attributes:
        tokenizer: decodes tokens.
        model: `LlamaForCausalLM` of clusters; class `c` is row `k + c`.
        mapping: token -> cluster.
        refiner: chooses the members.
    """

    tokenizer: VQTokenizer
    model: Any
    mapping: TokenMap
    refiner: Refiner

    @classmethod
    def load(cls, folder: Path = MODEL) -> Self:
        """What `pack` wrote, by default the model that comes with the package; computed in float32.

        Raises:
            ModelError: if a file is missing or damaged, or they do not belong together.
        """
        model, mapping = open_model(folder)
        refiner = Refiner.load(folder / "refiner.safetensors")
        refiner.check(mapping)
        return cls(load_tokenizer(), model, mapping, refiner)

    @torch.no_grad()
    def draw(self, classes: Tensor, sampling: Sampling | None = None, seed: int = 0) -> Tensor:
        """Images `[B, 3, 32, 32]` in [0, 1] of objects `[B]` int64, indices in `data.OBJECTS`.

        Raises:
            ConfigError: if there is no such object.
        """
        length = self.model.config.max_position_embeddings - 1  # the class comes first
        clusters, states = sample_clusters(self.model, classes, self.mapping.clusters, length, sampling, seed)
        tokens = self.refiner.sample(states, clusters, torch.Generator().manual_seed(seed))
        return self.tokenizer.decode(tokens)


def pack(model: Path, refiner: Path, to: Path) -> Path:
    """Write a trained model with its map and its refiner in half precision; returns the folder.

    Raises:
        ModelError: if the refiner is for another map, or the model knows other objects.
    """
    (lm, mapping), chooser = open_model(model), Refiner.load(refiner)
    chooser.check(mapping)
    if lm.config.vocab_size != mapping.clusters + len(OBJECTS) + 1:
        raise ModelError(
            f"{model} has {lm.config.vocab_size} rows; expected {mapping.clusters} clusters, {len(OBJECTS)} objects "
            "and one for no object"
        )
    export_model(lm.half(), mapping, to)
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
    main()
