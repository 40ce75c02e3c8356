"""How good a predictor's guesses are, counted while it works.

Only reads count: a guess of what is there already costs nothing and saves nothing, nor does one that finds no slot. A
cache knows what it read (`PredictionScore.of_reads`); where nothing is read, as in a replayed log, `ScoredPredictor`
takes every guess of what is not there for a read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from moesys.moe.expert_key import ExpertKey
from moesys.moe.predictors import Predictor
from moesys.moe.routing import Routing
from moesys.store import CacheStats


@dataclass(frozen=True)
class PredictionScore:
    """Counts of experts.

    num_guessed:  read on a guess.
    num_right:    of them, those that were needed.
    num_missing:  needed, and not there but for the guesses.
    """

    num_guessed: int = 0
    num_right: int = 0
    num_missing: int = 0

    @classmethod
    def of_reads(cls, stats: CacheStats) -> Self:
        """Returns what a cache's reads say, of its whole life or of the difference between two moments.

        A guess that was read before the first moment and needed after it counts as read then.
        """
        num_demanded = stats.num_loads - stats.prefetch_issued - stats.ahead_issued
        return cls(
            max(stats.prefetch_issued, stats.prefetch_used),
            stats.prefetch_used,
            stats.prefetch_used + num_demanded,
        )

    @property
    def num_wasted(self) -> int:
        """Guesses that nobody needed: reads for nothing."""
        return self.num_guessed - self.num_right

    @property
    def precision(self) -> float:
        """Share of the guesses that were needed; 0 without guesses."""
        return self.num_right / self.num_guessed if self.num_guessed else 0.0

    @property
    def recall(self) -> float:
        """Share of what was missing that was guessed; 0 where nothing was missing."""
        return self.num_right / self.num_missing if self.num_missing else 0.0


class ScoredPredictor:
    """A predictor whose guesses, as if each were read, are held against what was needed then."""

    def __init__(self, predictor: Predictor, is_here: Callable[[ExpertKey], bool]) -> None:
        """is_here: whether an expert needs no read now, such as `SectionCache.is_here`."""
        self._predictor = predictor
        self._is_here = is_here
        self._guessed: frozenset[ExpertKey] = frozenset()
        self.score = PredictionScore()

    def observe(self, layer_id: int, routing: Routing, x_TD: Tensor | None) -> None:
        """See `Predictor`."""
        needed = {(layer_id, expert) for expert in routing.expert_ids.unique().tolist()}
        missing = {key for key in needed if key in self._guessed or not self._is_here(key)}
        self.score = PredictionScore(
            self.score.num_guessed + len(self._guessed),
            self.score.num_right + len(self._guessed & needed),
            self.score.num_missing + len(missing),
        )
        self._guessed = frozenset()
        self._predictor.observe(layer_id, routing, x_TD)

    def guess(self, layer_id: int) -> Sequence[ExpertKey]:
        """See `Predictor`."""
        guesses = self._predictor.guess(layer_id)
        self._guessed = frozenset(key for key in guesses if not self._is_here(key))
        return guesses
