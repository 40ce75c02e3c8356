"""The product of a matrix per group, such as an attention head, with rows of its own for each."""

from moesys.kernels.grouped_linear.api import grouped_linear

__all__ = ["grouped_linear"]
