"""What docs/tokens.md states about smaller vocabularies: measured, and written into its tables.

    python benchmarks/tokens.py replacement     semantic replacement test -> tokens-replacement.json
    python benchmarks/tokens.py tree            time and memory of a tree of LlamaGen's size -> tokens-tree.json
    python benchmarks/tokens.py approximate     the approximate tree against the exact one -> tokens-approximate.json
    python benchmarks/tokens.py density         trees in which codes count by their density -> tokens-density.json
    python benchmarks/tokens.py fair            what the comparison has finished -> tokens-fair.json
    python benchmarks/tokens.py images          what the models of its first seed draw -> docs/images/tokens-drawn.png
    python benchmarks/tokens.py tables          the tables of both pages; with --check it only looks at them

`fair` and `images` read what `python -m hasten_zoo.emoji_tokens.compare` wrote. `tokens-reference.json` is that of
0.1.0: three seeds, one learning rate for all.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from hasten.bench.environment import environment
from hasten.bench.token_plots import plot_images
from hasten.fitting.token_model import Trainer
from hasten.fitting.token_recipe import Recipe
from hasten.io import write_atomically
from hasten.tokens import (
    MemberSampler,
    SemanticTree,
    TokenMap,
    flat_map,
    kmeans_map,
    random_map,
)
from hasten.tokens.approximate import approximate_linkage
from hasten.tokens.comparators import adjusted_rand, mean_within_distance
from hasten.tokens.linkage import average_linkage
from hasten.tokens.sample import sample_clusters
from hasten.tokens.shards import TokenShards
from hasten_zoo.emoji_tokens import decode, load_tokenizer
from hasten_zoo.emoji_tokens.compare import folder_of, vocabularies
from hasten_zoo.emoji_tokens.data import HELD_OUT, TRAIN, batches, images
from hasten_zoo.emoji_tokens.evaluate import (
    ReplacementTest,
)
from hasten_zoo.emoji_tokens.summary import differences, rates, spread, summary

HERE = Path(__file__).parent
ZOO = HERE.parent / "zoo" / "src" / "hasten_zoo" / "emoji_tokens"
PAGES = (HERE.parent / "docs" / "tokens.md", ZOO / "README.md")
REPLACEMENT, TREE, APPROXIMATE, REFERENCE, DENSITY, NORMALIZATION, FAIR = (
    HERE / f"tokens-{name}.json"
    for name in ("replacement", "tree", "approximate", "reference", "density", "normalization", "fair")
)
NO_SEED = "No seed is complete yet; the command is below."
DENSITY_MEASURES = {"psnr": 2, "ssim": 3, "feature_distance": 2, "frechet": 2}
CAP = 2  # times the mean size of a cluster, for the capped cut
CAPPED = "masc, capped"
VOCABULARIES = ("flat", "k-means", "random", "masc")
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _write(path: Path, result: dict[str, Any]) -> None:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    write_atomically(
        path,
        json.dumps({"created": created, "environment": environment(), **rounded}, indent=1) + "\n",
    )
    print(path)


@app.command()
def replacement(
    count: Annotated[int, typer.Option("--images", help="Held-out images.")] = 1024,
    ks: Annotated[str, typer.Option(help="Numbers of clusters, with commas.")] = "1024,512,256,128",
    seeds: Annotated[int, typer.Option(help="Of the members, the k-means and the random map.")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = REPLACEMENT,
) -> None:
    """Decode held-out images with each token replaced by a random mate, under each way to cluster."""
    tokenizer, held_out = load_tokenizer(), images(count, HELD_OUT).pixels
    test = ReplacementTest(tokenizer, held_out)
    with torch.no_grad():
        seen = torch.cat([tokenizer.encode(batch.pixels) for batch in batches(16_384, TRAIN)])
    counts = np.bincount(seen.flatten().numpy(), minlength=tokenizer.config.codes)
    share = counts[counts > 0] / counts.sum()
    codes = tokenizer.codebook.numpy()
    tree = SemanticTree.fit(codes, normalize="unit", used=counts)

    def maps(k: int, seed: int) -> dict[str, TokenMap]:
        masc = tree.map(k)
        return {
            "masc": masc,
            CAPPED: tree.map(k, max_size=CAP * tree.leaves // k),
            "k-means": kmeans_map(codes, k, normalize="unit", used=counts, seed=seed, runs=10),
            "random": random_map(masc, seed),
        }

    rows: list[dict[str, Any]] = []
    for k in (int(text) for text in ks.split(",")):
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in range(seeds):
            for name, mapping in maps(k, seed).items():
                sizes = {
                    "largest_cluster": int(mapping.sizes.max()),
                    "tokens_in_largest": _heaviest(mapping, counts),
                }
                found.setdefault(name, []).append(sizes | asdict(test(mapping, seed)))
        rows += [
            {
                "k": k,
                "map": name,
                **{m: spread([row[m] for row in each]) for m in each[0] if each[0][m] is not None},
            }
            for name, each in found.items()
        ]
        print(f"k = {k} done", flush=True)
    tokenizer_facts = {
        "codes": tokenizer.config.codes,
        "used": int((counts > 0).sum()),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        **asdict(test(flat_map(tokenizer.config.codes))),
    }
    _write(
        out,
        {"images": count, "seeds": seeds, "tokenizer": tokenizer_facts, "rows": rows},
    )


@app.command()
def density(
    count: Annotated[int, typer.Option("--images", help="Held-out images.")] = 512,
    ks: Annotated[str, typer.Option(help="Numbers of clusters, with commas.")] = "1024,512,256,128",
    seeds: Annotated[int, typer.Option(help="Of the members and the k-means.")] = 3,
) -> None:
    """Trees in which codes count by their density, in the same test: by usage, and by how near neighbours are."""
    tokenizer = load_tokenizer()
    test = ReplacementTest(tokenizer, images(count, HELD_OUT).pixels)
    test.lpips = None  # slow, and near to SSIM in the whole test
    with torch.no_grad():
        seen = torch.cat([tokenizer.encode(batch.pixels) for batch in batches(16_384, TRAIN)])
    counts = np.bincount(seen.flatten().numpy(), minlength=tokenizer.config.codes)
    codes = tokenizer.codebook.numpy()
    weights = {"all alike": None, "usage": counts, "near neighbours": _crowding(codes)}
    trees = {n: SemanticTree.fit(codes, normalize="unit", used=counts, weights=w) for n, w in weights.items()}
    rows = []
    for k in (int(text) for text in ks.split(",")):
        cap = CAP * trees["usage"].leaves // k
        fixed = {(name, limit): tree.map(k, limit) for name, tree in trees.items() for limit in (None, cap)}
        found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
        for seed in range(seeds):
            means = kmeans_map(codes, k, normalize="unit", used=counts, seed=seed, runs=3)
            for which, mapping in {**fixed, ("k-means", None): means}.items():
                found.setdefault(which, []).append(asdict(test(mapping, seed)))
        rows += [
            {
                "k": k,
                "weights": name,
                "cap": limit,
                **{m: spread([one[m] for one in each]) for m in DENSITY_MEASURES},
            }
            for (name, limit), each in found.items()
        ]
        print(f"k = {k} done", flush=True)
    _write(DENSITY, {"images": count, "seeds": seeds, "rows": rows})


def _crowding(codes: Any, neighbours: int = 8) -> Any:
    """Density of codes by their neighbours: one over the distance to the eighth."""
    from scipy.spatial import cKDTree

    return 1 / np.maximum(cKDTree(codes).query(codes, neighbours + 1)[0][:, -1], 1e-6)


def _heaviest(mapping: TokenMap, counts: Any) -> float:
    """Share of all tokens that the most frequent cluster takes."""
    return float(np.bincount(mapping.labels, counts).max() / counts.sum())


@app.command()
def tree(
    codes: Annotated[int, typer.Option(help="Codes.")] = 16_384,
    width: Annotated[int, typer.Option(help="Of a code.")] = 8,
    shared: Annotated[bool, typer.Option(help="Whether other work runs on the machine meanwhile.")] = False,
) -> None:
    """Fit a tree of random unit vectors in a process of its own; how long it takes and how much memory."""
    child = subprocess.run(
        [sys.executable, __file__, "tree-here", str(codes), str(width)],
        check=True,
        capture_output=True,
        text=True,
    )
    _write(
        TREE,
        {
            "codes": codes,
            "width": width,
            "machine_shared": shared,
            **json.loads(child.stdout),
        },
    )


@app.command("tree-here", hidden=True)
def tree_here(codes: int, width: int) -> None:
    """The measurement itself, printed as JSON."""
    book = np.random.default_rng(0).standard_normal((codes, width)).astype(np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    fitted = SemanticTree.fit(book, normalize="unit")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    cut = time.perf_counter()
    largest = int(fitted.map(codes // 2).sizes.max())
    facts = {
        "seconds": wall,
        "cpu_seconds": cpu,
        "cut_seconds": time.perf_counter() - cut,
        "largest_cluster_at_half": largest,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "bytes_before": 1024 * before,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts))


def _unit_rows(codes: int, width: int) -> Any:
    book = np.random.default_rng(0).standard_normal((codes, width))
    return book / np.linalg.norm(book, axis=1, keepdims=True)


@app.command()
def approximate(
    codes: Annotated[int, typer.Option(help="Codes, so few that the exact tree can be had.")] = 8192,
    large: Annotated[int, typer.Option(help="Codes of a tree that is only timed; 0 for none.")] = 131_072,
    width: Annotated[int, typer.Option(help="Of a code.")] = 8,
    ks: Annotated[str, typer.Option(help="Numbers of clusters, with commas.")] = "4096,2048,1024,256",
) -> None:
    """How far the approximate tree of random unit vectors is from the exact one, and how long a large one takes."""
    book, cell, groups = _unit_rows(codes, width), 1024, 2048

    def tree_of(linked: Any, exact: bool) -> SemanticTree:
        everything = np.arange(codes)
        return SemanticTree(*linked, everything, everything, "none", exact, "")

    exact = tree_of(average_linkage(book), True)
    near = tree_of(approximate_linkage(book, cell=cell, groups=groups), False)
    rows = []
    for k in (int(text) for text in ks.split(",")):
        a, b = exact.map(k), near.map(k)
        rows.append(
            {
                "k": k,
                "adjusted_rand": adjusted_rand(a.labels, b.labels),
                "within_exact": mean_within_distance(book, a),
                "within_approximate": mean_within_distance(book, b),
                "within_random": mean_within_distance(book, random_map(a)),
            }
        )
    timed: dict[str, Any] = {}
    if large:
        wall, cpu = time.perf_counter(), time.process_time()
        SemanticTree.fit(_unit_rows(large, width), exact=False)
        timed = {
            "codes": large,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "threads": torch.get_num_threads(),
        }
    facts = {"codes": codes, "width": width, "cell": cell, "groups": groups}
    _write(APPROXIMATE, {**facts, "rows": rows, "large": timed})


@app.command("fair")
def fair_(
    data: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/emoji-tokens"),
) -> None:
    """Sum up the finished seeds of the comparison: each vocabulary at its best learning rate, with intervals."""
    result = json.loads((data / "comparison.json").read_text())
    settings = {name: result[name] for name in ("k", "codes", "recipe", "sizes", "threads", "rates")}
    facts = {"settings": settings, "tuning": rates(result["tuning"])}
    names = list(facts["tuning"])
    seeds_of = [{run["seed"] for run in result["runs"] if run["vocabulary"] == name} for name in names]
    whole = set.intersection(*seeds_of)
    if whole:
        finished = [run for run in result["runs"] if run["seed"] in whole]
        found = summary(finished)
        pairs = (("masc", "k-means"), ("masc", "flat"), ("k-means", "flat"), ("masc, density", "masc"))
        against = {f"{a} - {b}": differences(finished, a, b) for a, b in pairs if a in names and b in names}
        facts |= {"differences": against, "seeds": found["seeds"], "goal": found["goal"], "vocabularies": _short(found)}
    _write(FAIR, facts)


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """Figures without curves."""
    return {n: {k: v for k, v in one.items() if k != "frechet_curve"} for n, one in found["vocabularies"].items()}


@app.command("images")
def images_(
    data: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("runs/emoji-tokens"),
    seed: Annotated[int, typer.Option(help="Of the runs.")] = 0,
) -> None:
    """One image of each object by each vocabulary's model: no guidance, members drawn uniformly, nothing chosen."""
    result, tokenizer = (
        json.loads((data / "comparison.json").read_text()),
        load_tokenizer(),
    )
    fine = TokenShards.open(data / "fine")
    maps = vocabularies(tokenizer.codebook.numpy(), fine.token_counts(), result["k"], seed)
    rows = {}
    for run in result["runs"]:
        if run["seed"] != seed:
            continue
        recipe, mapping = (
            Recipe(**{**result["recipe"], "seed": seed, "lr": run["lr"]}),
            maps[run["vocabulary"]],
        )
        trainer = Trainer(fine, mapping, recipe)
        trainer.restore(folder_of(data, run["vocabulary"], recipe) / "checkpoint.safetensors")
        condition = trainer.conditions.of(torch.arange(trainer.classes))
        clusters, _ = sample_clusters(trainer.causal, condition, fine.length, seed=seed)
        rows[run["vocabulary"]] = decode(MemberSampler.make(mapping)(clusters.numpy(), seed))
    print(plot_images(rows, HERE.parent / "docs" / "images" / "tokens-drawn.png"))


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_line(heads), "|---" + "|--:" * (len(heads) - 1) + "|", *map(_line, rows)])


