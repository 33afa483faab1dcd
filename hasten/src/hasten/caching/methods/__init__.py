"""One file a method. Importing this package makes all of them known by name."""

from hasten.caching.methods.ab_cache import ABCache
from hasten.caching.methods.dmd import DMD
from hasten.caching.methods.easycache import EasyCache
from hasten.caching.methods.fbcache import FBCache
from hasten.caching.methods.foca import FoCa
from hasten.caching.methods.freqca import FreqCa
from hasten.caching.methods.hicache import HiCache
from hasten.caching.methods.hyca import HyCa
from hasten.caching.methods.l2p import L2P
from hasten.caching.methods.leapcache import LeapCache
from hasten.caching.methods.magcache import MagCache
from hasten.caching.methods.reuse import Reuse
from hasten.caching.methods.speca import SpeCa
from hasten.caching.methods.spectrum import Spectrum
from hasten.caching.methods.svdcache import SVDCache
from hasten.caching.methods.taylorseer import TaylorSeer
from hasten.caching.methods.teacache import TeaCache

__all__ = [
    "DMD",
    "L2P",
    "ABCache",
    "EasyCache",
    "FBCache",
    "FoCa",
    "FreqCa",
    "HiCache",
    "HyCa",
    "LeapCache",
    "MagCache",
    "Reuse",
    "SVDCache",
    "SpeCa",
    "Spectrum",
    "TaylorSeer",
    "TeaCache",
]
