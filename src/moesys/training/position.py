"""How far a run has come: what a checkpoint keeps of it beside tensors, and what every metrics line begins with."""

from __future__ import annotations

from dataclasses import dataclass

from moesys.training.step import StepResult


@dataclass(frozen=True)
class Position:
    """A place in a run."""

    step: int = 0
    """Optimizer steps done; skipped ones count."""
    tokens: int = 0
    """Target tokens of the steps that changed the parameters."""
    elapsed_s: float = 0.0
    """Seconds of training over all resumes, without evaluations and saves."""

    def advance(self, result: StepResult, seconds: float) -> Position:
        """Returns the place after one more step."""
        tokens = self.tokens + (result.num_targets if result.is_finite else 0)
        return Position(self.step + 1, tokens, self.elapsed_s + seconds)
