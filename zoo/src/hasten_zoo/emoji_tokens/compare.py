"""Train the four vocabularies with equal compute and several seeds, and measure them (resumable).

    python -m hasten_zoo.emoji_tokens.compare --out runs/emoji-tokens --minutes 60

Run it again to go on. Each run has the same model body, batch, learning rate and number of steps, which is the same
compute but for the head; seeds run in turn, so that a stop leaves complete seeds. A seed is that of the weights, of
the order of the images, and of the k-means and the random map. The token shards are written first.

`comparison.json` holds what is done: for each run its curve (every 200 steps the losses on held-out images and the
quality of 512 drawn ones) and the quality of 2048 images drawn at the end, for each way to choose members.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hasten.errors import ModelError
from hasten.fitting.refiner import train_refiner
from hasten.fitting.token_model import Recipe, Trainer
from hasten.io import write_atomically
from hasten.tokens import MemberSampler, SemanticTree, TokenMap, flat_map, kmeans_map, random_map
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.sample import sample_clusters
from hasten.tokens.shards import TokenShards, write_shards
from hasten.tokens.tree import codebook_fingerprint
from numpy.typing import NDArray
from torch import Tensor

from hasten_zoo.emoji_tokens import load_tokenizer
from hasten_zoo.emoji_tokens.data import HELD_OUT, OBJECTS, TRAIN, batches
from hasten_zoo.emoji_tokens.evaluate import quality
from hasten_zoo.emoji_tokens.tokenizer import VQTokenizer

__all__ = ["RECIPE", "Sizes", "compare", "prepare", "vocabularies"]

CAP = 2  # times the mean size: no cluster of MASC is larger, as the replacement test advises
RECIPE = Recipe(steps=2000, batch=8, lr=1e-3, width=256, layers=4, heads=4)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        train, held_out: images of the two sets of tokens.
        drawn: images drawn for a point of a curve.
        drawn_last: images drawn at the end.
        every: steps between two points of a curve.
        refiner_steps: of the refiner of each MASC run; 0 for none.
    """

    train: int = 32_768
    held_out: int = 512
    drawn: int = 512
    drawn_last: int = 2048
    every: int = 200
    refiner_steps: int = 300


def prepare(folder: Path, tokenizer: VQTokenizer, sizes: Sizes) -> tuple[TokenShards, TokenShards]:
    """The token shards `fine` and `held_out` of the folder, written if they are not there.

    Raises:
        ModelError: if there are shards of another tokenizer.
    """
    note, fingerprint = folder / "codebook.txt", codebook_fingerprint(tokenizer.codebook)
    if note.exists():
        if note.read_text().strip() != fingerprint:
            raise ModelError(f"{folder} holds tokens of another tokenizer; give another folder with --out")
        return TokenShards.open(folder / "fine"), TokenShards.open(folder / "held_out")
    shards = []
    for name, n, use in (("fine", sizes.train, TRAIN), ("held_out", sizes.held_out, HELD_OUT)):
        parts = [(tokenizer.encode(batch.pixels), batch.classes) for batch in batches(n, use)]
        tokens, classes = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        shards.append(write_shards(folder / name, tokens, tokenizer.config.codes, classes))
    write_atomically(note, fingerprint + "\n")  # last, so that a folder with it is whole
    return shards[0], shards[1]


