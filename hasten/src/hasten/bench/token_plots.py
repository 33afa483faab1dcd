"""Images of trees, of their cuts (cluster sizes, swatches of decoded clusters) and of trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram

from hasten.errors import ConfigError
from hasten.io import write_atomically
from hasten.tokens.mapping import TokenMap
from hasten.tokens.tree import SemanticTree

__all__ = ["plot_curves", "plot_images", "plot_sizes", "plot_swatches", "plot_tree"]

# Images `[n, H, W, 3]` in [0, 1] of n tokens, each token alone.
Decode = Callable[[NDArray[np.int64]], NDArray[np.float32]]


def plot_tree(tree: SemanticTree, path: str | Path, top: int = 60) -> Path:
    """Draw the last `top` merges as a dendrogram; numbers in brackets count codes.

    Raises:
        ConfigError: if `top` is below 2, or the tree is not exact, as its heights do not ascend.
    """
    if top < 2:
        raise ConfigError(f"top must be at least 2, got {top}")
    if not tree.exact:
        raise ConfigError("heights of an approximate tree do not ascend, so it cannot be drawn; fit with exact=True")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    table = np.column_stack([tree.merges, np.maximum.accumulate(tree.heights), tree.sizes]).astype(float)
    dendrogram(table, p=top, truncate_mode="lastp", ax=axes, no_labels=top > 80, leaf_rotation=90)
    axes.set(ylabel="mean distance", title=f"{tree.leaves} used codes")
    return _saved(figure, path)


def plot_sizes(maps: dict[str, TokenMap], path: str | Path) -> Path:
    """Draw how many clusters have how many members, one line a map."""
    if not maps:
        raise ConfigError("there is no map to draw")
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, mapping in maps.items():
        sizes, clusters = np.unique(mapping.sizes, return_counts=True)
        axes.plot(sizes, clusters, marker="o", markersize=3, label=f"{name}, k = {mapping.clusters}")
    axes.set(xlabel="members of a cluster", ylabel="clusters", xscale="log", yscale="log")
    axes.legend()
    return _saved(figure, path)


def plot_swatches(mapping: TokenMap, decode: Decode, path: str | Path, clusters: int = 12, members: int = 12) -> Path:
    """Draw members of the largest clusters, decoded alone: one row a cluster.

    Raises:
        ConfigError: if no row or column is asked for.
    """
    if clusters < 1 or members < 1:
        raise ConfigError(f"clusters and members must be at least 1, got {clusters} and {members}")
    largest = np.argsort(-mapping.sizes, kind="stable")[:clusters].tolist()
    rows = {f"{c}\n({mapping.sizes[c]})": decode(mapping.of(c)[:members]) for c in largest}
    return plot_images(rows, path, side=0.6)


def plot_images(rows: Mapping[str, NDArray[np.float32]], path: str | Path, side: float = 0.8) -> Path:
    """Draw images `[n, H, W, 3]` in [0, 1], `side` inches wide, one labelled row for each entry.

    Raises:
        ConfigError: if there is no image.
    """
    columns = max((len(images) for images in rows.values()), default=0)
    if not columns:
        raise ConfigError("there is no image to draw")
    figure = Figure(figsize=(side * columns + 1, side * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, images) in zip(grid, rows.items(), strict=True):
        for i, axes in enumerate(row):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if i < len(images):
                axes.imshow(images[i].clip(0, 1), interpolation="nearest")
        row[0].set_ylabel(name, fontsize=6)
    return _saved(figure, path)


# Rows of `log.jsonl` of each run: one sequence a seed.
Curves = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]


def plot_curves(curves: Curves, measures: Mapping[str, str], path: str | Path) -> Path:
    """Draw measures over training steps, one panel a measure: the mean over the seeds, and a band from least to most.

    Args:
        curves: for each vocabulary the logs of its runs, which have the same steps.
        measures: key in the logs -> label of the axis.
        path: of the image.

    Raises:
        ConfigError: if there is nothing to draw, or runs of a vocabulary were logged at different steps.
    """
    if not curves or not measures or not all(curves.values()):
        raise ConfigError("curves need at least one vocabulary with a run, and one measure")
    figure = Figure(figsize=(4.6 * len(measures), 3.8), layout="constrained")
    for axes, (measure, label) in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures.items(), strict=True
    ):
        for name, runs in curves.items():
            steps = [row["step"] for row in runs[0]]
            if any([row["step"] for row in run] != steps for run in runs):
                raise ConfigError(f"the runs of {name} were logged at different steps; finish runs of one recipe")
            values = np.array([[row[measure] for row in run] for run in runs])
            (line,) = axes.plot(steps, values.mean(axis=0), label=name)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
        axes.set(xlabel="steps", ylabel=label, yscale="log" if measure == "frechet" else "linear")
        axes.legend()
    return _saved(figure, path)


def _saved(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    return write_atomically(path, lambda file: figure.savefig(file, dpi=140, format=path.suffix[1:] or "png"))
