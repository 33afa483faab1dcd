"""A smaller vocabulary for an autoregressive transformer: new embedding, new head, nothing else touched.

Hugging Face causal LMs tell their two layers by `get_input_embeddings` and `get_output_embeddings`; LlamaGen's modules
have them as `tok_embeddings` and `output`. The new rows are normal with standard deviation 0.02 (the paper's), or the
means of the old rows of each cluster, which keeps what a trained model knows.

Shapes: `N` tokens, `k` clusters, `S` special tokens, `D` width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hasten.errors import AdapterError, ModelError, unknown
from hasten.io import Kind, check_files, describe, read_json, read_record, write_files, write_record
from hasten.tokens.mapping import TokenMap

__all__ = ["Converted", "export_model", "open_model", "replace_vocabulary"]

Start = Literal["normal", "mean"]
STARTS = ("normal", "mean")
STD = 0.02
MOST_LAYERS = 1024


@dataclass(frozen=True)
class Converted:
    """What `replace_vocabulary` did.

    Attributes:
        rows_before: rows of the old embedding.
        rows_after: rows of the new one: `k` clusters and then the special tokens.
        special: special tokens that were carried over.
        parameters_saved: parameters that the model has fewer.
        tied: whether embedding and head share their weight, as before.
    """

    rows_before: int
    rows_after: int
    special: int
    parameters_saved: int
    tied: bool


def replace_vocabulary(
    model: nn.Module, mapping: TokenMap, *, start: Start = "normal", special: int = 0, seed: int = 0
) -> Converted:
    """Give the model, in place, an embedding and a head of `k + special` rows.

    Args:
        model: a Hugging Face causal LM, or a module with `tok_embeddings` (Embedding) and `output` (Linear).
        mapping: token -> cluster for the first `N` rows.
        start: new rows `"normal"`, or the `"mean"` of their members' old rows.
        special: rows that follow the `N` tokens (classes, begin, padding); they are copied to `k, k+1, ...`.
        seed: of the normal rows.

    Raises:
        AdapterError: if embedding and head cannot be found, or are of unknown classes.
        ModelError: if the vocabulary is not that of the map.
    """
    if start not in STARTS:
        raise unknown("start of the new rows", start, STARTS)
    embedding, head = _vocabulary(model)
    rows = embedding.num_embeddings
    if rows != mapping.tokens + special or head.out_features not in (rows, mapping.tokens):
        raise ModelError(
            f"embedding and head have {rows} and {head.out_features} rows, the map {mapping.tokens} tokens and "
            f"{special} special ones; use the map of this model's codebook and give special= for further rows"
        )
    before = sum(p.numel() for p in model.parameters())
    tied = embedding.weight is head.weight
    generator = torch.Generator().manual_seed(seed)
    new_embedding = _new_embedding(embedding, mapping, start, generator)
    new_head = _new_head(head, mapping, start, generator)
    if tied:
        new_head.weight = new_embedding.weight
    _install(model, new_embedding, new_head)
    for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        _renumber(config, mapping)
    after = sum(p.numel() for p in model.parameters())
    return Converted(rows, new_embedding.num_embeddings, special, before - after, tied)


def _vocabulary(model: nn.Module) -> tuple[nn.Embedding, nn.Linear]:
    if hasattr(model, "tok_embeddings") and hasattr(model, "output"):
        embedding, head = model.tok_embeddings, model.output
    elif hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings"):
        whole: Any = model
        embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    else:
        raise AdapterError(
            f"{type(model).__name__} has neither tok_embeddings and output (LlamaGen) nor get_input_embeddings and "
            "get_output_embeddings (Hugging Face causal LMs), so its vocabulary cannot be found"
        )
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        raise AdapterError(
            f"the vocabulary of {type(model).__name__} is a {type(embedding).__name__} and a {type(head).__name__}; "
            "expected a plain Embedding and a plain Linear (merge adapters and undo quantization first)"
        )
    return embedding, head


def _rows(old: Tensor, mapping: TokenMap, start: Start, generator: torch.Generator) -> Tensor:
    """The new rows `[k + S, ...]` of old ones `[N + S, ...]`."""
    k, n = mapping.clusters, mapping.tokens
    old = old.detach()
    if start == "normal":
        clusters = STD * torch.randn(k, *old.shape[1:], generator=generator)
        clusters = clusters.to(old)
    else:
        sums = torch.zeros(k, *old.shape[1:], dtype=torch.float32, device=old.device)
        sums.index_add_(0, torch.from_numpy(mapping.labels).long().to(old.device), old[:n].float())
        sizes = torch.from_numpy(mapping.sizes).to(sums).reshape(k, *[1] * (old.ndim - 1))
        clusters = (sums / sizes).to(old)
    return torch.cat([clusters, old[n:]])


def _new_embedding(old: nn.Embedding, mapping: TokenMap, start: Start, generator: torch.Generator) -> nn.Embedding:
    padding = None if old.padding_idx is None else _new_id(old.padding_idx, mapping)
    weight = _rows(old.weight, mapping, start, generator)
    new = nn.Embedding(len(weight), old.embedding_dim, padding, _weight=weight)
    return new.requires_grad_(old.weight.requires_grad)


def _new_head(old: nn.Linear, mapping: TokenMap, start: Start, generator: torch.Generator) -> nn.Linear:
    weight = _rows(old.weight, mapping, start, generator)
    new = nn.Linear(old.in_features, len(weight), bias=old.bias is not None, device="meta")
    new.weight = nn.Parameter(weight, old.weight.requires_grad)
    if old.bias is not None:
        bias = _rows(old.bias, mapping, start, generator)
        if start == "normal":
            bias[: mapping.clusters] = 0
        new.bias = nn.Parameter(bias, old.bias.requires_grad)
    return new


def _install(model: Any, embedding: nn.Embedding, head: nn.Linear) -> None:
    if hasattr(model, "tok_embeddings"):
        model.tok_embeddings, model.output = embedding, head
    else:
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)
    for config in (getattr(model, "config", None), model):
        if config is not None and hasattr(config, "vocab_size"):
            config.vocab_size = head.out_features


def _new_id(token: int, mapping: TokenMap) -> int:
    """The row of a token, or of a special token behind the `N` tokens."""
    return int(mapping.labels[token]) if token < mapping.tokens else token - mapping.tokens + mapping.clusters


def _renumber(config: Any, mapping: TokenMap) -> None:
    """Let the special tokens that a Hugging Face configuration names be the new rows."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, list):
            setattr(config, name, [_new_id(token, mapping) for token in value])
        elif isinstance(value, int) and value >= 0:
            setattr(config, name, _new_id(value, mapping))


