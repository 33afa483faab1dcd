"""One file a method. Importing this package makes all of them known by name."""

from hasten.caching.methods.foca import FoCa
from hasten.caching.methods.hicache import HiCache
from hasten.caching.methods.reuse import Reuse
from hasten.caching.methods.taylorseer import TaylorSeer

__all__ = ["FoCa", "HiCache", "Reuse", "TaylorSeer"]
