"""Held-out loss against a loop that scores every target in a forward pass of its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import start

from moesys.config import DataConfig
from moesys.data import heldout_windows
from moesys.errors import DataError
from moesys.models import DocumentAttend
from moesys.training import Trainer, evaluate, evaluate_text

LENGTH = 16


@pytest.fixture
def trained(corpus: Path, tmp_path: Path) -> Trainer:
    (corpus / "short.txt").write_text("ab")
    trainer = start(corpus, tmp_path / "run", "training.learning_rate=0.02")
    for _ in range(4):
        trainer.take_step()
    return trainer


@torch.no_grad()
def score_naively(trainer: Trainer, texts: list[str], stride: int) -> tuple[float, int]:
    """Returns the summed loss in nats and the number of targets: each document alone, from its end of text to
    its end of text, each target with the tokens of the first window that reaches it."""
    tokenizer = trainer.data.tokenizer
    total, num_targets = 0.0, 0
    for text in texts:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(text), tokenizer.end_of_text_id]
        for target in range(1, len(ids)):
            start = max(0, math.ceil((target - LENGTH) / stride)) * stride
            seen = torch.tensor([ids[start:target]])
            positions = torch.arange(seen.shape[1])[None]
            hidden = trainer.model(seen, positions, DocumentAttend(torch.zeros_like(seen))).hidden_BSD
            total -= trainer.model.compute_logits(hidden)[0, -1].double().log_softmax(-1)[ids[target]].item()
            num_targets += 1
    return total, num_targets


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_each_target_is_scored_once_in_its_document(trained: Trainer, stride: int) -> None:
    texts = [path.read_text() for path in sorted(Path(trained.config.data.source).iterdir())][-2:]
    folder = Path(trained.run.path).parent / "few"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text[:90])
    found = evaluate_text(
        trained.model,
        trained.data.tokenizer,
        DataConfig(source=str(folder)),
        None,
        stride,
        None,
        folder.parent / "cache",
    )
    total, num_targets = score_naively(trained, [text[:90] for text in texts], stride)
    assert found.num_targets == num_targets
    assert found.num_bytes == sum(len(text[:90].encode()) for text in texts)
    assert found.loss == pytest.approx(total / num_targets, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / found.num_bytes, rel=1e-5)


def test_more_context_per_target_is_what_a_smaller_stride_gives(trained: Trainer) -> None:
    losses = {
        stride: evaluate(
            trained.model, heldout_windows(trained.data.heldout, LENGTH, stride), trained.execution, 64
        ).loss
        for stride in (8, 16)
    }
    assert losses[8] != losses[16]


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_the_pieces_of_the_loss_do_not_matter(trained: Trainer, chunk: int) -> None:
    heldout = trained.make_heldout_set()
    expected = evaluate(trained.model, heldout, trained.execution, 64)
    found = evaluate(trained.model, heldout, trained.execution, chunk)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)


def test_the_heldout_part_of_a_source_is_what_training_keeps_away(trained: Trainer, tmp_path: Path) -> None:
    found = evaluate_text(
        trained.model, trained.data.tokenizer, trained.config.data, 0.2, None, None, tmp_path
    )
    assert found == trained.evaluate()
    everything = evaluate_text(
        trained.model, trained.data.tokenizer, trained.config.data, None, None, None, tmp_path
    )
    assert everything.num_bytes == trained.data.train.num_bytes + trained.data.heldout.num_bytes
    assert found.num_bytes == trained.data.heldout.num_bytes < everything.num_bytes


def test_a_budget_takes_whole_documents(trained: Trainer) -> None:
    lengths = torch.from_numpy(trained.data.heldout.document_starts).diff().tolist()
    assert trained.evaluate(max_tokens=lengths[0]).num_targets == lengths[0]
    assert trained.evaluate().num_targets == sum(lengths)


def test_progress_counts_batches_and_no_gradient_is_kept(trained: Trainer) -> None:
    heldout, seen = trained.make_heldout_set(), []
    evaluate(trained.model, heldout, trained.execution, 64, lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(heldout.batches)) for i in range(len(heldout.batches))]
    assert all(parameter.grad is None for parameter in trained.model.parameters())


def test_an_evaluation_is_not_counted_as_training(trained: Trainer) -> None:
    trained.evaluate()
    (counts,) = trained.take_step().load.expert_tokens
    assert sum(counts) == trained.tokens_per_step * trained.config.model.top_k


def test_a_stride_that_leaves_gaps_is_refused(trained: Trainer, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stride \(17\) must be between 1 and sequence_length \(16\)"):
        evaluate_text(
            trained.model, trained.data.tokenizer, DataConfig(source=str(corpus)), None, 17, None, tmp_path
        )
