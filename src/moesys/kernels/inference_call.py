"""Which calls of the small operators native code takes: those of inference on a CPU.

For the steps between matrices (norms, rotary embedding, routing), of which one token has a few dozen numbers each: what
costs is how many operations they take, and the question itself. Reads modes and devices, never a value of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels import native
from moesys.kernels.choice import Kernel, wants_native
from moesys.kernels.derivatives import is_transformed


def is_inference_call(*tensors: Tensor) -> bool:
    """Whether all tensors lie on a CPU, no derivative of them is wanted, nothing is being compiled and no other kernel
    than native is asked for."""
    watches = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cpu or (watches and tensor.requires_grad):
            return False
    return (
        not torch.compiler.is_compiling()
        and not is_transformed(*tensors)
        and wants_native(Kernel.AUTO)
        and native.find_obstacle() is None
    )
