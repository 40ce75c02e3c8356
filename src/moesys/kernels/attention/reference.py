"""The specification of attention over pages: query by query and head by head, in plain torch. Works in float64."""

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
    group = q_THD.shape[1] // keys.shape[1]
    y_THD = q_THD.new_empty(*q_THD.shape[:2], value_size)
    for query, rows in enumerate(table.list_rows(sliding_window)):
        for head in range(q_THD.shape[1]):
            keys_SD = keys[rows, head // group].to(wide)
            values_SD = keys_SD[:, :value_size] if values is None else values[rows, head // group].to(wide)
            scores_S = keys_SD @ (q_THD[query, head].to(wide) * scale)
            if sinks_H is not None:
                scores_S = torch.cat([scores_S, sinks_H[head : head + 1].to(wide)])
            y_THD[query, head] = scores_S.softmax(0)[: rows.shape[0]] @ values_SD
    return y_THD
