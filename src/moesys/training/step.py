"""One optimizer step: micro-batches forward and backward, one clip, one update.

The loss is the sum over target tokens divided by the number of target tokens of the whole step, so it does not
depend on how the step is cut into micro-batches. Balance losses are means over MoE layers, each micro-batch
weighing by its share of the targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moesys.data import Batch
from moesys.kernels import linear_cross_entropy
from moesys.models import Decoder, DecoderOutput, DocumentAttend
from moesys.moe import (
    BalanceScope,
    BiasBalancer,
    Execution,
    ExpertLoad,
    LoadMeter,
    Routing,
    compute_balance_loss,
    compute_router_z_loss,
    compute_sequence_balance_loss,
)
from moesys.training.optimizer import MasterAdamW


@dataclass(frozen=True)
class Objective:
    """What is minimised beside the cross entropy, and in pieces of how many tokens."""

    balance_loss: float
    router_z_loss: float
    loss_chunk_tokens: int
    balance_scope: BalanceScope = BalanceScope.MICRO_BATCH


@dataclass(frozen=True)
class StepResult:
    """The figures of one step. Losses are means; ``loss`` is cross entropy in nats per target token."""

    loss: float
    balance_loss: float
    router_z_loss: float
    gradient_norm: float
    num_targets: int
    load: ExpertLoad
    """What the routers did in all micro-batches; of a step that was not applied, it may hold NaN."""

    @property
    def is_finite(self) -> bool:
        """Whether the step was applied; a step with NaN or Inf leaves the parameters unchanged."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class MicroBatchLoss:
    """What a micro-batch adds to the loss of its step: scalars that still have their graphs."""

    total: Tensor
    """What is minimised."""
    cross_entropy: Tensor
    """Summed nats over the targets of the whole step."""
    balance_loss: Tensor
    router_z_loss: Tensor
    routings: Mapping[int, Routing]
    """By layer id."""


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
        """``meter`` gathers what a step's `StepResult` says of its routers, and is empty between steps."""
        self._model = model
        self._optimizer = optimizer
        self._execution = execution
        self._objective = objective
        self._gradient_clip = gradient_clip
        self._meter = meter
        self._balancer = BiasBalancer(model)

    def run(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Runs the micro-batches of one step and updates the model, unless loss or gradients are not finite."""
        num_targets = sum(batch.num_targets for batch in batches)
        totals = torch.zeros(3)
        for batch in batches:
            totals += self._run_micro_batch(batch, num_targets)
        gradients = self._optimizer.collect_gradients()
        gradient_norm = torch.nn.utils.get_total_norm(gradients)
        loss, balance_loss, router_z_loss = totals.tolist()
        result = StepResult(
            loss, balance_loss, router_z_loss, gradient_norm.item(), num_targets, self._meter.drain()
        )
        if not result.is_finite:
            self._optimizer.discard_gradients()
            self._balancer.discard()
            return result
        if self._gradient_clip > 0:
            _scale(gradients, min(1.0, self._gradient_clip / (result.gradient_norm + 1e-6)))
        self._optimizer.step(learning_rate)
        self._balancer.apply()
        return result

    def compute_loss(self, batch: Batch, num_targets: int, *, checks_logits: bool = False) -> MicroBatchLoss:
        """Runs a micro-batch forward, as a part of a step that has ``num_targets`` targets.

        checks_logits: whether NaN or Inf in router logits raises `RoutingError`, naming the layer. Training looks at
        its loss anyway and skips a step where that is not finite, so its layers need not look too.
        """
        output = self._model(
            batch.token_ids_BS,
            batch.positions_BS,
            DocumentAttend(batch.document_ids_BS),
            replace(self._execution, checks_logits=checks_logits),
        )
        cross_entropy = self._compute_cross_entropy(output, batch) / num_targets
        share = batch.num_targets / num_targets
        balance_loss, router_z_loss = (
            share * value
            for value in compute_mean_router_losses(output, cross_entropy, self._objective.balance_scope)
        )
        total = (
            cross_entropy
            + self._objective.balance_loss * balance_loss
            + self._objective.router_z_loss * router_z_loss
        )
        return MicroBatchLoss(total, cross_entropy, balance_loss, router_z_loss, output.routings)

    def _run_micro_batch(self, batch: Batch, num_targets: int) -> Tensor:
        """Adds the micro-batch's gradients; returns (3,) its shares of loss, balance loss and z-loss."""
        loss = self.compute_loss(batch, num_targets)
        loss.total.backward()
        self._optimizer.accumulate_gradients()
        self._meter.add(loss.routings)
        self._balancer.add(loss.routings)
        parts = (loss.cross_entropy, loss.balance_loss, loss.router_z_loss)
        return torch.stack([part.detach() for part in parts]).float().cpu()

    def _compute_cross_entropy(self, output: DecoderOutput, batch: Batch) -> Tensor:
        hidden_TD, weight_VD = self._model.prepare_loss(output.hidden_BSD.flatten(0, 1))
        return linear_cross_entropy(
            hidden_TD, weight_VD, batch.target_ids_BS.flatten(), self._objective.loss_chunk_tokens
        )


def compute_mean_router_losses(
    output: DecoderOutput, like: Tensor, scope: BalanceScope = BalanceScope.MICRO_BATCH
) -> tuple[Tensor, Tensor]:
    """Returns the balance loss and the z-loss, each averaged over the MoE layers; zeros where there are none.

    A sequence is a row of the batch.
    """
    routings = list(output.routings.values())
    if not routings:
        return torch.zeros_like(like), torch.zeros_like(like)
    if scope is BalanceScope.SEQUENCE:
        num_sequences = output.hidden_BSD.shape[0]
        balance_losses = [compute_sequence_balance_loss(routing, num_sequences) for routing in routings]
    else:
        balance_losses = [compute_balance_loss(routing) for routing in routings]
    z_losses = [compute_router_z_loss(routing) for routing in routings]
    return torch.stack(balance_losses).mean(), torch.stack(z_losses).mean()


@torch.no_grad()
def _scale(tensors: list[Tensor], factor: float) -> None:
    if factor < 1.0:
        torch._foreach_mul_(tensors, factor)
