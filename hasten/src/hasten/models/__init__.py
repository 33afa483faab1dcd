"""How denoisers are wired: one data entry per family of transformers, a probe for families that have none, UNets."""

from hasten.models import flux as _flux  # noqa: F401  (these four register the families)
from hasten.models import image as _image  # noqa: F401
from hasten.models import sound as _sound  # noqa: F401
from hasten.models import video as _video  # noqa: F401
from hasten.models.adapter import BlockModules, BlockStack, LayoutKind, ModelAdapter
from hasten.models.final_norm import FinalNorm, final_norm
from hasten.models.layout import TokenLayout, layout_of, patch_size
from hasten.models.probe import require_stacks, root_arguments, trace
from hasten.models.proxy import Here, Proxy
from hasten.models.registry import find, register, registered
from hasten.models.unet import DeepPart, deep_part, is_unet

__all__ = [
    "BlockModules",
    "BlockStack",
    "DeepPart",
    "FinalNorm",
    "Here",
    "LayoutKind",
    "ModelAdapter",
    "Proxy",
    "TokenLayout",
    "deep_part",
    "final_norm",
    "find",
    "is_unet",
    "layout_of",
    "patch_size",
    "register",
    "registered",
    "require_stacks",
    "root_arguments",
    "trace",
]
