"""One optimizer step: micro-batches forward and backward, one clip, one update.

The loss is the sum over target tokens divided by the number of target tokens of the whole step, so it does not
depend on how the step is cut into micro-batches. Balance losses are means over MoE layers, each micro-batch
weighing by its share of the targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesys.data import Batch
from moesys.kernels import linear_cross_entropy
from moesys.models import Decoder, DecoderOutput, DocumentAttend
from moesys.moe import Execution, LoadMeter, compute_balance_loss, compute_router_z_loss
from moesys.training.optimizer import MasterAdamW


@dataclass(frozen=True)
class Objective:
    """What is minimised beside the cross entropy, and in pieces of how many tokens."""

    balance_loss: float
    router_z_loss: float
    loss_chunk_tokens: int


@dataclass(frozen=True)
class StepResult:
    """The figures of one step. Losses are means; ``loss`` is cross entropy in nats per target token."""

    loss: float
    balance_loss: float
    router_z_loss: float
    gradient_norm: float
    num_targets: int

    @property
    def is_finite(self) -> bool:
        """Whether the step was applied; a step with NaN or Inf leaves the parameters unchanged."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class TrainingStep:
    """Carries out optimizer steps on a model."""

    def __init__(
        self,
        model: Decoder,
        optimizer: MasterAdamW,
        execution: Execution,
        objective: Objective,
        gradient_clip: float,
        meter: LoadMeter,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._execution = execution
        self._objective = objective
        self._gradient_clip = gradient_clip
        self._meter = meter

    def run(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Runs the micro-batches of one step and updates the model, unless loss or gradients are not finite."""
        num_targets = sum(batch.num_targets for batch in batches)
        totals = torch.zeros(3)
        for batch in batches:
            totals += self._run_micro_batch(batch, num_targets)
        gradients = self._optimizer.collect_gradients()
        gradient_norm = torch.nn.utils.get_total_norm(gradients)
        loss, balance_loss, router_z_loss = totals.tolist()
        result = StepResult(loss, balance_loss, router_z_loss, gradient_norm.item(), num_targets)
        if not result.is_finite:
            self._optimizer.discard_gradients()
            return result
        if self._gradient_clip > 0:
            _scale(gradients, min(1.0, self._gradient_clip / (result.gradient_norm + 1e-6)))
        self._optimizer.step(learning_rate)
        return result

    def _run_micro_batch(self, batch: Batch, num_targets: int) -> Tensor:
        """Adds the micro-batch's gradients; returns (3,) its shares of loss, balance loss and z-loss."""
        output = self._model(
            batch.token_ids_BS, batch.positions_BS, DocumentAttend(batch.document_ids_BS), self._execution
        )
        loss = self._compute_cross_entropy(output, batch) / num_targets
        share = batch.num_targets / num_targets
        balance_loss, router_z_loss = (share * value for value in compute_mean_router_losses(output, loss))
        total = (
            loss + self._objective.balance_loss * balance_loss + self._objective.router_z_loss * router_z_loss
        )
        total.backward()
        self._optimizer.accumulate_gradients()
        self._meter.add(output.routings)
        return torch.stack([loss.detach(), balance_loss.detach(), router_z_loss.detach()]).float().cpu()

    def _compute_cross_entropy(self, output: DecoderOutput, batch: Batch) -> Tensor:
        return linear_cross_entropy(
            output.hidden_BSD.flatten(0, 1),
            self._model.head_weight_VD,
            batch.target_ids_BS.flatten(),
            self._objective.loss_chunk_tokens,
        )


def compute_mean_router_losses(output: DecoderOutput, like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the balance loss and the z-loss, each averaged over the MoE layers; zeros where there are none."""
    routings = list(output.routings.values())
    if not routings:
        return torch.zeros_like(like), torch.zeros_like(like)
    return (
        torch.stack([compute_balance_loss(routing) for routing in routings]).mean(),
        torch.stack([compute_router_z_loss(routing) for routing in routings]).mean(),
    )


@torch.no_grad()
def _scale(tensors: list[Tensor], factor: float) -> None:
    if factor < 1.0:
        torch._foreach_mul_(tensors, factor)
