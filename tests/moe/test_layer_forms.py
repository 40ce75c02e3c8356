"""Forms of the layer: residual, gated shared expert, other expert forms, the user's own modules."""

from __future__ import annotations

import pytest
import torch
from layer_cases import HIDDEN, LAYER, NUM_EXPERTS, assert_all_close, make_layer, make_x, run
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from moesys.errors import ShapeError
from moesys.kernels import Activation, Adapters, ExpertForm
from moesys.moe import (
    Execution,
    ExpertBank,
    LocalDispatcher,
    ModuleBank,
    MoEConfig,
    MoELayer,
    Normalization,
    ResidentSource,
    TopKRouter,
)

FORMS = {
    "swiglu": ExpertForm(),
    "gelu": ExpertForm(Activation.GELU),
    "relu": ExpertForm(Activation.RELU),
    "clamped": ExpertForm(Activation.CLAMPED_SWIGLU),
}


def compute_dense(form: ExpertForm, module: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(module.named_parameters())
    up = x @ parameters["up_proj.weight" if "up_proj.weight" in parameters else "gate_up_proj.weight"].T
    if "up_proj.bias" in parameters:
        up = up + parameters["up_proj.bias"]
    match form.activation:
        case Activation.GELU:
            inner = gelu(up)
        case Activation.RELU:
            inner = relu(up)
        case _:
            gate, up = up.chunk(2, dim=-1)
            inner = silu(gate) * up
    down = inner @ parameters["down_proj.weight"].T
    return down + parameters["down_proj.bias"] if "down_proj.bias" in parameters else down


def compute_routed(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """The experts alone, one assignment at a time, through the bank's matrices."""
    bank, routing = layer.experts, layer.router(x_TD)
    assert isinstance(bank, ExpertBank)
    rows = [torch.zeros(HIDDEN, dtype=x_TD.dtype) for _ in x_TD]
    assignments = zip(routing.compute_token_ids().tolist(), routing.expert_ids.tolist(), strict=True)
    for weight, (token, expert) in zip(routing.weights, assignments, strict=True):
        up = bank.gate_up_EFD[expert] @ x_TD[token]
        if bank.gate_up_bias_EF is not None:
            up = up + bank.gate_up_bias_EF[expert]
        match bank.form.activation:
            case Activation.GELU:
                inner = gelu(up)
            case Activation.RELU:
                inner = relu(up)
            case Activation.SWIGLU:
                gate, up = up.chunk(2)
                inner = silu(gate) * up
            case Activation.CLAMPED_SWIGLU:
                gate, up = up.chunk(2)
                gate, up = gate.clamp(max=bank.form.limit), up.clamp(-bank.form.limit, bank.form.limit)
                inner = gate * torch.sigmoid(bank.form.alpha * gate) * (up + 1)
        y = bank.down_EDF[expert] @ inner
        rows[token] = rows[token] + weight * (
            y if bank.down_bias_ED is None else y + bank.down_bias_ED[expert]
        )
    return torch.stack(rows)


def fill_biases(layer: MoELayer) -> MoELayer:
    for name, parameter in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return layer


def differentiate(layer: MoELayer, x: Tensor, y: Tensor) -> list[Tensor]:
    upstream = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_expert_forms_with_and_without_biases(form: ExpertForm, bias: bool) -> None:
    layer = fill_biases(make_layer(MoEConfig(NUM_EXPERTS, 2, 4, form=form, expert_bias=bias)))
    x = make_x().requires_grad_()
    assert_all_close(run(layer), differentiate(layer, x, compute_routed(layer, x)))


@pytest.mark.parametrize(
    ("form", "bias"), [("swiglu", False), ("gelu", False), ("gelu", True), ("relu", True)]
)
def test_residual_is_deepspeeds_formula(form: str, bias: bool) -> None:
    config = MoEConfig(
        NUM_EXPERTS, 1, 4, weighting=Normalization.NONE, is_residual=True, form=FORMS[form], expert_bias=bias
    )
    layer = fill_biases(make_layer(config))
    residual = layer.residual
    assert residual is not None
    x = make_x().requires_grad_()
    coefficients = (x @ residual.coefficient.weight.T + residual.coefficient.bias).softmax(-1)
    dense = compute_dense(FORMS[form], residual.dense, x)
    expected = compute_routed(layer, x) * coefficients[:, 0:1] + dense * coefficients[:, 1:]
    assert_all_close(run(layer), differentiate(layer, x, expected))


@pytest.mark.parametrize(("form", "bias"), [("clamped", False), ("swiglu", True)])
def test_a_residual_without_a_dense_form_is_an_error(form: str, bias: bool) -> None:
    with pytest.raises(
        ShapeError, match=r"there is no dense layer of the form \w+ with(out)? biases; use gelu"
    ):
        MoELayer(8, MoEConfig(6, 2, 4, is_residual=True, form=FORMS[form], expert_bias=bias))


@pytest.mark.parametrize("gate", [False, True])
def test_shared_expert_with_and_without_a_gate(gate: bool) -> None:
    layer = make_layer(MoEConfig(NUM_EXPERTS, 2, 4, shared_intermediate_size=3, shared_expert_gate=gate))
    shared = layer.shared_expert
    assert shared is not None
    x = make_x().requires_grad_()
    extra = compute_dense(FORMS["swiglu"], shared, x)
    if gate:
        assert layer.shared_expert_gate is not None
        extra = extra * torch.sigmoid(x @ layer.shared_expert_gate.weight.T)
    assert_all_close(run(layer), differentiate(layer, x, compute_routed(layer, x) + extra))


def test_names_of_parameters_of_older_models_stay() -> None:
    layer = MoELayer(8, MoEConfig(6, 2, 4, shared_intermediate_size=3))
    assert set(layer.state_dict()) == {
        "router.weight_ED",
        "experts.gate_up_EFD",
        "experts.down_EDF",
        "shared_expert.gate_up_proj.weight",
        "shared_expert.down_proj.weight",
    }


def make_modules() -> list[nn.Module]:
    torch.manual_seed(3)
    return [nn.Sequential(nn.Linear(HIDDEN, 3 + i), nn.Tanh(), nn.Linear(3 + i, HIDDEN)) for i in range(4)]


def test_the_users_own_modules_as_experts() -> None:
    modules = make_modules()
    before = [parameter.clone() for module in modules for parameter in module.parameters()]
    layer = MoELayer(HIDDEN, MoEConfig(4, 2, 4), layer_id=LAYER, experts=ModuleBank(modules))
    after = [parameter for module in modules for parameter in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    layer.double()
    x = make_x().requires_grad_()
    routing = layer.router(x)
    rows = [
        sum(
            w * modules[e](x[t])
            for w, e in zip(
                routing.weights[2 * t : 2 * t + 2],
                routing.expert_ids[2 * t : 2 * t + 2].tolist(),
                strict=True,
            )
        )
        for t in range(13)
    ]
    assert_all_close(run(layer), differentiate(layer, x, torch.stack(rows)))


def test_another_number_of_experts_than_the_configs_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"router has 6 experts and the bank 4; both must have num_experts"):
        MoELayer(HIDDEN, MoEConfig(6, 2, 4), experts=ModuleBank(make_modules()))
    with pytest.raises(ShapeError, match=r"router has 5 experts and the bank 6"):
        MoELayer(HIDDEN, MoEConfig(6, 2, 4), router=TopKRouter(HIDDEN, 5, 2))


def test_adapters_of_the_layer_reach_its_experts() -> None:
    layer, x = make_layer(MoEConfig(NUM_EXPERTS, 2, 4)), make_x()
    bank = layer.experts
    assert isinstance(bank, ExpertBank)
    generator = torch.Generator().manual_seed(5)
    a1, b1, a2, b2 = (
        torch.randn(NUM_EXPERTS, *shape, generator=generator, dtype=torch.float64)
        for shape in ((2, HIDDEN), (8, 2), (2, 4), (HIDDEN, 2))
    )
    source = ResidentSource({LAYER: bank})
    adapters = {LAYER: Adapters(a1, b1, a2, b2, scale=0.5), LAYER + 1: Adapters(b1, b1, b1, b1)}
    found, _ = layer(x, Execution(LocalDispatcher(), source, adapters=adapters))
    plain, _ = layer(x)
    with torch.no_grad():
        bank.gate_up_EFD += 0.5 * b1 @ a1
        bank.down_EDF += 0.5 * b2 @ a2
    merged, _ = layer(x)
    torch.testing.assert_close(found, merged, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, plain)


def test_a_given_router_keeps_its_weights() -> None:
    router = TopKRouter(8, 4, 2)
    before = router.weight_ED.detach().clone()
    assert before.any()
    layer = MoELayer(8, MoEConfig(num_experts=4, top_k=2, intermediate_size=5), router=router)
    layer.reset_parameters()
    assert torch.equal(layer.router.weight_ED, before)
