"""Held-out loss and bits per byte, the figure that tokenizers cannot flatter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moesys.config import DataConfig
from moesys.data import HeldoutSet, Tokenizer, heldout_windows, pack_source
from moesys.kernels import linear_cross_entropy
from moesys.models import Decoder, DocumentAttend
from moesys.moe import Execution

_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Evaluation:
    """Cross entropy on held-out documents, each seen alone."""

    loss: float
    """Nats per target token."""
    bits_per_byte: float
    """Total information content of the targets over the UTF-8 bytes of the documents."""
    num_targets: int
    num_bytes: int


@torch.no_grad()
def evaluate(
    model: Decoder,
    heldout: HeldoutSet,
    execution: Execution,
    loss_chunk_tokens: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Scores every target of the set once. ``on_progress`` gets (batches done, batches)."""
    device = model.embedding.weight.device
    total = 0.0
    for done, held in enumerate(heldout.batches):
        batch = held.to(device)
        output = model(
            batch.token_ids_BS, batch.positions_BS, DocumentAttend(batch.document_ids_BS), execution
        )
        hidden_TD, weight_VD = model.prepare_loss(output.hidden_BSD.flatten(0, 1))
        total += linear_cross_entropy(
            hidden_TD, weight_VD, batch.target_ids_BS.flatten(), loss_chunk_tokens
        ).item()
        on_progress(done + 1, len(heldout.batches))
    return Evaluation(
        loss=total / heldout.num_targets,
        bits_per_byte=total / math.log(2) / heldout.num_bytes,
        num_targets=heldout.num_targets,
        num_bytes=heldout.num_bytes,
    )


def evaluate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    data: DataConfig,
    heldout_fraction: float | None,
    stride: int | None,
    max_tokens: int | None,
    cache_dir: Path,
) -> Evaluation:
    """Scores the documents of a source, or the answers of its conversations.

    data: of which source, format, text field and what is about chats are read.
    heldout_fraction: score only the documents that training with this fraction holds out; None scores all.
    stride: tokens by which windows advance, None for half the context. max_tokens: None scores everything.
    """
    length = model.config.position_limit
    packed = pack_source(data, tokenizer, heldout_fraction, cache_dir)
    heldout = heldout_windows(packed, length, max(1, length // 2) if stride is None else stride, max_tokens)
    return evaluate(model, heldout, model.make_resident_execution(), _CHUNK_TOKENS)
