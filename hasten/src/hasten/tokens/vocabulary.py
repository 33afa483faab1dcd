"""Where a model keeps its image vocabulary: the two tables, and the rows of image tokens in them.

Three layouts are in use. Image tokens alone (LlamaGen): all rows of the tables. Image tokens among text (Emu3,
Lumina-mGPT, Chameleon): some rows of the tables of a language model. Tables of their own beside those of a language
model (Janus). Which rows are image tokens is found out where the model says it (a `vocabulary_mapping` as in
transformers, tables with the names of a known family, tables of exactly `N` rows), and asked for where it does not.

Shapes: `N` image tokens, `k` clusters, `R` rows of the input table before the replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from hasten.errors import AdapterError, ConfigError, ModelError
from hasten.parameters import Text, accepted
from hasten.tokens.arrays import as_whole_numbers
from hasten.tokens.mapping import TokenMap

__all__ = [
    "Rows",
    "Vocabulary",
    "find_vocabulary",
    "mark_converted",
    "refuse_wrapped",
    "vocabulary_mapping",
]

Rows = int | range | Sequence[int] | NDArray[Any] | None
OWN_TABLES = (
    ("tok_embeddings", "output"),  # LlamaGen
    ("model.generation_embeddings", "model.generation_head.vision_head"),  # Janus in transformers
    ("gen_embed", "gen_head.vision_head"),  # Janus in its own repository
)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The ids of a model before and after its image tokens became clusters.

    The clusters lie in one piece where the first image token was; all other rows keep their order. Ids before it stay
    what they are, and those behind image tokens move down.

    Attributes:
        embedding, head: names of the modules that hold the tables.
        before: rows of the input table before, `R`.
        rows: `[N]` int64, row of each image token before.
        labels: `[N]` int32, cluster of each image token.
    """

    embedding: str
    head: str
    before: int
    rows: NDArray[np.int64] = field(repr=False)
    labels: NDArray[np.int32] = field(repr=False)

    @property
    def clusters(self) -> int:
        """Rows of clusters, `k`."""
        return int(self.labels.max()) + 1

    @property
    def after(self) -> int:
        """Rows of the input table after."""
        return self.before - len(self.rows) + self.clusters

    @property
    def offset(self) -> int:
        """Row of cluster 0; cluster `c` is row `offset + c`."""
        return int(self.rows.min())

    @property
    def shared(self) -> bool:
        """Whether the table holds other rows than image tokens."""
        return self.before > len(self.rows)

    @cached_property
    def new_ids(self) -> NDArray[np.int64]:
        """`[R]`: the row after of each row before; image tokens get the row of their cluster."""
        image = np.zeros(self.before, bool)
        image[self.rows] = True
        kept = np.flatnonzero(~image)
        ids = np.empty(self.before, np.int64)
        ids[kept] = np.arange(len(kept)) + np.where(kept > self.offset, self.clusters, 0)
        ids[self.rows] = self.offset + self.labels
        return ids

    def renumber(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Ids of the model's tokenizer as ids after the replacement, any shape.

        Raises:
            ConfigError: if an id is none of the table's.
        """
        ids = as_whole_numbers(ids, "ids")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.before:
            raise ConfigError(f"ids {ids.min()} .. {ids.max()} are not all in 0 .. {self.before - 1}")
        return self.new_ids[ids]

    @classmethod
    def of_clusters(cls, mapping: TokenMap, special: int, embedding: str, head: str) -> Vocabulary:
        """Of a model made for clusters: the `N` tokens came first, and `special` further rows behind them."""
        return cls(embedding, head, mapping.tokens + special, np.arange(mapping.tokens), mapping.labels)


def find_vocabulary(
    model: nn.Module, mapping: TokenMap, rows: Rows = None, embedding: str | None = None, head: str | None = None
) -> Vocabulary:
    """Where the image tokens of a map are in a model.

    Args:
        model: before the replacement.
        mapping: of the `N` image tokens.
        rows: their rows in the table: the first of `N` consecutive ones, a range, or `N` numbers.
        embedding, head: names of the modules with the tables, where the model does not say it.

    Raises:
        AdapterError: if the tables cannot be found, or it is not clear which they are.
        ModelError: if they do not fit the map, it is not known which rows are image tokens, or there are clusters.
        ConfigError: if `rows` are no rows of the table.
    """
    accepted("replace_vocabulary", "model", nn.Module, model)
    accepted("replace_vocabulary", "mapping", TokenMap, mapping)
    for name, given in (("embedding", embedding), ("head", head)):
        accepted("replace_vocabulary", name, Annotated[str | None, Text(1)], given)
    if (embedding is None) != (head is None):
        raise ConfigError("embedding and head belong together: give the names of both tables, or of none")
    refuse_wrapped(model)
    if _is_converted(model):
        raise ModelError(_twice(model))
    named = embedding is not None
    names = (embedding, head) if embedding is not None and head is not None else _tables(model)
    table, output = (_module(model, name) for name in names)
    if type(table) is not nn.Embedding or type(output) is not nn.Linear:
        raise AdapterError(
            f"the vocabulary of {type(model).__name__} is a {type(table).__name__} and a {type(output).__name__}; "
            "expected a plain Embedding and a plain Linear (merge adapters and undo quantization first)"
        )
    for name, module in zip(names, (table, output), strict=True):
        _check_plain(model, name, module, (table, output))
    total = table.num_embeddings
    own = names in OWN_TABLES or named
    said = None if own else _said_rows(model, mapping)
    index = _index(rows, mapping.tokens, total) if rows is not None else said
    if index is not None and said is not None and not np.array_equal(index, said):
        raise ModelError(
            f"{type(model).__name__} itself says that image token 0 is row {said[0]}, rows= says {index[0]}; "
            "leave rows= out, or give the map of this model's codebook"
        )
    if index is None:
        if total != mapping.tokens:
            raise ModelError(
                f"{names[0]} has {total} rows, the map {mapping.tokens} tokens, and {type(model).__name__} does not "
                "say which rows are image tokens; give rows= (the first of them, a range, or one number per token), "
                "or the names of the image tables with embedding= and head="
            )
        if not own:
            _refuse_doubt(model, names[0], total)
        index = np.arange(total)
    if output.out_features not in (total, mapping.tokens):
        raise ModelError(
            f"{names[1]} has {output.out_features} rows, {names[0]} {total}; expected as many, or the image tokens "
            f"alone ({mapping.tokens})"
        )
    return Vocabulary(*names, total, index, mapping.labels)


def vocabulary_mapping(model: nn.Module) -> Any:
    """What a transformers model says about its image tokens (Chameleon, Emu3), or None."""
    for module in model.modules():
        found = getattr(module, "vocabulary_mapping", None)
        if found is not None and hasattr(found, "img2bpe"):
            return found
    return None


def _said_rows(model: nn.Module, mapping: TokenMap) -> NDArray[np.int64] | None:
    found = vocabulary_mapping(model)
    if found is None:
        return None
    rows: dict[int, int] = found.img2bpe
    if len(set(rows.values())) < len(rows):
        raise ModelError(_twice(model))
    if sorted(rows) != list(range(mapping.tokens)):
        raise ModelError(
            f"{type(model).__name__} names {len(rows)} image tokens, the map has {mapping.tokens}; "
            "use the map of this model's codebook"
        )
    return np.asarray([rows[token] for token in range(mapping.tokens)], np.int64)


def _tables(model: nn.Module) -> tuple[str, str]:
    for names in OWN_TABLES:
        if all(_has(model, name) for name in names):
            return names
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        raise AdapterError(
            f"{type(model).__name__} has neither tok_embeddings and output (LlamaGen) nor get_input_embeddings and "
            "get_output_embeddings (Hugging Face causal LMs); name its tables with embedding= and head="
        )
    whole: Any = model
    found = (whole.get_input_embeddings(), whole.get_output_embeddings())
    known = {id(module): name for name, module in model.named_modules()}
    if any(id(module) not in known for module in found):
        raise AdapterError(
            f"{type(model).__name__} has no input and output table that a causal LM has; name the image tables with "
            "embedding= and head="
        )
    return known[id(found[0])], known[id(found[1])]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _module(model: nn.Module, name: str) -> nn.Module:
    if not _has(model, name):
        raise AdapterError(f"{type(model).__name__} has no module {name!r}; names are those of named_modules()")
    return model.get_submodule(name)


def mark_converted(model: nn.Module, found: Vocabulary) -> None:
    """Note that rows of a table are clusters: beside its weights, and in the configurations, which are saved."""
    model.get_submodule(found.embedding).hasten_clusters = found.clusters  # type: ignore[assignment]
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if f"{found.embedding}.".startswith(f"{name}." if name else "") and hasattr(config, "__dict__"):
            config.hasten_clusters = found.clusters


def _is_converted(model: nn.Module) -> bool:
    """Whether any table is of clusters: those of a second vocabulary could not be told from them in an export."""
    return any(
        hasattr(one, "hasten_clusters") for module in model.modules() for one in (module, getattr(module, "config", 0))
    )


def _twice(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has rows of clusters already, and takes them once; load it anew, as it was before the "
        "replacement"
    )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse what another module is wrapped in: its tensors have other names than those of the model that is opened.

    Raises:
        AdapterError: if the model, or a part of it, is compiled or made parallel.
    """
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = "_orig_mod" if hasattr(module, "_orig_mod") else "module"
            raise AdapterError(
                f"{name or 'the model'} is wrapped ({type(module).__name__}); give what is within it (.{inner}), and "
                "compile it, or make it parallel, afterwards"
            )


def _check_plain(model: nn.Module, name: str, module: nn.Module, tables: tuple[nn.Module, ...]) -> None:
    """Refuse a table that new rows would not be everything of.

    Raises:
        AdapterError: if something else changes what it gives, or others share its weight.
    """
    weight: Any = module.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
        what = "on no device" if weight.is_meta else f"a {type(weight).__name__} of {weight.dtype}"
        raise AdapterError(
            f"the weight of {name} is {what}; expected plain floating-point numbers (load it, undo quantization, "
            "gather its shards first)"
        )
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise AdapterError(
            f"{name} has hooks or a forward of its own, which new rows would lose; take them off, replace the "
            "vocabulary, and put them on again"
        )
    own = {id(p) for p in module.parameters(recurse=False)}
    for other, part in model.named_modules(remove_duplicate=False):
        twin = part is module and other != name
        if twin or (part not in tables and any(id(p) in own for p in part.parameters(recurse=False))):
            raise AdapterError(
                f"{other} of {type(model).__name__} shares numbers of {name}, and would keep its old rows; give it "
                "some of its own first"
            )


def _index(rows: Any, tokens: int, total: int) -> NDArray[np.int64]:
    """Rows `[N]` as numbers."""
    if isinstance(rows, (int, np.integer)) and not isinstance(rows, bool):
        rows = range(int(rows), int(rows) + tokens)
    index = as_whole_numbers([] if isinstance(rows, bool) else rows, "rows")
    if index.ndim != 1 or len(index) != tokens:
        raise ConfigError(
            f"rows must be the first row, or {tokens} whole numbers, one per token of the map; got {index.dtype} of "
            f"{index.shape}"
        )
    if index.min() < 0 or index.max() >= total:
        raise ConfigError(f"rows {index.min()} .. {index.max()} are not all in 0 .. {total - 1}, the rows of the table")
    if len(np.unique(index)) < len(index):
        raise ConfigError("rows has a row twice; each image token has a row of its own")
    return index.astype(np.int64)


def _refuse_doubt(model: nn.Module, chosen: str, total: int) -> None:
    """A second table of as many rows may be the one that is meant."""
    for name, module in model.named_modules():
        if name != chosen and isinstance(module, nn.Embedding) and module.num_embeddings == total:
            raise AdapterError(
                f"both {chosen} and {name} of {type(model).__name__} have {total} rows; say which are image tokens "
                "with rows=, or name the tables with embedding= and head="
            )
