"""Many prompts at once: each text is that of a generation of its own, however the batch is made up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_decoders import make_decoder, make_tokenizer
from torch import Tensor

from moesys.data import Tokenizer
from moesys.errors import GenerationError
from moesys.inference import Engine, Generation, SamplingParams, SequenceStep, Stop
from moesys.inference.batch import BatchPrompt, BatchResult, BatchRun
from moesys.inference.generate import encode_prompt
from moesys.inference.sampling import derive_seed
from moesys.models import Decoder

TEXTS = [
    "to be",
    "",
    "or not to be, or not to be",
    "User: hello",
    "日本 🙂",
    "be",
    "not to",
    "Assistant: hi hi hi",
]
POSITIONS = 120


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return make_decoder(vocab_size=tokenizer.vocab_size, max_positions=POSITIONS)


def make_prompts(tokenizer: Tokenizer) -> list[BatchPrompt]:
    """Texts of different lengths, at different temperatures, with seeds of their own."""
    return [
        BatchPrompt(encode_prompt(tokenizer, text), 4 + 5 * (i % 4), SamplingParams(0.5 * (i % 3), seed=i))
        for i, text in enumerate(TEXTS)
    ]


class WatchedEngine(Engine):
    """Keeps what each step was made of."""

    def __init__(self, model: Decoder, num_pages: int | None = None, page_tokens: int = 8) -> None:
        super().__init__(model, num_pages=num_pages, page_tokens=page_tokens)
        self.steps: list[list[SequenceStep]] = []
        self.num_open: list[int] = []

    def step(self, steps: Sequence[SequenceStep]) -> list[Tensor]:
        self.steps.append(list(steps))
        self.num_open.append(len(self._caches))
        return super().step(steps)


def write_alone(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[BatchPrompt], stop: Stop, prefill_tokens: int
) -> dict[int, BatchResult]:
    results: dict[int, BatchResult] = {}
    for index, prompt in enumerate(prompts):
        generation = Generation(
            Engine(model),
            tokenizer,
            prompt.token_ids,
            prompt.max_new_tokens,
            prompt.sampling,
            stop,
            prefill_tokens=prefill_tokens,
        )
        text = "".join(generation)
        stats = generation.stats
        assert stats is not None
        results[index] = BatchResult(index, text, stats.prompt_tokens, stats.new_tokens, stats.finish_reason)
    return results


@pytest.mark.parametrize("max_sequences", [1, 3, 32])
@pytest.mark.parametrize("prefill_tokens", [3, 512])
def test_each_text_is_that_of_a_generation_of_its_own(
    model: Decoder, tokenizer: Tokenizer, max_sequences: int, prefill_tokens: int
) -> None:
    prompts, stop = make_prompts(tokenizer), Stop(["e"], [7])
    run = BatchRun(
        Engine(model), tokenizer, prompts, stop, max_sequences=max_sequences, prefill_tokens=prefill_tokens
    )
    found = {result.index: result for result in run}
    assert found == write_alone(model, tokenizer, prompts, stop, prefill_tokens)
    assert {result.finish_reason for result in found.values()} >= {"length", "stop_string"}
    assert run.stats.prompt_tokens == sum(len(prompt.token_ids) for prompt in prompts)
    assert run.stats.new_tokens == sum(result.new_tokens for result in found.values())


def test_the_order_of_prompts_changes_no_text(model: Decoder, tokenizer: Tokenizer) -> None:
    prompts = make_prompts(tokenizer)
    there = {r.index: r.text for r in BatchRun(Engine(model), tokenizer, prompts, Stop(), max_sequences=3)}
    back = {
        7 - r.index: r.text
        for r in BatchRun(Engine(model), tokenizer, prompts[::-1], Stop(), max_sequences=3)
    }
    assert there == back


def test_a_finished_text_makes_room_for_the_next(model: Decoder, tokenizer: Tokenizer) -> None:
    engine, prompts = WatchedEngine(model), make_prompts(tokenizer)
    run = BatchRun(engine, tokenizer, prompts, Stop(), max_sequences=3)
    order = [result.index for result in run]
    assert sorted(order) == list(range(8))
    assert order != sorted(order)
    assert max(engine.num_open) == 3
    busy = [num for num, steps in zip(engine.num_open, engine.steps, strict=True) if len(steps) == 3]
    assert len(busy) > len(engine.steps) // 2
    assert not engine._caches
    assert run.stats.num_steps == len(engine.steps)
    assert f"{len(engine.steps)} steps" in run.stats.describe()


def test_a_step_is_a_token_of_every_text_and_a_bounded_piece_of_prompts(
    model: Decoder, tokenizer: Tokenizer
) -> None:
    engine = WatchedEngine(model)
    ids = tokenizer.encode("to be or not to be, that is the question")
    prompts = [BatchPrompt(ids[: 3 + 4 * i], 30, SamplingParams(0.0)) for i in range(6)]
    list(BatchRun(engine, tokenizer, prompts, Stop(), prefill_tokens=8))
    pieces = [[len(step.token_ids) for step in steps] for steps in engine.steps]
    assert pieces[0] == [3]
    assert all(sum(size for size in sizes if size > 1) <= 8 for sizes in pieces)
    assert max(len(sizes) for sizes in pieces) == 6
    assert all(step.num_logits == 1 for steps in engine.steps for step in steps)
    last = max(i for i, sizes in enumerate(pieces) if max(sizes) > 1)
    for before, steps in zip(engine.steps[:last], engine.steps[1:], strict=False):
        decoding = {s.sequence_id for s in before if len(s.token_ids) == 1}
        assert decoding <= {step.sequence_id for step in steps}


def test_short_prompts_share_a_step(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = WatchedEngine(model)
    prompts = [BatchPrompt([0, 5, 6], 4, SamplingParams(0.0)) for _ in range(5)]
    list(BatchRun(engine, tokenizer, prompts, Stop(), prefill_tokens=9))
    assert [len(step.token_ids) for step in engine.steps[0]] == [3, 3, 3]
    assert [len(step.token_ids) for step in engine.steps[1]] == [1, 1, 1, 3, 3]


@pytest.mark.parametrize("num_pages", [5, 6, 9, 14])
def test_few_pages_change_the_speed_and_nothing_else(
    model: Decoder, tokenizer: Tokenizer, num_pages: int
) -> None:
    prompts = make_prompts(tokenizer)
    engine = WatchedEngine(model, num_pages)
    found = {result.index: result for result in BatchRun(engine, tokenizer, prompts, Stop())}
    assert found == write_alone(model, tokenizer, prompts, Stop(), 512)
    assert max(engine.num_open) < 8
    assert engine._pool.allocator.num_free == num_pages


def test_a_growing_pool_grows_once(model: Decoder, tokenizer: Tokenizer) -> None:
    engine, sizes = WatchedEngine(model), set()
    for _ in BatchRun(engine, tokenizer, make_prompts(tokenizer), Stop(), max_sequences=3):
        sizes.add(engine.kv_bytes)
    assert len(sizes) == 1


def test_prompts_that_do_not_fit_are_named_before_any_runs(model: Decoder, tokenizer: Tokenizer) -> None:
    prompts = [*make_prompts(tokenizer), BatchPrompt([0] * 100, 21, SamplingParams())]
    with pytest.raises(
        GenerationError, match=r"prompt 8: the sequence needs 121 positions, the model .* 1 to 120"
    ):
        BatchRun(Engine(model), tokenizer, prompts, Stop())
    with pytest.raises(GenerationError, match=r"prompt 7: .* the pages for keys and values hold 24"):
        BatchRun(Engine(model, num_pages=3, page_tokens=8), tokenizer, prompts, Stop())
    with pytest.raises(
        GenerationError, match=r"max_sequences \(0\) and prefill_tokens \(512\) must be 1 or more"
    ):
        BatchRun(Engine(model), tokenizer, prompts, Stop(), max_sequences=0)


def test_a_batch_that_is_broken_off_gives_everything_back(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = WatchedEngine(model, num_pages=40)
    results = iter(BatchRun(engine, tokenizer, make_prompts(tokenizer), Stop()))
    next(results)
    assert engine._caches
    results.close()  # type: ignore[attr-defined]
    assert not engine._caches
    assert engine._pool.allocator.num_free == 40


def test_no_prompts_are_no_steps(model: Decoder, tokenizer: Tokenizer) -> None:
    run = BatchRun(Engine(model), tokenizer, [], Stop())
    assert list(run) == []
    assert run.stats.new_tokens_per_s == 0.0


def test_a_seed_of_its_own_is_a_function_of_seed_and_name() -> None:
    seeds = {
        derive_seed(seed, name)
        for seed in (0, 1, -1, 2**70)
        for name in ("line 1", "line 2", 'id "1"', "id 1")
    }
    assert len(seeds) == 16
    assert derive_seed(3, "line 1") == derive_seed(3, "line 1")
    assert torch.tensor([seed % 2 for seed in seeds]).float().mean() not in (0, 1)
