"""What is decoded: the model's files, the phases of a process, and the tokens that are fed. Plain data.

Random weights fall into repeating one token when they may choose, which flatters every cache; so the tokens are drawn
beforehand (`Feed.RANDOM`), and greedy decoding is a phase of its own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from make_checkpoint import CheckpointShape

WARM_STEPS = 3
"""Steps before the clock starts."""


class Format(StrEnum):
    """Of the weights of experts, attention and output head."""

    BF16 = "bf16"
    INT8 = "int8"

    @property
    def bits(self) -> float:
        """Per weight. Ours holds a float32 scale for 64 weights."""
        return 16.0 if self is Format.BF16 else 8.5


class Feed(StrEnum):
    """Which token follows."""

    RANDOM = "random"
    """One drawn beforehand: as diverse as routing can be with these weights."""
    GREEDY = "greedy"
    """The likeliest one."""
    REPLAY = "replay"
    """One drawn beforehand, and its experts are those that a trained model chose for a token of real text."""


@dataclass(frozen=True)
class Phase:
    """Prompts that are read, then steps that add a token to each sequence.

    num_steps:  timed ones; 0 where only the prompt is of interest.
    """

    feed: Feed
    batch: int
    prompt_tokens: int
    num_steps: int

    @property
    def name(self) -> str:
        if not self.num_steps:
            return f"prefill {self.prompt_tokens}"
        return f"{self.feed} x{self.batch}"

    @property
    def num_positions(self) -> int:
        """Of one sequence."""
        return self.prompt_tokens + (WARM_STEPS + self.num_steps if self.num_steps else 0)


@dataclass(frozen=True)
class ModelFiles:
    """Where the same weights lie in every layout that a system needs.

    routing: recorded choices of a trained model of as many layers and experts; None without.
    """

    folder: Path
    shape: CheckpointShape
    routing: Path | None = None

    def gguf(self, form: Format) -> Path:
        return self.folder.with_name(f"{self.folder.name}-gguf") / f"{form}.gguf"

    def packed(self, form: Format) -> Path:
        return self.folder.with_name(f"{self.folder.name}-packed") / f"{form}.moesys"

    def list_files(self) -> list[Path]:
        """What systems read from, whether it is there or not."""
        others = [path(form) for form in Format for path in (self.gguf, self.packed)]
        return [*sorted(self.folder.glob("*.safetensors")), *others]

    def scratch(self) -> Path:
        """A folder for a system's own copy."""
        return self.folder.with_name(f"{self.folder.name}-scratch")


@dataclass(frozen=True)
class Task:
    """What one process decodes.

    cap_bytes: for everything that it adds to its imports; None without a limit.
    """

    files: ModelFiles
    form: Format
    phases: tuple[Phase, ...]
    cap_bytes: int | None
    threads: int
    seed: int

    @property
    def num_positions(self) -> int:
        """Tokens of all sequences that are open at once."""
        return max(phase.batch * phase.num_positions for phase in self.phases)


@dataclass(frozen=True)
class Case:
    """The same work for several systems, each in processes of its own.

    cap_bytes: as in `Task`.
    """

    name: str
    form: Format
    phases: tuple[Phase, ...]
    systems: tuple[str, ...]
    cap_bytes: int | None = None


def draw_prompts(phase: Phase, vocab_size: int, seed: int) -> list[list[int]]:
    """Returns the tokens of each sequence's prompt."""
    generator = random.Random(f"{seed} prompts {phase.name}")
    return [[generator.randrange(vocab_size) for _ in range(phase.prompt_tokens)] for _ in range(phase.batch)]


def draw_steps(phase: Phase, vocab_size: int, seed: int) -> list[list[int]]:
    """Returns for each step, those before the clock included, a token for each sequence."""
    generator = random.Random(f"{seed} steps {phase.name}")
    num_steps = WARM_STEPS + phase.num_steps if phase.num_steps else 0
    return [[generator.randrange(vocab_size) for _ in range(phase.batch)] for _ in range(num_steps)]


def count_token_bytes(shape: CheckpointShape, form: Format) -> float:
    """Returns the weight bytes that one token needs from memory. Norms, router and one row of the embedding are not
    packed; the router is computed in float32."""
    matrices = 4 * shape.hidden_size**2 + shape.top_k * 3 * shape.hidden_size * shape.expert_size
    plain = 4 * shape.hidden_size * shape.num_experts + 2 * 4 * shape.hidden_size
    head = shape.hidden_size * shape.vocab_size
    packed_bytes = (shape.num_layers * matrices + head) * form.bits / 8
    return packed_bytes + shape.num_layers * plain + 2 * 2 * shape.hidden_size


def count_prefill_flops(shape: CheckpointShape, num_tokens: int) -> float:
    """Returns the floating-point operations of a prompt of which the last token's logits are wanted, scores that
    causality hides left out."""
    matrices = 4 * shape.hidden_size**2 + shape.top_k * 3 * shape.hidden_size * shape.expert_size
    router = shape.hidden_size * shape.num_experts
    attention = shape.hidden_size * (num_tokens + 1)
    per_token = 2 * (matrices + router + attention) * shape.num_layers
    return num_tokens * per_token + 2 * shape.hidden_size * shape.vocab_size
