"""Sampling, streaming text and the engine's rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesys.errors import GenerationError, ModelFormatError
from moesys.inference import ChatFormat, Engine, SamplingParams, SequenceStep, TextStream
from moesys.inference.chat import Message
from moesys.inference.sampling import sample_token
from moesys.models import AttentionConfig, Decoder, DecoderConfig, initialize_weights
from moesys.moe import MoEConfig

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])


def draw_many(params: SamplingParams, count: int = 2000) -> torch.Tensor:
    ids = [sample_token(LOGITS, params, position, []) for position in range(count)]
    return torch.bincount(torch.tensor(ids), minlength=LOGITS.shape[0]) / count


def test_draws_follow_the_probabilities() -> None:
    shares = draw_many(SamplingParams(temperature=1.0))
    assert (shares - LOGITS.softmax(0)).abs().max() < 0.04


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=1.0, top_k=2), {1, 3}),
        (SamplingParams(temperature=1.0, top_p=0.6), {1}),
        (SamplingParams(temperature=1.0, top_p=0.7), {1, 3}),
        (SamplingParams(temperature=1.0, min_p=0.3), {1, 3}),
        (SamplingParams(temperature=1.0, top_k=3, min_p=0.2, top_p=0.99), {1, 3}),
    ],
)
def test_filters_keep_exactly_the_likely_tokens(params: SamplingParams, allowed: set[int]) -> None:
    assert set(draw_many(params, 400).nonzero().flatten().tolist()) == allowed


def test_temperature_zero_takes_the_best_and_the_penalty_moves_it() -> None:
    greedy = SamplingParams(temperature=0.0)
    assert sample_token(LOGITS, greedy, 0, []) == 1
    assert sample_token(LOGITS, SamplingParams(temperature=0.0, repetition_penalty=2.0), 0, [1]) == 3


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    first = [sample_token(LOGITS, params, i, []) for i in range(50)]
    torch.rand(3)
    assert first == [sample_token(LOGITS, params, i, []) for i in range(50)]
    assert first != [sample_token(LOGITS, SamplingParams(temperature=1.0, seed=6), i, []) for i in range(50)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature \(-1.0\) must be 0 or more"),
        ({"top_k": 0}, r"top_k \(0\) must be 1 or more"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be in \(0, 1\]"),
        ({"min_p": 1.0}, r"min_p \(1.0\) must be in \[0, 1\)"),
        ({"temperature": 0.0, "top_k": 3}, "no effect at temperature 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        SamplingParams(**settings)


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


@given(st.text(max_size=30))
def test_streamed_pieces_are_the_text(text: str) -> None:
    stream = TextStream(decode_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.finish() == text


@given(st.text(alphabet="ab", max_size=20), st.text(alphabet="ab", min_size=1, max_size=3))
def test_nothing_after_a_stop_string_is_shown(text: str, stop: str) -> None:
    stream = TextStream(decode_bytes, [stop])
    shown = ""
    for byte in text.encode():
        shown += stream.push(byte)
        if stream.is_stopped:
            break
    shown += stream.finish()
    assert shown == text.split(stop)[0]
    assert stream.is_stopped == (stop in text)


@pytest.fixture
def engine() -> Engine:
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
    config = DecoderConfig(31, 16, attention, (MoEConfig(4, 2, 8),) * 2, max_positions=12)
    model = Decoder(config)
    initialize_weights(model, 0, std=0.3)
    return Engine(model.eval())


def test_sequences_in_one_step_do_not_see_each_other(engine: Engine) -> None:
    together = [engine.open_sequence(8) for _ in range(2)]
    both = engine.step([SequenceStep(together[0], 0, [1, 2, 3]), SequenceStep(together[1], 0, [4, 5])])
    alone = [engine.open_sequence(8) for _ in range(2)]
    for i, tokens in enumerate(([1, 2, 3], [4, 5])):
        [logits] = engine.step([SequenceStep(alone[i], 0, tokens)])
        torch.testing.assert_close(logits, both[i], rtol=1e-5, atol=1e-5)


def test_tokens_can_be_taken_back(engine: Engine) -> None:
    sequence, fresh = engine.open_sequence(8), engine.open_sequence(8)
    engine.step([SequenceStep(sequence, 0, [1, 2, 3, 4])])
    [again] = engine.step([SequenceStep(sequence, 2, [7, 8])])
    [straight] = engine.step([SequenceStep(fresh, 0, [1, 2, 7, 8])])
    torch.testing.assert_close(again, straight[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "token_ids", "message"),
    [
        (0, [], "at least one new token"),
        (1, [1], "positions must follow without a gap"),
        (0, [1] * 9, "do not fit its capacity"),
        (0, [31], "token ids must be 0 to 30"),
        (0, [-1], "token ids must be 0 to 30"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(
    engine: Engine, start: int, token_ids: list[int], message: str
) -> None:
    sequence = engine.open_sequence(8)
    with pytest.raises(GenerationError, match=message):
        engine.step([SequenceStep(sequence, start, token_ids)])


def test_sequences_must_be_open_and_fit_the_model(engine: Engine) -> None:
    with pytest.raises(GenerationError, match="needs 13 positions, the model was made for 1 to 12"):
        engine.open_sequence(13)
    sequence = engine.open_sequence(4)
    engine.close_sequence(sequence)
    with pytest.raises(GenerationError, match="is not open"):
        engine.step([SequenceStep(sequence, 0, [1])])


def test_a_chat_template_runs_in_a_sandbox() -> None:
    escape = ChatFormat("{{ ''.__class__.__mro__[1].__subclasses__() }}", (), {})
    with pytest.raises(ModelFormatError, match="chat template"):
        escape.render([Message("user", "hi")])


def test_chat_formats() -> None:
    messages = [Message("user", "hi"), Message("assistant", "ho"), Message("user", "again")]
    assert ChatFormat(None, (), {}).render(messages) == "User: hi\nAssistant: ho\nUser: again\nAssistant:"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"
    assert (
        ChatFormat(template, (), {"eos_token": "#"}).render(messages) == "<user>hi<assistant>ho<user>again#"
    )
