"""Train vocabularies with equal compute, each at its own best learning rate, and measure them (resumable).

    python -m hasten_zoo.emoji_tokens.compare --out runs/emoji-tokens --minutes 60

Run it again to go on. Each run has the same model body, batch and number of steps, which is the same compute but for
the head. First each vocabulary is trained once at every learning rate of a grid, with a seed that counts for nothing
else; then at the best of them with each seed. Seeds run in turn, so that a stop leaves complete seeds. A seed is that
of the weights, of the order of the images, and of the k-means and the random map. The token shards are written first.

`comparison.json` holds what is done: for each run its curve (losses on held-out images, quality of drawn ones, wall and
processor time of the steps) and the quality of the images drawn at the end, for each way to choose members, with what
the refiner cost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hasten.errors import ModelError, unknown
from hasten.fitting.refiner import train_refiner
from hasten.fitting.token_model import Trainer
from hasten.fitting.token_recipe import Recipe
from hasten.io import write_atomically
from hasten.tokens import MemberSampler, SemanticTree, TokenMap, flat_map, kmeans_map, random_map
from hasten.tokens.codebook import codebook_fingerprint
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.sample import sample_clusters
from hasten.tokens.shards import TokenShards, write_shards
from numpy.typing import NDArray
from torch import Tensor

from hasten_zoo.command import told
from hasten_zoo.emoji_tokens import load_tokenizer
from hasten_zoo.emoji_tokens.data import HELD_OUT, OBJECTS, TRAIN, batches
from hasten_zoo.emoji_tokens.evaluate import quality
from hasten_zoo.emoji_tokens.tokenizer import VQTokenizer

__all__ = ["ARMS", "RATES", "RECIPE", "Sizes", "best_rate", "compare", "folder_of", "prepare", "vocabularies"]

CAP = 2  # times the mean size: no cluster of MASC is larger, as the replacement test advises
RECIPE = Recipe(steps=2000, batch=8, lr=1e-3, width=256, layers=4, heads=4)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TUNING_SEED = 100
ARMS = ("flat", "k-means", "masc", "masc, density", "random")
REFINED = ("k-means", "masc")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured.

    Attributes:
        train, held_out: images of the two sets of tokens.
        drawn: images drawn for a point of a curve.
        drawn_last: images drawn at the end.
        every: steps between two points of a curve.
        refiner_steps: of the refiner of each k-means and MASC run; 0 for none.
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
        codes = tokenizer.codebook.numpy()
        shards.append(write_shards(folder / name, tokens, tokenizer.config.codes, classes, codebook=codes))
    write_atomically(note, fingerprint + "\n")  # last, so that a folder with it is whole
    return shards[0], shards[1]


def vocabularies(codebook: Any, counts: NDArray[Any], k: int, seed: int = 0) -> dict[str, TokenMap]:
    """The maps of the arms; all but the flat one have `k` clusters, random ones the sizes of MASC's.

    All cluster the used codes only. MASC is capped at twice the mean size of a cluster; with density each code counts
    as often as it occurs.
    """
    cap = CAP * -(-int((counts > 0).sum()) // k)

    def masc(weights: NDArray[Any] | None = None) -> TokenMap:
        return SemanticTree.fit(codebook, normalize="unit", used=counts, weights=weights).map(k, max_size=cap)

    plain = masc()
    return {
        "flat": flat_map(len(codebook)),
        "k-means": kmeans_map(codebook, k, normalize="unit", used=counts, seed=seed, runs=10),
        "masc": plain,
        "masc, density": masc(counts),
        "random": random_map(plain, seed),
    }


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    folder: Path
    sizes: Sizes
    tokenizer: VQTokenizer
    fine: TokenShards
    held_out: TokenShards

    def draw(self, trainer: Trainer, images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Classes `[N]`, each as often, clusters `[N, L]` and hidden states `[N, L, H]`, without guidance."""
        classes = torch.arange(images) % trainer.classes
        causal, device = trainer.causal, trainer.accelerator.device
        parts = [
            sample_clusters(causal, trainer.conditions.of(part).to(device), trainer.shards.length, seed=seed + i)
            for i, part in enumerate(classes.split(256))
        ]
        clusters = torch.cat([drawn for drawn, _ in parts]).cpu()
        states = torch.cat([state for _, state in parts if state is not None]).cpu()
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

    def last(self, trainer: Trainer, name: str) -> dict[str, dict[str, float]]:
        """Quality of many images for each way to choose members; for the refiner also what it cost."""
        classes, clusters, states = self.draw(trainer, self.sizes.drawn_last, seed=1)
        mapping, codebook = trainer.mapping, self.tokenizer.codebook.numpy()
        samplers = {"uniform": MemberSampler.make(mapping)}
        if mapping.kind != "flat":
            samplers["frequency"] = MemberSampler.make(mapping, "frequency", counts=self.fine.token_counts())
            if mapping.kind != "random":
                samplers["medoid"] = MemberSampler.make(mapping, "medoid", codebook=codebook)
        tokens = {kind: torch.from_numpy(sampler(clusters.numpy(), 1)) for kind, sampler in samplers.items()}
        found = {kind: self.grade(chosen, classes) for kind, chosen in tokens.items()}
        if name in REFINED and self.sizes.refiner_steps:
            refiner, seconds = self.refiner(trainer, folder_of(self.folder, name, trainer.recipe))
            generator = torch.Generator().manual_seed(1)
            pairs = zip(states.split(64), clusters.split(64), strict=True)
            chosen = torch.cat([refiner.sample(h, c, generator) for h, c in pairs])
            found["refiner"] = self.grade(chosen, classes) | {"cpu_seconds": seconds}
        return found

    def refiner(self, trainer: Trainer, folder: Path) -> tuple[Refiner, float]:
        """A refiner for the trained model, and the processor time of its training."""
        path, note = folder / "refiner.safetensors", folder / "refiner.json"
        if note.exists():
            return Refiner.load(path), float(json.loads(note.read_text())["cpu_seconds"])
        torch.manual_seed(trainer.recipe.seed)
        config = RefinerConfig(hidden=trainer.recipe.width, width=128, heads=4)
        refiner = Refiner(trainer.mapping, config).to(trainer.accelerator.device)
        started = time.process_time()
        steps = self.sizes.refiner_steps
        train_refiner(trainer.causal, refiner, self.fine, trainer.conditions, steps=steps, batch=16, lr=2e-3)
        seconds = round(time.process_time() - started, 2)
        refiner.cpu().save(path)
        write_atomically(note, json.dumps({"cpu_seconds": seconds}))  # last, so that it is of a whole refiner
        return refiner, seconds

    def run(self, name: str, mapping: TokenMap, recipe: Recipe, minutes: float) -> dict[str, Any] | None:
        """The figures of a run, measured once and kept beside it; None if its time ran out."""
        out = folder_of(self.folder, name, recipe)
        kept = out / "result.json"
        if kept.exists():
            return dict(json.loads(kept.read_text()))
        if minutes <= 0:
            return None
        trainer = Trainer(self.fine, mapping, recipe)
        if not trainer.run(out, self.held_out, minutes, self.sizes.every, measure=self.point):
            return None
        curve = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        tuning = recipe.seed == TUNING_SEED
        result = {
            "vocabulary": name,
            "seed": recipe.seed,
            "lr": recipe.lr,
            "clusters": mapping.clusters,
            "largest_cluster": int(mapping.sizes.max()),
            "parameters": sum(p.numel() for p in trainer.causal.parameters()),
            "curve": curve,
            "last": {} if tuning else self.last(trainer, name),
        }
        write_atomically(kept, json.dumps(result, indent=1) + "\n")
        return result


