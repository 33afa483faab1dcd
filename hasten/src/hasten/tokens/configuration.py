"""What a model's configuration says about ids, after its image tokens became clusters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

import numpy as np
from torch import nn

from hasten.errors import HastenWarning
from hasten.tokens.mapping import TokenMap
from hasten.tokens.vocabulary import Vocabulary, vocabulary_mapping

__all__ = ["pin_image_tokens", "renumber_configuration"]

WORDS = ("bad_words_ids", "force_words_ids", "sequence_bias")  # lists of lists of ids, the last with a number each
ID_SUFFIXES = ("_token_id", "_token_ids", "_token_index", "suppress_tokens")
PERHAPS = ("_id", "_ids", "_token", "_tokens", "_index")  # of what may be an id, and may be something else
COUNTS = ("max_", "min_", "num_", "prompt_lookup_num_")  # of what is a number of tokens


def renumber_configuration(model: nn.Module, found: Vocabulary, mapping: TokenMap) -> tuple[str, ...]:
    """Let sizes and ids of the configuration be those after the replacement; names of ids that were image tokens.

    Special tokens that were image tokens become None: a cluster must not end a text. Image tables beside those of a
    language model leave its ids as they are.
    """
    configurations = list(_configurations(model))
    if not _holds_ids(model, found):
        return ()
    for holder in (*configurations, *_holders(model, found)):
        if getattr(holder, "vocab_size", None) == found.before:
            holder.vocab_size = found.after
    _warn_of_others(configurations, found)
    cleared = [name for configuration in configurations for name in _renumber(configuration, found)]
    known = vocabulary_mapping(model)
    if known is not None:
        known.vocab_map.update({name: int(found.new_ids[row]) for name, row in known.vocab_map.items()})
        known.__init__(known.vocab_map)  # it keeps the ids of some tokens
        pin_image_tokens(model, found, mapping)
    return tuple(dict.fromkeys(cleared))


def pin_image_tokens(model: nn.Module, found: Vocabulary, mapping: TokenMap) -> None:
    """Let a model's own way from codes to rows give clusters, and the way back a member that is used.

    transformers works these tables out from names, one row per name, and keeps them once they are made.
    """
    known = vocabulary_mapping(model)
    if known is None:
        return
    for name in [name for name, value in vars(type(known)).items() if hasattr(value, "func")]:  # cached properties
        known.__dict__.pop(name, None)
    known.image_tokens = list(range(found.offset, found.offset + found.clusters))
    known.img2bpe = {token: found.offset + int(label) for token, label in enumerate(mapping.labels)}
    known.bpe2img = {found.offset + c: int(token) for c, token in enumerate(mapping.members[mapping.offsets[:-1]])}


def _holds_ids(model: nn.Module, found: Vocabulary) -> bool:
    """Whether the replaced table is the one whose rows the model's ids are."""
    get = getattr(model, "get_input_embeddings", None)
    return get is None or get() is model.get_submodule(found.embedding)


def _holders(model: nn.Module, found: Vocabulary) -> Iterator[nn.Module]:
    """The modules around one of the tables; others may have a vocabulary of their own that is as large."""
    for name, module in model.named_modules():
        if any(f"{table}.".startswith(f"{name}." if name else "") for table in (found.embedding, found.head)):
            yield module


def _warn_of_others(configurations: list[Any], found: Vocabulary) -> None:
    """Name what looks like an id that means another row now, under a name that none of the known ones is."""
    own = np.arange(found.before)
    moved = set(own[(found.new_ids != own) | np.isin(own, found.rows)].tolist())
    stale: list[str] = []

    def look(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                look(f"{name}.{key}", inner)
        elif name.rpartition(".")[2].startswith(COUNTS):
            return
        elif name.endswith(PERHAPS) and (not name.endswith(ID_SUFFIXES) or "." in name):
            values = value if isinstance(value, (list, tuple)) else [value]
            ids = [int(x) for x in values if isinstance(x, Integral) and not isinstance(x, bool)]
            if not moved.isdisjoint(ids):
                stale.append(name)

    for configuration in configurations:
        for name, value in vars(configuration).items():
            if name not in WORDS:
                look(name, value)
    if stale:
        warnings.warn(
            f"{', '.join(dict.fromkeys(stale))}: ids mean other rows now; set these anew, if they are ids",
            HastenWarning,
            stacklevel=4,
        )


def _configurations(model: nn.Module) -> Iterator[Any]:
    """The configuration, those within it, and that of generation."""
    waiting = [getattr(model, "config", None), getattr(model, "generation_config", None)]
    while waiting:
        one = waiting.pop(0)
        if one is None:
            continue
        yield one
        waiting += [value for value in vars(one).values() if hasattr(value, "to_dict") and value is not one]


def _entries(value: Any) -> list[Any]:
    return list(value.items() if isinstance(value, dict) else value)


def _flat(word: Any) -> Iterator[Any]:
    """The ids of a word, or of its alternatives."""
    if isinstance(word, (list, tuple)):
        for part in word:
            yield from _flat(part)
    else:
        yield word


def _nested(word: Any, new: Callable[[Any], Any]) -> Any:
    """A word, or its alternatives, with new ids."""
    return type(word)(_nested(part, new) for part in word) if isinstance(word, (list, tuple)) else new(word)


def _renumber(configuration: Any, found: Vocabulary) -> list[str]:
    """Renumber what a configuration names; the names of what was cleared."""
    image = set(found.rows.tolist())
    cleared = []

    def new(token: Any) -> Any:
        kept = isinstance(token, Integral) and 0 <= int(token) < found.before
        return int(found.new_ids[token]) if kept else token

    for name, value in list(vars(configuration).items()):
        if name in WORDS and isinstance(value, (dict, list, tuple)):
            biased = name == "sequence_bias"
            words = [tuple(entry) if biased else (entry, None) for entry in _entries(value)]
            kept = [(_nested(word, new), bias) for word, bias in words if image.isdisjoint(_flat(word))]
            if len(kept) < len(words):
                cleared.append(name)
            renewed: Any = dict(kept) if isinstance(value, dict) else [[*pair] if biased else pair[0] for pair in kept]
            setattr(configuration, name, renewed or None)
            continue
        if not name.endswith(ID_SUFFIXES) or isinstance(value, bool):
            continue
        if isinstance(value, list) and value and all(isinstance(token, Integral) for token in value):
            left = [new(token) for token in value if token not in image]
            if len(left) < len(value):
                cleared.append(name)
            setattr(configuration, name, left or None)
        elif isinstance(value, Integral):
            if value in image:
                cleared.append(name)
            setattr(configuration, name, None if value in image else new(value))
    return cleared
