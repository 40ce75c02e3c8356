"""The experts of a bank view as differentiable functions: any weight format, any form, with or without adapters.

Knows nothing of which rows go where. Autograd follows each expert's own matrices; a bank that is trained is taken
apart once, so that its gradient is one stack and not a zero-filled bank per expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear

from moesys.kernels.experts.activations import activate
from moesys.kernels.experts.modules import ExpertFunction
from moesys.kernels.formats import Int8Weight
from moesys.kernels.records import Adapters, BankView, ExpertForm, Weight
from moesys.kernels.weight_product import multiply_weight


def make_functions(view: BankView, adapters: Adapters | None) -> list[ExpertFunction | None]:
    """Returns one function per local expert; None for an expert that the view does not hold."""
    gate_ups, gate_up_biases = _take_apart(view.gate_up_SFD), _take_apart_biases(view.gate_up_bias_SF, view)
    downs, down_biases = _take_apart(view.down_SDF), _take_apart_biases(view.down_bias_SD, view)
    slots = view.compute_slots()
    low_ranks = [(None, None)] * len(slots) if adapters is None else _take_apart_adapters(adapters)
    return [
        None
        if slot < 0
        else _Expert(
            _Matrix(gate_ups[slot], gate_up_biases[slot], gate_up_low_rank),
            _Matrix(downs[slot], down_biases[slot], down_low_rank),
            view.form,
        )
        for slot, (gate_up_low_rank, down_low_rank) in zip(slots, low_ranks, strict=True)
    ]


@dataclass(frozen=True)
class _LowRank:
    """scale * b @ a, with a (rank, columns) and b (rows, rank)."""

    a_RK: Tensor
    b_MR: Tensor
    scale: float


@dataclass(frozen=True)
class _Matrix:
    weight_MK: Weight
    bias_M: Tensor | None
    low_rank: _LowRank | None

    def __call__(self, x_NK: Tensor) -> Tensor:
        y_NM = multiply_weight(x_NK, self.weight_MK)
        if self.bias_M is not None:
            y_NM = y_NM + self.bias_M
        if self.low_rank is not None:
            low_rank = self.low_rank
            y_NM = y_NM + low_rank.scale * linear(linear(x_NK, low_rank.a_RK), low_rank.b_MR)
        return y_NM


@dataclass(frozen=True)
class _Expert:
    gate_up: _Matrix
    down: _Matrix
    form: ExpertForm

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self.down(activate(self.gate_up(x_ND), self.form))


def _take_apart(weight: Weight) -> Sequence[Weight]:
    if isinstance(weight, Int8Weight):
        return [weight[slot] for slot in range(weight.shape[0])]
    return weight.unbind(0)


def _take_apart_biases(bias_SM: Tensor | None, view: BankView) -> Sequence[Tensor | None]:
    return [None] * view.num_slots if bias_SM is None else bias_SM.unbind(0)


def _take_apart_adapters(adapters: Adapters) -> list[tuple[_LowRank, _LowRank]]:
    parts = (adapters.gate_up_a_ERD, adapters.gate_up_b_EFR, adapters.down_a_ERF, adapters.down_b_EDR)
    return [
        (_LowRank(gate_up_a, gate_up_b, adapters.scale), _LowRank(down_a, down_b, adapters.scale))
        for gate_up_a, gate_up_b, down_a, down_b in zip(*(part.unbind(0) for part in parts), strict=True)
    ]
