"""`emoji-tokens`: a small VQ tokenizer of emoji pictures, and autoregressive models under four vocabularies."""

from hasten.zoo.emoji_tokens.tokenizer import VQTokenizer

__all__ = ["VQTokenizer"]
