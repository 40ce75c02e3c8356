"""The second seam: how expert weights reach the kernel, and the banks that hold them.

`ExpertSource.acquire` yields bank views in the order in which they become ready; the layer computes them as they
come and releases each. Resident weights are one constant view that needs no look at the routing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from moesys.errors import ShapeError
from moesys.kernels import BankView, ExpertForm, Int8Product, Int8Weight, ModuleView, pack_int8
from moesys.moe.routing import Routing


class Bank(Protocol):
    """All experts of a layer."""

    @property
    def view(self) -> BankView | ModuleView:
        """All experts, each in the slot of its own number."""
        ...


class ExpertBank(nn.Module):
    """The stacked weights of a layer's experts.

    gate_up_EFD:      (experts, halves * inner, hidden): the gate's rows first; a form without a gate has one half.
    down_EDF:         (experts, hidden, inner).
    gate_up_bias_EF:  (experts, halves * inner), down_bias_ED: (experts, hidden); None unless ``bias``.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        form: ExpertForm = ExpertForm(),  # noqa: B008 - frozen
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.form = form
        width = form.num_halves * inner_size
        self.gate_up_EFD = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        self.down_EDF = nn.Parameter(torch.empty(num_experts, hidden_size, inner_size))
        self.gate_up_bias_EF = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.down_bias_ED = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None

    @property
    def row_dtype(self) -> torch.dtype:
        """As which the rows that these experts compute must come."""
        return self.gate_up_EFD.dtype

    @property
    def view(self) -> BankView:
        """See `Bank`."""
        return BankView(
            self.gate_up_EFD,
            self.down_EDF,
            form=self.form,
            gate_up_bias_SF=self.gate_up_bias_EF,
            down_bias_SD=self.down_bias_ED,
        )


class QuantizedBank(nn.Module):
    """Experts in int8 groups, for inference and for adapters: buffers, never parameters. Made by `quantize_bank`."""

    gate_up_values: Tensor
    gate_up_scales: Tensor
    down_values: Tensor
    down_scales: Tensor
    gate_up_bias_EF: Tensor | None
    down_bias_ED: Tensor | None

    def __init__(
        self,
        gate_up_EFD: Int8Weight,
        down_EDF: Int8Weight,
        form: ExpertForm,
        gate_up_bias_EF: Tensor | None = None,
        down_bias_ED: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.form = form
        self.product = gate_up_EFD.product
        self._hidden_size, self._inner_size = gate_up_EFD.num_columns, down_EDF.num_columns
        self.register_buffer("gate_up_values", gate_up_EFD.values)
        self.register_buffer("gate_up_scales", gate_up_EFD.scales)
        self.register_buffer("down_values", down_EDF.values)
        self.register_buffer("down_scales", down_EDF.scales)
        self.register_buffer("gate_up_bias_EF", gate_up_bias_EF)
        self.register_buffer("down_bias_ED", down_bias_ED)

    @property
    def row_dtype(self) -> torch.dtype:
        """As which the rows that these experts compute must come."""
        return torch.float32

    @property
    def view(self) -> BankView:
        """See `Bank`. Raises `ShapeError` when the scales are no longer float32."""
        return BankView(
            Int8Weight(self.gate_up_values, self.gate_up_scales, self._hidden_size, self.product),
            Int8Weight(self.down_values, self.down_scales, self._inner_size, self.product),
            form=self.form,
            gate_up_bias_SF=self.gate_up_bias_EF,
            down_bias_SD=self.down_bias_ED,
        )


def make_quantized_bank(view: BankView) -> QuantizedBank:
    """Returns the bank of a view that covers all experts, in int8; the memory is shared. Raises `ShapeError` for
    another format."""
    gate_up, down = view.gate_up_SFD, view.down_SDF
    if not (isinstance(gate_up, Int8Weight) and isinstance(down, Int8Weight)):
        raise ShapeError("a quantized bank needs int8 matrices, got floats; use an ExpertBank")
    return QuantizedBank(gate_up, down, view.form, view.gate_up_bias_SF, view.down_bias_SD)


def quantize_bank(bank: ExpertBank, product: Int8Product = Int8Product.W8) -> QuantizedBank:
    """Returns the bank's experts rounded to int8 groups, on the same device, with biases copied as float32.

    Lossy: a weight is off by up to half the scale of its group; ``w8a8`` rounds activations too. Raises
    `ShapeError` when a weight is NaN or Inf.
    """
    biases = (bank.gate_up_bias_EF, bank.down_bias_ED)
    return QuantizedBank(
        pack_int8(bank.gate_up_EFD, product),
        pack_int8(bank.down_EDF, product),
        bank.form,
        *(None if bias is None else bias.detach().to(torch.float32, copy=True) for bias in biases),
    )


class ModuleBank(nn.Module):
    """Experts that are the user's own modules, each from (rows, hidden) to (rows, hidden), row by row."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(modules)

    @property
    def view(self) -> ModuleView:
        """See `Bank`."""
        return ModuleView(tuple(self.experts))


class ExpertSource(Protocol):
    """Owns or fetches expert weights and lends them as bank views."""

    def hint(self, layer_id: int, routing: Routing) -> None:
        """Tells which experts a layer is about to need; may start loads, may do nothing."""
        ...

    def acquire(self, layer_id: int, demand: Tensor) -> Generator[BankView | ModuleView, None, None]:
        """Yields views that together hold every expert with rows.

        demand: (experts + 1,) int64 group offsets of the dispatched rows. A view is pinned until released. Whoever
                stops before the last view closes the generator, which lets go of all that was not lent.
        """
        ...

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """Says that a view is no longer read."""
        ...


class ResidentSource:
    """Weights that never move: one view per layer that covers every expert. `make_resident_source` makes that of a
    whole model and sees to it that no two layers share an id."""

    def __init__(self, banks: Mapping[int, Bank]) -> None:
        self._banks = dict(banks)

    def hint(self, layer_id: int, routing: Routing) -> None:
        """See `ExpertSource`. There is nothing to load."""

    def acquire(self, layer_id: int, demand: Tensor) -> Generator[BankView | ModuleView, None, None]:
        """See `ExpertSource`. Does not look at the demand."""
        if layer_id not in self._banks:
            raise ShapeError(
                f"layer {layer_id} has no experts in this source; it holds layers {sorted(self._banks)}"
            )
        yield self._banks[layer_id].view

    def release(self, layer_id: int, view: BankView | ModuleView) -> None:
        """See `ExpertSource`. Nothing was pinned."""
