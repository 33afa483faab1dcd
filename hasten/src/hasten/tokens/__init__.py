"""Smaller vocabularies for autoregressive image models: MASC's semantic tree, its comparators, and their use."""

from hasten.tokens.comparators import flat_map, kmeans_map, random_map
from hasten.tokens.mapping import TokenMap
from hasten.tokens.members import MemberSampler
from hasten.tokens.replace import replace_vocabulary
from hasten.tokens.tree import SemanticTree

__all__ = [
    "MemberSampler",
    "SemanticTree",
    "TokenMap",
    "flat_map",
    "kmeans_map",
    "random_map",
    "replace_vocabulary",
]