def folder_of(folder: Path, name: str, recipe: Recipe) -> Path:
    """Where a run of the comparison is kept."""
    return folder / f"{name.replace(', ', '-')}-{recipe.lr:g}-{recipe.seed}"


def best_rate(runs: list[dict[str, Any]]) -> float:
    """The learning rate of the run whose drawn images are best in the end."""
    return float(min(runs, key=lambda run: run["curve"][-1]["frechet"])["lr"])


def compare(
    folder: Path,
    recipe: Recipe,
    k: int,
    seeds: int,
    minutes: float,
    sizes: Sizes | None = None,
    arms: Sequence[str] = ARMS,
    rates: Sequence[float] = RATES,
) -> bool:
    """Go on with the runs for some minutes, and write `comparison.json` of those that are done; whether all are.

    Args:
        folder: of the runs.
        recipe: of all of them but for seed and learning rate.
        k: clusters.
        seeds: how many.
        minutes: after how long to stop.
        sizes: how much is measured.
        arms: vocabularies, of `ARMS`.
        rates: learning rates; the best of each arm is chosen with a seed of its own.

    Raises:
        UnknownNameError: if there is no such arm.
    """
    if strangers := [name for name in arms if name not in ARMS]:
        raise unknown("arm", strangers[0], ARMS)
    started, sizes, tokenizer = time.monotonic(), sizes or Sizes(), load_tokenizer()
    fine, held_out = prepare(folder, tokenizer, sizes)
    bench = Bench(folder, sizes, tokenizer, fine, held_out)
    facts = {"k": k, "codes": tokenizer.config.codes, "objects": len(OBJECTS), "recipe": asdict(recipe)}
    facts |= {"sizes": asdict(sizes), "threads": torch.get_num_threads(), "rates": list(rates)}
    tuning: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []

    def done(name: str, mapping: TokenMap, seed: int, lr: float, found: list[dict[str, Any]]) -> bool:
        left = minutes - (time.monotonic() - started) / 60
        result = bench.run(name, mapping, replace(recipe, seed=seed, lr=lr), left)
        if result is not None:
            found.append(result)
            everything = {**facts, "tuning": tuning, "runs": runs}
            write_atomically(folder / "comparison.json", json.dumps(everything, indent=1) + "\n")
        return result is not None

    codebook, counts = tokenizer.codebook.numpy(), fine.token_counts()
    maps = vocabularies(codebook, counts, k, TUNING_SEED)
    if not all(done(name, maps[name], TUNING_SEED, lr, tuning) for name in arms for lr in rates):
        return False
    best = {name: best_rate([run for run in tuning if run["vocabulary"] == name]) for name in arms}
    for seed in range(seeds):
        maps = vocabularies(codebook, counts, k, seed)
        if not all(done(name, maps[name], seed, best[name], runs) for name in arms):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji-tokens"))
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", default=None, help=f"with semicolons; by default all: {'; '.join(ARMS)}")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="learning rates, with commas")
    for name in ("steps", "batch", "width", "layers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(RECIPE, name))
    for name in ("every", "drawn", "drawn_last", "refiner_steps"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Sizes(), name))
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the same command goes on")
    args = parser.parse_args()
    recipe = replace(RECIPE, steps=args.steps, batch=args.batch, width=args.width, layers=args.layers)
    sizes = Sizes(every=args.every, drawn=args.drawn, drawn_last=args.drawn_last, refiner_steps=args.refiner_steps)
    arms = ARMS if args.arms is None else [name.strip() for name in args.arms.split(";")]
    rates = [float(text) for text in args.rates.split(",")]
    done = compare(args.out, recipe, args.k, args.seeds, args.minutes, sizes, arms, rates)
    print("done" if done else "stopped for time; the same command goes on")


if __name__ == "__main__":
    told(main)
