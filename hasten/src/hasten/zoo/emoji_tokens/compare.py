"""Train the four vocabularies with equal compute and several seeds, and measure them (resumable).

    python -m hasten.zoo.emoji_tokens.compare --data runs/emoji-tokens --seeds 3 --steps 3000 --minutes 30

`--data` is the folder of `train_tokenizer`. Each run has the same model body, batch and number of steps, which is the
same compute but for the head; seeds run in turn, so that a stop leaves complete seeds. `comparison.json` holds the
semantic replacement test of each map, and for each run its curve, the loss and entropy over log k, the Fréchet
distance, precision and recall of drawn pictures against the training pictures, and `reach`, the first step at which
a held-out loss is not above the flat model's last one: over log k (easier with clusters that hold less information)
and in nats a fine token (the same scale for all, but it charges clusters for members that are drawn at random).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.files import write_whole
from hasten.tokens import MemberSampler, SemanticTree, TokenMap, flat_map, kmeans_map, random_map
from hasten.tokens.sample import Sampling, sample_clusters
from hasten.tokens.shards import TokenShards
from hasten.tokens.train import Recipe, Trainer
from hasten.zoo.emoji_tokens.data import TokenSet, load_token_set
from hasten.zoo.emoji_tokens.evaluate import FeatureSpace, frechet, precision_recall, replacement_test
from hasten.zoo.emoji_tokens.tokenizer import VQTokenizer

__all__ = ["compare", "vocabularies"]


def vocabularies(codebook: Any, counts: Any, k: int, seed: int = 0) -> dict[str, TokenMap]:
    """The four maps; k-means and MASC have `k` clusters, random ones the sizes of MASC's.

    All three cluster the used codes only and attach the others alike, so that dead codes favour none.
    """
    tree = SemanticTree.fit(codebook, normalize="unit", used=counts)
    masc = tree.map(k)
    means = kmeans_map(codebook[tree.used], k, normalize="unit", seed=seed, runs=10)
    mixed = random_map(TokenMap(masc.labels[tree.used]), seed)
    return {
        "flat": flat_map(len(codebook)),
        "k-means": TokenMap(means.labels[tree.nearest], "k-means", tree.fingerprint),
        "random": TokenMap(mixed.labels[tree.nearest], "random", tree.fingerprint),
        "masc": masc,
    }


def drawn_quality(trainer: Trainer, tokenizer: VQTokenizer, data: TokenSet, images: int, seed: int) -> dict[str, float]:
    """Fréchet distance, precision and recall of drawn pictures; classes as often as in the training set."""
    rng = np.random.default_rng(seed)
    classes = data.train_classes[torch.from_numpy(rng.integers(len(data.train), size=images))]
    device = trainer.accelerator.device
    drawn, sampler = [], MemberSampler.make(trainer.mapping)
    for i, part in enumerate(classes.split(64)):
        clusters, _ = sample_clusters(
            trainer.plain, part.to(device), trainer.k, trainer.shards.length, Sampling(guidance=1.5), seed + i
        )
        tokens = torch.from_numpy(sampler(clusters.cpu().numpy(), seed + i))
        with torch.no_grad():
            drawn.append(tokenizer.decode(tokens))
    space = FeatureSpace.of(data.train)
    real, made = space(data.train), space(torch.cat(drawn))
    precision, recall = precision_recall(real, made)
    return {"frechet": frechet(real, made), "precision": precision, "recall": recall}


def compare(folder: Path, recipe: Recipe, k: int, seeds: int, minutes: float, images: int = 512) -> bool:
    """Go on with the runs for some minutes, and write `comparison.json` of those that are done; whether all are."""
    data, tokenizer = load_token_set(), VQTokenizer.load(folder / "tokenizer.safetensors")
    fine, held_out = TokenShards.open(folder / "fine"), TokenShards.open(folder / "held_out")
    maps = vocabularies(np.load(folder / "codebook.npy"), fine.token_counts(), k)
    space, started = FeatureSpace.of(data.train), time.monotonic()
    result: dict[str, Any] = {
        "steps": recipe.steps,
        "k": k,
        "replacement": {name: replacement_test(tokenizer, m, data.test, space) for name, m in maps.items()},
        "runs": [],
    }
    for seed in range(seeds):
        for name, mapping in maps.items():
            left = minutes - (time.monotonic() - started) / 60
            done = _one_run(folder, recipe, name, mapping, seed, left, images, (data, tokenizer, fine, held_out))
            if done is None:
                return False
            result["runs"].append(done)
            write_whole(folder / "comparison.json", json.dumps(_with_reach(result), indent=1) + "\n")
    return True


def _one_run(
    folder: Path,
    recipe: Recipe,
    name: str,
    mapping: TokenMap,
    seed: int,
    minutes: float,
    images: int,
    parts: tuple[TokenSet, VQTokenizer, TokenShards, TokenShards],
) -> dict[str, Any] | None:
    """The figures of a run, measured once and kept beside it; None if its time ran out."""
    data, tokenizer, fine, held_out = parts
    out = folder / f"{name}-{seed}"
    kept = out / "result.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    if minutes <= 0:
        return None
    trainer = Trainer(fine, mapping, Recipe(**{**vars(recipe), "seed": seed}))
    if not trainer.run(out, held_out, minutes):
        return None
    curve = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    quality = drawn_quality(trainer, tokenizer, data, images, seed)
    result = {"vocabulary": name, "seed": seed, "curve": curve, **trainer.evaluate(held_out), **quality}
    write_whole(kept, json.dumps(result) + "\n")
    return result


def _with_reach(result: dict[str, Any]) -> dict[str, Any]:
    """The result with `reach` for each run whose seed has a flat run."""
    flat = {run["seed"]: run for run in result["runs"] if run["vocabulary"] == "flat"}
    for run in result["runs"]:
        if run["seed"] in flat:
            run["reach"] = {m: _first(run["curve"], m, flat[run["seed"]][m]) for m in ("loss_over_log_k", "token_loss")}
    return result


def _first(curve: list[dict[str, Any]], measure: str, goal: float) -> int | None:
    """The first step at which the measure is not above the goal, both rounded as the log is."""
    return next((point["step"] for point in curve if point[measure] <= round(goal, 5)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji-tokens"))
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=1e9)
    args = parser.parse_args()
    recipe = Recipe(steps=args.steps, batch=args.batch)
    done = compare(args.data, recipe, args.k, args.seeds, args.minutes)
    print("done" if done else "stopped for time; the same command goes on")


if __name__ == "__main__":
    main()
