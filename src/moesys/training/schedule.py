"""The learning rate as a pure function of the step, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from moesys.config import TrainingConfig


def compute_learning_rate(config: TrainingConfig, step: int) -> float:
    """Returns the learning rate of optimizer step ``step`` (0-based).

    Linear warm-up over ``warmup_steps``; then ``cosine``: half a cosine to the final rate at the last step, or
    ``wsd`` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395): constant, then linear over the last
    ``decay_fraction`` of the steps, if any.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    final = config.learning_rate * config.final_learning_rate_ratio
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
        return final + (config.learning_rate - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.num_decay_steps == 0:
        return config.learning_rate
    remaining = min(1.0, (config.steps - 1 - step) / config.num_decay_steps)
    return final + (config.learning_rate - final) * remaining
