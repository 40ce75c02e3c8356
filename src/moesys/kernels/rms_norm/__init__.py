"""Root-mean-square normalisation over the last dimension."""

from moesys.kernels.rms_norm.api import rms_norm

__all__ = ["rms_norm"]
