"""How a model's weights are cut into tensors and files: what a user may choose beside the numbers themselves."""

from __future__ import annotations

from dataclasses import dataclass

from moesys.checkpoint.model_writer import DEFAULT_SHARD_BYTES
from moesys.models import DecoderConfig, ExpertStorage, Family, choose_family


@dataclass(frozen=True)
class StorageForm:
    """Of an export.

    max_shard_bytes:  of the weights in one file, unless a single tensor is larger.
    experts:          whether each expert has tensors of its own; None for what the family's published models do.
    """

    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    experts: ExpertStorage | None = None

    def arrange(self, config: DecoderConfig, family: Family | None = None) -> Family:
        """Returns the family that writes a model in this form; None stands for the first that holds the model.

        Raises `ModelFormatError` where no family holds it, or the family has no such layout.
        """
        family = choose_family(config) if family is None else family
        return family if self.experts is None else family.with_experts(self.experts)


AS_PUBLISHED = StorageForm()
"""What an export is written as unless somebody chooses."""