def _range(figure: dict[str, float], digits: int) -> str:
    """Mean, and least to most where they differ."""
    low, mean, high = (f"{figure[name]:.{digits}f}" for name in ("min", "mean", "max"))
    return mean if low == high else f"{mean} ({low}-{high})"


def replacement_table(result: dict[str, Any]) -> str:
    """Markdown of the semantic replacement test."""
    own = result["tokenizer"]
    columns = {"psnr": 2, "ssim": 3, "lpips": 4, "feature_distance": 2, "frechet": 3}
    heads = [
        "k",
        "clusters",
        "PSNR dB",
        "SSIM",
        "LPIPS",
        "feature distance",
        "Fréchet distance",
        "largest cluster",
    ]
    rows = [
        [
            str(own["codes"]),
            "none",
            *(f"{own[m]:.{d}f}" if own.get(m) is not None else "-" for m, d in columns.items()),
            "1",
        ]
    ]
    for row in result["rows"]:
        cells = [_range(row[m], d) if m in row else "-" for m, d in columns.items()]
        rows.append([str(row["k"]), row["map"], *cells, _range(row["largest_cluster"], 0)])
    return _table(heads, rows)


def tokenizer_line(result: dict[str, Any]) -> str:
    """A sentence about the tokenizer."""
    own = result["tokenizer"]
    return (
        f"{own['used']} of {own['codes']} codes are used, with a perplexity of {own['perplexity']:.0f}; "
        f"{result['images']} held-out images are reconstructed with {own['psnr']:.1f} dB (SSIM {own['ssim']:.3f})."
    )


