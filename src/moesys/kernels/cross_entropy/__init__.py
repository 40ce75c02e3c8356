"""The last linear layer and the cross entropy as one operator that never holds all logits."""

from moesys.kernels.cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
