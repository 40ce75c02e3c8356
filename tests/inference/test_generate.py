"""Generation: what ends it, what its figures count, and greedy text against one pass after another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny_decoders import (
    MAX_POSITIONS,
    compute_full_logits,
    make_decoder,
    make_llama_like_tokenizer,
    make_tokenizer,
)
from torch import Tensor

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference import Engine, Generation, SamplingParams, SequenceStep, Stop, generate

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


class ScriptedEngine:
    """Answers with the tokens of a script; keeps the rules of sequences."""

    def __init__(self, script: Sequence[int], vocab_size: int) -> None:
        self._script = list(script)
        self._vocab_size = vocab_size
        self.open_ids: set[int] = set()
        self.steps: list[SequenceStep] = []

    def open_sequence(self, capacity: int) -> int:
        self.open_ids.add(capacity)
        return capacity

    def close_sequence(self, sequence_id: int) -> None:
        self.open_ids.remove(sequence_id)

    def step(self, steps: Sequence[SequenceStep]) -> list[Tensor]:
        [step] = steps
        self.steps.append(step)
        logits_V = torch.zeros(self._vocab_size)
        logits_V[self._script.pop(0)] = 9.0
        return [logits_V[None]]


def start(tokenizer: Tokenizer, script: Sequence[int], limit: int = 50, **settings: Any) -> Generation:
    engine = ScriptedEngine(script, tokenizer.vocab_size)
    return generate(
        cast(Engine, engine), tokenizer, "to be", max_new_tokens=limit, sampling=GREEDY, **settings
    )


def test_end_of_text_ends_it_and_is_not_shown(tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode("or not 🙂"), tokenizer.end_of_text_id, 5]
    generation = start(tokenizer, script)
    assert "".join(generation) == "or not 🙂"
    assert generation.new_token_ids == script[:-1]
    assert generation.stats is not None
    assert generation.stats.finish_reason == "end_of_text"
    assert generation.stats.new_tokens == len(script) - 1
    assert generation.stats.prompt_tokens == 1 + len(tokenizer.encode("to be"))


def test_further_stop_tokens_end_it_and_are_not_shown(tokenizer: Tokenizer) -> None:
    script = tokenizer.encode("or not")
    generation = start(tokenizer, script, stop=Stop(token_ids=[script[-1]]))
    assert "".join(generation) == tokenizer.decode(script[:-1])
    assert generation.stats is not None
    assert generation.stats.finish_reason == "end_of_text"


def test_a_stop_string_ends_it(tokenizer: Tokenizer) -> None:
    generation = start(tokenizer, tokenizer.encode("or not\nUser: more"), stop=Stop(["\nUser:"]))
    assert "".join(generation) == "or not"
    assert generation.stats is not None
    assert generation.stats.finish_reason == "stop_string"


def test_the_length_ends_it_in_the_middle_of_a_character(tokenizer: Tokenizer) -> None:
    generation = start(tokenizer, tokenizer.encode("𝄞𝄞"), limit=1)
    assert "".join(generation) == "\N{REPLACEMENT CHARACTER}"
    assert generation.stats is not None
    assert generation.stats.finish_reason == "length"
    assert generation.stats.new_tokens == 1
    assert generation.stats.decode_tokens_per_s == 0.0


def test_the_space_after_the_prompt_is_kept() -> None:
    """Mixtral's tokenizer drops the space that begins a text; the first new token does not begin one."""
    tokenizer = Tokenizer(make_llama_like_tokenizer(), "</s>")
    [space_is] = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([0, i]) == "</s> is"]
    assert "".join(start(tokenizer, [space_is, tokenizer.end_of_text_id])) == " is"


def test_a_stop_string_in_the_last_token_is_why_it_ended(tokenizer: Tokenizer) -> None:
    generation = start(tokenizer, tokenizer.encode("x"), limit=1, stop=Stop(["x"]))
    assert "".join(generation) == ""
    assert generation.stats is not None
    assert generation.stats.finish_reason == "stop_string"


