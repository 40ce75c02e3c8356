"""Which implementation of an operator computes a call. Each operator's ``api`` asks here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

from moesys import env
from moesys.errors import KernelError


class Kernel(StrEnum):
    """Implementations of an operator; ``auto`` takes the fastest that fits the call."""

    AUTO = "auto"
    REFERENCE = "reference"
    """The specification, slow and obvious."""
    TORCH = "torch"
    """Operations of torch, differentiable, on any device. Products of training are `moesys.kernels.multiply`."""
    NATIVE = "native"
    """C on the CPU, without gradients; a row's bits do not depend on other rows."""


Obstacle = Callable[[], str | None]
"""Why an implementation cannot take the call at hand; None when it can."""


def choose_kernel(operator: str, asked: Kernel, obstacles: Mapping[Kernel, Obstacle]) -> Kernel:
    """Returns the implementation for a call: the one asked for, else ``MOESYS_KERNEL``, else the first that fits.

    obstacles:  the operator's implementations, fastest first; looked at only where the choice depends on it.

    Raises `KernelError` when the implementation asked for cannot take the call; it never falls back.
    """
    wanted = read_override() if asked is Kernel.AUTO else asked
    if wanted is Kernel.AUTO:
        return next(name for name, find_obstacle in obstacles.items() if find_obstacle() is None)
    reason = obstacles[wanted]()
    if reason is not None:
        choices = ", ".join(["auto", *(name for name, find in obstacles.items() if find() is None)])
        raise KernelError(f"kernel '{wanted}' cannot compute {operator}: {reason}; choose {choices}")
    return wanted


def read_override() -> Kernel:
    """Returns what ``MOESYS_KERNEL`` names, `Kernel.AUTO` without it. Raises `KernelError` for an unknown name."""
    name = env.read_kernel()
    if name not in list(Kernel):
        raise KernelError(f"MOESYS_KERNEL is '{name}'; valid values are {', '.join(Kernel)}")
    return Kernel(name)
