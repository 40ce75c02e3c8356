"""Law 4: a checkpoint of transformers gives its logits here, in one pass, token by token and in batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from oracle import LENGTH, Checkpoint, assert_same, compute_logits, make_theirs, make_tokens

from family_keys import VARIANT_KEYS
from moesys.errors import GenerationError, ShapeError
from moesys.inference import Engine, SequenceStep

every_variant = pytest.mark.parametrize("checkpoint", VARIANT_KEYS, indirect=True)
LENGTHS = (5, 21, 13)


@every_variant
@torch.no_grad()
def test_one_pass_gives_the_same_logits(checkpoint: Checkpoint) -> None:
    tokens = make_tokens()
    assert_same(compute_logits(checkpoint.ours, tokens), checkpoint.theirs(tokens).logits)


@every_variant
@torch.no_grad()
def test_decoding_with_a_cache_gives_the_same_logits(checkpoint: Checkpoint) -> None:
    """A prompt in two pieces, then token by token, past windows and original contexts."""
    tokens = make_tokens(batch=1)
    engine = Engine(checkpoint.ours)
    sequence = engine.open_sequence(LENGTH)
    edges = [0, 3, 11, *range(12, LENGTH + 1)]
    logits = [
        engine.step([SequenceStep(sequence, start, tokens[0, start:end].tolist())])[0]
        for start, end in pairwise(edges)
    ]
    assert_same(torch.cat(logits), checkpoint.theirs(tokens).logits[0])


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_sequences_of_one_step_equal_a_padded_batch(checkpoint: Checkpoint, side: str) -> None:
    prompts = [make_tokens(1, length, seed=length)[0] for length in LENGTHS]
    longest = max(LENGTHS)
    tokens = torch.full((len(prompts), longest), 3)
    mask = torch.zeros_like(tokens)
    places = [slice(longest - n, None) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        tokens[row, place], mask[row, place] = prompt, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    theirs = checkpoint.theirs(tokens, attention_mask=mask, position_ids=positions).logits
    engine = Engine(checkpoint.ours)
    steps = [SequenceStep(engine.open_sequence(longest), 0, prompt.tolist()) for prompt in prompts]
    for row, (ours, place) in enumerate(zip(engine.step(steps), places, strict=True)):
        assert_same(ours, theirs[row, place])


@pytest.mark.parametrize("name", ["phimoe-longrope", "llama-longrope"])
def test_longrope_ends_with_the_original_context(
    name: str, open_checkpoint: Callable[[str], Checkpoint]
) -> None:
    """transformers goes on, with angles that differ between one pass and a cache."""
    checkpoint = open_checkpoint(name)
    limit = 64
    assert checkpoint.ours.config.max_positions > checkpoint.ours.config.position_limit == limit
    tokens = make_tokens(1, limit + 1)
    with torch.no_grad():
        whole = tokens[:, :limit]
        assert_same(compute_logits(checkpoint.ours, whole), checkpoint.theirs(whole).logits)
    engine = Engine(checkpoint.ours)
    engine.open_sequence(limit)
    with pytest.raises(GenerationError, match="needs 65 positions, the model was made for 1 to 64; shorten"):
        engine.open_sequence(limit + 1)
    with pytest.raises(ShapeError, match=r"position 64 lies beyond the original context \(64 tokens\)"):
        compute_logits(checkpoint.ours, tokens)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@torch.no_grad()
def test_transformers_answers_dynamic_ropes_by_how_the_text_was_cut() -> None:
    """Why that kind is refused: there is no one result to be equal to."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    theirs = make_theirs(VARIANT_KEYS["llama"] | {"rope_parameters": rope, "max_position_embeddings": 16})
    tokens = make_tokens(1)
    whole = theirs(tokens).logits
    cache = transformers.DynamicCache()
    parts = [theirs(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)]
    assert (torch.cat(parts, dim=1) - whole)[:, -1].abs().max() > 1e-2 * whole.abs().max()
