"""The product of two matrices in training, where nothing relies on a row's bits."""

from moesys.kernels.products.api import multiply, prefers_native

__all__ = ["multiply", "prefers_native"]
