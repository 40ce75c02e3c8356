"""What a call of the expert operator must look like. Reads shapes, dtypes and formats; never a value of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels.formats import Int8Product, Int8Weight
from moesys.kernels.records import Adapters, BankView, ModuleView, Rows, TokenSum, Weight

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_call(rows: Rows, view: BankView | ModuleView, adapters: Adapters | None) -> None:
    """Raises `ShapeError` for arguments of `compute_experts` that do not fit together."""
    _check_rows(rows)
    _check_slots(rows, view)
    if isinstance(view, BankView):
        _check_bank(rows, view)
        if adapters is not None:
            _check_adapters(rows, view, adapters)
    elif adapters is not None:
        raise ShapeError(
            "adapters add to the matrices of a bank, and a ModuleView has none; put them inside the modules"
        )


def check_sum(rows: Rows, view: BankView | ModuleView, weights_A: Tensor, token_sum: TokenSum) -> None:
    """Raises `ShapeError` for the further arguments of `compute_experts_summed`."""
    if weights_A.shape != rows.row_ids.shape:
        raise ShapeError(
            f"weights must have one entry per assignment ({rows.num_assignments}), got shape {tuple(weights_A.shape)}"
        )
    if torch.is_grad_enabled() and weights_A.dtype not in (torch.float32, torch.float64):
        raise ShapeError(
            f"routing weights must be float32 or float64, got {weights_A.dtype}; route in float32"
        )
    _check_ids("token_sum.positions", token_sum.positions)
    _check_offsets("token_sum.offsets", token_sum.offsets)
    if not view.covers_all:
        raise ShapeError(
            "summing in the kernel needs a view that covers every expert; "
            "use compute_experts per view and sum when the last one is done"
        )


def _check_rows(rows: Rows) -> None:
    if rows.x_RD.ndim != 2:
        raise ShapeError(f"x must be (rows, hidden), got shape {tuple(rows.x_RD.shape)}; flatten it to rows")
    if rows.x_RD.dtype not in _FLOATS:
        raise ShapeError(
            f"x must be floating point of 2 to 8 bytes, got {rows.x_RD.dtype}; cast it to the dtype of the weights"
        )
    _check_ids("row_ids", rows.row_ids)
    _check_offsets("offsets", rows.offsets)


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ShapeError(f"{name} must be a flat list of int64, got {ids.dtype} of shape {tuple(ids.shape)}")


def _check_offsets(name: str, offsets: Tensor) -> None:
    _check_ids(name, offsets)
    if offsets.shape[0] == 0:
        raise ShapeError(f"{name} must hold one entry more than there are groups, got none; begin it with 0")


def _check_slots(rows: Rows, view: BankView | ModuleView) -> None:
    if view.slot_of_expert is not None:
        if view.slot_of_expert.shape != (rows.num_experts,):
            raise ShapeError(
                f"slot_of_expert must have one entry per expert ({rows.num_experts}), "
                f"got shape {tuple(view.slot_of_expert.shape)}"
            )
        _check_ids("slot_of_expert", view.slot_of_expert)
    elif view.num_slots != rows.num_experts:
        raise ShapeError(
            f"a view without a slot table must hold all {rows.num_experts} experts, it has {view.num_slots} slots"
        )


def _check_bank(rows: Rows, view: BankView) -> None:
    hidden, halves, inner = rows.x_RD.shape[1], view.form.num_halves, view.down_SDF.shape[-1]
    num_slots, width = view.num_slots, halves * inner
    product = "inner" if halves == 1 else "2 * inner"
    if view.gate_up_SFD.shape != (num_slots, width, hidden):
        form = f"(slots, {product}, hidden) for {view.form.activation}"
        raise _make_shape_error("gate_up", view.gate_up_SFD, form, (num_slots, width, hidden))
    _check_shape("down", view.down_SDF, "(slots, hidden, inner)", (num_slots, hidden, inner))
    _check_formats(view)
    _check_dtypes(rows.x_RD.dtype, view)
    if view.gate_up_bias_SF is not None:
        _check_shape("gate_up_bias", view.gate_up_bias_SF, f"(slots, {product})", (num_slots, width))
        _check_dtype_of_rows("gate_up_bias", view.gate_up_bias_SF, rows)
    if view.down_bias_SD is not None:
        _check_shape("down_bias", view.down_bias_SD, "(slots, hidden)", (num_slots, hidden))
        _check_dtype_of_rows("down_bias", view.down_bias_SD, rows)


def _check_formats(view: BankView) -> None:
    formats = _find_format(view.gate_up_SFD), _find_format(view.down_SDF)
    if formats[0] != formats[1]:
        raise ShapeError(
            f"gate_up and down must have the same format, got {_name(formats[0])} and {_name(formats[1])}; "
            "convert one of them"
        )


def _check_dtypes(dtype: torch.dtype, view: BankView) -> None:
    weight = view.gate_up_SFD
    if isinstance(weight, Int8Weight):
        if dtype not in (torch.float32, torch.float64):
            raise ShapeError(
                f"int8 experts take activations of float32 (float64 in the reference), got {dtype}; cast x to float32"
            )
    elif weight.dtype not in _FLOATS:
        raise ShapeError(
            f"the experts must be floats of 2 to 8 bytes or an Int8Weight, got {weight.dtype}; "
            "widen them or use pack_int8"
        )
    elif torch.promote_types(weight.dtype, dtype) != dtype:
        raise ShapeError(
            f"x is {dtype} but the experts are {weight.dtype}, which does not widen to it; "
            f"cast x to {torch.promote_types(weight.dtype, dtype)}"
        )


def _check_adapters(rows: Rows, view: BankView, adapters: Adapters) -> None:
    hidden, width, inner = rows.x_RD.shape[1], view.gate_up_SFD.shape[1], view.down_SDF.shape[2]
    gate_up_rank, down_rank = adapters.gate_up_a_ERD.shape[1:2], adapters.down_a_ERF.shape[1:2]
    for name, tensor, what, shape in (
        ("gate_up_a", adapters.gate_up_a_ERD, "(experts, rank, hidden)", (*gate_up_rank, hidden)),
        ("gate_up_b", adapters.gate_up_b_EFR, "(experts, rows of gate_up, rank)", (width, *gate_up_rank)),
        ("down_a", adapters.down_a_ERF, "(experts, rank, inner)", (*down_rank, inner)),
        ("down_b", adapters.down_b_EDR, "(experts, hidden, rank)", (hidden, *down_rank)),
    ):
        _check_shape(f"the adapters' {name}", tensor, what, (rows.num_experts, *shape))
        _check_dtype_of_rows(f"the adapters' {name}", tensor, rows)


def _check_shape(name: str, tensor: Weight, what: str, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise _make_shape_error(name, tensor, what, expected)


def _make_shape_error(name: str, tensor: Weight, what: str, expected: tuple[int, ...]) -> ShapeError:
    return ShapeError(f"{name} must be {what} = {expected}, got {tuple(tensor.shape)}")


def _check_dtype_of_rows(name: str, tensor: Tensor, rows: Rows) -> None:
    if tensor.dtype != rows.x_RD.dtype:
        raise ShapeError(
            f"{name} must have the dtype of x ({rows.x_RD.dtype}), got {tensor.dtype}; cast one of them"
        )


def _find_format(weight: Weight) -> torch.dtype | Int8Product:
    return weight.product if isinstance(weight, Int8Weight) else weight.dtype


def _name(weight_format: torch.dtype | Int8Product) -> str:
    return f"int8 {weight_format}" if isinstance(weight_format, Int8Product) else str(weight_format)
