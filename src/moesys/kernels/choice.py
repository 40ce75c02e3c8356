"""Which implementation of an operator computes a call. Each operator asks here and nowhere else.

A wish comes from the call's own argument, else from `use_kernel`, else from ``MOESYS_KERNEL``. Without one the fastest
that fits computes, and where the user could have had a faster one it is said, once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from threading import Lock

from moesys import env
from moesys.errors import KernelError


class Kernel(StrEnum):
    """Implementations of an operator; ``auto`` takes the fastest that fits the call."""

    AUTO = "auto"
    """The default. Without gradients native where it can; in training torch, with the faster of both products."""
    REFERENCE = "reference"
    """The specification, slow and obvious."""
    TORCH = "torch"
    """Torch's own operations alone, differentiable, on any device."""
    NATIVE = "native"
    """C on the CPU, without gradients; a row's bits do not depend on other rows."""


_KERNELS = {kernel.value: kernel for kernel in Kernel}
"""By name: a look into it takes a tenth of a call of `Kernel`, and every call of an operator makes one."""


@dataclass(frozen=True)
class Obstacle:
    """Why an implementation cannot take a call.

    fix: what the user can change to have it; None where the call is as it should be, such as in training.
    """

    reason: str
    fix: str | None = None


FindObstacle = Callable[[], Obstacle | None]
"""Returns why an implementation cannot take the call at hand; None when it can."""

_ambient: ContextVar[Kernel] = ContextVar("moesys_kernel", default=Kernel.AUTO)
_held: ContextVar[Kernel | None] = ContextVar("moesys_kernel_of_environment", default=None)
_in_force: tuple[Kernel, ...] = ()
"""What `use_kernel` asks for now, in all threads: ``torch.compile`` can guard this, and no context variable."""
_in_force_lock = Lock()


def use_kernel(kernel: Kernel) -> AbstractContextManager[None]:
    """Makes ``kernel`` the wish of every operator called inside that is not given one; ``auto`` changes nothing.

    Holds for this thread or task, for products of a backward pass that runs inside, and for those of a forward pass
    that ran inside. Comes before ``MOESYS_KERNEL``.
    """
    changes_nothing = kernel is Kernel.AUTO or kernel is _ambient.get()
    return nullcontext() if changes_nothing else _set_ambient(kernel)


@contextmanager
def _set_ambient(kernel: Kernel) -> Iterator[None]:
    global _in_force
    with _in_force_lock:
        _in_force = (*_in_force, kernel)
    token = _ambient.set(kernel)
    try:
        yield
    finally:
        _ambient.reset(token)
        with _in_force_lock:
            position = _in_force.index(kernel)
            _in_force = _in_force[:position] + _in_force[position + 1 :]


def choose_kernel(operator: str, asked: Kernel, obstacles: Mapping[Kernel, FindObstacle]) -> Kernel:
    """Returns the implementation for a call: the one asked for, else `read_wish`, else the first that fits.

    obstacles:  the operator's implementations, fastest first; looked at only where the choice depends on it.

    Raises `KernelError` when the implementation asked for cannot take the call; it never falls back. Where none is
    asked for and one is passed over for a reason that the user can change, that is logged once per reason.
    """
    wanted = read_wish() if asked is Kernel.AUTO else asked
    if wanted is Kernel.AUTO:
        return _choose_fastest(operator, obstacles)
    obstacle = obstacles[wanted]()
    if obstacle is not None:
        choices = ", ".join(["auto", *(name for name, find in obstacles.items() if find() is None)])
        raise KernelError(f"kernel '{wanted}' cannot compute {operator}: {obstacle.reason}; choose {choices}")
    return wanted


def read_wish() -> Kernel:
    """Returns what `use_kernel` or else ``MOESYS_KERNEL`` names, `Kernel.AUTO` without either. Raises `KernelError`
    for an unknown name in the environment."""
    ambient = _ambient.get()
    if ambient is not Kernel.AUTO:
        return ambient
    return _held.get() or _read_environment()


def hold_environment() -> AbstractContextManager[None]:
    """Lets `read_wish` look at the environment once for all calls inside, in this thread or task: operators of one
    token are so short that the look is a tenth of them."""
    return nullcontext() if _held.get() is not None else _hold_environment()


@contextmanager
def _hold_environment() -> Iterator[None]:
    token = _held.set(_read_environment())
    try:
        yield
    finally:
        _held.reset(token)


def _read_environment() -> Kernel:
    name = env.read_kernel()
    try:
        return _KERNELS[name]
    except KeyError:
        raise KernelError(f"MOESYS_KERNEL is '{name}'; valid values are {', '.join(Kernel)}") from None


def wants_native(asked: Kernel) -> bool:
    """Whether ``native`` computes a call that it can take, where it is the fastest."""
    wish = read_wish() if asked is Kernel.AUTO else asked
    return wish is Kernel.AUTO or wish is Kernel.NATIVE


def is_torch_certain() -> bool:
    """Whether `read_wish` gives ``torch`` or ``auto`` in every thread, answered without a look at this one's. For code
    that ``torch.compile`` captures: a graph made after a yes is guarded by it, where `read_wish` breaks the graph."""
    return all(wish in ("auto", "torch") for wish in (env.read_kernel(), *_in_force))


def _choose_fastest(operator: str, obstacles: Mapping[Kernel, FindObstacle]) -> Kernel:
    for name, find_obstacle in obstacles.items():
        obstacle = find_obstacle()
        if obstacle is None:
            return name
        if obstacle.fix is not None:
            _report(operator, name, obstacle)
    raise KernelError(f"no implementation of {operator} can compute this call")


@cache
def _report(operator: str, passed_over: Kernel, obstacle: Obstacle) -> None:
    logging.getLogger("moesys").warning(
        "%s: a slower kernel computes than '%s': %s; %s", operator, passed_over, obstacle.reason, obstacle.fix
    )
