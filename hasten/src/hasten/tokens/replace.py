"""A smaller image vocabulary for an autoregressive transformer: new rows for clusters, nothing else touched.

The rows of image tokens in the input and the output table give way to `k` rows of clusters (`hasten.tokens.vocabulary`
finds them). They are normal with standard deviation 0.02 (the paper's), or the means of the old rows of each cluster's
members, which keeps what a trained model knows. Rows of text and of special tokens are carried over.

Shapes: `N` image tokens, `k` clusters, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from hasten.errors import unknown
from hasten.parameters import Range, accepted
from hasten.tokens.configuration import renumber_configuration
from hasten.tokens.mapping import TokenMap
from hasten.tokens.sample import MOST_SEED
from hasten.tokens.vocabulary import Rows, Vocabulary, find_vocabulary, mark_converted

__all__ = ["Converted", "replace_vocabulary", "resize_tables"]

Start = Literal["normal", "mean"]
STARTS = ("normal", "mean")
STD = 0.02


@dataclass(frozen=True, eq=False)
class Converted:
    """What `replace_vocabulary` did.

    Attributes:
        vocabulary: the tables, and the ids before and after.
        rows_before, rows_after: of the input table.
        kept: rows of text and special tokens, which were carried over.
        parameters_saved: parameters that the model has fewer.
        tied: whether embedding and head share their weight, as before.
        cleared: special tokens of the configuration that were image tokens, and now are none.
    """

    vocabulary: Vocabulary
    rows_before: int
    rows_after: int
    kept: int
    parameters_saved: int
    tied: bool
    cleared: tuple[str, ...]


def replace_vocabulary(
    model: nn.Module,
    mapping: TokenMap,
    *,
    rows: Rows = None,
    embedding: str | None = None,
    head: str | None = None,
    start: Start = "normal",
    seed: int = 0,
) -> Converted:
    """Give the model, in place, rows of clusters for its image tokens.

    Args:
        model: a Hugging Face causal LM, LlamaGen's transformer, Janus, or any module whose tables are named.
        mapping: token -> cluster for the `N` image tokens.
        rows: rows of the image tokens: the first of `N` consecutive ones, a range, or `N` numbers. Not needed where
            the model says it (Chameleon, Emu3, Janus), or where all rows are image tokens.
        embedding, head: names of the modules with the image tables, such as `"gen_embed"`.
        start: new rows `"normal"`, or the `"mean"` of their used members' old rows.
        seed: of the normal rows.

    Raises:
        AdapterError: if embedding and head cannot be found, or are of unknown classes.
        ModelError: if the vocabulary is not that of the map, or it is not known which rows are image tokens.
        ConfigError: if `rows` are no rows of the table.
    """
    seed = accepted("replace_vocabulary", "seed", Annotated[int, Range(0, MOST_SEED)], seed)
    if not isinstance(start, str) or start not in STARTS:
        raise unknown("start of the new rows", start, STARTS)
    found = find_vocabulary(model, mapping, rows, embedding, head)
    before = sum(p.numel() for p in model.parameters())
    table: Any = model.get_submodule(found.embedding)
    output: Any = model.get_submodule(found.head)
    tied = table.weight is output.weight
    generator = torch.Generator().manual_seed(seed)
    rows_of = _Rows(found, mapping, start, generator)
    weight = rows_of(table.weight, found.before)
    head_weight = weight if tied else rows_of(output.weight, output.out_features)
    bias = None if output.bias is None else rows_of(output.bias, output.out_features)
    if bias is not None and start == "normal":
        first = found.offset if output.out_features == found.before else 0
        bias[first : first + mapping.clusters] = 0
    _install(model, found, weight, head_weight, bias, tied)
    mark_converted(model, found)
    cleared = renumber_configuration(model, found, mapping)
    after = sum(p.numel() for p in model.parameters())
    return Converted(found, found.before, found.after, found.before - mapping.tokens, before - after, tied, cleared)


@dataclass(frozen=True)
class _Rows:
    """Makes the rows of a new table from those of the old one."""

    vocabulary: Vocabulary
    mapping: TokenMap
    start: Start
    generator: torch.Generator

    def __call__(self, old: Tensor, total: int) -> Tensor:
        """`old` `[total, ...]`: all rows of the table, or the image tokens alone."""
        old = old.detach()
        alone = total != self.vocabulary.before
        rows = torch.arange(total) if alone else torch.from_numpy(self.vocabulary.rows)
        image = torch.zeros(total, dtype=torch.bool)
        image[rows] = True
        first = int(rows.min())
        kept = (~image).to(old.device)
        clusters = self._clusters(old[rows.to(old.device)])
        return torch.cat([old[:first][kept[:first]], clusters, old[first:][kept[first:]]])

    def _clusters(self, old: Tensor) -> Tensor:
        """Rows `[k, ...]` of clusters from those of their tokens `[N, ...]`."""
        k = self.mapping.clusters
        if self.start == "normal":
            return (STD * torch.randn(k, *old.shape[1:], generator=self.generator)).to(old)
        used = torch.from_numpy(self.mapping.used).to(old.device)
        labels = torch.from_numpy(self.mapping.labels).long().to(old.device)
        sums = torch.zeros(k, *old.shape[1:], dtype=torch.float32, device=old.device)
        sums.index_add_(0, labels[used], old[used].float())
        sizes = torch.from_numpy(self.mapping.sizes).to(sums).reshape(k, *[1] * (old.ndim - 1))
        return (sums / sizes).to(old)


def _install(
    model: nn.Module, found: Vocabulary, weight: Tensor, head_weight: Tensor, bias: Tensor | None, tied: bool
) -> None:
    """Put new tables in the place of the old ones."""
    old_table: Any = model.get_submodule(found.embedding)
    old_head: Any = model.get_submodule(found.head)
    padding = None
    if old_table.padding_idx is not None and old_table.padding_idx not in found.rows:
        padding = int(found.new_ids[old_table.padding_idx])
    options = {name: getattr(old_table, name) for name in ("max_norm", "norm_type", "scale_grad_by_freq", "sparse")}
    table = nn.Embedding(len(weight), weight.shape[1], padding, device="meta", **options)
    table.train(old_table.training)
    table.weight = nn.Parameter(weight, old_table.weight.requires_grad)
    head = nn.Linear(head_weight.shape[1], len(head_weight), bias=bias is not None, device="meta")
    head.weight = table.weight if tied else nn.Parameter(head_weight, old_head.weight.requires_grad)
    if bias is not None:
        head.bias = nn.Parameter(bias, old_head.bias.requires_grad)
    model.set_submodule(found.embedding, table)
    model.set_submodule(found.head, head)


def resize_tables(model: nn.Module, found: Vocabulary) -> None:
    """Give a freshly built model tables of the sizes after the replacement, for weights that are to be loaded."""
    table: Any = model.get_submodule(found.embedding)
    output: Any = model.get_submodule(found.head)
    if table.num_embeddings == found.after:  # its configuration has the new size
        return
    tied = table.weight is output.weight
    weight = table.weight.new_zeros(found.after, table.embedding_dim)
    rows = found.after if output.out_features == found.before else found.clusters
    bias = None if output.bias is None else output.bias.new_zeros(rows)
    _install(model, found, weight, weight if tied else output.weight.new_zeros(rows, output.in_features), bias, tied)
