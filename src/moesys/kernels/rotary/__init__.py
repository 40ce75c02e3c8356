"""The rotary position embedding as a rotation of pairs."""

from moesys.kernels.rotary.api import rotate_pairs

__all__ = ["rotate_pairs"]
