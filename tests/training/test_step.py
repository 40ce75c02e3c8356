"""One optimizer step: micro-batches, ignored targets, clipping, statistics."""

from __future__ import annotations

import io
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import SETTINGS, STEPS, start
from torch import Tensor

from moesys.config import Config, load_config
from moesys.data import Batch
from moesys.models import DocumentAttend
from moesys.moe import BalanceScope, LoadMeter, MoELayer, compute_sequence_balance_loss
from moesys.training import PlainConsole, Trainer
from moesys.training.build import build_model
from moesys.training.metrics import read_metrics
from moesys.training.optimizer import MasterAdamW
from moesys.training.step import Objective, StepResult, TrainingStep

# An epsilon far above the gradients makes the update linear in them, so that rounding is not amplified.
CONFIG = load_config(None, [*SETTINGS, "training.epsilon=1.0"])
BIASED = load_config(None, [*SETTINGS, "training.epsilon=1.0", "model.balance_bias_rate=0.125"])


def make_batch(num_sequences: int = 8, ignored: tuple[int, ...] = ()) -> Batch:
    """Random tokens; in each of the first rows, as many leading targets as listed are ignored."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 300, (num_sequences, 17), generator=generator)
    targets = tokens[:, 1:].clone()
    for row, count in enumerate(ignored):
        targets[row, :count] = -100
    positions = torch.arange(16).repeat(num_sequences, 1)
    return Batch(tokens[:, :-1], targets, torch.zeros_like(positions), positions)


def cut(batch: Batch, size: int) -> list[Batch]:
    rows = range(0, batch.token_ids_BS.shape[0], size)
    return [Batch(*(tensor[row : row + size] for tensor in vars(batch).values())) for row in rows]


class Bench:
    """A fresh model with everything a step needs."""

    def __init__(
        self, objective: Objective, *, clip: float = 0.0, recompute: bool = False, config: Config = CONFIG
    ) -> None:
        self.model = build_model(config, vocab_size=300)
        self.optimizer = MasterAdamW(self.model, config.training, torch.float32)
        self.gradients: dict[str, Tensor] = {}
        execution = self.model.make_resident_execution(recompute=recompute)
        self.step = TrainingStep(self.model, self.optimizer, execution, objective, clip, LoadMeter())

    def run(self, batches: list[Batch]) -> StepResult:
        take = self.optimizer.step

        def record(learning_rate: float) -> None:
            self.gradients = {
                n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None
            }
            take(learning_rate)

        self.optimizer.step = record
        return self.step.run(batches, 0.1)


def assert_numeric(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        limit = 1e-5 * value.abs().max()
        assert (found[name] - value).abs().max() <= limit, name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("ignored", [(), (15, 3, 16, 16, 0, 7)], ids=["all-targets", "uneven-targets"])
@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_are_one_batch(size: int, ignored: tuple[int, ...], recompute: bool) -> None:
    batch = make_batch(ignored=ignored)
    # z-losses weigh by targets, so that they are one batch's only where targets are even.
    objective = Objective(0.0, 0.0 if ignored else 0.01, 5)
    whole, parts = Bench(objective), Bench(objective, recompute=recompute)
    expected, found = whole.run([batch]), parts.run(cut(batch, size))
    assert found.num_targets == expected.num_targets == 8 * 16 - sum(ignored)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    assert_numeric(parts.gradients, whole.gradients)
    assert_numeric(dict(parts.model.named_parameters()), dict(whole.model.named_parameters()))


def test_loss_and_gradients_are_those_of_plain_torch() -> None:
    batch = make_batch(ignored=(15, 3, 16))
    bench = Bench(Objective(0.0, 0.0, 5))
    model = build_model(CONFIG, vocab_size=300)
    output = model(batch.token_ids_BS, batch.positions_BS, DocumentAttend(batch.document_ids_BS))
    logits = model.compute_logits(output.hidden_BSD).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.target_ids_BS.flatten())
    loss.backward()
    result = bench.run(cut(batch, 2))
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    assert result.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert_numeric(bench.gradients, gradients)


def test_the_gradient_is_clipped_by_its_global_norm() -> None:
    batch = make_batch()
    free, clipped = Bench(Objective(0.0, 0.0, 64)), Bench(Objective(0.0, 0.0, 64), clip=0.125)
    norm = free.run([batch]).gradient_norm
    assert norm > 0.25
    assert clipped.run([batch]).gradient_norm == norm
    factor = 0.125 / (norm + 1e-6)
    assert_numeric(clipped.gradients, {name: factor * g for name, g in free.gradients.items()})


def test_balance_losses_are_added_with_their_coefficients() -> None:
    batch = make_batch()
    plain, balanced = Bench(Objective(0.0, 0.0, 64)), Bench(Objective(0.3, 0.2, 64))
    name = "blocks.0.feed_forward.router.weight_ED"
    without, result = plain.run([batch]), balanced.run([batch])
    assert result.loss == without.loss
    assert result.balance_loss == pytest.approx(1.0, abs=0.2)
    assert result.router_z_loss == pytest.approx(np.log(4) ** 2, rel=0.1)
    assert not torch.equal(plain.gradients[name], balanced.gradients[name])


def test_the_balance_loss_can_be_that_of_each_row() -> None:
    batch = make_batch(4)
    bench = Bench(Objective(0.01, 0.0, 64, BalanceScope.SEQUENCE))
    output = bench.model(batch.token_ids_BS, batch.positions_BS, DocumentAttend(batch.document_ids_BS))
    (routing,) = output.routings.values()
    expected = compute_sequence_balance_loss(routing, 4).item()
    assert bench.run([batch]).balance_loss == pytest.approx(expected, rel=1e-6)
    assert Bench(Objective(0.01, 0.0, 64)).run([batch]).balance_loss != pytest.approx(expected, rel=1e-3)


def read_bias(bench: Bench) -> Tensor:
    (layer,) = (module for module in bench.model.modules() if isinstance(module, MoELayer))
    assert layer.router.selection_bias_E is not None
    return layer.router.selection_bias_E.clone()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_balance_bias_moves_once_per_step_by_the_choices_of_all_micro_batches(recompute: bool) -> None:
    bench = Bench(Objective(0.0, 0.0, 64), recompute=recompute, config=BIASED)
    (counts,) = bench.run(cut(make_batch(), 2)).load.expert_tokens
    load = torch.tensor(counts, dtype=torch.float32)
    assert read_bias(bench).tolist() == (0.125 * torch.sign(load.mean() - load)).tolist()


def test_a_skipped_step_moves_no_balance_bias() -> None:
    bench = Bench(Objective(0.0, 0.0, 64), config=BIASED)
    batch = make_batch()
    token = batch.token_ids_BS[0, 0]
    with torch.no_grad():
        bench.model.embedding.weight[token] = float("nan")
    result = bench.run([batch])
    assert not result.is_finite
    assert not read_bias(bench).any()
    with torch.no_grad():
        bench.model.embedding.weight[token] = 0.0
    (counts,) = bench.run([batch]).load.expert_tokens
    load = torch.tensor(counts, dtype=torch.float32)
    assert read_bias(bench).tolist() == (0.125 * torch.sign(load.mean() - load)).tolist()


@pytest.mark.parametrize("recompute", [False, True])
def test_each_choice_is_counted_once(recompute: bool) -> None:
    bench = Bench(Objective(0.01, 0.01, 64), recompute=recompute)
    load = bench.run(cut(make_batch(), 2)).load
    assert load.layer_ids == [0]
    assert [sum(counts) for counts in load.expert_tokens] == [8 * 16 * 2]


@pytest.mark.parametrize("interrupted", [False, True])
def test_metrics_count_every_token_of_a_run(corpus: Path, tmp_path: Path, interrupted: bool) -> None:
    more = ("training.micro_batch_sequences=2", "memory.activation_checkpointing=true")
    trainer = start(corpus, tmp_path / "run", *more)
    if interrupted:
        request_interrupt_at(trainer, 3)
    outcome = trainer.train()
    assert outcome.is_finished is not interrupted
    assert outcome.step == (3 if interrupted else STEPS)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl").train
    assert [line.step for line in lines] == ([2, 3] if interrupted else [2, 4, 6, 8, 9])
    assert sum(sum(line.expert_tokens[0]) for line in lines) == outcome.step * 4 * 16 * 2
    assert lines[-1].tokens == outcome.step * 4 * 16
    assert {line.dropped for line in lines} == {0}


def request_interrupt_at(trainer: Trainer, step: int) -> None:
    take_step = trainer.take_step

    def take_step_and_signal() -> StepResult:
        result = take_step()
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    trainer.take_step = take_step_and_signal


def test_a_run_consumes_no_global_randomness(corpus: Path, tmp_path: Path) -> None:
    trainer = start(corpus, tmp_path / "run", "memory.activation_checkpointing=true")
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    trainer.train()
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(x, y) for x, y in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


def test_a_dense_model_has_no_imbalance(corpus: Path, tmp_path: Path) -> None:
    dense = [setting for setting in SETTINGS if "experts" not in setting and "expert_" not in setting]
    config = load_config(None, [*dense, "model.num_experts=0", f'data.source="{corpus}"', "training.steps=3"])
    Trainer.start(config, tmp_path / "run", PlainConsole(3, io.StringIO())).train()
    [*_, line] = read_metrics(tmp_path / "run" / "metrics.jsonl").train
    assert line.moe_layers == []
    assert np.isnan(line.imbalance)
    assert line.balance_loss == 0.0
