"""The record that models and losses receive. Knows nothing of files, tokenizers or ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesys.kernels.cross_entropy.target import IGNORED_TARGET


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what each should predict; every tensor is int64 of shape ``[B, S]``."""

    token_ids_BS: torch.Tensor
    """The input tokens."""
    target_ids_BS: torch.Tensor
    """The token that follows each input, or ``IGNORED_TARGET``."""
    document_ids_BS: torch.Tensor
    """0, 1, 2… within the row, rising by one where a document starts; tokens attend within equal ids."""
    positions_BS: torch.Tensor
    """Distance from the start of the document, or of the row where the document began in an earlier one."""

    @property
    def num_targets(self) -> int:
        """Positions that are scored."""
        return int((self.target_ids_BS != IGNORED_TARGET).sum())

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        return Batch(
            self.token_ids_BS.to(device),
            self.target_ids_BS.to(device),
            self.document_ids_BS.to(device),
            self.positions_BS.to(device),
        )
