"""One file a method. Importing this package makes all of them known by name."""

from hasten.resolution.methods.bottleneck import Bottleneck
from hasten.resolution.methods.dvg import DVG
from hasten.resolution.methods.fresco import Fresco
from hasten.resolution.methods.ralu import RALU
from hasten.resolution.methods.specedit import SpecEdit
from hasten.resolution.methods.spectral import Spectral

__all__ = ["DVG", "RALU", "Bottleneck", "Fresco", "SpecEdit", "Spectral"]
