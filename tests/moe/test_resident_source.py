"""The banks of experts and the source that lends them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moesys.errors import ShapeError
from moesys.kernels import (
    Activation,
    BankView,
    ExpertForm,
    Int8Product,
    Int8Weight,
    Kernel,
    Rows,
    compute_experts,
)
from moesys.moe import ExpertBank, ModuleBank, ResidentSource, quantize_bank
from moesys.moe.source import Bank

ROWS = Rows(
    torch.randn(5, 70, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 4, 2, 1]),
    torch.tensor([0, 1, 1, 4]),
)
FORMS = {"swiglu": ExpertForm(), "relu": ExpertForm(Activation.RELU)}


def make_bank(form: ExpertForm = FORMS["swiglu"], *, bias: bool = False) -> ExpertBank:
    bank = ExpertBank(3, 70, 20, form, bias)
    generator = torch.Generator().manual_seed(1)
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return bank


def zero_parameters(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def acquire(bank: Bank) -> BankView:
    (view,) = ResidentSource({2: bank}).acquire(2, ROWS.offsets)
    return view  # pyrefly: ignore


def test_a_bank_without_biases_has_the_parameters_that_checkpoints_know() -> None:
    assert {name: tuple(p.shape) for name, p in make_bank().named_parameters()} == {
        "gate_up_EFD": (3, 40, 70),
        "down_EDF": (3, 70, 20),
    }
    assert list(make_bank().state_dict()) == ["gate_up_EFD", "down_EDF"]


def test_the_form_decides_the_shapes() -> None:
    assert {name: tuple(p.shape) for name, p in make_bank(FORMS["relu"], bias=True).named_parameters()} == {
        "gate_up_EFD": (3, 20, 70),
        "down_EDF": (3, 70, 20),
        "gate_up_bias_EF": (3, 20),
        "down_bias_ED": (3, 70),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_view_lends_the_parameters_themselves(form: str, bias: bool) -> None:
    bank = make_bank(FORMS[form], bias=bias)
    view = acquire(bank)
    assert view.covers_all
    assert view.form == FORMS[form]
    assert (view.gate_up_SFD, view.down_SDF) == (bank.gate_up_EFD, bank.down_EDF)
    assert (view.gate_up_bias_SF is None, view.down_bias_SD is None) == (not bias, not bias)
    compute_experts(ROWS, view).sum().backward()
    assert all(parameter.grad is not None for parameter in bank.parameters())


@pytest.mark.parametrize("product", Int8Product, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_bank_computes_with_the_rounded_weights(product: Int8Product, bias: bool) -> None:
    bank = make_bank(FORMS["relu"], bias=bias)
    quantized = quantize_bank(bank, product)
    view = acquire(quantized)
    assert isinstance(view.gate_up_SFD, Int8Weight)
    assert isinstance(view.down_SDF, Int8Weight)
    assert view.gate_up_SFD.product is view.down_SDF.product is product
    assert view.form == bank.form
    rounded = BankView(
        view.gate_up_SFD.unpack(),
        view.down_SDF.unpack(),
        form=bank.form,
        gate_up_bias_SF=bank.gate_up_bias_EF,
        down_bias_SD=bank.down_bias_ED,
    )
    y, expected = (compute_experts(ROWS, each, kernel=Kernel.TORCH).detach() for each in (view, rounded))
    error = float((y - expected).abs().max() / expected.abs().max())
    assert (error <= 1e-5) is (product is Int8Product.W8)
    assert error < 0.05


def test_a_quantized_bank_is_a_copy_without_parameters() -> None:
    bank = make_bank(bias=True)
    quantized = quantize_bank(bank)
    before = {name: buffer.clone() for name, buffer in quantized.state_dict().items()}
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.zero_()
    assert list(quantized.parameters()) == []
    assert len(before) == 6
    assert all(torch.equal(before[name], buffer) for name, buffer in quantized.state_dict().items())


def test_a_quantized_bank_is_restored_from_its_state() -> None:
    saved = quantize_bank(make_bank(bias=True))
    other = quantize_bank(ExpertBank(3, 70, 20, bias=True).apply(zero_parameters))
    assert not compute_experts(ROWS, other.view).any()
    other.load_state_dict(saved.state_dict())
    assert torch.equal(compute_experts(ROWS, other.view), compute_experts(ROWS, saved.view))


def test_scales_of_another_dtype_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"float32 scales, got torch.int8 and torch.bfloat16"):
        _ = quantize_bank(make_bank()).bfloat16().view


def test_a_bank_with_nan_is_not_quantized() -> None:
    bank = make_bank()
    with torch.no_grad():
        bank.down_EDF[1, 2, 3] = torch.nan
    with pytest.raises(ShapeError, match="holds NaN or Inf"):
        quantize_bank(bank)


def test_a_module_bank_owns_its_modules() -> None:
    modules = [nn.Linear(70, 70) for _ in range(3)]
    bank = ModuleBank(iter(modules))
    assert len(list(bank.parameters())) == 6
    compute_experts(ROWS, bank.view).sum().backward()
    assert [module.weight.grad is not None for module in modules] == [True, False, True]


def test_a_layer_without_a_bank_is_named() -> None:
    source = ResidentSource({1: make_bank(), 4: ModuleBank([nn.Identity()])})
    with pytest.raises(ShapeError, match=r"layer 3 has no experts in this source; it holds layers \[1, 4\]"):
        next(source.acquire(3, ROWS.offsets))
