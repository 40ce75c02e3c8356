"""What the kernels multiply, as the records of operands.h: pointers, with the memory behind them kept alive."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.formats import GROUP_SIZE, Int8Weight
from moesys.kernels.native.library import load_library
from moesys.kernels.native.structures import Activations, Matrix
from moesys.kernels.native.weight_format import WeightFormat, find_format
from moesys.kernels.records import Weight

FLOAT32: Any = {"dtype": torch.float32, "device": "cpu"}
_LANES_OF_CORRECTION = 16


class ActivationBuffers:
    """Activations as a weight's format wants them, and the memory behind the pointers."""

    def __init__(self, x_RK: Tensor, weight: Weight) -> None:
        num_rows, columns = x_RK.shape
        form = find_format(weight)
        if x_RK.dtype is torch.bfloat16 and form is WeightFormat.BF16 and _multiplies_bf16():
            self._rounded = x_RK.contiguous()
            self.record = Activations(rounded=self._rounded.data_ptr(), columns=columns)
            return
        x_RK = x_RK.float()
        if isinstance(weight, Int8Weight) and weight.values.shape[-1] != columns:
            x_RK = torch.nn.functional.pad(x_RK, (0, weight.values.shape[-1] - columns))
            columns = weight.values.shape[-1]
        self._values = x_RK.contiguous()
        self.record = Activations(values=self._values.data_ptr(), columns=columns)
        if form is WeightFormat.W8A8:
            num_groups = num_rows * columns // GROUP_SIZE
            sizes = (4 * _LANES_OF_CORRECTION * num_groups, GROUP_SIZE * num_groups, 4 * num_groups)
            self._rounded = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
            self.record.corrections = start = self._rounded.data_ptr()
            self.record.rounded = start + sizes[0]
            self.record.scales = start + sizes[0] + sizes[1]


@cache
def _multiplies_bf16() -> bool:
    return bool(load_library().moesys_multiplies_bf16())


def new_inner_rows(num_rows: int, columns: int, dtype: torch.dtype, weight: Weight) -> Tensor:
    """Returns rows that the kernel fills and multiplies with ``weight``, for experts whose rows came in ``dtype``: zero
    beyond the columns where the weight's format pads, bfloat16 where the CPU multiplies it, else float32."""
    if isinstance(weight, Int8Weight) and weight.values.shape[-1] != columns:
        return torch.zeros(num_rows, weight.values.shape[-1], **FLOAT32)
    if dtype is torch.bfloat16 and find_format(weight) is WeightFormat.BF16 and _multiplies_bf16():
        return torch.empty(num_rows, columns, dtype=dtype, device="cpu")
    return torch.empty(num_rows, columns, **FLOAT32)


def pack_matrix(weight: Weight) -> Matrix:
    form = find_format(weight)
    assert form is not None
    values, scales = (
        (weight.values, weight.scales.data_ptr()) if isinstance(weight, Int8Weight) else (weight, None)
    )
    assert values.is_contiguous()
    *_, rows, columns = values.shape
    return Matrix(form, values.data_ptr(), scales, rows, columns)


def require_readable(dtype: torch.dtype, *tensors: Tensor | None) -> None:
    """Raises `ShapeError` for a tensor that C would misread: of another dtype, or not in the CPU's memory."""
    for tensor in tensors:
        if tensor is not None and (tensor.dtype is not dtype or not tensor.is_cpu):
            raise ShapeError(
                f"a native kernel reads {dtype} on a CPU here, got {tensor.dtype} on {tensor.device}; convert it, or "
                "choose the kernel 'torch'"
            )


def point(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
