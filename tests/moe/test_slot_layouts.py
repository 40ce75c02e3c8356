"""The parts of a slot are those of the expert, and make a view that computes what the expert's bank computes."""

from __future__ import annotations

import pytest
import torch

from moesys.errors import ShapeError
from moesys.kernels import Activation, ExpertForm, Int8Product, Int8Weight
from moesys.moe import (
    Execution,
    ExpertBank,
    LocalDispatcher,
    MoEConfig,
    MoELayer,
    PlainLayout,
    QuantizedBank,
    ResidentSource,
    quantize_bank,
)
from moesys.moe.slot_layout import Int8Layout
from moesys.moe.source import make_quantized_bank


def make_bank(form: ExpertForm, bias: bool) -> ExpertBank:
    torch.manual_seed(0)
    bank = ExpertBank(3, 100, 40, form, bias).requires_grad_(False)
    for weight in bank.parameters():
        weight.normal_()
    return bank


@pytest.mark.parametrize("product", Int8Product)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [Activation.SWIGLU, Activation.GELU])
def test_int8_parts_are_the_rounded_bank(activation: Activation, bias: bool, product: Int8Product) -> None:
    form = ExpertForm(activation)
    bank = quantize_bank(make_bank(form, bias), product)
    layout = Int8Layout(100, 40, form, bias, product)
    parts = list(bank.buffers())
    assert [(shape.shape, shape.dtype) for shape in layout.part_shapes] == [
        (part.shape[1:], part.dtype) for part in parts
    ]
    assert sum(shape.num_bytes for shape in layout.part_shapes) == sum(part[0].nbytes for part in parts)
    table = torch.tensor([2, -1, 0])
    view, expected = layout.make_view(parts, table), bank.view
    assert view.slot_of_expert is table
    assert view.form == form
    for one, other in (
        (view.gate_up_SFD, expected.gate_up_SFD),
        (view.down_SDF, expected.down_SDF),
    ):
        assert isinstance(one, Int8Weight)
        assert isinstance(other, Int8Weight)
        assert torch.equal(one.unpack(), other.unpack())
        assert one.product is product
    assert (view.gate_up_bias_SF is None) == (not bias)
    assert view.gate_up_bias_SF is expected.gate_up_bias_SF
    assert view.down_bias_SD is expected.down_bias_SD


def test_a_bank_is_made_of_the_parts_of_all_slots() -> None:
    form = ExpertForm(Activation.CLAMPED_SWIGLU)
    bank = quantize_bank(make_bank(form, bias=True))
    layout = Int8Layout(100, 40, form, has_bias=True)
    again = make_quantized_bank(layout.make_view(list(bank.buffers()), None))
    assert again.state_dict().keys() == bank.state_dict().keys()
    for one, other in zip(again.buffers(), bank.buffers(), strict=True):
        assert one.data_ptr() == other.data_ptr()
    floats = make_bank(form, bias=True)
    plain = PlainLayout(100, 40, torch.float32, form, has_bias=True)
    with pytest.raises(ShapeError, match="needs int8 matrices, got floats"):
        make_quantized_bank(plain.make_view(list(floats.parameters()), None))


def test_equal_layouts_share_slots_and_others_do_not() -> None:
    assert Int8Layout(100, 40) == Int8Layout(100, 40)
    assert len({Int8Layout(100, 40), Int8Layout(100, 41), Int8Layout(100, 40, product=Int8Product.W8A8)}) == 3


def test_a_bfloat16_layer_hands_int8_experts_float32_rows() -> None:
    torch.manual_seed(0)
    config = MoEConfig(4, 2, 24, shared_intermediate_size=16, shared_expert_gate=True)
    layer = MoELayer(32, config).requires_grad_(False).eval()
    layer.to(torch.bfloat16)
    layer.router.float()
    exact = layer.experts
    assert isinstance(exact, ExpertBank)
    layer.experts = quantize_bank(exact)
    x = torch.randn(6, 32, dtype=torch.bfloat16)
    y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    assert isinstance(layer.experts, QuantizedBank)
    assert layer.experts.row_dtype == torch.float32
    execution = Execution(LocalDispatcher(), ResidentSource({0: layer.experts}))
    layer.experts = exact.float()
    again, _ = layer(x, execution)
    assert torch.equal(again, y)
