"""The training loop: load, step, log, evaluate, save. Reads top to bottom; everything it calls has one file."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesys.checkpoint import (
    RunState,
    describe_config_difference,
    list_checkpoints,
    load_newest_checkpoint,
    save_checkpoint,
)
from moesys.config import Config
from moesys.data import Batch, HeldoutSet, PreparedData, SequenceLoader, heldout_windows, prepare_data
from moesys.env import read_cache_dir, read_world_size
from moesys.errors import CheckpointError, ConfigError, DataError, ModelFormatError, NonFiniteError
from moesys.kernels import Kernel
from moesys.models import DecoderConfig, choose_family
from moesys.moe import LoadMeter
from moesys.planning import measure_gemm_rate
from moesys.training.allocator import keep_freed_memory
from moesys.training.build import build_model, compute_dtype, resolve_dtype, resolve_paths, select_device
from moesys.training.console import Console
from moesys.training.diagnose import find_first_nonfinite
from moesys.training.evaluate import Evaluation, evaluate
from moesys.training.interrupt import Interruption
from moesys.training.metrics import (
    EvaluationMetrics,
    EventMetrics,
    MetricsSink,
    MetricsWriter,
    TensorBoardWriter,
    TrainMetrics,
    drop_after,
)
from moesys.training.optimizer import MasterAdamW
from moesys.training.run_directory import RunDirectory
from moesys.training.schedule import compute_learning_rate
from moesys.training.step import Objective, StepResult, TrainingStep
from moesys.units import format_count

# Settings that may change between a checkpoint and its resumption: they alter no weight.
_FREE_KEYS = {
    "training": {"log_every", "evaluate_every", "evaluate_tokens", "checkpoint_every", "keep_checkpoints",
                 "max_skipped_steps"},
    "runtime": {"threads", "tensorboard"},
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.train` ended."""

    step: int
    is_finished: bool
    """False when the run was interrupted and saved."""
    evaluation: Evaluation | None
    """On the whole held-out set, after the last step; None when interrupted."""


