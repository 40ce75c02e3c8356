"""How many assignments an expert takes, for those who ask for a limit. Without a `Capacity` nothing is ever dropped.

What exceeds the limit is marked in ``Routing.dropped`` and counted; the routing stays complete. Nothing here pads:
rows that are not there are not computed, so a limit bounds work and memory from above only. Scope: ``rank``, the
tokens of the Routing given, as in Tutel and DeepSpeed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction

import torch
from torch import Tensor

from moesys.errors import RoutingError
from moesys.moe.routing import Routing

_DEEPSPEED_MIN_CAPACITY = 4


class CapacityFormula(StrEnum):
    """From tokens T, experts E, choices k and factor f to the assignments that an expert takes.

    Computed exactly, with the factor as its decimal digits say: 800 tokens, 8 experts and 1.1 give 110. The systems
    themselves round: DeepSpeed multiplies in float32 and its ceil is one higher for about 1 % of usual shapes (50
    tokens, 2 experts, 1.2: 31); Tutel multiplies in float64 and its floor is at times one lower (100 per expert, 0.29:
    28).
    """

    TUTEL = "tutel"
    """k * int(f * ceil(T / E))."""
    DEEPSPEED = "deepspeed"
    """ceil(T / E * f * k)."""

    @property
    def default_min_capacity(self) -> int:
        """What the system's own users get who set no minimum: DeepSpeed's is 4, Tutel has none."""
        return _DEEPSPEED_MIN_CAPACITY if self is CapacityFormula.DEEPSPEED else 0

    def compute(self, num_tokens: int, num_experts: int, k: int, factor: float) -> int:
        """Returns the limit for a positive factor, before a minimum is applied; at least 0."""
        exact_factor = Fraction(str(factor))
        if self is CapacityFormula.TUTEL:
            return k * math.floor(exact_factor * math.ceil(Fraction(num_tokens, num_experts)))
        return math.ceil(Fraction(num_tokens, num_experts) * exact_factor * k)

    def can_drop(self, num_experts: int, k: int, factor: float) -> bool:
        """Returns whether there is a number of tokens for which the limit is less than it."""
        exact_factor = Fraction(str(factor))
        # Tutel's floor takes the largest part away where the even share is one.
        least_factor = math.floor(exact_factor) if self is CapacityFormula.TUTEL else exact_factor
        return least_factor * k < num_experts


class DropBy(StrEnum):
    """Which assignments of an expert stay when it has more than it takes."""

    POSITION = "position"
    """All first choices before all second choices, each in the order of the tokens."""
    PROBABILITY = "probability"
    """Those to which this expert has the largest share of the token's distribution, ``Routing.scores_TE``: the
    probability with softmax (DeepSpeed's ``drop_policy='probs'``), with sigmoid the score over the token's sum."""
    CONFIDENCE = "confidence"
    """As ``position``, with the tokens ordered by the largest share in their distribution (Tutel's batch-prioritized
    routing)."""


@dataclass(frozen=True)
class Capacity:
    """A limit on the assignments per expert. Made by its named constructors.

    factor:         times the even share of an expert; None: no limit.
    formula:        how the factor becomes a number.
    min_capacity:   the limit is at least this.
    drop_by:        which assignments stay.
    keeps_totals:   whether the surviving weights of a token grow so that its total stays what it was, where the
                    router normalises. That is DeepSpeed's normalisation over survivors; Tutel normalises before
                    dropping and leaves a token that lost an expert with less.
    bound_by_need:  whether `compute_limit` returns the largest need where that is less, as Tutel sizes its buffers
                    for a negative factor. It drops the same, and here nothing is padded.
    """

    factor: float | None
    formula: CapacityFormula = CapacityFormula.DEEPSPEED
    min_capacity: int = 0
    drop_by: DropBy = DropBy.POSITION
    keeps_totals: bool = False
    bound_by_need: bool = False

    def __post_init__(self) -> None:
        if self.factor is None:
            options = (self.min_capacity, self.drop_by, self.keeps_totals, self.bound_by_need)
            if options != (0, DropBy.POSITION, False, False):
                raise RoutingError(
                    f"a capacity without a factor drops nothing, so min_capacity ({self.min_capacity}), drop_by "
                    f"({self.drop_by}), keeps_totals ({self.keeps_totals}) and bound_by_need ({self.bound_by_need}) "
                    "contradict it; give a factor, or use Capacity.unbounded()"
                )
        elif not (self.factor > 0 and math.isfinite(self.factor)):
            raise RoutingError(
                f"the capacity factor ({self.factor}) must be positive; use Capacity.unbounded() to drop nothing and "
                "Capacity.from_tutel_factor() for Tutel's 0 and negative factors"
            )
        if self.min_capacity < 0:
            raise RoutingError(f"min_capacity ({self.min_capacity}) must be at least 0")

    @classmethod
    def unbounded(cls) -> Capacity:
        """Nothing is dropped. Where a capacity is configured, this switches it off for a call."""
        return cls(None)

    @classmethod
    def by_formula(
        cls,
        formula: CapacityFormula,
        factor: float,
        *,
        min_capacity: int | None = None,
        drop_by: DropBy = DropBy.POSITION,
    ) -> Capacity:
        """Returns `from_tutel_factor` or `deepspeed`, whichever the formula belongs to.

        min_capacity: None for the formula's own, `CapacityFormula.default_min_capacity`.

        Raises `RoutingError` for a factor that the formula does not have: only Tutel's may be 0 or negative.
        """
        make = cls.from_tutel_factor if formula is CapacityFormula.TUTEL else cls.deepspeed
        least = formula.default_min_capacity if min_capacity is None else min_capacity
        return make(factor, min_capacity=least, drop_by=drop_by)

    @classmethod
    def tutel(cls, factor: float, *, drop_by: DropBy = DropBy.POSITION, min_capacity: int = 0) -> Capacity:
        """Tutel's limit for a positive factor; the weights of survivors stay as they are."""
        return cls(factor, CapacityFormula.TUTEL, min_capacity, drop_by)

    @classmethod
    def from_tutel_factor(
        cls, factor: float, *, drop_by: DropBy = DropBy.POSITION, min_capacity: int = 0
    ) -> Capacity:
        """Tutel's meaning of ``capacity_factor``: positive is a limit, 0 drops nothing, and negative is the largest
        need, at most what the positive factor would give. Raises `RoutingError` for 0 with other options, which have
        nothing to act on."""
        if factor == 0:
            return cls(None, min_capacity=min_capacity, drop_by=drop_by)
        limit = cls.tutel(abs(factor), drop_by=drop_by, min_capacity=min_capacity)
        return replace(limit, bound_by_need=factor < 0)

    @classmethod
    def deepspeed(
        cls, factor: float, *, min_capacity: int = _DEEPSPEED_MIN_CAPACITY, drop_by: DropBy = DropBy.POSITION
    ) -> Capacity:
        """DeepSpeed's limit. Where the router normalises, the weights of survivors are normalised again, which changes
        nothing for k = 1; where it does not, they stay. DeepSpeed itself normalises always from k = 2 on."""
        return cls(factor, CapacityFormula.DEEPSPEED, min_capacity, drop_by, keeps_totals=True)

    def require_effect(self, num_experts: int, k: int) -> None:
        """Raises `RoutingError` for a factor with which an expert takes every token, so that nothing can be dropped."""
        if self.factor is None or self.formula.can_drop(num_experts, k, self.factor):
            return
        raise RoutingError(
            f"the capacity factor ({self.factor}) can never drop anything: with {num_experts} experts and top_k {k} an "
            f"expert then takes every token; use a factor below {num_experts / k:.4g}, or no capacity"
        )

    def compute_limit(self, routing: Routing) -> int:
        """Returns the assignments that an expert takes in this routing, at most the number of tokens.

        Waits for the device when the need decides. Raises `RoutingError` as `find_dropped` does.
        """
        if self.factor is None:
            return _find_largest_need(routing)
        bound = self._compute_bound(routing, self.factor)
        return min(bound, _find_largest_need(routing)) if self.bound_by_need else bound

    def find_dropped(self, routing: Routing) -> Tensor | None:
        """Returns (assignments,) bool: True beyond the limit; None where there is no limit.

        Raises `RoutingError` when tokens have different numbers of experts and the formula needs one k, or when
        assignments are to be dropped by scores that the routing does not have.
        """
        if self.factor is None:
            return None
        return compute_positions(routing, self.drop_by) >= self._compute_bound(routing, self.factor)

    def mark(self, routing: Routing, dropped: Tensor | None, *, is_normalized: bool) -> Routing:
        """Returns the routing with these assignments marked as dropped and the weights of the others as this
        capacity leaves them.

        is_normalized: whether the router scales a token's weights to one sum; only then is that sum restored.
        """
        if dropped is None:
            return routing
        weights = _keep_totals(routing, dropped) if self.keeps_totals and is_normalized else routing.weights
        return replace(routing, dropped=dropped, weights=weights)

    def _compute_bound(self, routing: Routing, factor: float) -> int:
        if routing.fixed_k is None:
            raise RoutingError(
                f"a capacity factor ({factor}) needs the same number of experts for every token, and this router gives "
                "as many as pass its threshold; drop the factor or choose a fixed top_k"
            )
        bound = self.formula.compute(routing.num_tokens, routing.num_experts, routing.fixed_k, factor)
        return min(max(bound, self.min_capacity), routing.num_tokens)


def compute_positions(routing: Routing, drop_by: DropBy = DropBy.POSITION) -> Tensor:
    """Returns (assignments,) int64: 0 for the first that an expert takes, 1 for its second, and so on.

    Ties go to the earlier token. Raises `RoutingError` where the order needs scores that the routing does not have.
    """
    order = torch.arange(routing.num_assignments, device=routing.expert_ids.device)
    for key in _list_keys(routing, drop_by):
        order = order[key[order].argsort(stable=True)]
    counts_E = routing.compute_expert_counts()
    starts_E = counts_E.cumsum(0) - counts_E
    places = torch.arange(routing.num_assignments, device=order.device)
    return torch.empty_like(order).scatter_(0, order, places - starts_E[routing.expert_ids[order]])


def _list_keys(routing: Routing, drop_by: DropBy) -> list[Tensor]:
    """Returns the (assignments,) sort keys, the least important first; the expert decides last of all."""
    choice = routing.choice
    match drop_by:
        case DropBy.POSITION:
            return [choice.compute_ranks(), routing.expert_ids]
        case DropBy.CONFIDENCE:
            largest_T = _require_scores(routing, drop_by).amax(dim=1)
            return [-largest_T[choice.compute_token_ids()], choice.compute_ranks(), routing.expert_ids]
        case DropBy.PROBABILITY:
            return [-choice.gather(_require_scores(routing, drop_by)), routing.expert_ids]


def _require_scores(routing: Routing, drop_by: DropBy) -> Tensor:
    if routing.scores_TE is None:
        raise RoutingError(
            f"dropping by {drop_by} needs a Routing with scores_TE; use a router with scores, or {DropBy.POSITION}"
        )
    return routing.scores_TE.detach()


def _find_largest_need(routing: Routing) -> int:
    return int(routing.compute_expert_counts().max())


def _keep_totals(routing: Routing, dropped: Tensor) -> Tensor:
    choice, weights = routing.choice, routing.weights
    survivors_A = choice.sum_per_token(weights.masked_fill(dropped, 0.0))
    # DeepSpeed's floor: survivors of about no weight stay so. Without it their gradients are infinite or NaN, and so
    # is the unused quotient of a token that lost all its experts, which would still spoil the gradient.
    growth_A = choice.sum_per_token(weights) / survivors_A.clamp_min(torch.finfo(weights.dtype).eps)
    return torch.where(dropped, weights, weights * growth_A)