def tree_line(result: dict[str, Any]) -> str:
    """A sentence about the LlamaGen-size tree."""
    machine = "a shared machine" if result["machine_shared"] else "a quiet machine"
    return (
        f"{result['codes']:,} codes of width {result['width']} take {result['seconds']:.0f} s "
        f"({result['cpu_seconds']:.0f} s of processor time) with {result['threads']} thread on {machine}, and "
        f"{result['peak_bytes'] / 2**30:.2f} GiB in all, of which {result['bytes_before'] / 2**30:.2f} GiB are there "
        "before it begins."
    )


def approximate_table(result: dict[str, Any]) -> str:
    """Markdown of the approximate tree against the exact one."""
    heads = [
        "k",
        "adjusted Rand index",
        "distance within clusters: exact",
        "approximate",
        "random clusters",
    ]
    columns = {
        "adjusted_rand": 2,
        "within_exact": 3,
        "within_approximate": 3,
        "within_random": 3,
    }
    rows = [
        [
            str(row["k"]),
            *(f"{row[name]:.{digits}f}" for name, digits in columns.items()),
        ]
        for row in result["rows"]
    ]
    large = result["large"]
    timed = (
        f"{large['codes']:,} codes of width {result['width']} take {large['cpu_seconds']:.0f} s of processor time with "
        f"{large['threads']} thread, and {large['peak_bytes'] / 2**30:.1f} GiB."
        if large
        else ""
    )
    about = (
        f"{result['codes']:,} random unit vectors of width {result['width']}, cells of {result['cell']} codes, "
        f"{result['groups']} clusters linked exactly."
    )
    return "\n\n".join(part for part in (_table(heads, rows), about, timed) if part)


