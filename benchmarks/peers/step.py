"""The training step that all peers share: loss, balance loss, clipped gradients, fused AdamW.

It knows a network only as a module from (tokens, mask) to (logits, balance loss).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peers.workload import Batch

LEARNING_RATE = 1e-3
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
LARGEST_GRADIENT_NORM = 1.0
BALANCE_COEFFICIENT = 0.01


class PlainTrainee:
    """A torch module trained as its users would: optional autocast around the forward pass, fp32 weights."""

    def __init__(self, network: nn.Module, arithmetic: str) -> None:
        self.network = network.train()
        self._autocast = arithmetic == "bf16"
        self._optimizer = torch.optim.AdamW(
            network.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, batch: Batch) -> float:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            logits_BSV, balance_loss = self.network(batch.tokens_BS, batch.mask_B1SS)
            loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), batch.targets_BS.flatten())
        (loss + BALANCE_COEFFICIENT * balance_loss).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT_NORM)
        self._optimizer.step()
        return loss.item()

    def count_dropped(self) -> float | None:
        return None
