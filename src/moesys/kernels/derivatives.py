"""Which derivatives torch is taking of a computation, beside the gradients of its backward pass.

Kernels with a backward pass of their own, and those without one, know nothing of tangents and batched tensors; where
such are at work, plain operations of torch must compute. Operators that a graph holds come too late for that choice:
they raise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef, Library

from moesys.errors import KernelError

_OPERATORS = Library("moesys", "IMPL")


def is_watched(value: object) -> bool:
    """Whether autograd will ask for a gradient of this value."""
    return torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad


def is_transformed(*values: object) -> bool:
    """Whether one of the values carries a tangent (`torch.autograd.forward_ad`), or a transform of `torch.func` such as
    ``vmap`` or ``jvp`` runs. Neither is switched off by ``torch.no_grad``. In ``torch.compile``, where tangents are not
    known yet, a level of forward_ad is enough for a yes."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any(_has_tangent(value) for value in values)


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def refuse_derivatives(operator: CustomOpDef) -> None:
    """Makes an operator of torch on a CPU raise `KernelError` for an argument with a tangent, which torch would drop
    without a word, and for one that autograd watches. `torch.func.vmap` calls it once per sample."""
    overload = operator._opoverload

    def compute(keyset: torch._C.DispatchKeySet, *arguments: object) -> Tensor:
        values = _list_tensors(arguments)
        if any(is_watched(value) or _has_tangent(value) for value in values):
            raise KernelError(
                f"the operator {overload} has no derivatives, and an argument needs a gradient or carries a tangent; "
                "call the function of moesys.kernels that puts it into a graph"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    _OPERATORS.impl(overload, compute, "AutogradCPU", with_keyset=True)


def _list_tensors(arguments: tuple[object, ...]) -> list[object]:
    return [
        value
        for argument in arguments
        for value in (argument if isinstance(argument, list | tuple) else (argument,))
    ]
