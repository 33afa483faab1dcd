"""How transformers are wired: one data entry a family, and a probe for families that have none."""

from hasten.models import flux as _flux  # noqa: F401  (these three register the families)
from hasten.models import image as _image  # noqa: F401
from hasten.models import video as _video  # noqa: F401
from hasten.models.adapter import BlockModules, BlockStack, LayoutKind, ModelAdapter
from hasten.models.layout import TokenLayout, layout_of, patch_size
from hasten.models.probe import require_stacks, root_arguments, trace
from hasten.models.proxy import Proxy
from hasten.models.registry import find, register, registered

__all__ = [
    "BlockModules",
    "BlockStack",
    "LayoutKind",
    "ModelAdapter",
    "Proxy",
    "TokenLayout",
    "find",
    "layout_of",
    "patch_size",
    "register",
    "registered",
    "require_stacks",
    "root_arguments",
    "trace",
]
