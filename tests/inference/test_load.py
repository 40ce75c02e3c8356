"""`moesys.load`: a model from Python in one line, resident or within a budget, with the same text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_decoders import make_tokenizer

import moesys
from moesys.checkpoint import save_model
from moesys.errors import GenerationError, IneffectiveOptionError, ModelFormatError
from moesys.inference import SamplingParams, SequenceStep
from moesys.models import AttentionConfig, Decoder, DecoderConfig, RopeConfig, initialize_weights
from moesys.moe import MoEConfig

GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    mixer, moe = AttentionConfig(4, 2, 8, RopeConfig(8)), MoEConfig(8, 2, 24)
    model = Decoder(DecoderConfig(300, 32, (mixer,) * 2, (moe,) * 2, tie_embeddings=False, max_positions=256))
    initialize_weights(model, seed=1, std=0.3)
    save_model(model, path, torch.float32, {"eos_token_id": tokenizer.end_of_text_id})
    tokenizer.save(path)
    return path


def test_a_budget_changes_no_text(folder: Path) -> None:
    texts = []
    for host_memory, context in ((None, None), ("1GiB", 40), ("80%", None)):
        with moesys.load(str(folder), host_memory=host_memory, context=context) as model:
            texts.append("".join(model.generate("to be", max_new_tokens=20, sampling=GREEDY)))
            assert (model.offloaded is None) is (host_memory is None)
    assert texts[0]
    assert texts == [texts[0]] * 3


def test_a_stop_string_ends_the_text(folder: Path) -> None:
    with moesys.load(folder) as model:
        text = "".join(model.generate("to be", max_new_tokens=20, sampling=GREEDY))
        middle = text[len(text) // 2]
        stopped = "".join(model.generate("to be", max_new_tokens=20, sampling=GREEDY, stop=[middle]))
    assert stopped == text[: text.index(middle)]


def test_a_context_is_what_a_budget_has_room_for(folder: Path) -> None:
    with moesys.load(folder, host_memory="1GiB", context=16) as model:
        assert model.offloaded is not None
        assert model.offloaded.plan.num_positions == 16
        with pytest.raises(GenerationError, match="pages"):
            list(model.generate("to be", max_new_tokens=100, sampling=GREEDY))


def test_what_cannot_be_opened_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(IneffectiveOptionError, match="context"):
        moesys.load(folder, context=16)
    with pytest.raises(GenerationError, match="host-memory"), moesys.load(folder, host_memory="1MiB"):
        pass
    with pytest.raises(ModelFormatError), moesys.load(tmp_path / "absent"):
        pass


def test_a_prompt_is_computed_in_the_passes_of_the_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moesys.load(folder, host_memory="1GiB") as model:
        lengths: list[int] = []
        step = model.engine.step

        def watch(steps: list[SequenceStep]) -> list[torch.Tensor]:
            lengths.extend(len(one.token_ids) for one in steps)
            return step(steps)

        monkeypatch.setattr(model.engine, "step", watch)
        list(replace(model, prefill_tokens=7).generate("to be or not to be " * 3, max_new_tokens=1))
    assert len(lengths) > 1
    assert max(lengths) == 7
