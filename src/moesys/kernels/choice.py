"""Which implementation of an operator computes a call. Each operator's ``api`` asks here and nowhere else."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from moesys import env
from moesys.errors import KernelError


class Kernel(StrEnum):
    """Implementations of an operator; ``auto`` takes the fastest that fits the call."""

    AUTO = "auto"
    REFERENCE = "reference"
    TORCH = "torch"
    NATIVE = "native"


def choose_kernel(
    operator: str, asked: Kernel, fitting: Collection[Kernel], obstacles: dict[Kernel, str]
) -> Kernel:
    """Returns the implementation for a call: the one asked for, else ``MOESYS_KERNEL``, else the first that fits.

    fitting:    implementations that can take the call, fastest first.
    obstacles:  why each of the others cannot.

    Raises `KernelError` when the implementation asked for cannot take the call; it never falls back.
    """
    wanted = _read_override() if asked is Kernel.AUTO else asked
    if wanted is Kernel.AUTO:
        return next(iter(fitting))
    if wanted not in fitting:
        reason = obstacles.get(wanted, "it has no implementation of that name")
        choices = ", ".join(["auto", *fitting])
        raise KernelError(f"kernel '{wanted}' cannot compute {operator}: {reason}; choose {choices}")
    return wanted


def _read_override() -> Kernel:
    name = env.read_kernel()
    if name not in list(Kernel):
        raise KernelError(f"MOESYS_KERNEL is '{name}'; valid values are {', '.join(Kernel)}")
    return Kernel(name)
