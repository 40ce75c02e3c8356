"""What the weights of a packed file are, and the int8 layers that stand for the dense matrices of an int8 one.

Knows which matrices of a decoder are rounded; knows nothing of files. The idea: modules are swapped for others with the
same product, so that the decoder does not know. Norms, routers and gates, which decide what a token sees and where it
goes, stay as they are, and so does the embedding, of which a token reads one row. A latent's expansion stays too:
attention over a cache of latents multiplies by it from both sides.
"""

from __future__ import annotations

from enum import StrEnum

from moesys.kernels import Int8Product
from moesys.models import Decoder
from moesys.moe import Linear
from moesys.moe.linear import quantize_linear

_KEPT_NAMES = ("kv_b_proj", "shared_expert_gate", "coefficient")


class PackedForm(StrEnum):
    """How the matrices of a packed file are stored."""

    FLOAT = "float"
    """Every weight in the dtype that it is computed in."""
    INT8 = "int8"
    """Experts, attention, shared experts, dense layers and an output head of its own in int8 groups: lossy."""


def quantize_modules(model: Decoder, product: Int8Product = Int8Product.W8) -> None:
    """Changes a model: its dense matrices become int8 layers; banks of experts stay.

    On the meta device the layers take their shapes alone. Raises `ShapeError` when a weight is NaN or Inf.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and name not in _KEPT_NAMES:
                setattr(module, name, quantize_linear(child, product))
