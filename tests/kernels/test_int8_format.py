"""The int8 format: packing, unpacking, and the error that it may make."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesys.errors import ShapeError
from moesys.kernels import Int8Product, Int8Weight, pack_int8
from moesys.kernels.formats import GROUP_SIZE, round_to_int8


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Weights of any float dtype whose groups differ in size by many powers of two, though none so small that its
    scale is subnormal; some entries are zero."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 2 * GROUP_SIZE + 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    powers = torch.randint(-60, 60, (1, columns // GROUP_SIZE + 1), generator=generator)
    weight *= (2.0**powers).repeat_interleave(GROUP_SIZE, dim=1)[:, :columns]
    weight[torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    return weight.to(draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))


def expand_scales(packed: Int8Weight) -> Tensor:
    return packed.scales.double().repeat_interleave(GROUP_SIZE, dim=-1)[..., : packed.num_columns]


@settings(max_examples=150, deadline=None)
@given(weight=matrices())
def test_a_weight_is_off_by_at_most_half_its_scale(weight: Tensor) -> None:
    """Half a scale from rounding; the product with the inverse scale and the one that unpacks, both in float32, move
    a number of up to 127 scales by a few 2^-24 of itself."""
    packed = pack_int8(weight)
    scales = expand_scales(packed)
    error = (packed.unpack(torch.float64) - weight.double()).abs()
    assert (error <= scales * (0.5 + 127 * 2**-21)).all()


@settings(max_examples=50, deadline=None)
@given(weight=matrices())
def test_packing_what_was_unpacked_changes_nothing(weight: Tensor) -> None:
    packed = pack_int8(weight)
    again = pack_int8(packed.unpack())
    assert torch.equal(again.values, packed.values)
    torch.testing.assert_close(again.scales, packed.scales, rtol=2**-22, atol=0)


@settings(max_examples=50, deadline=None)
@given(weight=matrices())
def test_the_largest_weight_of_a_group_uses_the_whole_range(weight: Tensor) -> None:
    packed = pack_int8(weight)
    largest = packed.values.unflatten(-1, (-1, GROUP_SIZE)).abs().amax(dim=-1)
    assert ((largest == 127) | (packed.scales == 0)).all()
    assert packed.values.min() >= -127
    assert not packed.values[..., packed.num_columns :].any()


def test_groups_do_not_share_a_scale() -> None:
    weight = torch.ones(1, 130)
    weight[:, 64:128], weight[:, 128:] = 1000.0, 0.001
    packed = pack_int8(weight)
    torch.testing.assert_close(packed.scales * 127, torch.tensor([[1.0, 1000.0, 0.001]]))
    assert (packed.values[:, :130] == 127).all()


def test_subnormal_scales_keep_large_and_small_apart() -> None:
    """The inverse of such a scale is infinite."""
    weight = torch.tensor([[5e-40, 1e-41, 0.0]])
    error = (pack_int8(weight).unpack() - weight).abs()
    assert error.max() <= 5e-42


def test_groups_of_zeros_have_scale_zero_and_unpack_to_zeros() -> None:
    weight = torch.cat([torch.zeros(2, 64), torch.ones(2, 5)], dim=1)
    packed = pack_int8(weight)
    assert not packed.scales[:, 0].any()
    assert torch.equal(packed.unpack(), weight)


def test_ties_round_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert pack_int8(weight).values[0, :6].tolist() == [127, 0, 2, 2, 0, -2]


def test_rounding_follows_the_rule_of_packing() -> None:
    matrix = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    values, scales = round_to_int8(matrix)
    packed = pack_int8(matrix)
    assert torch.equal(values, packed.values)
    assert torch.equal(scales, packed.scales)
    assert not round_to_int8(matrix.requires_grad_())[1].requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused(bad: float) -> None:
    weight = torch.ones(2, 70)
    weight[1, 66] = bad
    with pytest.raises(ShapeError, match="finite values; this tensor holds NaN or Inf"):
        pack_int8(weight)


@pytest.mark.parametrize("weight", [torch.ones(2, 3).int(), torch.ones(3)], ids=["integers", "one_dimension"])
def test_what_is_not_a_float_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"takes \(..., rows, columns\) floats, got"):
        pack_int8(weight)


def test_a_stack_is_indexed_like_the_tensor_that_it_stands_for() -> None:
    weight = torch.randn(3, 4, 70, generator=torch.Generator().manual_seed(0))
    packed = pack_int8(weight, Int8Product.W8A8)
    assert packed.shape == weight.shape
    assert packed.num_bytes == 3 * 4 * (128 + 4 * 2)
    one = packed[1]
    assert one.product is Int8Product.W8A8
    assert torch.equal(one.unpack(), packed.unpack()[1])
    assert one.values.data_ptr() == packed.values[1].data_ptr()
    assert packed.device == weight.device
    assert packed.unpack(torch.bfloat16).dtype == torch.bfloat16


def test_a_wrong_record_is_refused() -> None:
    packed = pack_int8(torch.ones(2, 70))
    with pytest.raises(ShapeError, match=r"of 70 columns need values \(..., 128\) and scales \(..., 2\)"):
        replace(packed, scales=packed.scales[:, :1])
    with pytest.raises(ShapeError, match=r"of 129 columns need values \(..., 192\)"):
        replace(packed, num_columns=129)
    with pytest.raises(
        ShapeError, match=r"int8 values and float32 scales, got torch.int8 and torch.bfloat16"
    ):
        replace(packed, scales=packed.scales.bfloat16())
