"""The decision of one MoE layer in one micro-batch: recorded in the forward pass, replayed when it is recomputed.

Recomputing the router can flip near-tied choices, and with them what a capacity drops, which would give the backward
pass other experts than the forward pass had. Only decisions are replayed; logits and weights are computed again,
with gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from moesys.moe.choice import Choice
from moesys.moe.routing import Routing


@dataclass(frozen=True)
class Decision:
    """What a routing decided.

    dropped: (assignments,) bool; None when nothing is dropped.
    """

    choice: Choice
    dropped: Tensor | None


@dataclass
class RoutingTape:
    """Keeps one decision."""

    _decision: Decision | None = field(default=None, init=False)
    _is_replaying: bool = field(default=False, init=False)

    @property
    def replayed(self) -> Decision | None:
        """What is to be used instead of deciding; None while recording."""
        return self._decision if self._is_replaying else None

    def record(self, routing: Routing) -> None:
        """Keeps the decision of the forward pass; does nothing while replaying."""
        if not self._is_replaying:
            self._decision = Decision(routing.choice, routing.dropped)

    def make_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Returns the contexts for forward and recompute that `torch.utils.checkpoint` asks for."""
        return nullcontext(), self._replay()

    @contextmanager
    def _replay(self) -> Iterator[None]:
        self._is_replaying = True
        try:
            yield
        finally:
            self._is_replaying = False
