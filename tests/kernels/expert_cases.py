"""Inputs of the expert operator, made by plain loops from each token's list of chosen experts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesys.kernels import BankView, Kernel, Rows, TokenSum, compute_experts, compute_experts_summed

Choices = list[list[int]]
GRADIENTS = ("x", "gate_up", "down", "weights")


@dataclass(frozen=True)
class Case:
    """One call of the expert operator."""

    x_RD: Tensor
    gate_up_SFD: Tensor
    down_SDF: Tensor
    weights_A: Tensor
    row_ids: Tensor
    offsets: Tensor
    token_sum: TokenSum
    slot_of_expert: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """The same case in another dtype; routing weights are never narrower than float32."""
        return replace(
            self,
            x_RD=self.x_RD.to(dtype),
            gate_up_SFD=self.gate_up_SFD.to(dtype),
            down_SDF=self.down_SDF.to(dtype),
            weights_A=self.weights_A.to(torch.promote_types(dtype, torch.float32)),
        )

    def with_slots(self, slot_of_expert: list[int], num_slots: int) -> Case:
        """The same experts behind a slot table; slots that no expert uses hold NaN."""
        gate_up = self.gate_up_SFD.new_full((num_slots, *self.gate_up_SFD.shape[1:]), torch.nan)
        down = self.down_SDF.new_full((num_slots, *self.down_SDF.shape[1:]), torch.nan)
        for expert, slot in enumerate(slot_of_expert):
            if slot >= 0:
                gate_up[slot], down[slot] = self.gate_up_SFD[expert], self.down_SDF[expert]
        return replace(self, gate_up_SFD=gate_up, down_SDF=down, slot_of_expert=torch.tensor(slot_of_expert))

    @property
    def rows(self) -> Rows:
        return Rows(self.x_RD, self.row_ids, self.offsets)

    @property
    def view(self) -> BankView:
        return BankView(self.gate_up_SFD, self.down_SDF, self.slot_of_expert)


def make_case(
    choices: Choices,
    num_experts: int,
    *,
    hidden: int = 5,
    inner: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Groups the choices by expert and draws activations and weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    assignments = [(token, expert) for token, experts in enumerate(choices) for expert in experts]
    order = sorted(range(len(assignments)), key=lambda a: assignments[a][1])
    place = {assignment: position for position, assignment in enumerate(order)}
    offsets = [0]
    for expert in range(num_experts):
        offsets.append(offsets[-1] + sum(chosen == expert for _, chosen in assignments))
    token_offsets = [0]
    for experts in choices:
        token_offsets.append(token_offsets[-1] + len(experts))
    return Case(
        x_RD=draw(len(choices), hidden),
        gate_up_SFD=draw(num_experts, 2 * inner, hidden),
        down_SDF=draw(num_experts, hidden, inner),
        weights_A=draw(len(assignments)).to(torch.promote_types(dtype, torch.float32)),
        row_ids=torch.tensor([assignments[a][0] for a in order], dtype=torch.int64),
        offsets=torch.tensor(offsets),
        token_sum=TokenSum(
            positions=torch.tensor([place[a] for a in range(len(assignments))], dtype=torch.int64),
            offsets=torch.tensor(token_offsets),
        ),
    )


def run(case: Case, kernel: Kernel, *, summed: bool) -> dict[str, Tensor]:
    """Returns the output and the gradient of every input under one fixed upstream gradient."""
    leaves = [
        t.detach().clone().requires_grad_()
        for t in (case.x_RD, case.gate_up_SFD, case.down_SDF, case.weights_A)
    ]
    x, gate_up, down, weights = leaves
    rows = Rows(x, case.row_ids, case.offsets)
    view = BankView(gate_up, down, case.slot_of_expert)
    if summed:
        y = compute_experts_summed(rows, view, weights, case.token_sum, kernel)
    else:
        y = compute_weighted_rows(rows, view, weights, kernel)
    if y.requires_grad:
        (y * make_upstream(y)).sum().backward()
    result = {"y": y.detach()}
    for name, leaf in zip(GRADIENTS, leaves, strict=True):
        result[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return result


def compute_weighted_rows(rows: Rows, view: BankView, weights_A: Tensor, kernel: Kernel) -> Tensor:
    """The rows of the operator, weighted by plain torch."""
    return compute_experts(rows, view, kernel) * weights_A[:, None].to(rows.x_RD.dtype)


def make_upstream(y: Tensor) -> Tensor:
    """A gradient without symmetry, the same for every dtype up to rounding."""
    return torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)


def assert_numeric(actual: Tensor, oracle: Tensor, what: str) -> None:
    """The design's "numeric": against a float64 oracle, relative to its largest value."""
    assert actual.shape == oracle.shape, what
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[actual.dtype]
    if actual.numel() == 0:
        return
    difference = (actual.double() - oracle.double()).abs().max()
    assert difference <= tolerance * oracle.double().abs().max(), f"{what}: {difference}"