def reference_table(result: dict[str, Any]) -> str:
    """Markdown of the comparison: drawn images, predictions, steps to the flat model's quality."""
    heads = [
        "vocabulary",
        "k",
        "Fréchet distance",
        "precision",
        "recall",
        "right object",
        "entropy / log k",
    ]
    heads += ["nats a fine token", "steps to flat's quality"]
    rows = []
    for name in VOCABULARIES:
        if (one := result["vocabularies"].get(name)) is None:
            continue
        steps = ", ".join("not reached" if step is None else str(step) for step in one["steps_to_flat"])
        rows.append(
            [
                name,
                str(one["clusters"]),
                _range(one["drawn"]["frechet"], 2),
                *(_range(one["drawn"][m], 2) for m in ("precision", "recall", "objects")),
                _range(one["held_out"]["entropy_over_log_k"], 3),
                _range(one["held_out"]["token_loss"], 3),
                steps,
            ]
        )
    floor = result["floor"]
    for label, key in (
        ("reconstructions", "reconstructions"),
        ("real images", "real_images"),
    ):
        cells = [f"{floor[key][m]:.2f}" for m in ("frechet", "precision", "recall", "objects")]
        rows.append([label, "-", *cells, "-", "-", "-"])
    return _table(heads, rows)


def members_table(result: dict[str, Any]) -> str:
    """Markdown of the Fréchet distance by the way to choose members."""
    kinds = ["uniform", "frequency", "medoid", "refiner"]
    rows = [
        [
            name,
            *(_range(one["members"][kind], 2) if kind in one["members"] else "-" for kind in kinds),
        ]
        for name, one in result["vocabularies"].items()
        if name != "flat"
    ]
    return _table(["vocabulary", *kinds], rows)


