"""The linear layer of every model: `torch.nn.Linear` in names and parameters, its product by our operator."""

from __future__ import annotations

from torch import Tensor, nn

from moesys.kernels import linear


class Linear(nn.Linear):
    """x @ weight^T + bias; which kernel computes it is the operator's choice."""

    def forward(self, input: Tensor) -> Tensor:
        """Takes (..., in_features), returns (..., out_features) in the dtype of the input."""
        return linear(input, self.weight, self.bias)
