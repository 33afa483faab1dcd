"""The word-level tokenizer of the models that learn their text encoders along."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

__all__ = ["WordTokenizer", "token_ids", "word_tokenizer"]


class WordTokenizer(PreTrainedTokenizerFast):
    """A word-level tokenizer whose length never exceeds its model's.

    `FluxPipeline` asks for 512 text tokens unless told otherwise, which is eight times the image of these small models.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("max_length") is not None:
            kwargs["max_length"] = min(int(kwargs["max_length"]), int(self.model_max_length))
        return super().__call__(*args, **kwargs)


def word_tokenizer(words: Iterable[str], length: int, split: pre_tokenizers.PreTokenizer) -> WordTokenizer:
    """A tokenizer over some words; unknown words share one token.

    Args:
        words: all of them, in lower case; their order does not matter.
        length: most tokens of a text, begin and end counted.
        split: takes a text apart.
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *sorted(set(words))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)])
    return WordTokenizer(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=length,
    )


def token_ids(tokenizer: WordTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """`[N, model_max_length]` int16, padded.

    Raises:
        ValueError: if a text has more tokens than that, or unknown words.
    """
    length = int(tokenizer.model_max_length)
    padded = tokenizer(list(texts), padding="max_length", max_length=length, return_tensors="pt").input_ids
    if padded.shape[1] != length or bool((padded == tokenizer.unk_token_id).any()):
        raise ValueError(f"a text has more than {length} tokens, or unknown words")
    short: torch.Tensor = padded.to(torch.int16)
    return short
