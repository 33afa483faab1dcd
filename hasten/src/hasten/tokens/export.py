"""A model of clusters as a folder: weights, configuration, map, and where its image tokens are.

A Hugging Face model is written with its own `save_pretrained`, any other module as `model.safetensors` with its state.
Beside it lie `token_map.safetensors` and `hasten_tokens.json`, with the ids before and after the replacement and the
digests of all files. Nothing in such a folder is executed; classes are those of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.errors import ModelError
from hasten.io import Kind, as_path, check_files, describe, read_json, read_record, shown, write_files, write_record
from hasten.parameters import accepted
from hasten.tokens.configuration import pin_image_tokens
from hasten.tokens.mapping import TokenMap
from hasten.tokens.replace import resize_tables
from hasten.tokens.vocabulary import Vocabulary, mark_converted, refuse_wrapped

__all__ = ["Exported", "export_model", "open_model"]

MOST_LAYERS = 1024
MOST_ROWS = 1 << 24


@dataclass(frozen=True, eq=False)
class Exported:
    """A model of clusters.

    Attributes:
        model: of transformers, or the module that was given.
        mapping: token -> cluster.
        vocabulary: its tables, and the ids before and after.
    """

    model: Any
    mapping: TokenMap
    vocabulary: Vocabulary


@dataclass(frozen=True)
class _Facts:
    """What lies beside an exported model: tables, sizes, and the digest of each of its files.

    `rows` are the rows of the image tokens before: the first of consecutive ones, or one number per token.
    """

    architecture: str
    embedding: str
    head: str
    before: int
    rows: tuple[int, ...]
    tokens: int
    clusters: int
    map: str
    files: dict[str, str]

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= self.before <= MOST_ROWS or len(self.rows) not in (1, self.tokens):
            raise ValueError("sizes must be positive and fit each other")
        if min(self.rows) < 0 or max(self.rows) + (self.tokens if len(self.rows) == 1 else 1) > self.before:
            raise ValueError("a row of an image token is none of the table's")

    def vocabulary(self, mapping: TokenMap) -> Vocabulary:
        """The ids that they tell of."""
        first = self.rows[0]
        rows = np.arange(first, first + self.tokens) if len(self.rows) == 1 else np.asarray(self.rows, np.int64)
        if len(np.unique(rows)) < len(rows):
            raise ValueError("two image tokens have the same row")
        return Vocabulary(self.embedding, self.head, self.before, rows, mapping.labels)


FACTS = "hasten_tokens.json"
MAP = "token_map.safetensors"
KIND = Kind("model of clusters", _Facts, ModelError, "Write it again with `hasten tokens train`, or export_model.")


def export_model(model: Any, mapping: TokenMap, folder: str | Path, vocabulary: Vocabulary) -> Path:
    """Write a converted model and its map into a folder; returns it.

    Args:
        model: after `replace_vocabulary`.
        mapping: its map.
        folder: where to.
        vocabulary: of the replacement, `Converted.vocabulary`.

    Raises:
        ModelError: if the model does not have the tables that the vocabulary tells of.
        AdapterError: if it is compiled, or made parallel.
        FileError: if a file cannot be written.
    """
    accepted("export_model", "model", nn.Module, model)
    accepted("export_model", "mapping", TokenMap, mapping)
    accepted("export_model", "vocabulary", Vocabulary, vocabulary)
    refuse_wrapped(model)
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{type(model).__name__} has adapters, of which save_pretrained writes nothing else; merge them first "
            "(merge_and_unload), and export what that gives"
        )
    found = [getattr(_module(model, name), "weight", None) for name in (vocabulary.embedding, vocabulary.head)]
    sizes = [None if weight is None else len(weight) for weight in found]
    after = (vocabulary.after, vocabulary.clusters)
    if sizes[0] != vocabulary.after or sizes[1] not in after or not np.array_equal(vocabulary.labels, mapping.labels):
        raise ModelError(
            f"{vocabulary.embedding} and {vocabulary.head} have {sizes[0]} and {sizes[1]} rows, expected "
            f"{vocabulary.after} with {mapping.clusters} clusters; replace_vocabulary first, and give its vocabulary"
        )
    folder = as_path(folder)
    digests = write_files(folder, partial(_save_files, model))
    mapping.save(folder / MAP)
    first = int(vocabulary.rows[0])
    consecutive = np.array_equal(vocabulary.rows, np.arange(first, first + mapping.tokens))
    facts = {
        "architecture": type(model).__name__,
        "embedding": vocabulary.embedding,
        "head": vocabulary.head,
        "before": vocabulary.before,
        "rows": [first] if consecutive else vocabulary.rows.tolist(),
        "tokens": mapping.tokens,
        "clusters": mapping.clusters,
        "map": mapping.kind,
        "files": digests,
    }
    write_record(folder / FACTS, KIND, facts)
    return folder


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _save_files(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")


def open_model(folder: str | Path, model: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Exported:
    """What `export_model` wrote.

    Args:
        folder: that it wrote.
        model: a freshly built module of the class that was exported, with its vocabulary before the replacement; it
            gets the tables and the weights. Needed for modules that are not of transformers.
        dtype: of a model of transformers, whatever precision it was kept in.

    Raises:
        ModelError: if the folder is no such model, or a file is not as it was written.
    """
    folder = as_path(folder)
    accepted("open_model", "model", nn.Module | None, model)
    accepted("open_model", "dtype", torch.dtype, dtype)
    if not (folder / MAP).is_file():
        raise ModelError(f"{folder} holds no model with its map; write one with `hasten tokens train`")
    mapping = TokenMap.load(folder / MAP)
    facts = read_record(folder / FACTS, KIND)
    if (facts.tokens, facts.clusters) != (mapping.tokens, mapping.clusters):
        raise ModelError(f"{folder}: the map is that of another model. {KIND.remedy}")
    check_files(folder, facts.files, ModelError, KIND.remedy)
    try:
        vocabulary = facts.vocabulary(mapping)
        if model is None:
            model = _pretrained(folder, facts, vocabulary, dtype)
        else:
            _load_into(model, folder, vocabulary)
        pin_image_tokens(model, vocabulary, mapping)
        mark_converted(model, vocabulary)
        return Exported(model.eval(), mapping, vocabulary)
    except Exception as error:  # whatever the other library raises, this is no usable model
        raise ModelError(f"{folder}: no usable model ({describe(error)}). {KIND.remedy}") from error


def _load_into(model: nn.Module, folder: Path, vocabulary: Vocabulary) -> None:
    from safetensors.torch import load_file

    resize_tables(model, vocabulary)
    model.load_state_dict(load_file(folder / "model.safetensors"))


def _pretrained(folder: Path, facts: _Facts, vocabulary: Vocabulary, dtype: torch.dtype) -> Any:
    """A model of transformers, if its weights are exactly those of its configuration: else it makes up the rest."""
    import transformers

    kind = getattr(transformers, facts.architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model {shown(facts.architecture)}; give model=, built as it was before")
    document = read_json(folder / "config.json")
    for part in (document, *(value for value in document.values() if isinstance(value, dict))):
        layers = part.get("num_hidden_layers", 1)
        if type(layers) is not int or layers > MOST_LAYERS:
            raise ValueError(f"it has {layers} layers, expected at most {MOST_LAYERS}")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):  # before memory for the sizes in the configuration is asked for
        empty = kind(config)
        resize_tables(empty, vocabulary)
    wanted = _shapes(empty)
    kept = _kept_numbers(folder, facts)
    if sum(wanted.values()) != kept:
        raise ValueError(f"its configuration asks for {sum(wanted.values())} numbers, its weights are {kept}")

    class Resized(kind):  # type: ignore[misc, valid-type]
        """The class with tables of the sizes after the replacement, while its weights are read."""

        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            resize_tables(self, vocabulary)

    Resized.__name__, Resized.__module__ = kind.__name__, kind.__module__  # names of tensors go by them
    model, info = Resized.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    for state in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(state):
            raise ValueError(f"its weights are not those of its configuration ({state}: {sorted(info[state])[0]})")
    model.__class__ = kind
    return model


def _shapes(model: nn.Module) -> dict[str, int]:
    """Numbers of each tensor that is kept, those of shared weights once."""
    state = {name: value.numel() for name, value in model.named_parameters()}
    keys = set(model.state_dict())
    return state | {name: value.numel() for name, value in model.named_buffers() if name in keys}


def _kept_numbers(folder: Path, facts: _Facts) -> int:
    """How many numbers the safetensors files hold."""
    from safetensors import safe_open

    total = 0
    for name in facts.files:
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="pt") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - no dict
    return total
