"""What the routers did between two lines of the log, from what they did in each step.

Knows counts and means; does not know who reads them. The idea: a skipped step has taught the model nothing and its
numbers may be NaN, so it enters nothing, as its loss does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from moesys.moe import ExpertLoad
from moesys.training.step import StepResult


def merge_loads(results: Sequence[StepResult]) -> ExpertLoad:
    """Sums the counts of the applied steps and averages the rest over them; steps have as many tokens each.

    Takes at least one step. Where none was applied, counts are 0 and averages NaN. The imbalance is that of the
    summed counts, and NaN for a model without MoE layers.
    """
    loads = [result.load for result in results if result.is_finite]
    expert_tokens = [[0] * len(counts) for counts in results[0].load.expert_tokens]
    for load in loads:
        expert_tokens = [
            [a + b for a, b in zip(*pair, strict=True)]
            for pair in zip(expert_tokens, load.expert_tokens, strict=True)
        ]
    return replace(
        results[0].load,
        expert_tokens=expert_tokens,
        imbalance=_mean([max(counts) * len(counts) / sum(counts) for counts in expert_tokens if sum(counts)]),
        entropy=_mean([load.entropy for load in loads]),
        confidence=_mean([load.confidence for load in loads]),
        dropped=sum(load.dropped for load in loads),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