class Trainer:
    """One run: a model, its optimizer and its data, at some step."""

    def __init__(self, run: RunDirectory, config: Config, data: PreparedData, console: Console) -> None:
        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        keep_freed_memory()
        self.run = run
        self.config = config
        self.data = data
        self.step = 0
        """Optimizer steps done; skipped ones count."""
        self.console = console
        self._device = select_device(config.runtime.device)
        self._dtype = compute_dtype(config)
        self.model = build_model(config, data.tokenizer.vocab_size)
        self.execution = self.model.make_resident_execution(
            Kernel(config.runtime.kernel), recompute=config.memory.activation_checkpointing
        )
        self.optimizer = MasterAdamW(self.model, config.training, self._dtype)
        self._meter = LoadMeter()
        self._training_step = TrainingStep(
            self.model,
            self.optimizer,
            self.execution,
            Objective(
                config.training.balance_loss, config.training.router_z_loss, config.memory.loss_chunk_tokens
            ),
            config.training.gradient_clip,
            self._meter,
        )
        self._loader = SequenceLoader(
            data.train,
            config.data.sequence_length,
            config.training.batch_sequences,
            config.training.resolved_micro_batch,
            config.data.seed,
            restart_documents=not config.data.attend_across_documents,
        )
        self._elapsed_s = 0.0
        self._skipped_in_a_row = 0

    @classmethod
    def start(cls, config: Config, path: Path, console: Console) -> Trainer:
        """Prepares data and model of a new run in the folder ``path``, which is written when both are there."""
        run = RunDirectory(path)
        run.require_unused()
        _require_one_process()
        select_device(config.runtime.device)
        config = resolve_paths(resolve_dtype(config))
        data = prepare_data(config.data, read_cache_dir())
        trainer = cls(run, config, data, console)
        _warn_if_not_exportable(trainer.model.config, console)
        run.create(config, data.tokenizer)
        return trainer

    @classmethod
    def resume(cls, path: Path, console: Console) -> Trainer:
        """Opens a run at its newest intact checkpoint; it goes on bit for bit on the same machine and threads."""
        _require_one_process()
        run = RunDirectory.open(path)
        config = run.load_config()
        data = prepare_data(config.data, read_cache_dir())
        trainer = cls(run, config, data, console)
        if list_checkpoints(run.checkpoints_folder):
            trainer._restore(load_newest_checkpoint(run.checkpoints_folder, on_damage=console.warning))
        else:
            console.warning(f"no checkpoint was written yet in {run.path}: going on from step 0")
            drop_after(run.metrics_file, 0)
        return trainer

    def describe(self) -> list[str]:
        """Returns lines for people: data, model, arithmetic, and where the run lies."""
        config, moe = self.model.config, self.config.model
        return [
            self.data.description,
            f"{format_count(self.model.count_parameters())} parameters, "
            f"{format_count(config.num_matmul_parameters_per_token)} multiply each token: {config.num_layers} layers, "
            f"hidden {config.hidden_size}, experts {moe.num_experts} top-{moe.top_k}",
            f"{self.config.training.steps} steps of {self.tokens_per_step} tokens, {self.config.training.dtype}, "
            f"{self._device}, {torch.get_num_threads()} threads; run in {self.run.path}",
        ]

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step."""
        return self.config.training.batch_sequences * self.config.data.sequence_length

    def train(self) -> Outcome:
        """Runs to the last step, or until interrupted. Saves at the end and when interrupted."""
        config = self.config.training
        with self._open_sinks() as sinks, Interruption(self.console.warning) as interruption:
            log = _Log(self, sinks)
            while self.step < config.steps and not interruption.is_requested:
                result = self.take_step()
                log.add(result)
                self._guard(result, log)
                self.console.advance(self.step)
                is_last = self.step == config.steps
                if is_last or self.step % config.log_every == 0:
                    log.write()
                if _is_due(config.evaluate_every, self.step) and not is_last:
                    log.write_evaluation(self.evaluate(config.evaluate_tokens))
                if _is_due(config.checkpoint_every, self.step) or is_last:
                    log.write_event("checkpoint", f"saved {self.save()}")
            if self.step < config.steps:
                if log.has_unwritten_steps:
                    log.write()
                log.write_event(
                    "interrupted", f"saved {self.save()}; go on with: moesys resume {self.run.path}"
                )
                return Outcome(self.step, is_finished=False, evaluation=None)
            evaluation = self.evaluate()
            log.write_evaluation(evaluation)
        return Outcome(self.step, is_finished=True, evaluation=evaluation)

    def take_step(self) -> StepResult:
        """Carries out one optimizer step on the next batch and returns its figures; writes nothing."""
        started = time.perf_counter()
        batches = self._load_batches(self.step)
        result = self._training_step.run(batches, compute_learning_rate(self.config.training, self.step))
        self._elapsed_s += time.perf_counter() - started
        self.step += 1
        return result

    def evaluate(self, max_tokens: int | None = None) -> Evaluation:
        """Scores held-out documents, each alone; ``max_tokens`` bounds how many, None takes all."""
        return evaluate(
            self.model,
            self.make_heldout_set(max_tokens),
            self.execution,
            self.config.memory.loss_chunk_tokens,
        )

    def make_heldout_set(self, max_tokens: int | None = None) -> HeldoutSet:
        """Returns the held-out documents in windows that overlap by half, so that tokens are judged with context."""
        length = self.config.data.sequence_length
        return heldout_windows(self.data.heldout, length, length // 2, max_tokens)

    def save(self) -> Path:
        """Writes a checkpoint of this step and returns its folder."""
        state = RunState(
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            tensors=self.optimizer.export_state(),
            metadata={
                "config": self.config.model_dump(mode="json"),
                "data_fingerprint": self.data.fingerprint,
                "elapsed_s": self._elapsed_s,
                "skipped_in_a_row": self._skipped_in_a_row,
                "threads": torch.get_num_threads(),
            },
        )
        return save_checkpoint(self.run.checkpoints_folder, state, keep=self.config.training.keep_checkpoints)

    def _restore(self, state: RunState) -> None:
        metadata: Any = state.metadata
        _check_same_config(metadata["config"], self.config)
        if metadata["data_fingerprint"] != self.data.fingerprint:
            raise DataError(
                f"the corpus or tokenizer of {self.config.data.source!r} has changed since the checkpoint "
                f"(fingerprint {metadata['data_fingerprint'][:12]}, now {self.data.fingerprint[:12]}); "
                "restore the files, or start a new run"
            )
        if metadata["threads"] != torch.get_num_threads():
            self.console.warning(
                f"the run was saved with {metadata['threads']} threads and goes on with {torch.get_num_threads()}: "
                "sums may differ in the last bits"
            )
        self.optimizer.import_state(state.tensors)
        self.step = state.step
        self._elapsed_s = metadata["elapsed_s"]
        self._skipped_in_a_row = metadata["skipped_in_a_row"]
        if self.run.metrics_file.exists():
            drop_after(self.run.metrics_file, state.step)
        with self._open_sinks() as sinks:
            _Log(self, sinks).write_event("resumed", f"resumed at step {self.step}")

    def _load_batches(self, step: int) -> list[Batch]:
        return [self._loader.load(step, i).to(self._device) for i in range(self._loader.num_micro_batches)]

    def _guard(self, result: StepResult, log: _Log) -> None:
        """Counts steps that were skipped for NaN or Inf, and stops the run after too many in a row."""
        if result.is_finite:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        log.write_event(
            "skipped_step",
            f"step {self.step} was skipped, parameters unchanged: loss {result.loss}, "
            f"gradient norm {result.gradient_norm}",
        )
        limit = self.config.training.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            place = find_first_nonfinite(self.model, self._load_batches(self.step - 1), self.execution)
            # Skipped steps have changed nothing, so what is in memory is the last good state.
            saved = "" if place.startswith("the parameter") else f"; the last good state is in {self.save()}"
            raise NonFiniteError(
                f"loss or gradients were NaN or Inf in {limit} steps in a row (training.max_skipped_steps), up to "
                f"step {self.step}; it began in {place}{saved}; start a new run with a lower training.learning_rate "
                f"({self.config.training.learning_rate}) than this one's"
            )

    @contextmanager
    def _open_sinks(self) -> Iterator[list[MetricsSink]]:
        with ExitStack() as stack:
            sinks: list[MetricsSink] = [MetricsWriter(self.run.metrics_file)]
            stack.callback(sinks[0].close)
            if self.config.runtime.tensorboard:
                sinks.append(TensorBoardWriter(self.run.tensorboard_folder))
                stack.callback(sinks[1].close)
            yield sinks


class _Log:
    """Averages steps between two lines and writes records to the sinks and the console."""

    def __init__(self, trainer: Trainer, sinks: list[MetricsSink]) -> None:
        self._trainer = trainer
        self._sinks = sinks
        self.console = trainer.console
        self._results: list[StepResult] = []
        self._started_s = trainer._elapsed_s
        self._flops_per_token = trainer.model.config.compute_training_flops_per_token(
            trainer.config.data.sequence_length
        )
        self._gemm_rate: float | None = None

    @property
    def has_unwritten_steps(self) -> bool:
        return bool(self._results)

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    def write(self) -> None:
        """Writes the line of the steps added since the last one; skipped steps count in time and not in loss."""
        trainer = self._trainer
        load = trainer._meter.drain()
        tokens_per_s = sum(result.num_targets for result in self._results) / (
            trainer._elapsed_s - self._started_s
        )
        loss = self._mean("loss")
        metrics = TrainMetrics(
            step=trainer.step,
            tokens=trainer.step * trainer.tokens_per_step,
            elapsed_s=trainer._elapsed_s,
            loss=loss,
            bits_per_byte=loss / math.log(2) * trainer.data.train.num_tokens / trainer.data.train.num_bytes,
            learning_rate=compute_learning_rate(trainer.config.training, trainer.step - 1),
            gradient_norm=self._mean("gradient_norm"),
            tokens_per_s=tokens_per_s,
            gemm_share=self._flops_per_token * tokens_per_s / self._measure_gemm_rate(),
            balance_loss=self._mean("balance_loss"),
            router_z_loss=self._mean("router_z_loss"),
            moe_layers=load.layer_ids,
            expert_tokens=load.expert_tokens,
            imbalance=load.imbalance if load.layer_ids else math.nan,
            routing_entropy=load.entropy,
            router_confidence=load.confidence,
            dropped=load.dropped,
        )
        self._results, self._started_s = [], trainer._elapsed_s
        self._write(metrics)
        self.console.show(metrics)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        trainer = self._trainer
        self._write(
            EvaluationMetrics(
                step=trainer.step,
                tokens=trainer.step * trainer.tokens_per_step,
                elapsed_s=trainer._elapsed_s,
                heldout_loss=evaluation.loss,
                heldout_bits_per_byte=evaluation.bits_per_byte,
                heldout_tokens=evaluation.num_targets,
            )
        )
        self.console.message(
            f"step {trainer.step}: held out {evaluation.bits_per_byte:.4f} bits/byte "
            f"(loss {evaluation.loss:.4f} over {evaluation.num_targets} tokens)"
        )

    def write_event(self, event: str, message: str) -> None:
        self._write(EventMetrics(self._trainer.step, self._trainer._elapsed_s, event, message))
        (self.console.warning if event == "skipped_step" else self.console.message)(message)

    def _write(self, record: TrainMetrics | EvaluationMetrics | EventMetrics) -> None:
        for sink in self._sinks:
            sink.write(record)

    def _mean(self, name: str) -> float:
        values = [getattr(result, name) for result in self._results if result.is_finite]
        return sum(values) / len(values) if values else math.nan

    def _measure_gemm_rate(self) -> float:
        if self._gemm_rate is None:
            self._gemm_rate = measure_gemm_rate(self._trainer._dtype, self._trainer._device)
        return self._gemm_rate


def _require_one_process() -> None:
    world_size = read_world_size()
    if world_size > 1:
        raise ConfigError(
            f"training runs in one process, torchrun has started {world_size} (WORLD_SIZE); start `moesys train` alone"
        )


def _warn_if_not_exportable(config: DecoderConfig, console: Console) -> None:
    try:
        choose_family(config)
    except ModelFormatError as error:
        console.warning(f"this model trains, but `moesys export` will refuse it: {error}")


def _check_same_config(saved: dict[str, Any], current: Config) -> None:
    difference = describe_config_difference(
        _drop_free_keys(saved), _drop_free_keys(current.model_dump(mode="json"))
    )
    if difference:
        raise CheckpointError(
            f"the checkpoint belongs to another config:\n{difference}\n"
            "restore these lines in the run's config.toml, or start a new run"
        )


def _drop_free_keys(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        section: {key: value for key, value in keys.items() if key not in _FREE_KEYS.get(section, ())}
        for section, keys in tree.items()
    }


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
