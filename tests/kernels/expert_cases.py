"""Inputs of the expert operator, made by plain loops from each token's list of chosen experts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from moesys.kernels import (
    Activation,
    Adapters,
    BankView,
    ExpertForm,
    Int8Product,
    Int8Weight,
    Kernel,
    Rows,
    TokenSum,
    compute_experts,
    compute_experts_summed,
    pack_int8,
)
from moesys.kernels.records import Weight

Choices = list[list[int]]
GRADIENTS = ("x", "gate_up", "down", "weights")

ROUTINGS: dict[str, tuple[Choices, int]] = {
    **{f"top_{k}_of_4": ([[(t + i) % 4 for i in range(k)] for t in range(6)], 4) for k in range(1, 5)},
    "empty_experts": ([[1, 3], [3, 1], [1, 3]], 6),
    "one_takes_all": ([[2], [2], [2], [2], [2]], 4),
    "one_token": ([[3, 0]], 4),
    "one_expert": ([[0], [0], [0]], 1),
    "ragged": ([[2, 0, 1], [], [1], [0, 2], []], 3),
    "no_assignments": ([[], []], 3),
    "no_tokens": ([], 3),
}
MIXED = ROUTINGS["top_3_of_4"]

TRAINABLE = [Kernel.TORCH]
"""Implementations with a backward pass."""
FORWARD = [*TRAINABLE, Kernel.NATIVE]
"""Implementations that compute float32 rows with weights in any format."""

FORMATS = ("float32", "bfloat16", "w8", "w8a8")
"""Of the weights; the activations are float32."""

FORMS = {
    "swiglu": ExpertForm(),
    # Drawn numbers reach the limit on both sides.
    "clamped_swiglu": ExpertForm(Activation.CLAMPED_SWIGLU, limit=0.7, alpha=1.5),
    "gelu": ExpertForm(Activation.GELU),
    "relu": ExpertForm(Activation.RELU),
}


@dataclass(frozen=True)
class Case:
    """One call of the expert operator."""

    x_RD: Tensor
    gate_up_SFD: Weight
    down_SDF: Weight
    weights_A: Tensor
    row_ids: Tensor
    offsets: Tensor
    token_sum: TokenSum
    slot_of_expert: Tensor | None = None
    form: ExpertForm = field(default_factory=ExpertForm)
    gate_up_bias_SF: Tensor | None = None
    down_bias_SD: Tensor | None = None
    adapters: Adapters | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """The same case in another dtype; routing weights are never narrower than float32, int8 weights stay."""
        moved = {name: convert(getattr(self, name), dtype) for name in _FLOATS}
        weights_A = self.weights_A.to(torch.promote_types(dtype, torch.float32))
        return replace(self, **moved, weights_A=weights_A, adapters=convert_adapters(self.adapters, dtype))

    def with_format(self, name: str) -> Case:
        """Activations of float32 and the weights in one of `FORMATS`."""
        case = self.to(torch.float32)
        return replace(
            case, gate_up_SFD=to_format(case.gate_up_SFD, name), down_SDF=to_format(case.down_SDF, name)
        )

    def with_slots(self, slot_of_expert: list[int], num_slots: int) -> Case:
        """The same experts behind a slot table; slots that no expert uses hold NaN."""
        moved = {
            name: scatter_slots(bank, slot_of_expert, num_slots)
            for name in ("gate_up_SFD", "down_SDF", "gate_up_bias_SF", "down_bias_SD")
            if (bank := getattr(self, name)) is not None
        }
        return replace(self, **moved, slot_of_expert=torch.tensor(slot_of_expert))

    @property
    def rows(self) -> Rows:
        return Rows(self.x_RD, self.row_ids, self.offsets)

    @property
    def view(self) -> BankView:
        return BankView(
            self.gate_up_SFD,
            self.down_SDF,
            self.slot_of_expert,
            self.form,
            self.gate_up_bias_SF,
            self.down_bias_SD,
        )

    def list_leaves(self) -> dict[str, Tensor]:
        """Every tensor that can have a gradient, by its name in the results of `run`."""
        named = {
            "x": self.x_RD,
            "gate_up": self.gate_up_SFD,
            "down": self.down_SDF,
            "weights": self.weights_A,
            "gate_up_bias": self.gate_up_bias_SF,
            "down_bias": self.down_bias_SD,
        }
        if self.adapters is not None:
            named |= {name: getattr(self.adapters, name) for name in _ADAPTERS}
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}

    def with_leaves(self, leaves: dict[str, Tensor]) -> Case:
        """The same case computed from other tensors, named as in `list_leaves`."""
        own = {_FIELD_OF_LEAF[name]: leaf for name, leaf in leaves.items() if name in _FIELD_OF_LEAF}
        adapters = self.adapters
        if adapters is not None:
            adapters = replace(adapters, **{name: leaves[name] for name in _ADAPTERS if name in leaves})
        return replace(self, **own, adapters=adapters)


_FLOATS = ("x_RD", "gate_up_SFD", "down_SDF", "gate_up_bias_SF", "down_bias_SD")
_ADAPTERS = [f.name for f in fields(Adapters) if f.name != "scale"]
_FIELD_OF_LEAF = {
    "x": "x_RD",
    "gate_up": "gate_up_SFD",
    "down": "down_SDF",
    "weights": "weights_A",
    "gate_up_bias": "gate_up_bias_SF",
    "down_bias": "down_bias_SD",
}


def convert(tensor: Weight | None, dtype: torch.dtype) -> Weight | None:
    return tensor.to(dtype) if isinstance(tensor, Tensor) else tensor


def convert_adapters(adapters: Adapters | None, dtype: torch.dtype) -> Adapters | None:
    if adapters is None:
        return None
    return replace(adapters, **{name: getattr(adapters, name).to(dtype) for name in _ADAPTERS})


def to_format(weight: Tensor, name: str) -> Weight:
    match name:
        case "float32":
            return weight
        case "bfloat16":
            return weight.bfloat16()
        case _:
            return pack_int8(weight, Int8Product(name))


def scatter_slots(bank: Weight, slot_of_expert: list[int], num_slots: int) -> Weight:
    if isinstance(bank, Int8Weight):
        scales = scatter_slots(bank.scales, slot_of_expert, num_slots)
        values = bank.values.new_zeros(num_slots, *bank.values.shape[1:])
        for expert, slot in enumerate(slot_of_expert):
            if slot >= 0:
                values[slot] = bank.values[expert]
        return replace(bank, values=values, scales=scales)
    moved = bank.new_full((num_slots, *bank.shape[1:]), torch.nan)
    for expert, slot in enumerate(slot_of_expert):
        if slot >= 0:
            moved[slot] = bank[expert]
    return moved


def make_case(
    choices: Choices,
    num_experts: int,
    *,
    hidden: int = 5,
    inner: int = 3,
    dtype: torch.dtype = torch.float64,
    form: ExpertForm = ExpertForm(),  # noqa: B008 - frozen
    bias: bool = False,
    rank: int | None = None,
    seed: int = 0,
) -> Case:
    """Groups the choices by expert and draws activations and weights; adapters where a rank is given."""
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
    width = form.num_halves * inner
    return Case(
        x_RD=draw(len(choices), hidden),
        gate_up_SFD=draw(num_experts, width, hidden),
        down_SDF=draw(num_experts, hidden, inner),
        weights_A=draw(len(assignments)).to(torch.promote_types(dtype, torch.float32)),
        row_ids=torch.tensor([assignments[a][0] for a in order], dtype=torch.int64),
        offsets=torch.tensor(offsets),
        token_sum=TokenSum(
            positions=torch.tensor([place[a] for a in range(len(assignments))], dtype=torch.int64),
            offsets=torch.tensor(token_offsets),
        ),
        form=form,
        gate_up_bias_SF=draw(num_experts, width) if bias else None,
        down_bias_SD=draw(num_experts, hidden) if bias else None,
        adapters=None
        if rank is None
        else Adapters(
            draw(num_experts, rank, hidden),
            draw(num_experts, width, rank),
            draw(num_experts, rank, inner),
            draw(num_experts, hidden, rank),
            scale=0.5,
        ),
    )


def compute(case: Case, kernel: Kernel, *, summed: bool) -> Tensor:
    """The result of the operator; without ``summed`` its rows, weighted by plain torch."""
    if summed:
        return compute_experts_summed(
            case.rows, case.view, case.weights_A, case.token_sum, case.adapters, kernel
        )
    y_AD = compute_experts(case.rows, case.view, case.adapters, kernel)
    return y_AD * case.weights_A[:, None].to(case.x_RD.dtype)


def run(case: Case, kernel: Kernel, *, summed: bool) -> dict[str, Tensor]:
    """Returns the output and the gradient of every input under one fixed upstream gradient."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.list_leaves().items()}
    y = compute(case.with_leaves(leaves), kernel, summed=summed)
    if y.requires_grad:
        (y * make_upstream(y)).sum().backward()
    gradients = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()}
    return {"y": y.detach()} | gradients


def make_upstream(y: Tensor) -> Tensor:
    """A gradient without symmetry, the same for every dtype up to rounding."""
    return torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)


def assert_numeric(actual: Tensor, oracle: Tensor, what: str) -> None:
    """The design's "numeric": against a float64 oracle, relative to its largest value. A bfloat16 gradient is the
    exact one rounded, so it may be off by half of its last bit, too."""
    assert actual.shape == oracle.shape, what
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5 + 2**-8}[actual.dtype]
    if actual.numel() == 0:
        return
    difference = (actual.double() - oracle.double()).abs().max()
    assert difference <= tolerance * oracle.double().abs().max(), f"{what}: {difference}"
