"""`sprites-stream`: a small chunk-wise causal video model whose objects leave the image and come back."""

from hasten_zoo.sprites_stream.data import World, conditions, draw, paths, random_world
from hasten_zoo.sprites_stream.model import CausalVideoTransformer, ModelConfig, load_model, new_stream
from hasten_zoo.sprites_stream.rollout import RollOut, roll_out

__all__ = [
    "CausalVideoTransformer",
    "ModelConfig",
    "RollOut",
    "World",
    "conditions",
    "draw",
    "load_model",
    "new_stream",
    "paths",
    "random_world",
    "roll_out",
]
