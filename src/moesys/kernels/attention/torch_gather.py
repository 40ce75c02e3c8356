"""Attention over pages by torch, on every device: a query's keys and values are gathered, then multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from moesys.kernels.attention.page_table import PageTable


def attend_pages(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor | None,
    table: PageTable,
    scale: float,
    value_size: int,
    sliding_window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """See `moesys.kernels.attention.api.attend_pages`."""
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    num_queries, num_heads, key_size = q_THD.shape
    q_TKGD = (q_THD.to(wide) * scale).view(num_queries, keys.shape[1], -1, key_size)
    outputs: list[Tensor] = []
    for q_KGD, rows in zip(q_TKGD, table.list_rows(sliding_window), strict=True):
        keys_KSD = keys[rows].to(wide).transpose(0, 1)
        values_KSD = keys_KSD[..., :value_size] if values is None else values[rows].to(wide).transpose(0, 1)
        scores_KGS = torch.bmm(q_KGD, keys_KSD.transpose(1, 2))
        if sinks_H is not None:
            scores_KGS = torch.cat([scores_KGS, sinks_H.to(wide).view(*scores_KGS.shape[:2], 1)], dim=2)
        weights_KGS = scores_KGS.softmax(dim=2)[..., : rows.shape[0]]
        outputs.append(torch.bmm(weights_KGS, values_KSD).flatten(0, 1))
    return torch.stack(outputs).to(q_THD.dtype) if outputs else q_THD.new_empty(0, num_heads, value_size)