def vocabularies(codebook: Any, counts: NDArray[Any], k: int, seed: int = 0) -> dict[str, TokenMap]:
    """The four maps; k-means and MASC (capped) have `k` clusters, random ones the sizes of MASC's.

    All three cluster the used codes only and attach the others alike, so that dead codes favour none.
    """
    tree = SemanticTree.fit(codebook, normalize="unit", used=counts)
    masc = tree.map(k, max_size=CAP * -(-len(codebook) // k))
    means = kmeans_map(codebook[tree.used], k, normalize="unit", seed=seed, runs=10)
    mixed = random_map(TokenMap(masc.labels[tree.used]), seed)
    return {
        "flat": flat_map(len(codebook)),
        "k-means": TokenMap(means.labels[tree.nearest], "k-means", tree.fingerprint),
        "random": TokenMap(mixed.labels[tree.nearest], "random", tree.fingerprint),
        "masc": masc,
    }


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    folder: Path
    recipe: Recipe
    sizes: Sizes
    tokenizer: VQTokenizer
    fine: TokenShards
    held_out: TokenShards

    def draw(self, trainer: Trainer, images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Classes `[N]`, each as often, clusters `[N, L]` and hidden states `[N, L, H]`, without guidance."""
        classes = torch.arange(images) % trainer.classes
        device = trainer.accelerator.device
        parts = [
            sample_clusters(trainer.plain, part.to(device), trainer.k, trainer.shards.length, seed=seed + i)
            for i, part in enumerate(classes.split(256))
        ]
        clusters, states = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return classes, clusters, states

    @torch.no_grad()
    def grade(self, tokens: Tensor, classes: Tensor) -> dict[str, float]:
        """Quality of the images of tokens `[N, L]`."""
        return asdict(quality(torch.cat([self.tokenizer.decode(part) for part in tokens.split(256)]), classes))

    def point(self, trainer: Trainer) -> dict[str, float]:
        """Quality of some images with members drawn uniformly, for the curve."""
        seed = 1000 * trainer.steps
        classes, clusters, _ = self.draw(trainer, self.sizes.drawn, seed)
        members = MemberSampler.make(trainer.mapping)(clusters.numpy(), seed)
        return self.grade(torch.from_numpy(members), classes)

    def last(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        """Quality of many images for each way to choose members."""
        classes, clusters, states = self.draw(trainer, self.sizes.drawn_last, seed=1)
        mapping, codebook = trainer.mapping, self.tokenizer.codebook
        samplers = {"uniform": MemberSampler.make(mapping)}
        if mapping.kind != "flat":
            samplers["frequency"] = MemberSampler.make(mapping, "frequency", counts=self.fine.token_counts())
            samplers["medoid"] = MemberSampler.make(mapping, "medoid", codebook=codebook, normalize="unit")
        tokens = {name: torch.from_numpy(sampler(clusters.numpy(), 1)) for name, sampler in samplers.items()}
        if mapping.kind == "masc" and self.sizes.refiner_steps:
            refiner = self.refiner(trainer).cpu()
            generator = torch.Generator().manual_seed(1)
            pairs = zip(states.split(64), clusters.split(64), strict=True)
            tokens["refiner"] = torch.cat([refiner.sample(h, c, generator) for h, c in pairs])
        return {name: self.grade(chosen, classes) for name, chosen in tokens.items()}

    def refiner(self, trainer: Trainer) -> Refiner:
        """A refiner for the trained model, from the folder of the run or trained."""
        path = self.folder / f"masc-{trainer.recipe.seed}" / "refiner.safetensors"
        if path.exists():
            return Refiner.load(path)
        torch.manual_seed(trainer.recipe.seed)
        config = RefinerConfig(hidden=trainer.recipe.width, width=128, heads=4)
        refiner = Refiner(trainer.mapping, config).to(trainer.accelerator.device)
        train_refiner(trainer.plain, refiner, self.fine, steps=self.sizes.refiner_steps, batch=16, lr=2e-3)
        refiner.save(path)
        return refiner

    def run(self, name: str, mapping: TokenMap, seed: int, minutes: float) -> dict[str, Any] | None:
        """The figures of a run, measured once and kept beside it; None if its time ran out."""
        out = self.folder / f"{name}-{seed}"
        kept = out / "result.json"
        if kept.exists():
            return dict(json.loads(kept.read_text()))
        if minutes <= 0:
            return None
        trainer = Trainer(self.fine, mapping, Recipe(**{**asdict(self.recipe), "seed": seed}))
        if not trainer.run(out, self.held_out, minutes, self.sizes.every, measure=self.point):
            return None
        curve = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        result = {
            "vocabulary": name,
            "seed": seed,
            "clusters": mapping.clusters,
            "largest_cluster": int(mapping.sizes.max()),
            "parameters": sum(p.numel() for p in trainer.plain.parameters()),
            "curve": curve,
            "last": self.last(trainer),
        }
        write_atomically(kept, json.dumps(result) + "\n")
        return result


def compare(folder: Path, recipe: Recipe, k: int, seeds: int, minutes: float, sizes: Sizes | None = None) -> bool:
    """Go on with the runs for some minutes, and write `comparison.json` of those that are done; whether all are."""
    started, sizes, tokenizer = time.monotonic(), sizes or Sizes(), load_tokenizer()
    fine, held_out = prepare(folder, tokenizer, sizes)
    bench = Bench(folder, recipe, sizes, tokenizer, fine, held_out)
    facts = {"k": k, "codes": tokenizer.config.codes, "objects": len(OBJECTS), "recipe": asdict(recipe)}
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        maps = vocabularies(tokenizer.codebook.numpy(), fine.token_counts(), k, seed)
        for name, mapping in maps.items():
            done = bench.run(name, mapping, seed, minutes - (time.monotonic() - started) / 60)
            if done is None:
                return False
            runs.append(done)
            result = {**facts, "sizes": asdict(sizes), "threads": torch.get_num_threads(), "runs": runs}
            write_atomically(folder / "comparison.json", json.dumps(result, indent=1) + "\n")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-tokens"))
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the same command goes on")
    args = parser.parse_args()
    recipe = Recipe(**{**asdict(RECIPE), "steps": args.steps})
    done = compare(args.out, recipe, args.k, args.seeds, args.minutes)
    print("done" if done else "stopped for time; the same command goes on")


if __name__ == "__main__":
    main()
