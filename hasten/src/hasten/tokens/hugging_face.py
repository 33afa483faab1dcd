"""A causal LM of transformers as a `CausalModel`: only the rows of clusters are predicted, and the cache is static.

The sequence is the condition, then the clusters of the image; models that end each row of an image with a token (Emu3,
Lumina-mGPT) get it where it belongs. States are those of the language model after its last norm; clusters have tables
in it (LlamaGen-like, Emu3, Chameleon) or beside it (Janus), where they pass through its aligner and its head.

Shapes: `B` images, `P` ids of a condition, `l` clusters, `k` clusters that there are, `H` width.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hasten.errors import AdapterError, ConfigError
from hasten.parameters import Range, accepted
from hasten.tokens.causal import CausalModel, Condition, Decoding, Prediction
from hasten.tokens.vocabulary import Vocabulary

__all__ = ["HuggingFaceModel"]

# Head with tables beside those of the language model -> how clusters are embedded, what predicts them, what is between.
BESIDE = {
    "model.generation_head.vision_head": (
        "prepare_embeddings_for_image_generation",
        "model.generation_head",
        "model.generation_aligner",
    ),
    "gen_head.vision_head": ("prepare_gen_img_embeds", "gen_head", "gen_aligner"),
}
UNCACHED = ("bloom",)  # takes its positions from a mask, which a static cache outgrows
UNPADDED = ("rwkv",)  # sees padding, whatever a mask says
SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class HuggingFaceModel(CausalModel):
    """A converted model of transformers.

    Args:
        model: after `replace_vocabulary`.
        vocabulary: `Converted.vocabulary`.
        row_length: clusters in a row of the image, where each row ends with a token.
        row_end: that token, an id of the model's tokenizer before the replacement.
        codebooks: sizes of the vocabularies that positions take in turn.
        keep_text: whether rows of text that no image needs are to stay as they are in training.

    Raises:
        AdapterError: if it is not known how the model predicts clusters.
        ConfigError: if rows are given by half.
    """

    new_ids: Tensor
    row_end: Tensor

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        *,
        row_length: int | None = None,
        row_end: int | None = None,
        codebooks: tuple[int, ...] = (),
        keep_text: bool = True,
    ) -> None:
        accepted("HuggingFaceModel", "model", nn.Module, model)
        accepted("HuggingFaceModel", "vocabulary", Vocabulary, vocabulary)
        super().__init__(vocabulary.clusters, codebooks)
        if not hasattr(model, "get_input_embeddings") or not (
            hasattr(model, "get_decoder") or hasattr(model, "language_model")
        ):
            raise AdapterError(
                f"{type(model).__name__} is no model of transformers with a decoder; give its forward to a "
                "FunctionModel instead"
            )
        if not getattr(model, "can_generate", lambda: True)():
            raise AdapterError(f"{type(model).__name__} does not generate, it sees what comes after; use a causal LM")
        for name, given in (("row_length", row_length), ("row_end", row_end)):
            accepted("HuggingFaceModel", name, Annotated[int | None, Range(0)], given)
        self.keep_text = keep_text
        if (row_length is None) != (row_end is None) or (row_length is not None and row_length < 1):
            raise ConfigError(f"row_length and row_end belong together, got {row_length} and {row_end}")
        self.model = model
        self.vocabulary = vocabulary
        self.row_length = row_length
        self.beside = BESIDE.get(vocabulary.head)
        self.own = self.beside is not None or model.get_input_embeddings() is not model.get_submodule(
            vocabulary.embedding
        )
        ids = torch.arange(model.get_input_embeddings().num_embeddings)
        if not self.own:
            ids = torch.from_numpy(vocabulary.new_ids)
        self.register_buffer("new_ids", ids, persistent=False)
        self.register_buffer("row_end", self._known(torch.tensor([[row_end or 0]])), persistent=False)
        self._check()

    def _check(self) -> None:
        config, decoder = self._decoder().config, self._decoder()
        scaled = [name for name in SCALED if getattr(config, name, None) not in (None, 1, 1.0)]
        table, head = (self.model.get_submodule(n) for n in (self.vocabulary.embedding, self.vocabulary.head))
        width = self.model.get_input_embeddings().embedding_dim
        if scaled or "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
            what = f"scales its logits by {scaled[0]}" if scaled else f"runs a {type(decoder).__name__}"
            raise AdapterError(f"{type(self.model).__name__} {what}; give its forward to a FunctionModel instead")
        if self.beside is None and (table.embedding_dim != width or head.in_features != config.hidden_size):
            raise AdapterError(
                f"{self.vocabulary.embedding} and {self.vocabulary.head} are {table.embedding_dim} and "
                f"{head.in_features} wide, the model {config.hidden_size}; give its forward to a FunctionModel instead"
            )

    def trained(self) -> list[nn.Parameter]:
        names = [self.vocabulary.embedding, self.vocabulary.head, *(self.beside[1:] if self.beside else ())]
        parts = [self._decoder(), self.model.get_input_embeddings(), *map(self.model.get_submodule, names)]
        return list({id(p): p for part in parts for p in part.parameters()}.values())

    def undecayed(self) -> list[nn.Parameter]:
        if not self.keep_text:
            return []
        head: Any = self.model.get_submodule(self.vocabulary.head)
        return [self.model.get_input_embeddings().weight, *([] if self.own else head.parameters())]

    def _decoder(self) -> Any:
        language = getattr(self.model, "language_model", None)  # Janus in its own repository
        return (self.model if language is None else language).get_decoder()

    def _known(self, ids: Tensor) -> Tensor:
        """Ids before the replacement as rows.

        Raises:
            ConfigError: if there is no such id.
        """
        on_host = ids.device.type == "cpu"  # a device checks by itself, and is not waited for
        if on_host and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.new_ids):
            raise ConfigError(f"ids {int(ids.min())} .. {int(ids.max())} are not all in 0 .. {len(self.new_ids) - 1}")
        return self.new_ids[ids]

    def _embed(self, clusters: Tensor) -> Tensor:
        """Clusters `[B, l]` as inputs of the language model `[B, l, H]`.

        Raises:
            ConfigError: if there is no such cluster; a row of text could be in its place.
        """
        on_host = clusters.device.type == "cpu"
        if on_host and clusters.numel() and not 0 <= int(clusters.min()) <= int(clusters.max()) < self.clusters:
            raise ConfigError(
                f"clusters {int(clusters.min())} .. {int(clusters.max())} are not all in 0 .. {self.clusters - 1}"
            )
        if self.beside is not None:
            embedded: Tensor = getattr(self.model, self.beside[0])(clusters)
            return embedded
        first = 0 if self.own else self.vocabulary.offset
        found: Tensor = self.model.get_submodule(self.vocabulary.embedding)(clusters + first)
        return found

    def _predict(self, states: Tensor, first: int) -> Tensor:
        """Logits `[B, l, k]` of states `[B, l, H]` for positions from `first` on."""
        if self.beside is not None:
            logits = self.model.get_submodule(self.beside[1])(states)
        else:
            head: Any = self.model.get_submodule(self.vocabulary.head)
            begin = self.vocabulary.offset if head.out_features > self.clusters else 0
            rows = slice(begin, begin + self.clusters)
            bias = None if head.bias is None else head.bias[rows]
            logits = torch.nn.functional.linear(states, head.weight[rows], bias)
        return self.within_codebook(logits, first)

    def _run(self, inputs: Tensor, mask: Tensor | None, seen: int, **cache: Any) -> Tensor:
        """States of inputs `[B, n, H]` behind `seen` others; `mask` `[B, seen + n]` tells padding, if there is any."""
        if mask is None:  # a mask would be looked at, for which the device had to be waited for
            positions = torch.arange(seen, seen + inputs.shape[1], device=inputs.device).expand(len(inputs), -1)
        else:
            positions, mask = (mask.long().cumsum(1) - 1).clamp_min(0)[:, seen:], mask.long()
        output = self._decoder()(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, **cache)
        states: Tensor = output.last_hidden_state
        return states

    def _rows(self, clusters: Tensor) -> Tensor:
        """Clusters as inputs, with the token that ends each full row."""
        embedded = self._embed(clusters)
        if self.row_length is None or clusters.shape[1] < self.row_length:
            return embedded
        end = self.model.get_input_embeddings()(self.row_end.expand(len(clusters), 1))
        pieces = []
        for row in embedded.split(self.row_length, dim=1):
            pieces += [row, end] if row.shape[1] == self.row_length else [row]
        return torch.cat(pieces, dim=1)

    def _before(self, clusters: int, device: torch.device) -> Tensor:
        """Where, behind the condition's last id, the state lies that predicts each of so many clusters."""
        places = torch.arange(clusters, device=device)
        return places if self.row_length is None else places + places // self.row_length

    def forward(self, condition: Condition, clusters: Tensor) -> Prediction:
        prefix = self.model.get_input_embeddings()(self._known(condition.ids))
        inputs = torch.cat([prefix, self._rows(clusters).to(prefix)], dim=1) if clusters.shape[1] else prefix
        self._check_fits(condition, inputs.shape[1])
        mask = torch.nn.functional.pad(condition.mask, (0, inputs.shape[1] - prefix.shape[1]), value=True)
        states = self._run(inputs, mask if condition.has_padding else None, 0, use_cache=False)
        places = prefix.shape[1] - 1 + self._before(clusters.shape[1] + 1, states.device)
        states = states[:, places]
        return Prediction(self._predict(states, 0), states)

    def _check_fits(self, condition: Condition, places: int) -> None:
        """Refuse more places than the model has positions for, and padding where the model would see it."""
        config = self._decoder().config
        if condition.has_padding and config.model_type in UNPADDED:
            raise ConfigError(
                f"{type(self.model).__name__} takes no padding; give conditions of equal length, with guidance, too"
            )
        most = getattr(config, "max_position_embeddings", None)
        if isinstance(most, int) and places > most:
            raise ConfigError(
                f"{type(self.model).__name__} has positions for {most} tokens, condition and image take {places}; draw "
                "shorter images, or give it more positions"
            )

    def decode(self, condition: Condition, length: int) -> Decoding:
        from transformers import StaticCache

        decoder = self._decoder()
        named = inspect.signature(decoder.forward).parameters
        name = next((n for n in ("cache", "past_key_values") if n in named), None)  # by the version of transformers
        stateful = getattr(decoder, "_is_stateful", False)  # its memory is no cache of keys and values
        if name is None or stateful or decoder.config.model_type in UNCACHED:
            yield from super().decode(condition, length)
            return
        inputs = self.model.get_input_embeddings()(self._known(condition.ids))
        ends = 0 if self.row_length is None else length // self.row_length
        longest = inputs.shape[1] + length + ends
        self._check_fits(condition, longest - 1)
        kept = {name: StaticCache(config=decoder.config, max_cache_len=longest), "use_cache": True}
        mask = torch.nn.functional.pad(condition.mask, (0, longest - inputs.shape[1]), value=True)
        seen = 0
        for place in range(length):
            upto = seen + inputs.shape[1]
            states = self._run(inputs, mask[:, :upto] if condition.has_padding else None, seen, **kept)
            seen = upto
            drawn = yield Prediction(self._predict(states[:, -1:], place)[:, 0], states[:, -1])
            inputs = self._embed(drawn[:, None])
            if self.row_length is not None and (place + 1) % self.row_length == 0:
                end = self.model.get_input_embeddings()(self.row_end.expand(len(drawn), 1))
                inputs = torch.cat([inputs, end], dim=1)
