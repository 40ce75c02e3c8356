"""What the C functions take, as ctypes structures: field by field the records of csrc."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


class Matrix(Structure):
    _fields_ = (
        ("format", c_int32),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
    )


class Activations(Structure):
    _fields_ = (
        ("values", c_void_p),
        ("rounded", c_void_p),
        ("scales", c_void_p),
        ("corrections", c_void_p),
        ("columns", c_int64),
    )


class LinearCall(Structure):
    """Holds the fields of a `Matrix` flat: one structure costs half as much to make as two, and a call is 10 us."""

    _fields_ = (
        ("x", c_void_p),
        ("is_bf16", c_int32),
        ("rows", c_int64),
        ("columns", c_int64),
        ("w_format", c_int32),
        ("w_values", c_void_p),
        ("w_scales", c_void_p),
        ("w_rows", c_int64),
        ("w_columns", c_int64),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("threads", c_int32),
    )


class GroupedLinearCall(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("token_stride", c_int64),
        ("group_stride", c_int64),
        ("is_bf16", c_int32),
        ("tokens", c_int64),
        ("groups", c_int64),
        ("columns", c_int64),
        ("w", c_void_p),
        ("w_is_bf16", c_int32),
        ("has_rows", c_int32),
        ("w_group", c_int64),
        ("w_column", c_int64),
        ("outputs", c_int64),
        ("y", c_void_p),
        ("threads", c_int32),
    )


class ProductCall(Structure):
    _fields_ = (
        ("a", c_void_p),
        ("a_row", c_int64),
        ("a_column", c_int64),
        ("b", c_void_p),
        ("b_row", c_int64),
        ("c", c_void_p),
        ("c_row", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("depth", c_int64),
        ("accumulate", c_int32),
        ("threads", c_int32),
    )


class RowSums(Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("positions", c_void_p),
        ("offsets", c_void_p),
        ("num_results", c_int64),
        ("num_positions", c_int64),
        ("is_bf16", c_int32),
        ("results", c_void_p),
    )


class RowSumCall(Structure):
    _fields_ = (
        ("sums", RowSums),
        ("rows", c_void_p),
        ("are_bf16", c_int32),
        ("num_rows", c_int64),
        ("columns", c_int64),
        ("threads", c_int32),
    )


class ExpertsCall(Structure):
    _fields_ = (
        ("x", Activations),
        ("row_ids", c_void_p),
        ("offsets", c_void_p),
        ("slots", c_void_p),
        ("num_experts", c_int64),
        ("num_rows", c_int64),
        ("num_assignments", c_int64),
        ("num_slots", c_int64),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("activation", c_int32),
        ("limit", c_float),
        ("alpha", c_float),
        ("inner", c_int64),
        ("inner_rows", Activations),
        ("y", c_void_p),
        ("sums", RowSums),
        ("threads", c_int32),
    )


class RMSNormCall(Structure):
    """Holds its two parts flat."""

    _fields_ = (
        ("x", c_void_p),
        ("row_stride", c_int64),
        ("first_weight", c_void_p),
        ("first_size", c_int64),
        ("first_groups", c_int64),
        ("second_weight", c_void_p),
        ("second_size", c_int64),
        ("second_groups", c_int64),
        ("is_bf16", c_int32),
        ("rows", c_int64),
        ("epsilon", c_float),
        ("y", c_void_p),
        ("threads", c_int32),
    )


class RotaryCall(Structure):
    _fields_ = (
        ("x", c_void_p),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("is_bf16", c_int32),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("pairs", c_int64),
        ("y", c_void_p),
        ("threads", c_int32),
    )


class AttentionCall(Structure):
    """The last seven fields are filled in by the function."""

    _fields_ = (
        ("q", c_void_p),
        ("q_is_bf16", c_int32),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("is_bf16", c_int32),
        ("rows", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("key_size", c_int64),
        ("value_size", c_int64),
        ("value_step", c_int64),
        ("page_ids", c_void_p),
        ("starts", c_void_p),
        ("stops", c_void_p),
        ("num_page_ids", c_int64),
        ("num_queries", c_int64),
        ("page_tokens", c_int64),
        ("window", c_int64),
        ("sinks", c_void_p),
        ("scale", c_float),
        ("y", c_void_p),
        ("threads", c_int32),
        ("most_pieces", c_int64),
        ("wide_key", c_int64),
        ("wide_value", c_int64),
        ("queries", c_void_p),
        ("sums", c_void_p),
        ("totals", c_void_p),
        ("weights", c_void_p),
    )


class TopKCall(Structure):
    _fields_ = (
        ("scores", c_void_p),
        ("num_tokens", c_int64),
        ("num_experts", c_int64),
        ("k", c_int64),
        ("ids", c_void_p),
        ("threads", c_int32),
    )


class ChoiceCall(Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("scores", c_void_p),
        ("bias", c_void_p),
        ("num_tokens", c_int64),
        ("num_experts", c_int64),
        ("k", c_int64),
        ("normalizes", c_int32),
        ("smallest_sum", c_float),
        ("scale", c_float),
        ("ids", c_void_p),
        ("token_offsets", c_void_p),
        ("weights", c_void_p),
        ("threads", c_int32),
    )


class WeighingCall(Structure):
    _fields_ = (
        ("scores", c_void_p),
        ("ids", c_void_p),
        ("offsets", c_void_p),
        ("num_tokens", c_int64),
        ("num_experts", c_int64),
        ("num_assignments", c_int64),
        ("normalizes", c_int32),
        ("smallest_sum", c_float),
        ("weights", c_void_p),
    )


class GroupingCall(Structure):
    _fields_ = (
        ("ids", c_void_p),
        ("token_offsets", c_void_p),
        ("weights", c_void_p),
        ("num_tokens", c_int64),
        ("num_experts", c_int64),
        ("num_assignments", c_int64),
        ("row_ids", c_void_p),
        ("offsets", c_void_p),
        ("positions", c_void_p),
        ("sorted_weights", c_void_p),
    )
