"""A causal LM of transformers as a `CausalModel`: only the rows of clusters are predicted, and the cache is static.

Classes differ in what they do beside their decoder and their head, and there are new ones every month. So each model is
tried when it is taken: its own forward on a few clusters must give its head the states that we give it, and leave the
logits as they are. Whether it heeds a mask, and whether a static cache changes anything, is tried as well.

The sequence is the condition, then the clusters of the image; models that end each row of an image with a token (Emu3,
Lumina-mGPT) get it where it belongs. States are those of the language model after its last norm; clusters have tables
in it (LlamaGen-like, Emu3, Chameleon) or beside it (Janus), where they pass through its aligner and its head.

Shapes: `B` images, `P` ids of a condition, `l` clusters, `k` clusters that there are, `H` width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from hasten.errors import AdapterError, ConfigError
from hasten.io import describe
from hasten.parameters import Range, accepted
from hasten.tokens.causal import CausalModel, Condition, Decoding, Prediction, evaluating
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
TRIED = 4  # clusters of the images that a model is tried with, once
SPREAD = 100.0  # of the logits that are put in the place of a head's, to see what becomes of them


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
        AdapterError: if it is not known how the model predicts clusters, or its own forward gives something else.
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
        device = model.get_input_embeddings().weight.device
        self.new_ids, self.row_end = self.new_ids.to(device), self.row_end.to(device)
        self._check()
        self.takes_padding, self.takes_cache = True, False
        self._try(device)

    def _check(self) -> None:
        config, decoder = self._decoder().config, self._decoder()
        table, head = (self.model.get_submodule(n) for n in (self.vocabulary.embedding, self.vocabulary.head))
        width = self.model.get_input_embeddings().embedding_dim
        if "inputs_embeds" not in inspect.signature(decoder.forward).parameters:
            raise self._unlike(f"runs a {type(decoder).__name__}")
        if self.beside is None and (table.embedding_dim != width or head.in_features != config.hidden_size):
            raise AdapterError(
                f"{self.vocabulary.embedding} and {self.vocabulary.head} are {table.embedding_dim} and "
                f"{head.in_features} wide, the model {config.hidden_size}; give its forward to a FunctionModel instead"
            )

    def _unlike(self, what: str) -> AdapterError:
        return AdapterError(f"{type(self.model).__name__} {what}; give its forward to a FunctionModel instead")

    def _most(self) -> int | None:
        """Places that the model has positions for, if their number is limited."""
        most = getattr(self._decoder().config, "max_position_embeddings", None)
        return most if isinstance(most, int) else None

    @torch.no_grad()
    def _try(self, device: torch.device) -> None:
        """Compare with the model's own forward; find out whether it heeds a mask, and may have a static cache.

        Raises:
            AdapterError: if its own predictions are others.
        """
        most = self._most()
        length = TRIED if most is None else max(1, min(TRIED, most - 1))
        clusters = torch.arange(2 * length, device=device).reshape(2, length) % self.clusters
        with evaluating(self):
            try:
                inputs = self._embed(clusters)
                states = self._run(inputs.clone(), None, 0, use_cache=False)  # CTRL scales its inputs in place
            except Exception as error:  # whatever it raises, it cannot be run like this
                raise self._unlike(
                    f"cannot be run on {device} ({describe(error)}): move it to its device first; or"
                ) from error
            head = self.model.get_submodule(self.vocabulary.head)
            if self.beside is None and not self.own and self.model.get_output_embeddings() is head:
                self._compare_with_own(clusters, states)
            self.takes_padding = self._tried(lambda: self._heeds_mask(inputs, states[:1]))
            self.takes_cache = self._tried(lambda: self._caches(device, length))

    def _tried(self, attempt: Callable[[], bool]) -> bool:
        try:
            return attempt()
        except Exception:  # whatever it raises, it cannot do it
            return False

    def _compare_with_own(self, clusters: Tensor, states: Tensor) -> None:
        """Refuse a model that gives its head other states, or changes what comes out of it."""
        given, made = [], []

        def put(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            given.append(inputs[0])
            made.append(torch.linspace(-SPREAD, SPREAD, output.numel()).reshape(output.shape).to(output))
            return made[-1]

        hook = self.model.get_submodule(self.vocabulary.head).register_forward_hook(put)
        named = "use_cache" in inspect.signature(self.model.forward).parameters
        try:
            logits = self.model(
                input_ids=clusters + self.vocabulary.offset, **({"use_cache": False} if named else {})
            ).logits
        except Exception as error:  # whatever it raises
            raise self._unlike(f"cannot be run on ids of clusters alone ({describe(error)})") from error
        finally:
            hook.remove()
        if len(given) != 1 or given[0].shape != states.shape or logits.shape != made[0].shape:
            raise self._unlike("does not run its head once on the states of all places")
        if not _alike(given[0], states):
            raise self._unlike("gives its head other states than those of its decoder")
        forbidden = logits <= torch.finfo(logits.dtype).min / 2  # Chameleon writes no image tokens into a text
        if not torch.equal(logits[~forbidden].float(), made[0][~forbidden].float()):
            raise self._unlike("changes its logits after its head (a scale, a cap or the like)")

    def _heeds_mask(self, inputs: Tensor, states: Tensor) -> bool:
        """Whether padding in front of the first image changes nothing, whatever it holds."""
        mask = torch.ones(2, inputs.shape[1] + 1, dtype=torch.bool, device=inputs.device)
        mask[0, 0] = False
        for padding in (inputs[:, :1], -3 * inputs.flip(1)[:, :1]):
            found = self._run(torch.cat([padding, inputs], dim=1), mask, 0, use_cache=False)
            if not _alike(found[:1, 1:], states):
                return False
        return True

    def _caches(self, device: torch.device, length: int) -> bool:
        """Whether the model says that it takes a static cache, and a few clusters come out as without one."""
        decoder = self._decoder()
        said = getattr(decoder, "_can_compile_fullgraph", getattr(decoder, "_supports_static_cache", False))
        if not said or getattr(decoder, "_is_stateful", False) or self._cache_name() is None:
            return False  # a window or a memory of its own shows after more clusters than are tried
        ids = torch.arange(4, device=device).reshape(2, 2) % len(self.new_ids)
        padded = torch.tensor([[False, True], [True, True]], device=device)
        for condition in (Condition(ids), Condition(ids, padded))[: 1 + self.takes_padding]:
            clusters = torch.arange(2 * length, device=device).reshape(2, length) % self.clusters
            decoding = self._decode_cached(condition, length)
            found = [next(decoding), *(decoding.send(clusters[:, i]) for i in range(length - 1))]
            expected = self(condition, clusters[:, :-1]).states
            cached = [prediction.states for prediction in found]
            if expected is None or not all(s is not None and _alike(s, expected[:, i]) for i, s in enumerate(cached)):
                return False
        return True

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
        if condition.has_padding and not self.takes_padding:
            raise ConfigError(
                f"{type(self.model).__name__} takes no padding; give conditions of equal length, with guidance, too"
            )
        most = self._most()
        if most is not None and places > most:
            raise ConfigError(
                f"{type(self.model).__name__} has positions for {most} tokens, condition and image take {places}; draw "
                "shorter images, or give it more positions"
            )

    def decode(self, condition: Condition, length: int) -> Decoding:
        yield from (self._decode_cached if self.takes_cache else super().decode)(condition, length)

    def _cache_name(self) -> str | None:
        """What the decoder calls its cache, by the version of transformers."""
        named = inspect.signature(self._decoder().forward).parameters
        return next((name for name in ("cache", "past_key_values") if name in named), None)

    def _decode_cached(self, condition: Condition, length: int) -> Decoding:
        from transformers import StaticCache

        inputs = self.model.get_input_embeddings()(self._known(condition.ids))
        ends = 0 if self.row_length is None else length // self.row_length
        longest = inputs.shape[1] + length + ends
        self._check_fits(condition, longest - 1)
        cache = StaticCache(config=self._decoder().config, max_cache_len=longest)
        kept = {str(self._cache_name()): cache, "use_cache": True}
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


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether states are the same but for rounding."""
    limit = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.05
    return bool((found.float() - expected.float()).abs().max() <= limit * expected.float().abs().max())
