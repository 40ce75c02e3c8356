"""What a run tells while it trains: lines averaged over steps, evaluations and events.

Knows the records and who gets them; does not know the loop. The idea: the log follows the run's position, so a
line is always about the step that was added last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from moesys.planning import measure_gemm_rate
from moesys.training.console import Console
from moesys.training.evaluate import Evaluation
from moesys.training.expert_load import merge_loads
from moesys.training.metrics import (
    EvaluationMetrics,
    EventMetrics,
    MetricsSink,
    MetricsWriter,
    Record,
    TensorBoardWriter,
    TrainMetrics,
)
from moesys.training.position import Position
from moesys.training.run_directory import RunDirectory
from moesys.training.step import StepResult

_ALARMS = {"skipped_step", "damaged_checkpoint"}


@dataclass(frozen=True)
class Yardstick:
    """What turns a step's figures into those that people compare."""

    tokens_per_byte: float
    """Of the training text."""
    flops_per_token: float
    """Arithmetic of a training step."""
    dtype: torch.dtype
    device: torch.device

    @cached_property
    def gemm_rate(self) -> float:
        """FLOP/s of a large matrix product here, measured when first asked for."""
        return measure_gemm_rate(self.dtype, self.device)


class TrainingLog:
    """Averages steps between two lines and writes records to the sinks and the console."""

    def __init__(
        self,
        sinks: Sequence[MetricsSink],
        console: Console,
        yardstick: Yardstick,
        position: Position,
    ) -> None:
        self._sinks = sinks
        self._console = console
        self._yardstick = yardstick
        self._position = position
        self._written_s = position.elapsed_s
        self._results: list[StepResult] = []

    @property
    def has_unwritten_steps(self) -> bool:
        return bool(self._results)

    def add(self, result: StepResult, position: Position) -> None:
        """Takes the figures of a step that ended at ``position``."""
        self._results.append(result)
        self._position = position

    def write(self, learning_rate: float) -> None:
        """Writes the line of the steps added since the last one; skipped steps count in time and in
        nothing else."""
        position, load = self._position, merge_loads(self._results)
        seconds = position.elapsed_s - self._written_s
        tokens_per_s = sum(result.num_targets for result in self._results) / seconds
        loss = self._mean("loss")
        metrics = TrainMetrics(
            step=position.step,
            tokens=position.tokens,
            elapsed_s=position.elapsed_s,
            loss=loss,
            bits_per_byte=loss / math.log(2) * self._yardstick.tokens_per_byte,
            learning_rate=learning_rate,
            gradient_norm=self._mean("gradient_norm"),
            tokens_per_s=tokens_per_s,
            gemm_share=self._yardstick.flops_per_token * tokens_per_s / self._yardstick.gemm_rate,
            balance_loss=self._mean("balance_loss"),
            router_z_loss=self._mean("router_z_loss"),
            moe_layers=load.layer_ids,
            expert_tokens=load.expert_tokens,
            imbalance=load.imbalance,
            routing_entropy=load.entropy,
            router_confidence=load.confidence,
            dropped=load.dropped,
            skipped_steps=sum(not result.is_finite for result in self._results),
        )
        self._results, self._written_s = [], position.elapsed_s
        self._write(metrics)
        self._console.show(metrics)

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Writes what the model of this position scores on held-out text."""
        position = self._position
        self._write(
            EvaluationMetrics(
                step=position.step,
                tokens=position.tokens,
                elapsed_s=position.elapsed_s,
                heldout_loss=evaluation.loss,
                heldout_bits_per_byte=evaluation.bits_per_byte,
                heldout_tokens=evaluation.num_targets,
            )
        )
        self._console.message(
            f"step {position.step}: held out {evaluation.bits_per_byte:.4f} bits/byte "
            f"(loss {evaluation.loss:.4f} over {evaluation.num_targets} tokens)"
        )

    def write_event(self, event: str, message: str) -> None:
        """Writes something that happened at this position."""
        self._write(EventMetrics(self._position.step, self._position.elapsed_s, event, message))
        (self._console.warning if event in _ALARMS else self._console.message)(message)

    def _write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def _mean(self, name: str) -> float:
        values = [getattr(result, name) for result in self._results if result.is_finite]
        return sum(values) / len(values) if values else math.nan


@contextmanager
def open_sinks(run: RunDirectory, *, tensorboard: bool) -> Iterator[list[MetricsSink]]:
    """Opens what a run's records are written to, and closes it on leaving."""
    with ExitStack() as stack:
        sinks: list[MetricsSink] = [MetricsWriter(run.metrics_file)]
        stack.callback(sinks[0].close)
        if tensorboard:
            sinks.append(TensorBoardWriter(run.tensorboard_folder))
            stack.callback(sinks[1].close)
        yield sinks