@dataclass(frozen=True)
class _Facts:
    """What lies beside an exported model: sizes, and the digest of each of its files."""

    tokens: int
    clusters: int
    map: str
    files: dict[str, str]


FACTS = "hasten_tokens.json"
KIND = Kind("model of clusters", _Facts, ModelError, "Write it again with `hasten tokens train`, or export_model.")


def export_model(model: Any, mapping: TokenMap, folder: str | Path) -> Path:
    """Write a converted model and its map; a Hugging Face model is opened again with `from_pretrained`.

    Other modules are written as `model.safetensors` with their state. `token_map.safetensors` lies beside it, and the
    digests of all files.

    Raises:
        ModelError: if the model still has another vocabulary than the map.
        FileError: if a file cannot be written.
    """
    _, head = _vocabulary(model)
    if head.out_features < mapping.clusters or head.out_features >= mapping.tokens > mapping.clusters:
        raise ModelError(
            f"the head has {head.out_features} rows, the map {mapping.clusters} clusters; replace_vocabulary first"
        )
    folder = Path(folder)
    digests = write_files(folder, partial(_save_files, model))
    mapping.save(folder / "token_map.safetensors")
    facts = {"tokens": mapping.tokens, "clusters": mapping.clusters, "map": mapping.kind, "files": digests}
    write_record(folder / FACTS, KIND, facts)
    return folder


def _save_files(model: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        state = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")


def open_model(folder: str | Path) -> tuple[Any, TokenMap]:
    """A Hugging Face model and its map that `export_model` wrote, in float32, whatever precision they were kept in.

    Raises:
        ModelError: if the folder is no such model, or a file is not as it was written.
    """
    folder = Path(folder)
    if not (folder / "token_map.safetensors").is_file():
        raise ModelError(f"{folder} holds no model with its map; write one with `hasten tokens train`")
    mapping = TokenMap.load(folder / "token_map.safetensors")
    facts = read_record(folder / FACTS, KIND)
    if (facts.tokens, facts.clusters) != (mapping.tokens, mapping.clusters):
        raise ModelError(f"{folder}: the map is that of another model. {KIND.remedy}")
    check_files(folder, facts.files, ModelError, KIND.remedy)
    try:
        return _load_weights(folder, facts).eval(), mapping
    except Exception as error:  # whatever the other library raises, this is no usable model
        raise ModelError(f"{folder}: no usable model ({describe(error)}). {KIND.remedy}") from error


def _load_weights(folder: Path, facts: _Facts) -> Any:
    """The model, if its weights are exactly those of its configuration: else the other library makes up the rest."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = read_json(folder / "config.json").get("num_hidden_layers", 1)
    if type(layers) is not int or layers > MOST_LAYERS:
        raise ValueError(f"it has {layers} layers, expected at most {MOST_LAYERS}")
    with torch.device("meta"):  # before memory for the sizes in the configuration is asked for
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    wanted = sum(p.numel() for p in empty.parameters())
    kept = sum(_numbers(folder / name) for name in facts.files if name.endswith(".safetensors"))
    if wanted != kept:
        raise ValueError(f"its configuration asks for {wanted} numbers, its weights are {kept}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    for state in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(state):
            raise ValueError(f"its weights are not those of its configuration ({state}: {sorted(info[state])[0]})")
    return model


def _numbers(path: Path) -> int:
    """How many numbers a safetensors file holds."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no dict
