"""A prompt in bounded passes: the same as in one, in bits where attention sums alike, and never a longer pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_decoders import WIDE_LATENT, assert_same, make_tokenizer
from torch import Tensor

from moesys.errors import GenerationError
from moesys.inference import Engine, SamplingParams, SequenceStep, generate
from moesys.inference.generate import PREFILL_TOKENS, Generation, Stop
from moesys.inference.kv_cache import BLOCK_TOKENS
from moesys.models import AttentionConfig, Decoder, DecoderConfig, MixerConfig, RopeConfig, initialize_weights
from moesys.moe import MoEConfig

NUM_PROMPT = 700
MIXERS: dict[str, MixerConfig] = {
    "grouped": AttentionConfig(4, 2, 8, RopeConfig(8)),
    "latent": WIDE_LATENT,
    "window": AttentionConfig(4, 2, 8, RopeConfig(8), sliding_window=90),
    "sinks": AttentionConfig(4, 2, 8, RopeConfig(8), has_sinks=True),
}
GREEDY = SamplingParams(temperature=0.0)


class WatchedEngine(Engine):
    """Keeps the logits and the length of every pass."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.lengths: list[int] = []
        self.logits: list[Tensor] = []

    def step(self, steps: Sequence[SequenceStep]) -> list[Tensor]:
        [step] = steps
        self.lengths.append(len(step.token_ids))
        self.logits = super().step(steps)
        return self.logits


def make_model(mixer: MixerConfig) -> Decoder:
    config = DecoderConfig(300, 32, (mixer,) * 2, (MoEConfig(8, 2, 24),) * 2, max_positions=1000)
    model = Decoder(config)
    initialize_weights(model, 0, std=0.3)
    return model.eval().requires_grad_(False)


def prefill(model: Decoder, prefill_tokens: int) -> WatchedEngine:
    engine, draw = WatchedEngine(model), torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 300, (NUM_PROMPT,), generator=draw).tolist()
    list(Generation(engine, make_tokenizer(), prompt, 1, GREEDY, Stop(), prefill_tokens=prefill_tokens))
    return engine


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_prompt_in_passes_gives_what_one_pass_gives(mixer: str) -> None:
    model = make_model(MIXERS[mixer])
    whole, parts, odd = (prefill(model, size) for size in (NUM_PROMPT, PREFILL_TOKENS, 133))
    assert whole.lengths == [700]
    assert parts.lengths == [512, 188]
    assert odd.lengths == [133] * 5 + [35]
    assert torch.equal(parts.logits[0], whole.logits[0])
    # Torch's attention sums in an order that depends on the number of queries and on whether there is a mask.
    assert_same(odd.logits[0], whole.logits[0])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("num_tokens", [513, 520, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_passes_of_whole_blocks_give_the_same_bits(mixer: str, num_tokens: int, dtype: torch.dtype) -> None:
    """Whatever a plan makes of the memory that there is, it writes the same text."""
    model = make_model(MIXERS[mixer]).to(dtype)
    logits = []
    for size in (BLOCK_TOKENS, 2 * BLOCK_TOKENS):
        engine, draw = Engine(model), torch.Generator().manual_seed(0)
        ids = torch.randint(1, 300, (num_tokens,), generator=draw).tolist()
        sequence = engine.open_sequence(num_tokens)
        steps = [SequenceStep(sequence, i, ids[i : i + size]) for i in range(0, num_tokens, size)]
        logits.append(torch.cat([rows for step in steps for rows in engine.step([step])]))
    assert torch.equal(*logits)


def test_a_pass_of_no_tokens_is_refused() -> None:
    engine = Engine(make_model(MIXERS["grouped"]))
    with pytest.raises(GenerationError, match=r"prefill_tokens \(0\) must be 1 or more"):
        generate(engine, make_tokenizer(), "to be", prefill_tokens=0)
