"""The dense product of every matrix outside the experts: attention, shared experts, output head."""

from moesys.kernels.linear.api import linear

__all__ = ["linear"]