def _interval(figure: dict[str, float], digits: int) -> str:
    """Mean and its 95 % interval."""
    low, mean, high = (f"{figure[name]:.{digits}f}" for name in ("low", "mean", "high"))
    return f"{mean} ({low} to {high})"


def fair_table(result: dict[str, Any]) -> str:
    """Markdown of the comparison at each vocabulary's best learning rate."""
    if "vocabularies" not in result:
        return NO_SEED
    heads = [
        "vocabulary",
        "k",
        "learning rate",
        "Fréchet distance",
        "with its refiner",
        "nats per fine token",
    ]
    heads += ["steps to flat's quality", "processor seconds", "refiner"]
    rows = []
    for name, one in result["vocabularies"].items():
        steps = ", ".join("not reached" if step is None else str(step) for step in one["steps_to_flat"])
        refined, cost = (
            one["members"].get("refiner"),
            one["member_cpu_seconds"].get("refiner"),
        )
        rows.append(
            [
                name,
                str(one["clusters"]),
                f"{one['lr']:g}",
                _interval(one["drawn"]["frechet"], 1),
                "-" if refined is None else _interval(refined, 1),
                _interval(one["held_out"]["token_loss"], 3),
                steps,
                f"{one['cpu_seconds']['mean']:.0f}",
                "-" if cost is None else f"{cost['mean']:.0f}",
            ]
        )
    return _table(heads, rows)


def rates_table(result: dict[str, Any]) -> str:
    """Markdown of the Fréchet distance by learning rate, with the seed that counts for nothing else."""
    columns = [f"{rate:g}" for rate in result["settings"]["rates"]]
    rows = [[name, *(f"{found[c]:.1f}" for c in columns)] for name, found in result["tuning"].items()]
    return _table(["vocabulary", *columns], rows)


def differences_table(result: dict[str, Any]) -> str:
    """Markdown of differences seed by seed."""
    if "vocabularies" not in result:
        return NO_SEED
    rows = [
        [name, _interval(one["frechet"], 1), _interval(one["token_loss"], 3)]
        for name, one in result["differences"].items()
    ]
    return _table(["difference", "Fréchet distance", "nats per fine token"], rows)


def fair_line(result: dict[str, Any]) -> str:
    """What the seeds show, and what they do not."""
    if "vocabularies" not in result:
        return "Without complete seeds no difference between vocabularies is claimed here."
    names = {"masc": "MASC", "k-means": "k-means", "flat": "the flat vocabulary", "masc, density": "MASC with density"}
    said = []
    for pair, one in result["differences"].items():
        first, second = (names[name] for name in pair.split(" - "))
        found = one["frechet"]
        if found["low"] <= 0 <= found["high"]:
            said.append(f"between {first} and {second} no difference in the Fréchet distance is shown")
        else:
            which = (first, second) if found["mean"] < 0 else (second, first)
            ends = sorted(abs(found[end]) for end in ("low", "high"))
            amount = f"{abs(found['mean']):.1f} ({ends[0]:.1f} to {ends[1]:.1f})"
            said.append(f"{which[0]} is ahead of {which[1]} by {amount}")
    recipe, seeds = result["settings"]["recipe"], len(result["seeds"])
    shares = [one["drawn"]["objects"]["mean"] for one in result["vocabularies"].values()]
    return (
        f"{seeds} seed{'s' * (seeds != 1)}, {recipe['steps']} steps of {recipe['batch']} images, width "
        f"{recipe['width']}, {recipe['layers']} layers: {'; '.join(said)}. This is the very beginning of a training: "
        f"{100 * min(shares):.0f} to {100 * max(shares):.0f} per cent of the images show the object that was asked for "
        "(6 by chance)."
    )


