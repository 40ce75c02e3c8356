"""Root-mean-square normalisation over the last dimension."""

from moesys.kernels.rms_norm.api import rms_norm, rms_norm_pair

__all__ = ["rms_norm", "rms_norm_pair"]
