"""How transformers are wired: one data entry a family, and a probe for families that have none."""

from hasten.hosts import flux as _flux  # noqa: F401  (these three register the families)
from hasten.hosts import image as _image  # noqa: F401
from hasten.hosts import video as _video  # noqa: F401
from hasten.hosts.layout import TokenLayout, layout_of
from hasten.hosts.probe import require_stacks, root_arguments, trace
from hasten.hosts.registry import find, register, registered
from hasten.hosts.spec import HostSpec, LayoutKind, ModuleSpec, StackSpec
from hasten.hosts.standin import StandIn

__all__ = [
    "HostSpec",
    "LayoutKind",
    "ModuleSpec",
    "StackSpec",
    "StandIn",
    "TokenLayout",
    "find",
    "layout_of",
    "register",
    "registered",
    "require_stacks",
    "root_arguments",
    "trace",
]
