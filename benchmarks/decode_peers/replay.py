"""Recorded choices instead of a router's, handed to the layers of any model through the tape of its `Execution`.

The layers are asked in order, once each per step; weights of the chosen experts are still the router's own.
"""

from __future__ import annotations

import torch

from moesys.moe import Choice, Routing, RoutingTape
from moesys.moe.routing_log import RoutingLog
from moesys.moe.tape import Decision


class ReplayTape(RoutingTape):
    """Gives token after token of a log to the sequences of a batch, each of which has its own stretch of the log."""

    def __init__(self, log: RoutingLog, num_layers: int, batch: int) -> None:
        """num_layers: of the model, all with experts; they take the layers of the log in order, from the first again
        where the log has fewer."""
        super().__init__()
        recorded = log.layer_ids
        self._tables = [log.expert_ids[recorded[i % len(recorded)]].long() for i in range(num_layers)]
        self._stretch = log.num_tokens // batch
        self._batch = batch
        self._token = self._layer = 0
        self._num_tokens = 0

    def plan(self, tokens_per_sequence: int) -> None:
        """Says how many tokens of each sequence the next step brings."""
        self._token, self._num_tokens = self._token + self._num_tokens, tokens_per_sequence
        self._layer = 0

    @property
    def replayed(self) -> Decision:
        """What the layer whose turn it is does."""
        first = torch.arange(self._batch)[:, None] * self._stretch + self._token
        rows = (first + torch.arange(self._num_tokens)).flatten() % self._tables[0].shape[0]
        return Decision(Choice.from_table(self._tables[self._layer][rows]), None)

    def record(self, routing: Routing) -> None:
        """Goes on to the next layer."""
        self._layer += 1
