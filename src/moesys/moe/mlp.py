"""The dense feed-forward layer without a gate, and the choice between it and `SwiGLU` by an expert's form."""

from __future__ import annotations

from torch import Tensor, nn

from moesys.errors import ShapeError
from moesys.kernels import Activation, ExpertForm
from moesys.moe.linear import Linear
from moesys.moe.swiglu import SwiGLU


class MLP(nn.Module):
    """down(activation(up(x))) with GELU or ReLU, the dense form of an expert without a gate."""

    def __init__(self, hidden_size: int, inner_size: int, activation: Activation, bias: bool) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, inner_size, bias=bias)
        self.down_proj = Linear(inner_size, hidden_size, bias=bias)
        self._activate = nn.functional.gelu if activation is Activation.GELU else nn.functional.relu

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns (..., hidden)."""
        return self.down_proj(self._activate(self.up_proj(x)))


def make_dense(hidden_size: int, inner_size: int, form: ExpertForm, bias: bool) -> SwiGLU | MLP:
    """Makes the dense layer that has the shape of an expert. Raises `ShapeError` for a form that has none."""
    match form.activation:
        case Activation.GELU | Activation.RELU:
            return MLP(hidden_size, inner_size, form.activation, bias)
        case Activation.SWIGLU if not bias:
            return SwiGLU(hidden_size, inner_size)
        case _:
            raise ShapeError(
                f"there is no dense layer of the form {form.activation} {'with' if bias else 'without'} biases; "
                "use gelu or relu, or swiglu without biases"
            )
