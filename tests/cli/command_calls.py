"""What the tests of the command line share: the settings of a small run, and what a command said."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

SETTINGS = [
    "model.hidden_size=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_experts=4",
    "model.expert_intermediate_size=12",
    "data.vocab_size=300",
    "data.sequence_length=16",
    "data.heldout_fraction=0.2",
    "training.steps=4",
    "training.batch_sequences=2",
    "training.warmup_steps=1",
    "training.log_every=2",
]


@dataclass(frozen=True)
class Answer:
    """What a command said. Whatever a terminal would break into lines is joined again."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        return re.sub(r"\s+", " ", self.err)


Call = Callable[..., Answer]
