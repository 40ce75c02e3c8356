"""The engine against one pass without a cache: any cut into steps, any company, any taking back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from tiny_decoders import (
    MAX_POSITIONS,
    VOCAB,
    assert_same,
    compute_full_logits,
    make_decoder,
    make_mixed_decoder,
)

from moesys.errors import GenerationError
from moesys.inference import Engine, SequenceStep
from moesys.models import Decoder

MODELS: dict[str, Callable[[], Decoder]] = {
    **{f"window-{size}": lambda size=size: make_decoder(sliding_window=size) for size in (None, 1, 4, 40)},
    "mixed": make_mixed_decoder,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return MODELS[request.param]()


def make_tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run_in_chunks(engine: Engine, tokens: list[int], cuts: list[int]) -> torch.Tensor:
    sequence = engine.open_sequence(len(tokens))
    edges = [0, *sorted(set(cuts)), len(tokens)]
    logits = [
        engine.step([SequenceStep(sequence, start, tokens[start:end])])[0] for start, end in pairwise(edges)
    ]
    engine.close_sequence(sequence)
    return torch.cat(logits)


@pytest.mark.parametrize("cuts", [[], list(range(1, 20)), [1], [19], [7], [3, 5, 6, 14]])
def test_any_cut_of_a_prompt_gives_the_logits_of_one_pass(model: Decoder, cuts: list[int]) -> None:
    tokens = make_tokens(20)
    assert_same(run_in_chunks(Engine(model), tokens, cuts), compute_full_logits(model, tokens))


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 19), max_size=6))
def test_random_cuts_choose_the_same_tokens(cuts: list[int]) -> None:
    model, tokens = make_decoder(sliding_window=5), make_tokens(20, seed=3)
    found = run_in_chunks(Engine(model), tokens, cuts)
    assert torch.equal(found.argmax(-1), compute_full_logits(model, tokens).argmax(-1))


def test_sequences_in_one_step_are_each_as_if_alone(model: Decoder) -> None:
    engine, prompts = Engine(model), [make_tokens(n, seed=n) for n in (3, 1, 11, 8)]
    ids = [engine.open_sequence(20) for _ in prompts]
    engine.step([SequenceStep(ids[2], 0, prompts[2][:6])])
    starts = [0, 0, 6, 0]
    steps = [SequenceStep(i, s, p[s:]) for i, s, p in zip(ids, starts, prompts, strict=True)]
    for start, prompt, logits in zip(starts, prompts, engine.step(steps), strict=True):
        assert_same(logits, compute_full_logits(model, prompt)[start:])
    decoding = engine.step([SequenceStep(i, len(p), [7]) for i, p in zip(ids, prompts, strict=True)])
    for prompt, logits in zip(prompts, decoding, strict=True):
        assert_same(logits, compute_full_logits(model, [*prompt, 7])[-1:])


def test_tokens_taken_back_leave_no_trace(model: Decoder) -> None:
    engine, tokens = Engine(model), make_tokens(12)
    sequence = engine.open_sequence(20)
    engine.step([SequenceStep(sequence, 0, tokens)])
    [logits] = engine.step([SequenceStep(sequence, 5, [1, 2])])
    assert_same(logits, compute_full_logits(model, [*tokens[:5], 1, 2])[5:])
    with pytest.raises(GenerationError, match="7 tokens are cached"):
        engine.step([SequenceStep(sequence, 8, [1])])


def test_only_the_wanted_logits_are_computed(model: Decoder) -> None:
    engine, tokens = Engine(model), make_tokens(6)
    first, second = engine.open_sequence(8), engine.open_sequence(8)
    found = engine.step([SequenceStep(first, 0, tokens, num_logits=2), SequenceStep(second, 0, tokens[:3])])
    assert_same(found[0], compute_full_logits(model, tokens)[-2:])
    assert_same(found[1], compute_full_logits(model, tokens[:3]))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (SequenceStep(0, 3, []), "at least one new token"),
        (SequenceStep(0, 4, [1]), "start at 4, but 3 tokens are cached; positions must follow without a gap"),
        (SequenceStep(0, -1, [1]), "start at -1"),
        (SequenceStep(0, 3, [1] * 6), r"9 tokens do not fit its capacity \(8\)"),
        (SequenceStep(0, 3, [0, VOCAB]), "token ids must be 0 to 30, got 0 to 31"),
        (SequenceStep(0, 3, [-1]), "token ids must be 0 to 30"),
        (
            SequenceStep(0, 3, [1], num_logits=0),
            r"num_logits \(0\) must be 1 to the number of new tokens \(1\)",
        ),
        (SequenceStep(0, 3, [1], num_logits=2), "num_logits"),
        (SequenceStep(9, 0, [1]), r"sequence 9 is not open; open ones: \[0, 1\]"),
        (SequenceStep(1, 0, [1]), "a sequence may occur once in a step"),
    ],
)
def test_a_refused_step_changes_no_cache(step: SequenceStep, message: str) -> None:
    model, tokens = make_decoder(), make_tokens(4)
    engine = Engine(model)
    ids = [engine.open_sequence(8) for _ in range(2)]
    assert ids == [0, 1]
    engine.step([SequenceStep(i, 0, tokens[:3]) for i in ids])
    with pytest.raises(GenerationError, match=message):
        engine.step([SequenceStep(1, 0, [5, 6]), step])
    for logits in engine.step([SequenceStep(i, 3, tokens[3:]) for i in ids]):
        assert_same(logits, compute_full_logits(model, tokens)[3:])


def test_a_step_needs_a_record() -> None:
    with pytest.raises(GenerationError, match="at least one sequence"):
        Engine(make_decoder()).step([])


def test_a_step_that_breaks_half_way_keeps_the_tokens_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_decoder(), make_tokens(8)
    engine = Engine(model)
    sequence = engine.open_sequence(10)
    engine.step([SequenceStep(sequence, 0, tokens)])

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model.blocks[2], "forward", fail)
        with pytest.raises(MemoryError):
            engine.step([SequenceStep(sequence, 4, [1, 2])])
    with pytest.raises(GenerationError, match="4 tokens are cached"):
        engine.step([SequenceStep(sequence, 8, [1])])
    [logits] = engine.step([SequenceStep(sequence, 4, tokens[4:])])
    assert_same(logits, compute_full_logits(model, tokens)[4:])


@pytest.mark.parametrize("capacity", [0, -1, MAX_POSITIONS + 1])
def test_a_sequence_must_fit_the_model(capacity: int) -> None:
    with pytest.raises(GenerationError, match=f"needs {capacity} positions, the model was made for 1 to 24"):
        Engine(make_decoder()).open_sequence(capacity)


def test_caches_have_the_shapes_of_their_mixers() -> None:
    model = make_mixed_decoder()
    engine = Engine(model, num_pages=3, page_tokens=4)
    for tensors, mixer in zip(engine._pool.layers, model.config.mixers, strict=True):
        assert [tuple(t.shape) for t in tensors] == [(12, c.num_heads, c.size) for c in mixer.cached]


def test_closing_frees_once() -> None:
    engine = Engine(make_decoder())
    sequence = engine.open_sequence(4)
    engine.close_sequence(sequence)
    for use in (
        lambda: engine.step([SequenceStep(sequence, 0, [1])]),
        lambda: engine.close_sequence(sequence),
    ):
        with pytest.raises(GenerationError, match=f"sequence {sequence} is not open"):
            use()
    assert engine.open_sequence(4) != sequence


MACHINE_MODEL = make_mixed_decoder()


class EngineMachine(RuleBasedStateMachine):
    """Sequences opened, extended, rolled back and closed in any order, against one pass over each."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(MACHINE_MODEL)
        self.tokens: dict[int, list[int]] = {}

    @rule()
    def open_sequence(self) -> None:
        self.tokens[self.engine.open_sequence(MAX_POSITIONS)] = []

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.tokens)), min_size=1, unique=True))
        steps = []
        for sequence in chosen:
            start = data.draw(st.integers(0, min(len(self.tokens[sequence]), MAX_POSITIONS - 1)))
            size = min(5, MAX_POSITIONS - start)
            new = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=size))
            self.tokens[sequence] = self.tokens[sequence][:start] + new
            steps.append(SequenceStep(sequence, start, new))
        for step, logits in zip(steps, self.engine.step(steps), strict=True):
            assert_same(
                logits, compute_full_logits(MACHINE_MODEL, self.tokens[step.sequence_id])[step.start :]
            )

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def close_sequence(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.engine.close_sequence(sequence)
        del self.tokens[sequence]


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