def density_line(result: dict[str, Any]) -> str:
    """How much the weights change."""
    of = {(row["k"], row["weights"], row["cap"] is None): row["psnr"]["mean"] for row in result["rows"]}
    parts = []
    for name in ("usage", "near neighbours"):
        for free in (True, False):
            changes = [of[k, w, f] - of[k, "all alike", f] for k, w, f in of if w == name and f == free]
            how = "without a cap" if free else "with it"
            parts.append(f"{name} {how} {min(changes):+.2f} to {max(changes):+.2f} dB")
    return f"Against codes that count alike, over all k: {', '.join(parts)}."


def density_table(result: dict[str, Any]) -> str:
    """Markdown of trees in which codes count by their density."""
    rows = [
        [
            str(row["k"]),
            "k-means" if row["weights"] == "k-means" else f"MASC, {row['weights']}",
            "-" if row["cap"] is None else str(row["cap"]),
            *(_range(row[m], digits) for m, digits in DENSITY_MEASURES.items()),
        ]
        for row in result["rows"]
    ]
    return _table(
        [
            "k",
            "clusters, weights",
            "cap",
            "PSNR dB",
            "SSIM",
            "feature distance",
            "Fréchet distance",
        ],
        rows,
    )


def normalization_table(result: dict[str, Any]) -> str:
    """Markdown of raw and unit rows under tokenizers of both kinds."""
    rows = []
    for kind in ("direction", "distance"):
        of = {(row["k"], row["rows"], row["clusters"]): row for row in result[kind]}
        for k in dict.fromkeys(row["k"] for row in result[kind]):
            cells = [f"{of[k, n, c]['psnr']:.2f}" for c in ("masc", "k-means") for n in ("none", "unit")]
            some = of[k, "none", "masc"]
            rows.append(
                [
                    f"by {kind}",
                    str(k),
                    f"{some['plain']:.2f}",
                    *cells,
                    f"{some['adjusted_rand_none_unit']:.2f}",
                ]
            )
    heads = [
        "codes are looked up",
        "k",
        "tokenizer",
        "MASC, raw",
        "MASC, unit",
        "k-means, raw",
        "k-means, unit",
    ]
    return _table([*heads, "adjusted Rand of the trees"], rows)


MAKERS: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "replacement": (REPLACEMENT, replacement_table),
    "tokenizer": (REPLACEMENT, tokenizer_line),
    "tree": (TREE, tree_line),
    "approximate": (APPROXIMATE, approximate_table),
    "reference": (REFERENCE, reference_table),
    "members": (REFERENCE, members_table),
    "fair": (FAIR, fair_table),
    "rates": (FAIR, rates_table),
    "differences": (FAIR, differences_table),
    "fair-words": (FAIR, fair_line),
    "density": (DENSITY, density_table),
    "density-words": (DENSITY, density_line),
    "normalization": (NORMALIZATION, normalization_table),
}


def fill(text: str) -> str:
    """`text` with everything between `<!-- tokens NAME -->` and `<!-- end -->` made anew from the JSON files."""

    def made(match: re.Match[str]) -> str:
        path, make = MAKERS[match[1]]
        body = make(json.loads(path.read_text())) if path.exists() else "Not measured yet."
        return f"<!-- tokens {match[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- tokens ([\w-]+) -->\n.*?\n?<!-- end -->", made, text, flags=re.DOTALL)


@app.command()
def tables(
    check: Annotated[bool, typer.Option(help="Only look whether the pages are current.")] = False,
) -> None:
    """Write the tables of docs/tokens.md and of the zoo's page."""
    for page in PAGES:
        old = page.read_text()
        new = fill(old)
        if check and new != old:
            raise SystemExit(f"{page} does not hold what the JSON files say; run python benchmarks/tokens.py tables")
        if not check:
            write_atomically(page, new)


if __name__ == "__main__":
    app()
