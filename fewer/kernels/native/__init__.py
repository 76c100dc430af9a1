"""The decoding step of the CPU in C: compiled once on this machine where there is a compiler, otherwise not used."""

from fewer.kernels.native.build import Unavailable, library

__all__ = ["Unavailable", "library"]
