"""Where NaN or Inf began, for the message of a run that has to stop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moesys.data import Batch
from moesys.models import Decoder, DocumentAttend
from moesys.moe import Execution


@torch.no_grad()
def find_first_nonfinite(model: Decoder, batches: Iterable[Batch], execution: Execution) -> str:
    """Runs the micro-batches of a step forward and names the first place with NaN or Inf, such as
    ``layer 2, feed_forward``."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name}"
    for batch in batches:
        place = _find_in_forward(model, batch, execution)
        if place is not None:
            return place
    return "the backward pass (every activation of the forward pass is finite)"


def _find_in_forward(model: Decoder, batch: Batch, execution: Execution) -> str | None:
    found: list[str] = []
    places: dict[nn.Module, str] = {model.embedding: "the embedding", model.final_norm: "the final norm"}
    for layer_id, block in enumerate(model.blocks):
        places |= {child: f"layer {layer_id}, {name}" for name, child in block.named_children()}

    def check(module: nn.Module, args: Any, output: Any) -> None:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        if not found and not torch.isfinite(tensor).all():
            found.append(places[module])

    handles = [module.register_forward_hook(check) for module in places]
    try:
        output = model(
            batch.token_ids_BS, batch.positions_BS, DocumentAttend(batch.document_ids_BS), execution
        )
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    if not torch.isfinite(model.compute_logits(output.hidden_BSD)).all():
        return "the output head"
    return None
