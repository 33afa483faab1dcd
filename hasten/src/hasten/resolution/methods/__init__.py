"""One file a method. Importing this package makes all of them known by name."""

from hasten.resolution.methods.dvg import DVG

__all__ = ["DVG"]