def test_the_prompt_is_run_once_and_then_each_new_token(tokenizer: Tokenizer) -> None:
    script = [*tokenizer.encode("or"), tokenizer.end_of_text_id]
    generation = start(tokenizer, script)
    list(generation)
    prompt = [tokenizer.end_of_text_id, *tokenizer.encode("to be")]
    engine = cast(ScriptedEngine, generation._engine)
    assert [(step.start, list(step.token_ids)) for step in engine.steps] == [
        (0, prompt),
        *((len(prompt) + i, [token]) for i, token in enumerate(script[:-1])),
    ]
    assert all(step.num_logits == 1 for step in engine.steps)
    assert not engine.open_ids


def test_the_readers_time_is_not_in_the_figures(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def look() -> float:
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(sys.modules[Generation.__module__], "time", SimpleNamespace(perf_counter=look))
    generation = start(tokenizer, [*tokenizer.encode("or not"), tokenizer.end_of_text_id])
    for _ in generation:
        now += 100
    stats = generation.stats
    assert stats is not None
    assert (stats.prefill_s, stats.decode_s) == (1, stats.new_tokens - 1)
    assert stats.decode_tokens_per_s == 1
    assert stats.describe().endswith("tokens/s, ended by end of text")


def test_an_abandoned_generation_frees_its_sequence(tokenizer: Tokenizer) -> None:
    generation = start(tokenizer, tokenizer.encode("or not to be"))
    pieces = iter(generation)
    next(pieces)
    pieces.close()
    assert generation.stats is None
    assert not cast(ScriptedEngine, generation._engine).open_ids


def test_it_can_be_iterated_once(tokenizer: Tokenizer) -> None:
    generation = start(tokenizer, [tokenizer.end_of_text_id])
    list(generation)
    with pytest.raises(GenerationError, match="iterated before"):
        list(generation)


@pytest.mark.parametrize("window", [None, 4])
def test_greedy_tokens_are_those_of_one_pass_after_another(tokenizer: Tokenizer, window: int | None) -> None:
    model = make_decoder(vocab_size=tokenizer.vocab_size, sliding_window=window)
    generation = generate(Engine(model), tokenizer, "to be", max_new_tokens=12, sampling=GREEDY)
    text = "".join(generation)
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("to be")]
    for found in generation.new_token_ids:
        assert found == int(compute_full_logits(model, ids)[-1].argmax())
        ids.append(found)
    assert tokenizer.decode(ids).startswith("<|endoftext|>to be" + text)


def test_the_same_seed_gives_the_same_text(tokenizer: Tokenizer) -> None:
    engine = Engine(make_decoder(vocab_size=tokenizer.vocab_size))

    def write(seed: int) -> list[int]:
        generation = generate(
            engine, tokenizer, "", max_new_tokens=15, sampling=SamplingParams(2.0, seed=seed)
        )
        list(generation)
        return generation.new_token_ids

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_what_cannot_be_generated_says_why(tokenizer: Tokenizer) -> None:
    engine = Engine(make_decoder(vocab_size=tokenizer.vocab_size))
    with pytest.raises(GenerationError, match=r"max_new_tokens \(0\) must be 1 or more"):
        generate(engine, tokenizer, "a", max_new_tokens=0)
    with pytest.raises(GenerationError, match="the prompt has no tokens"):
        Generation(engine, tokenizer, [], 1, GREEDY, Stop())
    with pytest.raises(GenerationError, match="stop string must not be empty"):
        generate(engine, tokenizer, "a", stop=Stop([""]))
    too_long = generate(engine, tokenizer, "🙃" * MAX_POSITIONS, max_new_tokens=1)
    with pytest.raises(GenerationError, match="the model was made for 1 to 24; shorten the prompt"):
        list(too_long)


def test_weights_that_are_not_numbers_are_an_error(tokenizer: Tokenizer) -> None:
    model = make_decoder(vocab_size=tokenizer.vocab_size)
    model.final_norm.weight.data[0] = torch.nan
    with pytest.raises(GenerationError, match="the largest logit of the token at position 2 is nan"):
        list(generate(Engine(model), tokenizer, "t", max_new_tokens=3))
