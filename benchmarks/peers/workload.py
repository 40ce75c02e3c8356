"""What is trained in a step: the network's shape, its arithmetic, and packed random documents.

Every system gets the same tokens, drawn from a seed. Tokens are uniform, so that a fresh router spreads them
about evenly, as a balanced one does; what imbalance costs is another benchmark's question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A decoder of SwiGLU experts, and the batch of one step."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_experts: int
    top_k: int
    expert_size: int
    vocab_size: int = 4096
    sequence_length: int = 256
    num_sequences: int = 8

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Tokens per step."""
        return self.num_sequences * self.sequence_length

    @property
    def active_weights(self) -> int:
        """Matrix weights that a token is multiplied with: attention, router, its experts, the head."""
        attention = 4 * self.hidden_size**2
        router = self.hidden_size * self.num_experts
        experts = self.top_k * 3 * self.hidden_size * self.expert_size
        return self.num_layers * (attention + router + experts) + self.vocab_size * self.hidden_size

    @property
    def flops_per_token(self) -> int:
        """Forward and backward: 6 x active weights + 6 x layers x hidden x sequence length.

        A weight costs one multiplication and one addition forwards and twice that backwards. The second term
        is causal attention's two products, half of the full square; shorter documents are not subtracted.
        """
        attention = 6 * self.num_layers * self.hidden_size * self.sequence_length
        return 6 * self.active_weights + attention


@dataclass(frozen=True)
class Batch:
    """Packed sequences [B, S] (int64): tokens, what follows each, and its document within the sequence."""

    tokens_BS: Tensor
    targets_BS: Tensor
    documents_BS: Tensor
    positions_BS: Tensor
    """Each token's distance from the start of its document."""
    mask_B1SS: Tensor
    """True where a query (dim 2) may see a key (dim 3): not later, and in the same document."""


def draw_batches(shape: Shape, num_batches: int, seed: int) -> list[Batch]:
    """Batches of uniform tokens: a stream of documents of 64 to 1024 tokens, cut into sequences as packing does."""
    generator = torch.Generator().manual_seed(seed)
    return [_draw_batch(shape, generator) for _ in range(num_batches)]


def _draw_batch(shape: Shape, generator: torch.Generator) -> Batch:
    S = shape.sequence_length
    tokens = torch.randint(shape.vocab_size, (shape.num_sequences, S + 1), generator=generator)
    documents_BS = _draw_documents(shape.num_sequences * S, generator).view(shape.num_sequences, S)
    same_document_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    first_BS = same_document_BSS.int().argmax(dim=-1)
    causal_SS = torch.ones(S, S, dtype=torch.bool).tril()
    return Batch(
        tokens_BS=tokens[:, :-1].contiguous(),
        targets_BS=tokens[:, 1:].contiguous(),
        documents_BS=documents_BS,
        positions_BS=torch.arange(S) - first_BS,
        mask_B1SS=(same_document_BSS & causal_SS)[:, None],
    )


def _draw_documents(num_tokens: int, generator: torch.Generator) -> Tensor:
    """The document of each token of a stream, from 0 up."""
    lengths = torch.randint(64, 1025, (num_tokens // 64 + 1,), generator=generator)
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[:num_tokens]
