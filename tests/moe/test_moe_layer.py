"""The MoE layer against a loop over tokens, alone in a module, and with other dispatchers and sources."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fake_seams import ExpertCutDispatcher, PiecewiseSource, TokenCutDispatcher
from torch import Tensor, nn
from torch.nn.functional import silu

from moesys.errors import ShapeError
from moesys.kernels import BankView, Kernel
from moesys.moe import (
    Dispatcher,
    Execution,
    LocalDispatcher,
    MoEConfig,
    MoELayer,
    Normalization,
    ResidentSource,
    Routing,
    RoutingTape,
)

HIDDEN, NUM_EXPERTS, TOP_K = 5, 6, 3
GROUPS = ([4, 1], [0], [5, 2, 3])


def make_layer(
    *, dtype: torch.dtype = torch.float64, shared: int = 0, normalize: bool = True, hidden: int = HIDDEN
) -> MoELayer:
    torch.manual_seed(0)
    weighting = Normalization.AFTER if normalize else Normalization.NONE
    layer = MoELayer(hidden, MoEConfig(NUM_EXPERTS, TOP_K, 4, weighting, shared), layer_id=7)
    layer.reset_parameters(std=0.7)
    return layer.to(dtype) if dtype == torch.float64 else _cast_experts(layer, dtype)


def _cast_experts(layer: MoELayer, dtype: torch.dtype) -> MoELayer:
    layer.experts.to(dtype)
    return layer


def make_x(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def swiglu(gate_up: Tensor, down: Tensor, x_D: Tensor) -> Tensor:
    gate, up = (gate_up @ x_D).chunk(2)
    return down @ (silu(gate) * up)


def compute_naively(layer: MoELayer, x_TD: Tensor, *, normalize: bool = True) -> Tensor:
    rows = []
    for x_D in x_TD:
        scores = (layer.router.weight_ED @ x_D).softmax(0)
        chosen = sorted(range(NUM_EXPERTS), key=lambda e: (-scores[e].item(), e))[:TOP_K]
        total = sum(scores[e] for e in chosen) if normalize else 1.0
        y_D = torch.zeros_like(x_D)
        for e in chosen:
            y_D = y_D + scores[e] / total * swiglu(
                layer.experts.gate_up_EFD[e], layer.experts.down_EDF[e], x_D
            )
        if layer.shared_expert is not None:
            shared = layer.shared_expert
            y_D = y_D + swiglu(shared.gate_up_proj.weight, shared.down_proj.weight, x_D)
        rows.append(y_D)
    return torch.stack(rows)


def differentiate(layer: MoELayer, x: Tensor, y: Tensor) -> list[Tensor]:
    upstream = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], upstream)]


def run(layer: MoELayer, x: Tensor, execution: Execution | None = None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return differentiate(layer, x, layer(x, execution)[0])


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(got, want) for got, want in zip(actual, expected, strict=True))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [0, 3])
def test_equals_loop_over_tokens(shared: int, normalize: bool) -> None:
    layer = make_layer(shared=shared, normalize=normalize)
    x = make_x(11, HIDDEN).requires_grad_()
    assert_all_close(run(layer, x), differentiate(layer, x, compute_naively(layer, x, normalize=normalize)))


def test_drops_into_any_module_and_keeps_the_shape() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(HIDDEN)
            self.mlp = MoELayer(HIDDEN, MoEConfig(4, 2, 8))

        def forward(self, x: Tensor) -> Tensor:
            y, routing = self.mlp(self.norm(x))
            assert routing.num_tokens == x[..., 0].numel()
            return x + y

    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = make_x(2, 3, HIDDEN, dtype=torch.float32)
    losses = []
    for _ in range(3):
        y = model(x)
        assert y.shape == (2, 3, HIDDEN)
        loss = y.square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_order_of_tokens_does_not_depend_on_the_batch_shape() -> None:
    layer = make_layer()
    x = make_x(2, 4, HIDDEN)
    assert torch.equal(layer(x)[0].reshape(8, HIDDEN), layer(x.reshape(8, HIDDEN))[0])
    transposed = x.transpose(0, 1)
    assert_all_close([layer(transposed)[0]], [layer(x)[0].transpose(0, 1)])


@pytest.mark.parametrize("use_tape", [False, True])
def test_no_tokens(use_tape: bool) -> None:
    layer = make_layer(shared=2)
    x = torch.zeros(3, 0, HIDDEN, dtype=torch.float64)
    tape = RoutingTape() if use_tape else None
    execution = Execution(LocalDispatcher(), ResidentSource({7: layer.experts}), tape=tape)
    y, routing = layer(x, execution)
    assert y.shape == x.shape
    assert routing.num_assignments == 0
    y.sum().backward()
    assert not any(p.grad is None or p.grad.any() for p in layer.experts.parameters())


def test_wrong_hidden_size_is_an_error() -> None:
    with pytest.raises(ShapeError, match=r"last dimension of x \(4\) must be the layer's hidden size \(5\)"):
        make_layer()(make_x(2, 4))


def test_unknown_layer_is_an_error() -> None:
    layer = make_layer()
    with pytest.raises(ShapeError, match=r"layer 7 has no experts in this source; it holds layers \[3\]"):
        layer(make_x(2, HIDDEN), Execution(LocalDispatcher(), ResidentSource({3: layer.experts})))


@pytest.mark.parametrize("kernel", [Kernel.REFERENCE, Kernel.TORCH], ids=str)
@pytest.mark.parametrize(
    "dispatcher",
    [
        TokenCutDispatcher(4),
        TokenCutDispatcher(0),
        ExpertCutDispatcher([[0, 1], [2, 3, 4, 5]]),
        ExpertCutDispatcher([[5], [1, 3], [], [0, 2, 4]]),
    ],
    ids=["tokens", "no_tokens_first", "two_groups", "empty_group"],
)
def test_parts_change_nothing(dispatcher: Dispatcher, kernel: Kernel) -> None:
    layer, x = make_layer(shared=2), make_x(9, HIDDEN)
    execution = Execution(dispatcher, ResidentSource({7: layer.experts}), kernel)
    assert_all_close(run(layer, x, execution), run(layer, x))


def test_parts_and_pieces_together() -> None:
    layer, x = make_layer(), make_x(9, HIDDEN)
    source = PiecewiseSource(layer.experts, GROUPS)
    assert_all_close(run(layer, x, Execution(TokenCutDispatcher(5), source)), run(layer, x))
    assert source.num_hints == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_pieces_give_the_bits_of_the_resident_view(dtype: torch.dtype) -> None:
    """Law 2: where the weights come from changes no bit of the output."""
    layer, x = make_layer(dtype=dtype, hidden=16), make_x(33, 16, dtype=dtype)
    with torch.no_grad():
        resident, _ = layer(x)
        pieces, _ = layer(x, Execution(LocalDispatcher(), PiecewiseSource(layer.experts, GROUPS)))
    assert torch.equal(pieces, resident)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_order_of_arrival_changes_no_bit(dtype: torch.dtype) -> None:
    layer, x = make_layer(dtype=dtype), make_x(17, HIDDEN, dtype=dtype)
    outputs = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        source = PiecewiseSource(layer.experts, [GROUPS[i] for i in order])
        outputs.append(run(layer, x, Execution(LocalDispatcher(), source)))
    for y, _, *parameter_gradients in outputs[1:]:
        assert torch.equal(y, outputs[0][0])
        assert_all_equal(parameter_gradients[1:], outputs[0][3:])


def test_each_view_is_released_before_the_next_is_asked_for() -> None:
    layer = make_layer()
    source = PiecewiseSource(layer.experts, GROUPS)
    layer(make_x(4, HIDDEN), Execution(LocalDispatcher(), source))
    assert source.max_pinned == 1
    assert source.num_pinned == 0


def test_a_source_that_yields_nothing_is_an_error() -> None:
    class Empty:
        def hint(self, layer_id: int, routing: Routing) -> None: ...

        def acquire(self, layer_id: int, demand: Tensor) -> Iterator[BankView]:
            yield from ()

        def release(self, layer_id: int, view: BankView) -> None: ...

    with pytest.raises(
        ShapeError, match=r"for layer 7 experts \[.*\d.*\] were in none and experts \[\] in several"
    ):
        make_layer()(make_x(2, HIDDEN), Execution(LocalDispatcher(), Empty()))


def test_tape_replays_the_recorded_experts() -> None:
    layer, x = make_layer(), make_x(6, HIDDEN)
    tape = RoutingTape()
    execution = Execution(LocalDispatcher(), ResidentSource({7: layer.experts}), tape=tape)
    _, recorded = layer(x, execution)
    with torch.no_grad():
        layer.router.weight_ED.neg_()
    with tape.make_contexts()[1]:
        _, replayed = layer(x, execution)
    _, free = layer(x, execution)
    assert torch.equal(replayed.expert_ids, recorded.expert_ids)
    assert not torch.equal(free.expert_ids, recorded.expert_ids)


def test_autocast_before_the_layer_is_fine() -> None:
    """The layer before hands over bfloat16; the experts compute in their own dtype and the result goes back."""
    layer = MoELayer(8, MoEConfig(num_experts=4, top_k=2, intermediate_size=6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(torch.nn.Linear(8, 8)(torch.randn(3, 8)))
    assert y.dtype == torch.bfloat16
