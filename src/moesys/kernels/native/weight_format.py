"""Which weights the native kernels take, numbered as in operands.h."""

from __future__ import annotations

from enum import IntEnum

import torch

from moesys.kernels.formats import Int8Product, Int8Weight
from moesys.kernels.records import Weight


class WeightFormat(IntEnum):
    """In the order of ``weight_format``."""

    F32 = 0
    BF16 = 1
    W8 = 2
    W8A8 = 3


_OF_DTYPE = {torch.float32: WeightFormat.F32, torch.bfloat16: WeightFormat.BF16}


def find_format(weight: Weight) -> WeightFormat | None:
    """Returns the format of a weight, or None for one that the native kernels do not take."""
    if isinstance(weight, Int8Weight):
        return WeightFormat.W8A8 if weight.product is Int8Product.W8A8 else WeightFormat.W8
    return _OF_DTYPE.get(weight.dtype)
